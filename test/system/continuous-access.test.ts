import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { ConnectionStatus } from '../../src/gen/edgemesh/v1/admin.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import { type EdgeMesh, eventually, startEdgeMesh, unary, wasClosed } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa, policyDirectory, startOpa } from '../support/opa.ts'

/** An administrator and a service that administrators may reach: business hours don't concern them. */
async function furnish({ admin }: EdgeMesh): Promise<void> {
  await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: 'finance', roles: [] })
}

async function start(t: ExecutionContext, env: Record<string, string> = {}) {
  const mesh = await startEdgeMesh(t, env)
  await furnish(mesh)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  return { mesh, device }
}

async function withoutHours({ admin }: EdgeMesh): Promise<void> {
  const { data } = await unary(admin, 'getPolicyState', {})
  await unary(admin, 'updatePolicyData', { data: { ...data, hours: undefined } })
}

const codes = (reasons: { code: string }[]) => reasons.map(reason => reason.code)

test('an open connection is taken back with reasons when its device stops being healthy', async t => {
  const { mesh, device } = await start(t)
  const heart = heartbeats(t, mesh, device)
  t.deepEqual((await heart.beat(healthy)).failingPosture, [])
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada@example.com', 'payroll')
  t.true(answer.allowed)
  t.not(answer.connectionId, '')

  t.deepEqual((await heart.beat({ diskEncrypted: false })).failingPosture, ['disk_encrypted'])
  const revocation = await access.revocationOf(answer.connectionId)
  t.deepEqual(codes(revocation.reasons), ['DISK_NOT_ENCRYPTED'])
  const { answer: denied } = await unary(mesh.clients(device).authorize, 'check', {
    question: { id: 'again', user: 'ada', service: 'payroll', action: '' },
    deviceId: '',
  })
  t.false(denied?.allowed)
  t.deepEqual(denied?.reasons, revocation.reasons)

  await eventually('the connection is on record as revoked', async () => {
    const { rows } = await mesh.pool.query('select status, end_reasons from connections where id = $1', [
      answer.connectionId,
    ])
    return rows[0]?.status === 'revoked' && rows[0].end_reasons[0].code === 'DISK_NOT_ENCRYPTED'
  })
  const { rows } = await mesh.pool.query('select questions from decisions where id = $1', [
    revocation.decisionId.split('.')[0],
  ])
  t.false(rows[0].questions[0].allow, 'the decision that took it back is on record')
})

test('an open connection is taken back when heartbeats stop for longer than the maximum age', async t => {
  const { mesh, device } = await start(t, { HEALTH_CHECK_MAX_AGE_MINUTES: '0.05', HEARTBEAT_INTERVAL_SECONDS: '1' })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  t.true(answer.allowed)
  const revocation = await access.revocationOf(answer.connectionId)
  t.deepEqual(codes(revocation.reasons), ['HEALTH_STALE'])
  const again = await access.ask('ada', 'payroll')
  t.deepEqual(codes(again.reasons), ['HEALTH_STALE'])
})

test('heartbeats that say nothing new keep a connection open past the maximum age', async t => {
  const { mesh, device } = await start(t, { HEALTH_CHECK_MAX_AGE_MINUTES: '0.05', HEARTBEAT_INTERVAL_SECONDS: '1' })
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  const until = Date.now() + 5_000
  while (Date.now() < until) {
    await heart.beat()
    await new Promise(resolve => setTimeout(resolve, 300))
  }
  t.deepEqual(access.revoked, [])
  access.send({ $case: 'list', value: {} })
  const listed = await eventually('the list of connections', () =>
    access.responses.find(response => response.kind?.$case === 'connections'),
  )
  t.deepEqual(
    listed.kind?.$case === 'connections' && listed.kind.value.connections.map(({ connectionId }) => connectionId),
    [answer.connectionId],
  )
})

test('a device that another instance hears from stays allowed here', async t => {
  const { mesh, device } = await start(t, { HEALTH_CHECK_MAX_AGE_MINUTES: '0.05', HEARTBEAT_INTERVAL_SECONDS: '1' })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  // What another instance writes for a heartbeat that changed nothing: the time, and no announcement.
  const until = Date.now() + 4_500
  while (Date.now() < until) {
    await mesh.pool.query(
      "update device_postures set measured_at = now(), received_at = now() where device_id = 'alpha'",
    )
    await new Promise(resolve => setTimeout(resolve, 250))
  }
  t.deepEqual(access.revoked, [])
  t.true(answer.allowed)
})

