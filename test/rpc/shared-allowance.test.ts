/** The limit that instances share without asking each other about every message. */
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import pg from 'pg'
import { isDatabaseOutage } from '../../src/db/failure.ts'
import { Fault } from '../../src/fault.ts'
import { creditOf, type Settle, type Settled, settleIn, sharedAllowance } from '../../src/rpc/shared-allowance.ts'
import type { RateLimit } from '../../src/settings.ts'
import { testDatabase } from '../support/postgres.ts'

/** One more instance, with a pool of its own that counts its statements. */
function instance(t: ExecutionContext, url: string, limit: RateLimit, options: { gatherMs?: number } = {}) {
  const pool = new pg.Pool({ connectionString: url, max: 2 })
  pool.on('error', () => {})
  t.teardown(() => pool.end())
  const settle = settleIn(pool, 'LIMIT', limit)
  const counting = { statements: 0 }
  const take = sharedAllowance({
    name: 'LIMIT',
    limit,
    ...options,
    settle(settlements) {
      counting.statements++
      return settle(settlements)
    },
  })
  return { counting, take }
}

type Take = ReturnType<typeof sharedAllowance>

/** Whether it was admitted. @throws what is no refusal */
async function admitted(take: Take, key: string, points = 1): Promise<boolean> {
  try {
    await take(key, points)
    return true
  } catch (error) {
    if (error instanceof Fault && error.reason === 'RATE_LIMITED') return false
    throw error
  }
}

const count = (outcomes: boolean[]) => outcomes.filter(Boolean).length

for (const limit of [7, 30, 100, 1_000]) {
  test(`of three times ${limit} messages that race at three instances ${limit} are let through, and at most a tenth more`, async t => {
    const { url } = await testDatabase(t)
    const rate = { count: limit, windowSeconds: 60 }
    const instances = Array.from({ length: 3 }, () => instance(t, url, rate))
    const devices = ['alpha', 'beta', 'gamma', 'delta']
    const counts = await Promise.all(
      devices.map(async device => {
        // Several callers at each instance, each of which asks one thing after the other.
        const outcomes = await Promise.all(
          instances.flatMap(({ take }) =>
            Array.from({ length: 5 }, async () => {
              const own: boolean[] = []
              for (let asked = 0; asked < Math.ceil(limit / 5); asked++) {
                own.push(await admitted(take, device))
                if (asked % 3 === 0) await new Promise(setImmediate)
              }
              return own
            }),
          ),
        )
        return count(outcomes.flat())
      }),
    )
    for (const number of counts) t.true(number >= limit && number <= limit * 1.1, `${number} of ${limit}`)
    // By now all of them know.
    for (const { take } of instances) t.false(await admitted(take, 'alpha'))
  })
}

test('what instances may let through before they have asked is never more than a tenth of the limit, however many they are', async t => {
  const { url, pool } = await testDatabase(t)
  const limit = { count: 100, windowSeconds: 60 }
  const instances = Array.from({ length: 8 }, () => instance(t, url, limit))
  for (const { take } of instances) t.true(await admitted(take, 'alpha'))
  // Meanwhile the limit is used up elsewhere, and none of them knows.
  await settleIn(pool, 'LIMIT', limit)([{ key: 'alpha', used: 0, wanted: 92, windowEnd: 0 }])
  let unasked = 0
  for (const { take } of instances) {
    for (;;) {
      const wait = take('alpha', 1)
      if (wait) {
        await t.throwsAsync(wait, { message: /more than 100 in 60 s/ })
        break
      }
      unasked++
    }
  }
  t.true(unasked > 0 && unasked <= 10, `${unasked}`)
})

test('a device that stays under its limit is refused nowhere, whichever instances it asks', async t => {
  const { url } = await testDatabase(t)
  const instances = Array.from({ length: 3 }, () => instance(t, url, { count: 100, windowSeconds: 60 }))
  const outcomes = await Promise.all(Array.from({ length: 100 }, (_, at) => admitted(instances[at % 3]!.take, 'alpha')))
  t.is(count(outcomes), 100)
})

