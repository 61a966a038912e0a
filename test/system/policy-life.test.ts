import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { json } from 'node:stream/consumers'
import test, { type ExecutionContext } from 'ava'
import { authorizations, heartbeats } from '../support/device.ts'
import { eventually, startEdgeMesh, startSecondInstance, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa } from '../support/opa.ts'
import { changedBundle, emptyFolder, putBundle, shippedAs } from '../support/policies.ts'

const testWithOpa = findOpa() === undefined ? test.skip : test

const telemetry = async (mesh: { server: { metricsPort: number } }, path: string) =>
  (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}${path}`)).text()

/** Two instances, each with a folder of its own that holds the shipped policy as `v1`, and a healthy device at each. */
async function twoInstances(t: ExecutionContext) {
  const folders = [emptyFolder(t), emptyFolder(t)] as const
  for (const folder of folders) await putBundle(folder, await shippedAs('v1'))
  const first = await startEdgeMesh(t, { POLICY_BUNDLE_DIR: folders[0] })
  const second = await startSecondInstance(t, first, { POLICY_BUNDLE_DIR: folders[1] })
  await unary(first.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(first.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const meshes = [first, second] as const
  const devices = await Promise.all(
    meshes.map(async mesh => {
      const device = await mesh.enroll()
      await heartbeats(t, mesh, device).beat(healthy)
      return { device, access: authorizations(t, mesh, device) }
    }),
  )
  return { folders, meshes, devices }
}

testWithOpa('a policy put into the folders takes open connections back at both instances (needs opa)', async t => {
  const { folders, meshes, devices } = await twoInstances(t)
  const answers = await Promise.all(devices.map(({ access }) => access.ask('ada', 'payroll')))
  t.deepEqual(
    answers.map(({ allowed, policyRevision }) => ({ allowed, policyRevision })),
    [
      { allowed: true, policyRevision: 'v1' },
      { allowed: true, policyRevision: 'v1' },
    ],
  )

  for (const mesh of meshes) t.regex(await telemetry(mesh, '/metrics'), /edgemesh_policy_revision\{revision="v1"/)

  const { archive, revision } = changedBundle(t, ['input.user.status == "active"', 'input.user.status == "nobody"'])
  for (const folder of folders) await putBundle(folder, archive)
  for (const [at, { access, device }] of devices.entries()) {
    const taken = await access.revocationOf(answers[at]?.connectionId ?? '')
    t.is(taken.policyRevision, revision)
    t.deepEqual(
      taken.reasons.map(({ code }) => code),
      ['USER_DISABLED'],
    )
    // What was kept in memory is of no more use.
    const again = await access.ask('ada', 'payroll')
    t.like(again, { allowed: false, policyRevision: revision })
    const mesh = meshes[at as 0 | 1]
    const { decision } = await unary(mesh.admin, 'getDecision', { id: taken.decisionId, explain: false })
    t.is(decision?.policyRevision, revision)
    const state = await unary(mesh.admin, 'getPolicyState', {})
    t.like(state, { revision, engine: 'in-process', instanceId: mesh.server.instanceId, refused: undefined })
    t.true((state.checkedAt as Date) >= (state.activatedAt as Date))
    const metrics = await telemetry(mesh, '/metrics')
    t.true(metrics.includes(`edgemesh_policy_revision{revision="${revision}",engine="in-process"} 1`), metrics)
    t.true(metrics.includes('edgemesh_policy_revision{revision="v1",engine="in-process"} 0'), metrics)
    t.regex(metrics, /^edgemesh_policy_refused 0$/m)
    t.truthy(device)
  }
})

test("a broken policy is told by readiness, metrics and the operator's tools of that instance, which goes on", async t => {
  const { folders, meshes, devices } = await twoInstances(t)
  await putBundle(folders[1], Buffer.from('no archive'))
  const [first, second] = meshes
  await eventually('it is refused', async () => (await unary(second.admin, 'getPolicyState', {})).refused)
  const { refused, revision } = await unary(second.admin, 'getPolicyState', {})
  t.is(revision, 'v1')
  t.regex(refused?.problem ?? '', /is no whole archive/)
  t.truthy(refused?.hint)
  t.truthy(refused?.since)
  const ready = JSON.parse(await telemetry(second, '/readyz'))
  t.true(ready.ready)
  t.regex(ready.checks.policy.detail, /^v1; refused: .* is no whole archive/)
  const metrics = await telemetry(second, '/metrics')
  t.regex(metrics, /^edgemesh_policy_refused 1$/m)
  t.regex(metrics, /^edgemesh_policy_refusals_total 1$/m)
  t.regex(metrics, /^edgemesh_policy_activated_timestamp_seconds \d+/m)
  t.regex(metrics, /^edgemesh_policy_last_checked_timestamp_seconds \d+/m)
  t.is((await unary(first.admin, 'getPolicyState', {})).refused, undefined)
  for (const { access } of devices) t.true((await access.ask('ada', 'payroll')).allowed)
})

test('what was allowed by a policy that is replaced meanwhile is decided anew', async t => {
  const allowed = { allow: true, reasons: [], valid_for_seconds: 3_600, clock_used: false }
  const reason = { code: 'NOT_ANY_MORE', field: 'user', actual: 'ada', required: 'nobody', message: 'No.' }
  const denied = { ...allowed, allow: false, reasons: [reason], valid_for_seconds: 60 }
  let revision = 'r1'
  let holds = false
  /** Questions that the second policy has been asked. */
  let askedSince = 0
  const opa = createServer(async (request, response) => {
    const { input } = (await json(request)) as { input: { operator?: object; user?: { id: string } | null } }
    const isOfAda = input.user?.id === 'ada'
    const usable = input.operator || input.user ? allowed : denied
    if (holds && isOfAda) {
      // Asked under the first policy, and answered when all have heard of the second one.
      holds = false
      revision = 'r2'
      await eventually('the second policy has been looked at', () => askedSince >= 10)
      response.end(JSON.stringify({ result: allowed, provenance: { bundles: { main: { revision: 'r1' } } } }))
      return
    }
    if (revision === 'r2') askedSince++
    const result = revision === 'r2' && isOfAda ? denied : usable
    response.end(JSON.stringify({ result, provenance: { bundles: { main: { revision } } } }))
  }).listen(0, '127.0.0.1')
  await once(opa, 'listening')
  t.teardown(() => {
    opa.closeAllConnections()
    opa.close()
  })
  const mesh = await startEdgeMesh(t, { OPA_URL: `http://127.0.0.1:${(opa.address() as AddressInfo).port}` })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const device = await mesh.enroll()
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  holds = true
  const answer = await access.ask('ada', 'payroll')
  const last = answer.allowed ? await access.revocationOf(answer.connectionId) : answer
  t.is(last.policyRevision, 'main@r2')
  t.is(last.reasons[0]?.code, 'NOT_ANY_MORE')
})