for (const [what, act, code] of [
  [
    'the user is disabled',
    (mesh: EdgeMesh) => unary(mesh.admin, 'updateUser', { id: 'ada', status: 2 }),
    'USER_DISABLED',
  ],
  [
    'the user gets a role that may not reach it',
    async (mesh: EdgeMesh) => {
      await withoutHours(mesh)
      return unary(mesh.admin, 'updateUser', { id: 'ada', role: 'guest' })
    },
    'ROLE_NOT_GRANTED',
  ],
  [
    "the user's role may no longer reach it",
    (mesh: EdgeMesh) => unary(mesh.admin, 'deleteRoleGrant', { role: 'admin', service: '*' }),
    'ROLE_NOT_GRANTED',
  ],
  [
    'the service is disabled',
    (mesh: EdgeMesh) => unary(mesh.admin, 'updateService', { id: 'payroll', status: 2 }),
    'SERVICE_DISABLED',
  ],
  [
    'the device is quarantined',
    (mesh: EdgeMesh) => unary(mesh.admin, 'quarantineDevice', { id: 'alpha', reason: 'lost' }),
    'DEVICE_QUARANTINED',
  ],
  [
    'the requirements are tightened',
    async (mesh: EdgeMesh) => {
      const { data } = await unary(mesh.admin, 'getPolicyState', {})
      const requirements = { ...data?.requirements, diskPercentMax: 25 }
      return unary(mesh.admin, 'updatePolicyData', { data: { ...data, requirements } })
    },
    'DISK_TOO_FULL',
  ],
] as const) {
  test(`an open connection is taken back when ${what}`, async t => {
    const { mesh, device } = await start(t)
    await heartbeats(t, mesh, device).beat(healthy)
    const access = authorizations(t, mesh, device)
    const answer = await access.ask('ada', 'payroll')
    t.true(answer.allowed)
    await act(mesh)
    t.deepEqual(codes((await access.revocationOf(answer.connectionId)).reasons), [code])
    t.deepEqual(codes((await access.ask('ada', 'payroll')).reasons), [code])
  })
}

test('an open connection is taken back when a role that the user got meanwhile may no longer reach it', async t => {
  const { mesh, device } = await start(t)
  const grant = { role: 'ops', service: 'payroll', actions: ['connect'] }
  await unary(mesh.admin, 'setRoleGrant', { grant })
  await withoutHours(mesh)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  await unary(mesh.admin, 'updateUser', { id: 'ada', role: 'ops' })
  t.true((await access.ask('ada', 'payroll')).allowed)
  t.deepEqual(access.revoked, [])
  await unary(mesh.admin, 'deleteRoleGrant', { role: 'ops', service: 'payroll' })
  t.deepEqual(codes((await access.revocationOf(answer.connectionId)).reasons), ['ROLE_NOT_GRANTED'])
})

test('an open connection is taken back when business hours end', async t => {
  let offsetMs = 0
  const clock = () => Date.now() + offsetMs
  const mesh = await startEdgeMesh(t, {}, undefined, clock)
  await furnish(mesh)
  await unary(mesh.admin, 'updateUser', { id: 'ada', role: 'engineer' })
  await unary(mesh.admin, 'setRoleGrant', { grant: { role: 'engineer', service: 'payroll', actions: ['connect'] } })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  // Hours end with a minute. The server's clock goes forward to a few seconds before that.
  const closing = Math.ceil(Date.now() / 60_000) * 60_000
  offsetMs = closing - 6_000 - Date.now()
  const { data } = await unary(mesh.admin, 'getPolicyState', {})
  const days = ['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun']
  const endMinute = (closing / 60_000) % 1_440 || 1_440
  const hours = { timezone: 'UTC', days, startMinute: 0, endMinute, exemptRoles: [] }
  await unary(mesh.admin, 'updatePolicyData', { data: { ...data, hours } })

  const answer = await access.ask('ada', 'payroll')
  t.deepEqual([answer.allowed, codes(answer.reasons)], [true, []])
  t.true((answer.expiresAt?.getTime() ?? Number.POSITIVE_INFINITY) <= closing)
  t.deepEqual(codes((await access.revocationOf(answer.connectionId)).reasons), ['OUTSIDE_HOURS'])
  t.true(clock() >= closing)
})

