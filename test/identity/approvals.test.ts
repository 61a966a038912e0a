import test, { type ExecutionContext } from 'ava'
import { Fault } from '../../src/fault.ts'
import { createApprovals, type Wait } from '../../src/identity/approvals.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { refused } from '../admin/operator.ts'
import { eventually } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const never = new AbortController().signal
const token = '0123456789ab'

/** Devices that wait, in a real database, and a change feed that the test speaks for. */
async function scene(t: ExecutionContext, { reminderMs }: { reminderMs?: number } = {}) {
  const { pool } = await testDatabase(t)
  const changes: ((keys: string[]) => void)[] = []
  const resets: (() => void)[] = []
  const looks: number[] = []
  const outage = { looksToFail: 0 }
  const watched = {
    async query(text: string, values: unknown[][]) {
      try {
        if (outage.looksToFail-- > 0) throw new Error('the database is away')
        return await pool.query(text, values)
      } finally {
        looks.push(values[0]?.length ?? 0)
      }
    },
  } as unknown as typeof pool
  const approvals = createApprovals({
    pool: watched,
    feed: { onChange: listener => void changes.push(listener), onReset: listener => void resets.push(listener) },
    log,
    ...(reminderMs && { reminderMs }),
  })
  t.teardown(() => approvals.endAll(new Fault('UNAVAILABLE', 'DRAINING', 'the test is over')))
  await pool.query(
    `insert into enrollment_tokens (id, secret_hash, uses_max, expires_at, labels, created_by, created_at)
     values ($1, '', 100, now(), '{}', '', now())`,
    [token],
  )
  return {
    approvals,
    /** How many were looked at with each look that is over. */
    looks,
    looked: (times: number) => eventually(`look ${times}`, () => looks.length >= times),
    outage,
    pool,
    announce: (...keys: string[]) => {
      for (const listener of changes) listener(keys)
    },
    reset: () => {
      for (const listener of resets) listener()
    },
    async pendingDevice(id: string): Promise<Wait> {
      await pool.query(
        `insert into devices (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
         values ($1, 'iot', '', '', '{}', 'pending', $1, '', now(), now())`,
        [id],
      )
      return { tokenId: token, deviceId: id, status: 'pending' }
    },
    decide: (id: string, status: string) => pool.query('update devices set status = $2 where id = $1', [id, status]),
  }
}

test('a decision ends the wait of that device, and of no other', async t => {
  const { approvals, looks, looked, pendingDevice, decide, announce } = await scene(t)
  const [a, b] = [await pendingDevice('a'), await pendingDevice('b')]
  const decided = approvals.decided(a, never)
  let other: boolean | undefined
  approvals.decided(b, never).then(
    is => {
      other = is
    },
    () => {},
  )
  await looked(1)
  await decide('a', 'active')
  announce('user:ada', 'device:a', 'device:zoe')
  t.true(await decided)
  announce('device:b')
  await looked(3)
  // One look comes after the other: what this one finds is found when that of b is over.
  t.true(await approvals.decided({ ...a, status: 'pending' }, never))
  t.is(other, undefined, 'announced, but still pending')
  t.deepEqual(looks, [2, 1, 1, 1])
})

test('a device that was deleted, or whose token was revoked, waits no longer', async t => {
  const { approvals, looked, pool, pendingDevice, announce } = await scene(t)
  const [a, b] = [await pendingDevice('a'), await pendingDevice('b')]
  const [deleted, revoked] = [approvals.decided(a, never), approvals.decided(b, never)]
  await looked(1)
  await pool.query(`delete from devices where id = 'a'`)
  announce('device:a')
  t.true(await deleted)
  await pool.query('update enrollment_tokens set revoked_at = now()')
  announce(`token:${token}`)
  t.true(await revoked)
})

test('a decision that came before the wait began is seen', async t => {
  const { approvals, pendingDevice, decide } = await scene(t)
  const wait = await pendingDevice('a')
  await decide('a', 'active')
  t.true(await approvals.decided(wait, never))
})

test('after a feed that was lost all are looked at again, in one statement', async t => {
  const { approvals, looks, looked, pendingDevice, decide, reset } = await scene(t)
  const waits = await Promise.all(Array.from({ length: 50 }, (_, index) => pendingDevice(`device-${index}`)))
  const decisions = waits.map(wait => approvals.decided(wait, never))
  await looked(1)
  t.deepEqual(looks, [50], 'who begins to wait in one moment is looked at in one go, too')
  for (const { deviceId } of waits) await decide(deviceId, 'active')
  reset()
  t.deepEqual(new Set(await Promise.all(decisions)), new Set([true]))
  t.deepEqual(looks, [50, 50])
})

test('a look that the database refuses is taken again', async t => {
  const { approvals, looks, looked, outage, pendingDevice, decide, announce } = await scene(t)
  const wait = await pendingDevice('a')
  const decided = approvals.decided(wait, never)
  await looked(1)
  outage.looksToFail = 1
  await decide('a', 'active')
  announce('device:a')
  t.true(await decided)
  t.is(looks.length, 3)
})

test('it is told when to remind the device that it waits', async t => {
  const { approvals, pendingDevice } = await scene(t, { reminderMs: 20 })
  const wait = await pendingDevice('a')
  t.false(await approvals.decided(wait, never))
  t.false(await approvals.decided(wait, never))
})

test('a caller who goes waits no longer', async t => {
  const { approvals, pendingDevice } = await scene(t)
  const wait = await pendingDevice('a')
  const gone = new AbortController()
  const decided = approvals.decided(wait, gone.signal)
  const cancelled = new Fault('ABORTED', 'CANCELLED', 'the caller has gone')
  gone.abort(cancelled)
  t.is(await t.throwsAsync(decided), cancelled)
  t.is(await t.throwsAsync(approvals.decided(wait, gone.signal)), cancelled)
})

test('five thousand may wait at one instance; one more is told to come back, until there is room', async t => {
  const { approvals, pendingDevice, decide } = await scene(t)
  const wait = await pendingDevice('a')
  const leaving = new AbortController()
  const all = [approvals.decided(wait, leaving.signal)]
  for (let more = 1; more < 5_000; more++) all.push(approvals.decided(wait, never))
  for (const one of all) one.catch(() => {})
  const fault = await refused(t, approvals.decided(wait, never), 'UNAVAILABLE', 'APPROVALS_FULL')
  t.true((fault.retryAfterMs ?? 0) > 0)
  leaving.abort(new Error('gone'))
  await decide('a', 'active')
  t.true(await approvals.decided(wait, never), 'there was room for it')
})

test('an instance that stops ends all waits, and none begins', async t => {
  const { approvals, pendingDevice } = await scene(t)
  const wait = await pendingDevice('a')
  const decided = approvals.decided(wait, never)
  const draining = new Fault('UNAVAILABLE', 'DRAINING', 'this instance is stopping')
  approvals.endAll(draining)
  t.is(await t.throwsAsync(decided), draining)
  t.is(await t.throwsAsync(approvals.decided(wait, never)), draining)
})
