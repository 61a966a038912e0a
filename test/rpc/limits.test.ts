/** Limits that instances share, each instance standing for itself with a pool of its own. */
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import pg from 'pg'
import { isDatabaseOutage } from '../../src/db/failure.ts'
import { Fault } from '../../src/fault.ts'
import { sharedRateLimit, sweepRateLimits } from '../../src/rpc/limits.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'

type Pool = Pick<pg.Pool, 'query'>

/** The pool of one more instance, which counts its statements. */
function instance(t: ExecutionContext, url: string) {
  const pool = new pg.Pool({ connectionString: url, max: 5 })
  // The database may be dropped a moment before a connection has ended.
  pool.on('error', () => {})
  t.teardown(() => pool.end())
  const counting = {
    statements: 0,
    query(...args: Parameters<pg.Pool['query']>) {
      counting.statements++
      return pool.query(...args)
    },
  }
  return counting as typeof counting & Pool & pg.Pool
}

/** How calls have ended: how many were let through, and what the others were told. */
async function outcomes(calls: Promise<void>[]) {
  const settled = await Promise.allSettled(calls)
  const refusals = settled.flatMap(call => (call.status === 'rejected' ? [call.reason as Fault] : []))
  return { admitted: calls.length - refusals.length, refusals }
}

const callsOf = (count: number, call: () => Promise<void>) => Array.from({ length: count }, call)

test('of fifty calls that race at two instances as many are let through as the limit says, again and again', async t => {
  const { url } = await testDatabase(t)
  for (let round = 0; round < 5; round++) {
    const limits = [instance(t, url), instance(t, url)].map(pool =>
      sharedRateLimit(pool, 'LIMIT', 'address', { count: 7, windowSeconds: 60 }),
    )
    const calls = Array.from({ length: 50 }, (_, at) => limits[at % 2]?.(`10.0.0.${round}`) as Promise<void>)
    const { admitted, refusals } = await outcomes(calls)
    t.is(admitted, 7)
    for (const refusal of refusals) {
      t.true(refusal instanceof Fault)
      t.deepEqual([refusal.code, refusal.reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
      t.regex(refusal.message, /more than 7 in 60 s \(LIMIT\)/)
      t.true((refusal.retryAfterMs ?? 0) > 0 && (refusal.retryAfterMs ?? 0) <= 60_000)
    }
    const later = await outcomes(limits.map(limit => limit(`10.0.0.${round}`)))
    t.is(later.admitted, 0)
  }
})

test('who waits for as long as it was told is let through again, and the allowance is whole', async t => {
  const { url } = await testDatabase(t)
  const [one, other] = [instance(t, url), instance(t, url)].map(pool =>
    sharedRateLimit(pool, 'LIMIT', 'address', { count: 2, windowSeconds: 3 }),
  ) as [(key: string) => Promise<void>, (key: string) => Promise<void>]
  t.is((await outcomes(callsOf(3, () => one('a')))).admitted, 2)
  const { refusals } = await outcomes([other('a')])
  await sleep(refusals[0]?.retryAfterMs)
  const after = await outcomes([one('a'), other('a'), one('a')])
  t.is(after.admitted, 2)
})

test('what one key takes is not missing for another, nor for another limit', async t => {
  const { url } = await testDatabase(t)
  const pool = instance(t, url)
  const limit = { count: 1, windowSeconds: 60 }
  const [byAddress, byToken] = [
    sharedRateLimit(pool, 'LIMIT', 'address', limit),
    sharedRateLimit(pool, 'LIMIT', 'token', limit),
  ]
  t.is((await outcomes(callsOf(20, () => byAddress('a')))).admitted, 1)
  t.is((await outcomes([byAddress('b'), byToken('a')])).admitted, 2)
})

test('a storm on one key costs a handful of statements, and none once it is over its limit', async t => {
  const { url } = await testDatabase(t)
  const pool = instance(t, url)
  const limit = sharedRateLimit(pool, 'LIMIT', 'address', { count: 5, windowSeconds: 60 })
  t.is((await outcomes(callsOf(1_000, () => limit('a')))).admitted, 5)
  t.true(pool.statements <= 2, `${pool.statements} statements`)
  const before = pool.statements
  t.is((await outcomes(callsOf(1_000, () => limit('a')))).admitted, 0)
  t.is(pool.statements, before)
})

test('calls that come together are counted together, and none is lost while there is room', async t => {
  const { url } = await testDatabase(t)
  const pool = instance(t, url)
  const limit = sharedRateLimit(pool, 'LIMIT', 'address', { count: 1_000, windowSeconds: 60 })
  t.is((await outcomes(callsOf(999, () => limit('a')))).admitted, 999)
  t.is((await outcomes(callsOf(3, () => limit('a')))).admitted, 1)
})

test('while the database is away nobody is let through, and it is an outage', async t => {
  const away = new pg.Pool({ connectionString: 'postgresql://nobody@127.0.0.1:1/nothing' })
  t.teardown(() => away.end())
  const limit = sharedRateLimit(away, 'LIMIT', 'address', { count: 5, windowSeconds: 60 })
  const { admitted, refusals } = await outcomes(callsOf(10, () => limit('a')))
  t.is(admitted, 0)
  t.true(refusals.every(isDatabaseOutage))
})

test('what is over is swept away, and what still counts is not', async t => {
  const { url, pool } = await testDatabase(t)
  await sharedRateLimit(instance(t, url), 'LIMIT', 'address', { count: 5, windowSeconds: 3_600 })('now')
  await pool.query("insert into rate_limits (key, points, expire) values ('then', 5, 1000)")
  t.teardown(sweepRateLimits(pool, createLog({ level: 'silent' }), 10))
  await eventually('the sweep', async () => {
    const { rows } = await pool.query<{ key: string }>('select key from rate_limits')
    return rows.length === 1 && rows[0]?.key === 'LIMIT address now'
  })
  t.pass()
})
