/** What a user behind a real Envoy sees, with the configuration that docs/envoy.md shows. */
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { heartbeats } from '../support/device.ts'
import { eventually, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { startEnvoy } from '../support/envoy.ts'
import { findProgram } from '../support/find-program.ts'
import { healthy } from '../support/healthy.ts'
import { proxyIdentity } from '../support/proxy-identity.ts'

/** Skipped where there is no Envoy: `.ci/tools` brings it, or name it in ENVOY. */
const proxied = findProgram('envoy') ? test : test.skip
if (!findProgram('envoy')) test.skip('envoy is not on this machine: run .ci/tools, or name it in ENVOY', t => t.pass())

async function start(t: ExecutionContext, edit?: (yaml: string) => string) {
  const mesh = await startEdgeMesh(t)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  const [alpha, beta] = [await mesh.enroll({ device: { id: 'alpha' } }), await mesh.enroll({ device: { id: 'beta' } })]
  const service = await proxyIdentity(mesh)
  const envoy = await startEnvoy(t, { server: mesh.server.apiPort, service, ...(edit && { edit }) })
  await heartbeats(t, mesh, alpha).beat(healthy)
  return { mesh, alpha, beta, envoy }
}

const asAda = { 'x-edgemesh-user': 'ada' }
const codes = (body: string) => JSON.parse(body).reasons.map(({ code }: { code: string }) => code)

proxied('a healthy device reaches the service through Envoy, and the service reads what was decided', async t => {
  const { mesh, alpha, envoy } = await start(t)
  const answer = await envoy.get(alpha, asAda)
  t.deepEqual([answer.status, answer.body], [200, 'payroll'])
  const [headers] = envoy.reached
  t.is(headers?.['x-edgemesh-device'], 'alpha')
  const id = String(headers?.['x-edgemesh-decision-id'])
  const { rows } = await mesh.pool.query(
    'select device_id, caller, questions, policy_revision from decisions where id = $1',
    [id.replace(/\.0$/, '')],
  )
  t.is(rows[0]?.device_id, 'alpha')
  t.is(rows[0]?.caller, 'spiffe://edgemesh.local/service/edge-proxy')
  t.true(rows[0]?.questions[0].allow)
  t.is(headers?.['x-edgemesh-policy-revision'], rows[0]?.policy_revision)
})

proxied('a device that is not healthy is answered 403 with the reasons, and does not reach the service', async t => {
  const { beta, envoy } = await start(t)
  const answer = await envoy.get(beta, asAda)
  t.is(answer.status, 403)
  t.is(answer.headers['content-type'], 'application/json')
  t.deepEqual(codes(answer.body), ['HEALTH_UNKNOWN'])
  t.is(answer.headers['x-edgemesh-decision-id'], JSON.parse(answer.body).decisionId)
  t.deepEqual(envoy.reached, [])
})

proxied('what a client says of its certificate and of decisions is not believed, nor passed on', async t => {
  const { alpha, beta, envoy } = await start(t)
  const claim = 'Hash=00;URI=spiffe://edgemesh.local/device/alpha'
  t.deepEqual(codes((await envoy.get(beta, { ...asAda, 'x-forwarded-client-cert': claim })).body), ['HEALTH_UNKNOWN'])
  t.deepEqual(envoy.reached, [])
  const forged = { 'x-edgemesh-decision-id': 'mine', 'x-edgemesh-device': 'gamma', 'x-edgemesh-admin': 'yes' }
  t.is((await envoy.get(alpha, { ...asAda, ...forged })).status, 200)
  const [headers] = envoy.reached
  t.is(headers?.['x-edgemesh-device'], 'alpha')
  t.not(headers?.['x-edgemesh-decision-id'], 'mine')
  t.is(headers?.['x-edgemesh-admin'], undefined)
})

for (const [what, edit] of [
  ['passes on what clients say', (yaml: string) => yaml.replace('SANITIZE_SET', 'ALWAYS_FORWARD_ONLY')],
  [
    'passes on what clients say, and does not show us certificates',
    (yaml: string) => yaml.replace('SANITIZE_SET', 'ALWAYS_FORWARD_ONLY').replace('include_peer_certificate: true', ''),
  ],
] as const) {
  proxied(`a device can not pass for another where Envoy ${what}`, async t => {
    const { alpha, beta, envoy } = await start(t, edit)
    const claim = `Hash=00;URI=spiffe://edgemesh.local/device/alpha`
    const answer = await envoy.get(beta, { ...asAda, 'x-forwarded-client-cert': claim })
    t.is(answer.status, 403)
    t.deepEqual(codes(answer.body), ['FORWARDED_CERTIFICATE_MISMATCH'])
    t.is((await envoy.get(alpha, { ...asAda, 'x-forwarded-client-cert': `${claim};` })).status, 403)
    t.deepEqual(envoy.reached, [])
  })
}

proxied('where Envoy appends to what clients say, its own word counts, and no open quote swallows it', async t => {
  const edit = (yaml: string) =>
    yaml.replace('SANITIZE_SET', 'APPEND_FORWARD').replace('include_peer_certificate: true', '')
  const { alpha, beta, envoy } = await start(t, edit)
  const claim = 'Hash=00;URI=spiffe://edgemesh.local/device/alpha'
  t.deepEqual(codes((await envoy.get(beta, { ...asAda, 'x-forwarded-client-cert': claim })).body), ['HEALTH_UNKNOWN'])
  t.is((await envoy.get(alpha, { ...asAda, 'x-forwarded-client-cert': claim })).status, 200)
  const swallowing = await envoy.get(beta, { ...asAda, 'x-forwarded-client-cert': `${claim};Subject="` })
  t.deepEqual(codes(swallowing.body), ['FORWARDED_CERTIFICATE_MALFORMED'])
})

proxied('without include_peer_certificate, the hash that Envoy forwards tells the certificate', async t => {
  const { alpha, envoy } = await start(t, yaml => yaml.replace('include_peer_certificate: true', ''))
  t.is((await envoy.get(alpha, asAda)).status, 200)
})

proxied('a device that is revoked is refused on the connection that it has open', async t => {
  const { mesh, alpha, envoy } = await start(t)
  t.is((await envoy.get(alpha, asAda)).status, 200)
  await unary(mesh.admin, 'revokeDevice', { id: 'alpha', reason: 'stolen' })
  const refused = await eventually('the device is refused', async () => {
    const answer = await envoy.get(alpha, asAda)
    return answer.status !== 200 && answer
  })
  t.is(refused.status, 403)
  t.deepEqual(codes(refused.body), ['DEVICE_REVOKED'])
})

proxied('while no EdgeMesh answers, nothing passes, and 503 tells that from a denial', async t => {
  const { mesh, alpha, envoy } = await start(t)
  t.is((await envoy.get(alpha, asAda)).status, 200)
  await mesh.server.stop()
  t.is((await envoy.get(alpha, asAda)).status, 503)
  t.is(envoy.reached.length, 1)
})

proxied('who shows no certificate is turned away by Envoy before anything is asked', async t => {
  const { mesh, envoy } = await start(t)
  await t.throwsAsync(envoy.get({}, asAda))
  const { rows } = await mesh.pool.query("select 1 from audit_events where method like '/envoy%'")
  t.deepEqual(rows, [])
})
