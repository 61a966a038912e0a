import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { heartbeats } from '../support/device.ts'
import {
  connect,
  type EdgeMesh,
  enrollClientOf,
  enrollOnce,
  eventually,
  refused,
  sharedEdgeMesh,
  startEdgeMesh,
  startSecondInstance,
  testEnvironment,
  tokenIdOf,
  unary,
} from '../support/edgemesh.ts'
import { startEnroll } from '../support/enrolling.ts'
import { healthy } from '../support/healthy.ts'
import { serve } from '../support/serve.ts'

const mesh = sharedEdgeMesh(test)

/** What approving a device comes down to. */
async function approve({ pool }: Pick<EdgeMesh, 'pool'>, id: string): Promise<void> {
  await change(pool, `update devices set status = 'active' where id = '${id}' and status = 'pending'`, id)
}

async function change(pool: EdgeMesh['pool'], statement: string, id: string): Promise<void> {
  const { rowCount } = await pool.query(statement)
  if (rowCount !== 1) throw new Error(`there is no device ${id} as it should be`)
  await pool.query(`select pg_notify('edgemesh_changes', 'device:${id}')`)
}

/** How calls about a device are on record: code, reason, and what the detail says. */
async function eventsOf(at: Pick<EdgeMesh, 'pool'>, target: string) {
  // By time alone: what ends a call is dated when it ends.
  const { rows } = await at.pool.query<{ event: string }>(
    `select concat_ws(' ', code, nullif(reason, ''), detail ->> 'step', case when detail ? 'serial' then 'serial' end) as event
     from audit_events where method like '%/Enroll' and target = $1 order by at, id desc`,
    [target],
  )
  return rows.map(({ event }) => event)
}

async function tokenRow(at: Pick<EdgeMesh, 'pool'>, token: string) {
  const { rows } = await at.pool.query<{ uses: number; completed: number }>(
    `select uses, (select count(completed_at)::int from token_redemptions where token_id = id) as completed
     from enrollment_tokens where id = $1`,
    [tokenIdOf(token)],
  )
  return rows[0]
}

/** A device that waits at `at` with a new token. */
async function waitingDevice(t: ExecutionContext, at: EdgeMesh, id: string) {
  const token = await at.token({ requiresApproval: true })
  const keyPem = createKey()
  const call = await startEnroll(t, enrollClientOf(at), { token, keyPem, device: { id } })
  t.is(await call.pending(), id)
  return { token, keyPem, call }
}

test('a device waits on its stream until an operator approves it, at whatever instance, and then has its identity', async t => {
  const own = await startEdgeMesh(t)
  const other = await startSecondInstance(t, own)
  const { token, keyPem, call } = await waitingDevice(t, other, 'press-1')

  const { device } = await unary(own.admin, 'getDevice', { id: 'press-1' })
  t.like(device, { status: 1, certificates: [] }, 'an operator sees it, pending and without a certificate')
  t.deepEqual(await tokenRow(own, token), { uses: 1, completed: 0 })

  await approve(own, 'press-1')
  const identity = await call.identity()
  t.is(identity.spiffeId, 'spiffe://edgemesh.local/device/press-1')
  const certificatePem = identity.certificateChainPem.join('')
  await heartbeats(t, own, { ...own.anonymous, keyPem, certificatePem }).beat(healthy)
  t.deepEqual(await tokenRow(own, token), { uses: 1, completed: 1 })
  t.deepEqual(
    await eventsOf(own, 'device/press-1'),
    ['OK waits for approval', 'OK serial'],
    'one event when it was taken up, one when it ended',
  )
  const scraped = await (await fetch(`http://127.0.0.1:${other.server.metricsPort}/metrics`)).text()
  for (const line of [
    'edgemesh_device_enrollments_total{outcome="pending"} 1',
    'edgemesh_device_enrollments_total{outcome="enrolled"} 1',
    'edgemesh_calls_total{method="/edgemesh.v1.EnrollService/Enroll",code="OK"} 1',
  ]) {
    t.true(scraped.includes(line), line)
  }
})