test('messages within the allowance are let through without a wait, and the database hears of them now and then', async t => {
  const { url } = await testDatabase(t)
  const { take, counting } = instance(t, url, { count: 100_000, windowSeconds: 60 })
  await take('alpha', 1)
  let waits = 0
  for (let asked = 0; asked < 50_000; asked++) {
    const wait = take('alpha', 1)
    if (!wait) continue
    waits++
    await wait
  }
  t.true(waits <= 50, `${waits} waits`)
  t.true(counting.statements <= 50, `${counting.statements} statements`)
})

test('many devices are settled in one statement', async t => {
  const { url } = await testDatabase(t)
  const { take, counting } = instance(t, url, { count: 5, windowSeconds: 60 })
  const outcomes = await Promise.all(Array.from({ length: 400 }, (_, at) => admitted(take, `device-${at}`)))
  t.is(count(outcomes), 400)
  t.true(counting.statements <= 2, `${counting.statements} statements`)
})

test('a fleet that reports now and then is counted in a few statements, and whoever is within its allowance does not wait', async t => {
  const { url } = await testDatabase(t)
  const limit = { count: 10, windowSeconds: 60 }
  const { take, counting } = instance(t, url, limit, { gatherMs: 100 })
  const waits = { first: 0, second: 0 }
  await Promise.all(
    Array.from({ length: 300 }, async (_, at) => {
      await sleep(at)
      const wait = take(`device-${at}`, 1)
      if (wait) waits.first++
      await wait
      if (take(`device-${at}`, 1)) waits.second++
    }),
  )
  t.deepEqual(waits, { first: 300, second: 0 })
  t.true(counting.statements <= 30, `${counting.statements} statements`)
})

test('instances that settle the same devices do not lock each other out', async t => {
  const { url } = await testDatabase(t)
  const instances = Array.from({ length: 3 }, () => instance(t, url, { count: 5, windowSeconds: 60 }))
  for (let round = 0; round < 5; round++) {
    const devices = Array.from({ length: 200 }, (_, at) => `device-${round}-${at}`)
    const outcomes = await Promise.all(
      instances.flatMap(({ take }, at) =>
        (at % 2 ? devices : devices.toReversed()).map(device => admitted(take, device)),
      ),
    )
    t.is(count(outcomes), 600)
  }
})

