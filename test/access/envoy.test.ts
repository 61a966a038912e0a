/** What a proxy is answered, whatever it or its clients send. */
import { X509Certificate } from 'node:crypto'
import { credentials as grpcCredentials } from '@grpc/grpc-js'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import {
  AuthorizationClient,
  CheckRequest,
  type CheckResponse,
  type DeniedHttpResponse,
} from '../../src/gen/envoy/service/auth/v3/external_auth.ts'
import { specialLeaves } from '../support/authority.ts'
import { heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  refused,
  shared,
  startEdgeMesh,
  startSecondInstance,
  type TestDevice,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { proxyIdentity } from '../support/proxy-identity.ts'

const furnished = shared(test, async file => {
  const mesh = await startEdgeMesh(file)
  await furnish(mesh)
  const [alpha, beta] = [await mesh.enroll({ device: { id: 'alpha' } }), await mesh.enroll({ device: { id: 'beta' } })]
  await heartbeats(file, mesh, alpha).beat(healthy)
  const proxy = await proxyIdentity(mesh)
  return { mesh, alpha, beta, proxy, envoy: authorization(file, mesh, proxy) }
})

async function furnish({ admin }: EdgeMesh): Promise<void> {
  await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
}

function authorization(t: ExecutionContext, mesh: EdgeMesh, who: Credentials): AuthorizationClient {
  const pem = (text: string | undefined) => (text ? Buffer.from(text) : null)
  const channel = grpcCredentials.createSsl(Buffer.from(who.rootsPem), pem(who.keyPem), pem(who.certificatePem))
  const client = new AuthorizationClient(`127.0.0.1:${mesh.server.apiPort}`, channel, {
    'grpc.ssl_target_name_override': 'localhost',
    'grpc.default_authority': 'localhost',
  })
  t.teardown(() => client.close())
  return client
}

type Asking = {
  principal?: string
  certificate?: string
  headers?: Record<string, string>
  host?: string
  contextExtensions?: Record<string, string>
}

const principalOf = (id: string) => `spiffe://edgemesh.local/device/${id}`
const fingerprint = ({ certificatePem }: TestDevice) =>
  new X509Certificate(certificatePem).fingerprint256.replaceAll(':', '').toLowerCase()
/** As Envoy's `include_peer_certificate` has it. */
const escaped = ({ certificatePem }: { certificatePem: string }) =>
  encodeURIComponent(new X509Certificate(certificatePem).toString())

/** Alpha's request as a proxy that is configured well tells it, but for what is given. */
function asking(given: Asking = {}): CheckRequest {
  const { alpha } = furnished()
  const {
    principal = principalOf('alpha'),
    certificate = escaped(alpha),
    host = '',
    headers,
    contextExtensions,
  } = given
  return CheckRequest.fromPartial({
    attributes: {
      source: { principal, certificate },
      request: { http: { host, headers: headers ?? { 'x-edgemesh-user': 'ada' } } },
      contextExtensions: contextExtensions ?? { 'edgemesh.service': 'payroll' },
    },
  })
}

function denied({ status, httpResponse }: CheckResponse): DeniedHttpResponse & { codes: string[] } {
  if (httpResponse?.$case !== 'deniedResponse') throw new Error('it was not denied')
  if (status?.code !== 7) throw new Error(`a denial with status ${status?.code}`)
  const codes = JSON.parse(httpResponse.value.body).reasons.map(({ code }: { code: string }) => code)
  return { ...httpResponse.value, codes }
}

const isAllowed = ({ status, httpResponse }: CheckResponse) =>
  status?.code === 0 && httpResponse?.$case === 'okResponse'

test('the service is the one of the route, else the host without its port', async t => {
  const { envoy } = furnished()
  t.true(isAllowed(await unary(envoy, 'check', asking())))
  for (const host of ['payroll', 'payroll:8443', 'Payroll']) {
    t.true(isAllowed(await unary(envoy, 'check', asking({ host, contextExtensions: {} }))), host)
  }
  t.deepEqual(denied(await unary(envoy, 'check', asking({ host: '[::1]:80', contextExtensions: {} }))).codes, [
    'SERVICE_UNKNOWN',
  ])
  // The route has the last word.
  const elsewhere = { host: 'payroll', contextExtensions: { 'edgemesh.service': 'orders' } }
  t.deepEqual(denied(await unary(envoy, 'check', asking(elsewhere))).codes, ['SERVICE_UNKNOWN'])
})

test('the route may name the action, and the header that the user stands in', async t => {
  const { envoy, mesh } = furnished()
  const contextExtensions = {
    'edgemesh.service': 'payroll',
    'edgemesh.action': 'read',
    'edgemesh.user-header': 'x-user',
  }
  const headers = { 'x-user': 'ada@example.com', 'x-edgemesh-user': 'nobody' }
  const response = await unary(envoy, 'check', asking({ contextExtensions, headers }))
  const ok = response.httpResponse?.$case === 'okResponse' ? response.httpResponse.value : undefined
  t.deepEqual(ok?.headersToRemove, ['x-edgemesh-user'])
  const id = ok?.headers.find(({ header }) => header?.key === 'x-edgemesh-decision-id')?.header?.value ?? ''
  const { rows } = await mesh.pool.query('select questions from decisions where id = $1', [id.replace(/\.0$/, '')])
  const { user, service, action } = rows[0]?.questions[0] ?? {}
  t.deepEqual({ user, service, action }, { user: 'ada@example.com', service: 'payroll', action: 'read' })
})

/** Whatever a client can bring about is a denial: an error might let it pass. */
const clientsDoing: Record<string, [() => Asking, string]> = {
  'no client certificate': [() => ({ principal: '', certificate: '' }), 'CLIENT_CERTIFICATE_MISSING'],
  'the certificate of an operator': [
    () => ({ principal: 'spiffe://edgemesh.local/operator/ada' }),
    'CLIENT_NOT_A_DEVICE',
  ],
  'a device of another domain': [() => ({ principal: 'spiffe://evil.local/device/alpha' }), 'CLIENT_NOT_A_DEVICE'],
  'a subject instead of a SPIFFE ID': [() => ({ principal: 'CN=alpha' }), 'CLIENT_NOT_A_DEVICE'],
  'a device that there is not': [() => ({ principal: principalOf('gamma') }), 'CERTIFICATE_UNKNOWN'],
  "another device's certificate": [() => ({ certificate: escaped(furnished().beta) }), 'CERTIFICATE_UNKNOWN'],
  'a certificate that is none': [() => ({ certificate: '%%%' }), 'CLIENT_CERTIFICATE_MALFORMED'],
  'nothing that tells the certificate': [() => ({ certificate: '' }), 'CLIENT_CERTIFICATE_UNKNOWN'],
  'no user': [() => ({ headers: {} }), 'INVALID_FIELD'],
  'a user longer than any': [() => ({ headers: { 'x-edgemesh-user': 'a'.repeat(300) } }), 'INVALID_FIELD'],
  'no host where the route names no service': [() => ({ contextExtensions: {} }), 'INVALID_FIELD'],
}

for (const [what, [given, code]] of Object.entries(clientsDoing)) {
  test(`a request with ${what} is denied as ${code}, and that is on record`, async t => {
    const { envoy, mesh } = furnished()
    const answer = denied(await unary(envoy, 'check', asking(given())))
    t.deepEqual(answer.codes, [code])
    t.is(answer.status?.code, 403)
    const { rows } = await mesh.pool.query("select 1 from audit_events where reason = $1 and method like '/envoy.%'", [
      code,
    ])
    t.true(rows.length > 0)
  })
}

const headersSaying: Record<string, [() => string, string | undefined]> = {
  'the same device and certificate': [
    () => `Hash=${fingerprint(furnished().alpha)};URI=${principalOf('alpha')}`,
    undefined,
  ],
  'the same certificate and no URI': [() => `Hash=${fingerprint(furnished().alpha).toUpperCase()}`, undefined],
  'another device before that': [
    () => `Hash=00;URI=${principalOf('beta')},Hash=${fingerprint(furnished().alpha)};URI=${principalOf('alpha')}`,
    undefined,
  ],
  'another device': [
    () => `Hash=${fingerprint(furnished().beta)};URI=${principalOf('beta')}`,
    'FORWARDED_CERTIFICATE_MISMATCH',
  ],
  'another device last': [
    () => `Hash=${fingerprint(furnished().alpha)};URI=${principalOf('alpha')},Hash=00;URI=${principalOf('beta')}`,
    'FORWARDED_CERTIFICATE_MISMATCH',
  ],
  "another device's certificate": [
    () => `Hash=${fingerprint(furnished().beta)};URI=${principalOf('alpha')}`,
    'CERTIFICATE_UNKNOWN',
  ],
  'two devices at once': [
    () => `Hash=${fingerprint(furnished().alpha)};URI=${principalOf('alpha')};URI=${principalOf('beta')}`,
    'FORWARDED_CERTIFICATE_MISMATCH',
  ],
  'nothing that can be read': [() => `Hash=${fingerprint(furnished().alpha)};URI="`, 'FORWARDED_CERTIFICATE_MALFORMED'],
}

for (const [what, [header, code]] of Object.entries(headersSaying)) {
  test(`where x-forwarded-client-cert tells of ${what}, the answer is ${code ?? 'an allow'}`, async t => {
    const headers = { 'x-edgemesh-user': 'ada', 'x-forwarded-client-cert': header() }
    const answer = await unary(furnished().envoy, 'check', asking({ certificate: '', headers }))
    if (code) t.deepEqual(denied(answer).codes, [code])
    else t.true(isAllowed(answer))
  })
}

test('what is wrong with the configuration of a proxy is an error that names the field', async t => {
  const { envoy } = furnished()
  for (const [name, value] of [
    ['edgemesh.service', 'Pay Roll'],
    ['edgemesh.action', 'read everything'],
    ['edgemesh.user-header', 'X User'],
  ] as const) {
    const refusal = await refused(unary(envoy, 'check', asking({ contextExtensions: { [name]: value } })))
    t.is(refusal.code, 'INVALID_ARGUMENT')
    t.deepEqual(refusal.fields, [`attributes.context_extensions["${name}"]`])
  }
  const { fields, message } = await refused(unary(envoy, 'check', CheckRequest.fromPartial({ attributes: {} })))
  t.deepEqual(fields, ['attributes.request.http'])
  t.regex(message, /envoy\.filters\.http\.ext_authz/)
})

test('a device that asks by itself is asked about itself, whatever it says', async t => {
  const { mesh, alpha, beta } = furnished()
  t.true(isAllowed(await unary(authorization(t, mesh, alpha), 'check', asking({ principal: '', certificate: '' }))))
  // Beta tells alpha's certificate, as only a trusted proxy may.
  t.deepEqual(denied(await unary(authorization(t, mesh, beta), 'check', asking())).codes, ['HEALTH_UNKNOWN'])
})

test('operators and strangers may not ask as proxies do', async t => {
  const { mesh } = furnished()
  const { code, reason } = await refused(unary(authorization(t, mesh, mesh.operator), 'check', asking()))
  t.deepEqual([code, reason], ['PERMISSION_DENIED', 'WRONG_CALLER'])
  const stranger = await refused(unary(authorization(t, mesh, mesh.anonymous), 'check', asking()))
  t.deepEqual([stranger.code, stranger.reason], ['UNAUTHENTICATED', 'CERTIFICATE_MISSING'])
})

test('of two certificates of a device, the one that was revoked is denied and the other is not', async t => {
  const { mesh, envoy, alpha } = furnished()
  const leaf = await specialLeaves(mesh)
  const lost = await leaf({ spiffeId: principalOf('alpha'), recordedFor: 'alpha' })
  t.true(isAllowed(await unary(envoy, 'check', asking({ certificate: escaped(lost) }))))
  await mesh.pool.query(
    "update certificates set revoked_at = now(), revocation_reason = 'keyCompromise' where serial = $1",
    [lost.serial],
  )
  await mesh.pool.query("select pg_notify('edgemesh_changes', 'device:alpha')")
  await eventually('the lost certificate is denied', async () => {
    const answer = await unary(envoy, 'check', asking({ certificate: escaped(lost) }))
    return !isAllowed(answer) && t.deepEqual(denied(answer).codes, ['CERTIFICATE_REVOKED'])
  })
  t.true(isAllowed(await unary(envoy, 'check', asking({ certificate: escaped(alpha) }))))
})

test('a certificate that has expired while its connection was open is denied', async t => {
  const { mesh, envoy } = furnished()
  const leaf = await specialLeaves(mesh)
  const old = await leaf({ spiffeId: principalOf('alpha'), recordedFor: 'alpha', validForMs: -1_000 })
  t.deepEqual(denied(await unary(envoy, 'check', asking({ certificate: escaped(old) }))).codes, ['CERTIFICATE_EXPIRED'])
})

test('each device behind a proxy has the limit of its own, and is told with 429 when to come back', async t => {
  const mesh = await startEdgeMesh(t, { RATE_LIMIT_CONNECTIONS: '2/hour' })
  await furnish(mesh)
  const envoy = authorization(t, mesh, await proxyIdentity(mesh))
  const [one, two] = [await mesh.enroll({ device: { id: 'one' } }), await mesh.enroll({ device: { id: 'two' } })]
  const ask = (id: string, device: TestDevice) =>
    unary(envoy, 'check', asking({ principal: principalOf(id), certificate: escaped(device) }))
  for (let asked = 0; asked < 2; asked++) t.is(denied(await ask('one', one)).status?.code, 403)
  const limited = denied(await ask('one', one))
  t.is(limited.status?.code, 429)
  t.deepEqual(limited.codes, ['RATE_LIMITED'])
  t.regex(limited.headers.find(({ header }) => header?.key === 'retry-after')?.header?.value ?? '', /^[1-9]\d*$/)
  t.is(denied(await ask('two', two)).status?.code, 403)
})

test('where policy can not be asked, the answer is an error and not a decision', async t => {
  const { mesh, proxy } = furnished()
  const blind = await startSecondInstance(t, mesh, { OPA_URL: 'http://127.0.0.1:9', OPA_TIMEOUT: '1' })
  const { code, reason } = await refused(unary(authorization(t, blind, proxy), 'check', asking()))
  t.deepEqual([code, reason], ['UNAVAILABLE', 'POLICY_UNAVAILABLE'])
})

test('decisions for proxies are counted with the others', async t => {
  const { mesh, envoy } = furnished()
  const allowed = async () => {
    const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
    return Number(/edgemesh_authorization_decisions_total\{decision="allow"\} (\d+)/.exec(text)?.[1])
  }
  const before = await allowed()
  await unary(envoy, 'check', asking())
  t.true((await allowed()) > before)
})