for (const [what, reject] of [
  [
    'revoked',
    async (id: string) => void (await unary(mesh().admin, 'revokeDevice', { id, reason: 'nobody knows it' })),
  ],
  ['deleted', (id: string) => change(mesh().pool, `delete from devices where id = '${id}'`, id)],
] as const) {
  test(`a device that is ${what} while it waits is told that it was rejected, and again when it asks again`, async t => {
    const id = `press-${what}`
    const { token, keyPem, call } = await waitingDevice(t, mesh(), id)
    await reject(id)
    const end = await call.refused()
    t.deepEqual([end.code, end.reason], ['PERMISSION_DENIED', 'ENROLLMENT_REJECTED'])
    if (what === 'revoked') t.true(end.message.includes('nobody knows it'))
    const again = await refused(enrollOnce(enrollClientOf(mesh()), token, keyPem))
    t.is(again.reason, 'ENROLLMENT_REJECTED')

    t.deepEqual(await eventsOf(mesh(), `device/${id}`), [
      'OK waits for approval',
      'PERMISSION_DENIED ENROLLMENT_REJECTED',
    ])
    const { rows } = await mesh().pool.query('select from certificates where subject_id = $1', [id])
    t.is(rows.length, 0)
  })
}

test('a device whose instance is killed goes on waiting at another one, even if its token has expired meanwhile', async t => {
  const survivor = await startEdgeMesh(t)
  const { address, kill } = await serve(t, { ...testEnvironment, DATABASE_URL: survivor.databaseUrl })
  const doomed = await connect(t, survivor.server, address)
  const { token, keyPem, call } = await waitingDevice(t, { ...survivor, ...doomed }, 'press-2')
  await kill()
  t.is((await call.refused()).code, 'UNAVAILABLE')

  await survivor.pool.query(`update enrollment_tokens set expires_at = now() - interval '1 day'`)
  const again = await startEnroll(t, enrollClientOf(survivor), { token, keyPem })
  t.is(await again.pending(), 'press-2', 'the same device')
  const late = await refused(enrollOnce(enrollClientOf(survivor), token, createKey()))
  t.is(late.reason, 'TOKEN_OTHER_KEY', 'nobody else comes in by it')
  await approve(survivor, 'press-2')
  t.is((await again.identity()).deviceId, 'press-2')
  t.deepEqual(await tokenRow(survivor, token), { uses: 1, completed: 1 })
})

test('who was approved while nobody listened gets the identity with the next call', async t => {
  const { token, keyPem, call } = await waitingDevice(t, mesh(), 'press-3')
  call.cancel()
  await eventually('the end of the stream is on record', async () =>
    (await eventsOf(mesh(), 'device/press-3')).some(event => event.startsWith('CANCELLED STREAM_LOST')),
  )
  await approve(mesh(), 'press-3')
  t.is((await enrollOnce(enrollClientOf(mesh()), token, keyPem)).deviceId, 'press-3')
  t.deepEqual(await tokenRow(mesh(), token), { uses: 1, completed: 1 })
})

test('revoking its token ends the wait of a device, at every instance', async t => {
  const other = await startSecondInstance(t, mesh())
  const { token, call } = await waitingDevice(t, other, 'press-4')
  await unary(mesh().admin, 'revokeEnrollmentToken', { id: tokenIdOf(token) })
  const end = await call.refused()
  t.deepEqual([end.code, end.reason], ['UNAUTHENTICATED', 'TOKEN_REVOKED'])
})

test('a device that waits is asked to connect again when its instance stops', async t => {
  const own = await startEdgeMesh(t)
  const { call } = await waitingDevice(t, own, 'press-5')
  const stopped = own.server.stop()
  const end = await call.refused()
  t.deepEqual([end.code, end.reason], ['UNAVAILABLE', 'DRAINING'])
  t.true((end.retryAfterMs ?? 0) > 0)
  await stopped
})

test('a decision that is made while the change feed is away is not missed', async t => {
  const own = await startEdgeMesh(t)
  const { call } = await waitingDevice(t, own, 'press-6')
  // In one transaction, so that its notification has no connection to go to.
  await own.pool.query(
    `with cut as (
       select pg_terminate_backend(pid) from pg_stat_activity
       where application_name = 'edgemesh change feed' and datname = current_database()
     ), approved as (update devices set status = 'active' where id = 'press-6')
     select * from cut`,
  )
  t.is((await call.identity()).deviceId, 'press-6')
})

test('a quarantine is no approval: the device waits until it is released', async t => {
  const { call } = await waitingDevice(t, mesh(), 'press-7')
  await change(mesh().pool, `update devices set status = 'quarantined' where id = 'press-7'`, 'press-7')
  await eventually('another answer', () => call.responses.length === 2)
  t.true(
    call.responses.every(({ step }) => step?.$case === 'pendingApproval'),
    'it is told again that it waits',
  )
  await unary(mesh().admin, 'releaseDevice', { id: 'press-7' })
  t.is((await call.identity()).deviceId, 'press-7')
})