test('who is refused is told when to come back, and then the allowance is whole', async t => {
  const { url } = await testDatabase(t)
  const limit = { count: 20, windowSeconds: 2 }
  const [one, other] = [instance(t, url, limit), instance(t, url, limit)]
  for (let asked = 0; asked < 30; asked++) await admitted(one.take, 'alpha')
  const refusal = await t.throwsAsync(async () => other.take('alpha', 20), { instanceOf: Fault })
  t.deepEqual([refusal?.code, refusal?.reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
  t.true((refusal?.retryAfterMs ?? 0) > 0 && (refusal?.retryAfterMs ?? 0) <= 2_000)
  await sleep(refusal?.retryAfterMs)
  const outcomes = await Promise.all(Array.from({ length: 20 }, () => admitted(other.take, 'alpha')))
  t.is(count(outcomes), 20)
})

test('what was let through in a window and never counted is not missing in the next', async t => {
  const { url } = await testDatabase(t)
  const limit = { count: 100, windowSeconds: 1 }
  const [one, other] = [instance(t, url, limit), instance(t, url, limit)]
  await one.take('alpha', 1)
  t.is(one.take('alpha', 2), undefined)
  await sleep(1_010)
  t.true(await admitted(other.take, 'alpha', 1))
  t.true(await admitted(one.take, 'alpha', 99))
})

test('a message with more questions than are left is refused whole, and one that fits is let through', async t => {
  const { url } = await testDatabase(t)
  const { take } = instance(t, url, { count: 100, windowSeconds: 60 })
  t.true(await admitted(take, 'alpha', 90))
  t.false(await admitted(take, 'beta', 101))
  for (let asked = 0; asked < 5; asked++) t.true(await admitted(take, 'alpha', 1))
  t.false(await admitted(take, 'alpha', 6))
})

test('names longer than a row has room for are counted like others', async t => {
  const { url } = await testDatabase(t)
  const { take } = instance(t, url, { count: 3, windowSeconds: 60 })
  const device = `spiffe://${'a'.repeat(250)}/device/alpha`
  const outcomes = await Promise.all(Array.from({ length: 5 }, () => admitted(take, device)))
  t.is(count(outcomes), 3)
})

test('while the database is away the share is used up, and then it is an outage; afterwards nothing is missing', async t => {
  const { url } = await testDatabase(t)
  const limit = { count: 100, windowSeconds: 60 }
  const pool = new pg.Pool({ connectionString: url, max: 2 })
  t.teardown(() => pool.end())
  const away = new pg.Pool({ connectionString: 'postgresql://nobody@127.0.0.1:1/nothing' })
  t.teardown(() => away.end())
  let reachable = true
  const [settle, settleAway] = [settleIn(pool, 'LIMIT', limit), settleIn(away, 'LIMIT', limit)]
  const take = sharedAllowance({ name: 'LIMIT', limit, settle: some => (reachable ? settle(some) : settleAway(some)) })
  t.true(await admitted(take, 'alpha'))
  reachable = false
  let let_through = 0
  const outage = await t.throwsAsync(async () => {
    for (; let_through < 100; let_through++) await take('alpha', 1)
  })
  t.true(isDatabaseOutage(outage))
  t.is(let_through, 5, 'half of a tenth of the limit')
  t.true(isDatabaseOutage(await t.throwsAsync(async () => take('beta', 1))))
  reachable = true
  let more = 0
  while (await admitted(take, 'alpha')) more++
  t.true(1 + let_through + more >= 100 && 1 + let_through + more <= 110)
})

// ── The arithmetic, against a database of which only the meaning is left ───────────────────────────────────────────

type Row = { counted: number; credit: number; end: number }

const earlyMs = 5

/** What the statement does, by a clock of its own. */
function modelDatabase(limit: RateLimit, now: () => number) {
  const rows = new Map<string, Row>()
  const credit = creditOf(limit)
  const windowMs = limit.windowSeconds * 1_000
  return {
    open: (key: string) => {
      const row = rows.get(key)
      return row && row.end > now() + earlyMs ? row : undefined
    },
    settle: (settlements: Parameters<Settle>[0]): Settled[] =>
      settlements.map(({ key, used, wanted, windowEnd }) => {
        const row = rows.get(key)
        const open = row && row.end > now() + earlyMs
        const known = open && row.end === windowEnd
        const handedOut = open && (row.credit >= credit ? credit + 1 : credit - Math.floor((credit - row.credit) / 2))
        const next: Row = open
          ? {
              counted: row.counted + wanted + (known ? used : 0),
              credit: known ? row.credit : (handedOut as number),
              end: row.end,
            }
          : { counted: wanted, credit: credit - Math.floor(credit / 2), end: now() + windowMs }
        rows.set(key, next)
        return { key, ...next, windowEnd: next.end, msLeft: Math.max(next.end - now(), 1) }
      }),
  }
}

type Step =
  | { do: 'ask'; at: number; points: number; times: number }
  /** An instance is killed, with what it has not settled, and started anew. */
  | { do: 'restart'; at: number }
  | { do: 'pass'; ms: number }

const instances = fc.nat({ max: 3 })
const askSingly = fc.record({
  do: fc.constant('ask' as const),
  at: instances,
  points: fc.constant(1),
  times: fc.integer({ min: 1, max: 12 }),
})
const ask = fc.record({
  do: fc.constant('ask' as const),
  at: instances,
  points: fc.integer({ min: 1, max: 9 }),
  times: fc.integer({ min: 1, max: 12 }),
})
const restart = fc.record({ do: fc.constant('restart' as const), at: instances })
const pass = fc.record({ do: fc.constant('pass' as const), ms: fc.integer({ min: 1, max: 400 }) })

/** Runs the steps in whatever order the scheduler lets requests, answers and steps happen. */
async function play(steps: Step[], limit: RateLimit, scheduler: fc.Scheduler) {
  let time = 1_000_000
  const database = modelDatabase(limit, () => time)
  /** Points admitted by the end of the window in which that was. */
  const admittedIn = new Map<number, number>()
  let refusals = 0
  let outsideOfWindows = 0
  const note = (end: number, points: number) => admittedIn.set(end, (admittedIn.get(end) ?? 0) + points)
  function start(offset: number) {
    const own = { settledIn: 0, take: undefined as unknown as Take }
    own.take = sharedAllowance({
      name: 'LIMIT',
      limit,
      // Each has a clock that began at another time.
      clock: () => time - offset,
      async settle(settlements) {
        await scheduler.schedule(Promise.resolve(), 'request')
        const answer = database.settle(settlements)
        await scheduler.schedule(Promise.resolve(), 'answer')
        own.settledIn = answer[0]!.windowEnd
        return answer
      },
    })
    return own
  }
  const alive = Array.from({ length: 4 }, (_, at) => start(at * 12_345))
  function perform(step: Step): void {
    if (step.do === 'pass') time += step.ms
    else if (step.do === 'restart') alive[step.at] = start(time - step.at)
    else {
      for (let time = 0; time < step.times; time++) askOnce(alive[step.at]!, step.points)
    }
  }
  function askOnce(own: ReturnType<typeof start>, points: number): void {
    try {
      const wait = own.take('alpha', points)
      if (wait) {
        wait.then(
          () => note(own.settledIn, points),
          () => refusals++,
        )
        return
      }
      const open = database.open('alpha')
      if (open) note(open.end, points)
      else outsideOfWindows++
    } catch {
      refusals++
    }
  }
  scheduler.scheduleSequence(steps.map(step => ({ label: step.do, builder: async () => perform(step) })))
  await scheduler.waitIdle()
  return { admittedIn, refusals, outsideOfWindows }
}

const limits = fc.constantFrom(1, 10, 20, 47, 100, 500, 2_000)

test('whatever the interleaving, and whoever starts or dies, no window sees more than the limit and a tenth', async t => {
  await fc.assert(
    fc.asyncProperty(
      fc.scheduler(),
      fc.array(fc.oneof({ weight: 6, arbitrary: ask }, restart, { weight: 4, arbitrary: pass }), { maxLength: 60 }),
      limits,
      async (scheduler, steps, points) => {
        const limit = { count: points, windowSeconds: 1 }
        const { admittedIn, outsideOfWindows } = await play(steps, limit, scheduler)
        if (outsideOfWindows > 0) throw new Error('admitted without a window')
        for (const admitted of admittedIn.values()) {
          if (admitted > limit.count * 1.1) throw new Error(`${admitted} of ${limit.count}`)
        }
      },
    ),
    { numRuns: 2_000 },
  )
  t.pass()
})

test('whatever the interleaving, whoever asks for no more than the limit gets all of it, and whoever asks for more gets the limit', async t => {
  await fc.assert(
    fc.asyncProperty(
      fc.scheduler(),
      fc.array(askSingly, { maxLength: 40 }),
      limits,
      async (scheduler, steps, points) => {
        const limit = { count: points, windowSeconds: 3_600 }
        const asked = steps.reduce((sum, step) => sum + step.times, 0)
        const { admittedIn, refusals } = await play(steps, limit, scheduler)
        const [admitted = 0] = admittedIn.values()
        if (asked <= limit.count && refusals > 0) throw new Error(`${refusals} refused of ${asked}`)
        if (admitted < Math.min(asked, limit.count)) throw new Error(`${admitted} admitted of ${asked}`)
      },
    ),
    { numRuns: 1_000 },
  )
  t.pass()
})