const withOpa = findOpa() === undefined ? test.skip : test
withOpa('an open connection is taken back when the policy is replaced (needs opa)', async t => {
  const policies = await mkdtemp(join(tmpdir(), 'edgemesh-policies-'))
  t.teardown(() => rm(policies, { recursive: true }))
  await cp(policyDirectory, policies, { recursive: true })
  const opa = await startOpa(t, { policies })
  const { mesh, device } = await start(t, { OPA_URL: opa.url })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  t.true(answer.allowed)

  const path = join(policies, 'authz.rego')
  const closed = (await readFile(path, 'utf8'))
    .replace('allow if {\n', 'allow if {\n\tinput.user.role == "nobody"\n')
    .concat('\nrefusals contains reason("CLOSED", "policy", "closed", "open", "Nobody may connect now.")\n')
  await writeFile(path, closed)
  const revocation = await access.revocationOf(answer.connectionId)
  t.deepEqual(codes(revocation.reasons), ['CLOSED'])
  t.not(revocation.policyRevision, answer.policyRevision)
})

test('the stream of a certificate that is revoked is cut, and its connections are taken back', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const { connectionId } = await access.ask('ada', 'payroll')
  await mesh.pool.query("update certificates set revoked_at = now() where subject_id = 'alpha'")
  await mesh.pool.query("select pg_notify('edgemesh_changes', 'device:alpha')")
  t.like(await access.ended, { code: 'UNAUTHENTICATED', reason: 'CERTIFICATE_REVOKED' })
  await eventually('the connection is on record as revoked', async () => {
    const { rows } = await mesh.pool.query('select status, end_reasons from connections where id = $1', [connectionId])
    return rows[0]?.status === 'revoked' && rows[0].end_reasons[0].code === 'CERTIFICATE_REVOKED'
  })
})

test('how long revocations take is measured, to the push and to the acknowledgement', async t => {
  const { mesh, device } = await start(t)
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  const [first, second] = [await access.ask('ada', 'payroll'), await access.ask('ada', 'payroll')]
  t.is(access.responses[0]?.resumeWithin?.seconds, 30)
  t.true(access.responses.slice(1).every(({ resumeWithin }) => resumeWithin === undefined))
  await heart.beat({ diskEncrypted: false })
  for (const { connectionId } of [first, second]) await access.revocationOf(connectionId)
  const scrape = async () => (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
  const before = await scrape()
  t.true(before.includes('edgemesh_revocation_push_seconds_count 2'), before)
  t.true(before.includes('edgemesh_revocations_unacknowledged 2'))
  const tookSeconds = Number(/^edgemesh_revocation_push_seconds_sum (\S+)/m.exec(before)?.[1])
  t.true(tookSeconds >= 0 && tookSeconds < 40, `${tookSeconds}`)

  const ids = [first.connectionId, first.connectionId, 'not pushed']
  access.send({ $case: 'acknowledge', value: { connectionIds: ids } })
  await eventually('one is acknowledged', async () => {
    const text = await scrape()
    return (
      text.includes('edgemesh_revocation_acknowledged_seconds_count 1') &&
      text.includes('edgemesh_revocations_unacknowledged 1')
    )
  })
  t.true((await access.ask('nobody', 'payroll')).reasons.length > 0, 'the stream goes on, and there was no answer')
  t.is(access.responses.filter(({ kind }) => kind?.$case === 'answers').length, 3)
  access.send({ $case: 'acknowledge', value: { connectionIds: Array(129).fill(second.connectionId) } })
  t.like(await access.ended, { code: 'INVALID_ARGUMENT' })
  t.true((await scrape()).includes('edgemesh_revocations_unacknowledged 0'), 'nobody is waited for who has gone')
})

test('an operator closes one connection and leaves the others', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const [first, second] = [await access.ask('ada', 'payroll'), await access.ask('ada', 'payroll')]
  await unary(mesh.admin, 'closeConnection', { id: first.connectionId, reason: 'maintenance' })
  t.deepEqual(codes((await access.revocationOf(first.connectionId)).reasons), ['CLOSED_BY_OPERATOR'])
  t.deepEqual(
    access.revoked.map(({ connectionId }) => connectionId),
    [first.connectionId],
  )
  t.not(second.connectionId, first.connectionId)
})