test('a device that enrolls again with a token that takes approval is kept out until it is approved anew', async t => {
  const keyPem = createKey()
  const device = await mesh().enroll({ keyPem, device: { id: 'press-8' } })
  const token = await mesh().token({ requiresApproval: true, labels: { tier: 'prod' } })
  const call = await startEnroll(t, enrollClientOf(mesh()), { token, keyPem, device: { id: 'press-8' } })
  await call.pending()
  const { answer } = await unary(mesh().clients(device).authorize, 'check', {
    question: { id: '1', user: 'ada', service: 'payroll', action: '' },
    deviceId: '',
  })
  t.false(answer?.allowed)
  t.true(
    answer?.reasons.some(({ field, actual }) => field === 'device.status' && actual === 'pending'),
    'it may do nothing yet',
  )
  t.deepEqual(await labelsOf('press-8'), {}, 'nor has it the labels')
  await approve(mesh(), 'press-8')
  t.is((await call.identity()).deviceId, 'press-8')
  t.deepEqual(await labelsOf('press-8'), { tier: 'prod' })
})

async function labelsOf(id: string) {
  return (await unary(mesh().admin, 'getDevice', { id })).device?.labels
}

test('a device whose token is revoked while it waits has none of its labels, approved or not', async t => {
  const keyPem = createKey()
  await mesh().enroll({ keyPem, device: { id: 'press-10', labels: { role: 'press' } } })
  const token = await mesh().token({ requiresApproval: true, labels: { role: 'vault' } })
  const device = { id: 'press-10', labels: { role: 'boss', more: '' } }
  const call = await startEnroll(t, enrollClientOf(mesh()), { token, keyPem, device })
  await call.pending()
  await unary(mesh().admin, 'revokeEnrollmentToken', { id: tokenIdOf(token) })
  t.is(await call.outcome(), 'TOKEN_REVOKED')
  await unary(mesh().admin, 'approveDevice', { id: 'press-10' })
  t.deepEqual(await labelsOf('press-10'), { role: 'press' })
})

test('a quarantined device may not ask for approval with a token: its release would pass for that', async t => {
  const keyPem = createKey()
  await mesh().enroll({ keyPem, device: { id: 'press-11' } })
  await unary(mesh().admin, 'quarantineDevice', { id: 'press-11', reason: 'virus' })
  const token = await mesh().token({ requiresApproval: true, labels: { role: 'vault' } })
  const asked = { token, keyPem, device: { id: 'press-11' } }
  const seen = await (await startEnroll(t, enrollClientOf(mesh()), asked)).refused()
  t.deepEqual([seen.code, seen.reason], ['FAILED_PRECONDITION', 'DEVICE_QUARANTINED'])
  t.deepEqual(await tokenRow(mesh(), token), { uses: 0, completed: 0 })
  await unary(mesh().admin, 'releaseDevice', { id: 'press-11' })
  t.deepEqual(await labelsOf('press-11'), {})
})

test('an approval that comes after the certificate of before has expired lets the device in all the same', async t => {
  const keyPem = createKey()
  await mesh().enroll({ keyPem, device: { id: 'press-9' } })
  const token = await mesh().token({ requiresApproval: true })
  const call = await startEnroll(t, enrollClientOf(mesh()), { token, keyPem, device: { id: 'press-9' } })
  await call.pending()
  await mesh().pool.query(`update certificates set not_after = now() where subject_id = 'press-9'`)
  await approve(mesh(), 'press-9')
  t.is((await call.identity()).deviceId, 'press-9')
})

test('a token of several uses enrolls each device with an approval of its own', async t => {
  const token = await mesh().token({ requiresApproval: true, usesMax: 2 })
  const calls = await Promise.all(
    ['hall-1', 'hall-2'].map(id =>
      startEnroll(t, enrollClientOf(mesh()), { token, keyPem: createKey(), device: { id } }),
    ),
  )
  for (const call of calls) await call.pending()
  const third = await refused(enrollOnce(enrollClientOf(mesh()), token, createKey()))
  t.is(third.reason, 'TOKEN_USED_UP', 'a use is a use from when it is asked for')
  await approve(mesh(), 'hall-2')
  t.is((await calls[1]?.identity())?.deviceId, 'hall-2')
  t.is(calls[0]?.responses.length, 1)
  t.deepEqual(await tokenRow(mesh(), token), { uses: 2, completed: 1 })
})