test('a revoked device loses its streams at once and can not come back', async t => {
  const { mesh, device } = await start(t)
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  await access.ask('ada', 'payroll')
  await unary(mesh.admin, 'revokeDevice', { id: 'alpha', reason: 'stolen' })
  t.is((await heart.ended)?.reason, 'DEVICE_REVOKED')
  t.is((await access.ended)?.code, 'UNAUTHENTICATED')
  const later = heartbeats(t, mesh, device)
  later.send({})
  t.is((await later.ended)?.reason, 'DEVICE_REVOKED')
})

test('ending the stream closes its connections', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const answer = await access.ask('ada', 'payroll')
  access.end()
  t.is(await access.ended, undefined)
  await eventually('the connection is on record as closed', () => wasClosed(mesh, answer.connectionId))
})

test('a connection that lasts is listed until it ends; of short ones there is one event for all that are closed at once', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const lasting = await access.ask('ada', 'payroll')
  const listed = async () => {
    const page = { deviceId: 'alpha', status: 0, pageSize: 0, pageToken: '' }
    const { connections } = await unary(mesh.admin, 'listConnections', page)
    return connections.map(({ id, status, decisionId }) => [id, status, decisionId])
  }
  await eventually('it is listed', async () => (await listed()).length > 0)
  t.deepEqual(await listed(), [[lasting.connectionId, ConnectionStatus.ACTIVE, lasting.decisionId]])

  const short = [await access.ask('ada', 'payroll'), await access.ask('ada', 'payroll')]
  const ids = short.map(({ connectionId }) => connectionId)
  access.send({ $case: 'close', value: { connectionIds: [...ids, lasting.connectionId] } })
  await eventually('all are closed', async () => {
    const closed = await Promise.all([...ids, lasting.connectionId].map(id => wasClosed(mesh, id)))
    return closed.every(Boolean)
  })
  t.deepEqual(await listed(), [[lasting.connectionId, ConnectionStatus.CLOSED, lasting.decisionId]])
  const { rows } = await mesh.pool.query(`select actor, target, detail from audit_events where detail ? 'closed'`)
  t.deepEqual(rows, [{ actor: device.identity.spiffeId, target: 'device/alpha', detail: { closed: ids } }])
})

test('an operator closes a connection that was allowed a moment ago', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const { connectionId, decisionId } = await access.ask('ada', 'payroll')
  const { connection } = await unary(mesh.admin, 'closeConnection', { id: connectionId, reason: 'maintenance' })
  t.like(connection, { id: connectionId, status: ConnectionStatus.REVOKED, decisionId, userId: 'ada' })
  const { reasons } = await access.revocationOf(connectionId)
  t.deepEqual(codes(reasons), ['CLOSED_BY_OPERATOR'])
})

test('the metrics show what happened under the names that dashboards know', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  await access.ask('ada', 'payroll')
  await access.ask('nobody', 'payroll')
  const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
  for (const line of [
    'edgemesh_device_enrollments_total{outcome="enrolled"} 1',
    'edgemesh_authorization_decisions_total{decision="allow"} 1',
    'edgemesh_authorization_decisions_total{decision="deny"} 1',
    'edgemesh_authorization_latency_seconds_count 2',
    'edgemesh_connections_active{service="payroll"} 1',
    'edgemesh_health_checks_total 1',
  ]) {
    t.true(text.includes(line), `${line} in\n${text}`)
  }
  for (const name of [
    'edgemesh_devices_total{status="active"}',
    'edgemesh_unhealthy_devices',
    'edgemesh_streams_open',
    'edgemesh_event_loop_delay_seconds',
    'edgemesh_database_pool_connections',
    'edgemesh_connections_total{service="payroll",status="allowed"}',
  ]) {
    t.true(text.includes(name), name)
  }
})
