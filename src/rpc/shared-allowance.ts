/**
 * A limit that all instances share, for what is counted with every message: nearly always without asking anybody.
 *
 *     const limit = sharedAllowance({ name: 'RATE_LIMIT_CONNECTIONS', limit, settle: settleIn(pool, …) })
 *     const wait = limit('spiffe://…/device/alpha', 3) // throws when it is too often
 *     if (wait) await wait
 *
 * What is admitted is counted here at once, and in the database later. How much may be counted here only is this
 * instance's share of a credit, which is a tenth of the limit. In each window of a key:
 *
 * 1. who comes first waits until the database has told what is counted so far and when the window ends. It hands out a
 *    share with that, half of the credit that is left, rounded up, so that the shares of all who ever ask are never more than it
 * 2. then messages are admitted here, up to the share; from half of it on, what was admitted is settled behind their back
 * 3. who finds the share spent waits for the settlement that is under way, and is counted with it, exactly
 * 4. what is over the limit by what is known is refused here, until the window is over
 *
 * Why no window sees more than the limit and a tenth, however many instances race, start or die: what the database counts
 * itself is never admitted beyond the limit. When its count reaches the limit, each instance has at most its share that is
 * not in it, be it that it was admitted before or will be until it settles next; and with that it learns of the limit and
 * stops. An instance that forgot a key, or died with what it had not settled, has lost a share and can only get another from
 * what is left. And nobody who stays under the limit is refused: nothing is counted twice, or for another window.
 *
 * Where messages are few, the shares are small and nearly each message is settled. `gatherMs` then has many keys settled together.
 *
 * When the database is away the shares are used up, and then nobody is let through. The rows are not logged: when
 * PostgreSQL itself crashes, windows begin anew.
 */
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { LRUCache } from 'lru-cache'
import type pg from 'pg'
import { untilCommitted } from '../db/failure.ts'
import type { RateLimit } from '../settings.ts'
import { databaseMs, earlyMs, rateLimited } from './limits.ts'

/** What an instance has to say and to ask of one key. */
export type Settlement = {
  key: string
  /** What was admitted in `windowEnd` and is not counted yet. */
  used: number
  /** What waits to be admitted. */
  wanted: number
  /** The window of which the instance has its share, by the database's clock; 0: it knows of none. */
  windowEnd: number
}

export type Settled = {
  key: string
  /** What is counted in the window, `wanted` included, whether there was room for it or not. */
  counted: number
  /** How much of the credit has been handed out, the share of this instance included; more than there is: it got none. */
  credit: number
  windowEnd: number
  msLeft: number
}

/** Counts for all instances, each key by itself and never two at a time. */
export type Settle = (settlements: Settlement[]) => Promise<Settled[]>

type Waiting = { points: number; admit: () => void; refuse: (error: unknown) => void }

type Allowance = {
  key: string
  /** The window that all else here is about; 0 before the first is known. */
  windowEnd: number
  /** It does not end before this, by our clock, as of `learnedAt`: what the database said was some time on its way. */
  endsEarliest: number
  endsLatest: number
  learnedAt: number
  /** What the database had counted when it was asked last. */
  counted: number
  /** How much may be admitted here without being counted there. */
  share: number
  unsettled: number
  /** The part of `unsettled` that is on its way to the database. */
  underWay: number
  waiting: Waiting[]
}

/** The part of the limit by which all instances together may exceed it. */
const creditFraction = 0.1
/** Keys remembered, some 300 bytes each. One that is forgotten has only lost its share. */
const keysMax = 50_000
/** Keys settled in one statement: a few milliseconds of the database's time. */
const settlementsMax = 500
/** Clocks are slewed by half a millisecond a second at most; ours and the database's may be slewed apart. */
const driftFraction = 0.001
const keyCharactersMax = 200

/** By how much all instances together may exceed the limit. */
export function creditOf({ count }: RateLimit): number {
  return Math.floor(count * creditFraction)
}

/**
 * The share of whom `handedOut` was told: each gets half of what is left, rounded up, which leaves what it got or one less.
 * Where another limit is in force elsewhere, what was handed out before is none of these sums; then the lesser is safe.
 */
function shareOf(credit: number, handedOut: number): number {
  const left = Math.max(credit - handedOut, 0)
  for (let sum = 0; sum < credit; ) {
    const share = Math.ceil((credit - sum) / 2)
    sum += share
    if (sum === handedOut) return share
  }
  return left
}

/**
 * @param name the setting, for the message
 * @param gatherMs how long a settlement waits for others to go with it, at the expense of those who wait for it
 * @param clock one that never jumps
 * @returns a function that takes `points` from the allowance of `key`, at once or after a wait
 * @throws Fault RESOURCE_EXHAUSTED `RATE_LIMITED` with RetryInfo; what `settle` throws when that is needed
 */
export function sharedAllowance({
  name,
  limit,
  settle,
  gatherMs = 0,
  clock = () => performance.now(),
}: {
  name: string
  limit: RateLimit
  settle: Settle
  gatherMs?: number
  clock?: () => number
}): (key: string, points: number) => void | Promise<void> {
  const credit = creditOf(limit)
  const allowances = new LRUCache<string, Allowance>({ max: keysMax })
  /** To be settled next. */
  const due = new Map<string, Allowance>()
  /** Being settled: they must not be made a second time when they are forgotten meanwhile. */
  let settling = new Map<string, Allowance>()
  let running = false

  function find(key: string): Allowance {
    const kept = allowances.get(key)
    if (kept) return kept
    const allowance = due.get(key) ?? settling.get(key) ?? newAllowance(key)
    allowances.set(key, allowance)
    return allowance
  }

  function request(allowance: Allowance): void {
    due.set(allowance.key, allowance)
    if (running) return
    running = true
    queueMicrotask(settleAll)
  }

  /** One statement at a time, in which all that came meanwhile is settled. */
  async function settleAll(): Promise<void> {
    while (due.size > 0) {
      if (gatherMs > 0 && due.size < settlementsMax) await sleep(gatherMs)
      settling = new Map([...due].slice(0, settlementsMax))
      for (const key of settling.keys()) due.delete(key)
      await settleSome([...settling.values()])
    }
    settling = new Map()
    running = false
  }

  async function settleSome(some: Allowance[]): Promise<void> {
    const waiting = some.map(allowance => allowance.waiting.splice(0))
    const asked = some.map((allowance, at): Settlement => {
      allowance.underWay = allowance.unsettled
      const wanted = waiting[at]!.reduce((sum, { points }) => sum + points, 0)
      return { key: allowance.key, used: allowance.underWay, wanted, windowEnd: allowance.windowEnd }
    })
    const askedAt = clock()
    try {
      const settled = new Map((await settle(asked)).map(one => [one.key, one]))
      const now = clock()
      some.forEach((allowance, at) => {
        const answer = settled.get(allowance.key)
        if (!answer) throw new Error(`no settlement of ${allowance.key}`)
        learn(allowance, answer, askedAt, now)
        admit(waiting[at]!, limit.count - (answer.counted - asked[at]!.wanted), allowance.endsLatest - now)
      })
    } catch (error) {
      // Whether it was counted is not known: it stays a part of the share, so that the limit holds in any case.
      for (const allowance of some) allowance.underWay = 0
      for (const { refuse } of waiting.flat()) refuse(error)
    }
  }

  function learn(allowance: Allowance, answer: Settled, askedAt: number, now: number): void {
    if (answer.windowEnd === allowance.windowEnd) {
      allowance.unsettled -= allowance.underWay
    } else {
      // What was not settled in the window before counts for nothing any more.
      allowance.unsettled = 0
      allowance.share = shareOf(credit, answer.credit)
      allowance.windowEnd = answer.windowEnd
    }
    allowance.underWay = 0
    allowance.counted = answer.counted
    allowance.learnedAt = now
    allowance.endsEarliest = askedAt + answer.msLeft - earlyMs
    allowance.endsLatest = now + answer.msLeft
  }

  /** In the order in which they came, as many as there is room for. */
  function admit(waiting: Waiting[], roomBefore: number, msLeft: number): void {
    let room = roomBefore
    for (const { points, admit, refuse } of waiting) {
      if (points > room) {
        refuse(rateLimited(name, limit, Math.ceil(msLeft)))
        continue
      }
      room -= points
      admit()
    }
  }

  return (key, points) => {
    const now = clock()
    const allowance = find(key)
    if (now < allowance.endsEarliest - (now - allowance.learnedAt) * driftFraction) {
      const { counted, unsettled, share } = allowance
      if (counted + unsettled + points > limit.count) {
        throw rateLimited(name, limit, Math.ceil(allowance.endsLatest - now))
      }
      if (unsettled + points <= share) {
        allowance.unsettled += points
        if ((allowance.unsettled - allowance.underWay) * 2 >= share) request(allowance)
        return
      }
    }
    return new Promise((admit, refuse) => {
      allowance.waiting.push({ points, admit, refuse })
      request(allowance)
    })
  }
}

function newAllowance(key: string): Allowance {
  return {
    key,
    windowEnd: 0,
    endsEarliest: Number.NEGATIVE_INFINITY,
    endsLatest: 0,
    learnedAt: 0,
    counted: 0,
    share: 0,
    unsettled: 0,
    underWay: 0,
    waiting: [],
  }
}

/**
 * `$1`: by key, what is used, what is wanted, and the window of which the instance has its share. Rows are locked in the
 * order of their keys, so that instances which settle the same ones wait for each other and never in a circle.
 *
 * The clock is the database's, read once a row and after the wait for its lock. A window whose end is further away than
 * windows are long is none: the clock has been set back.
 */
const settlementStatement = `
  insert into rate_limits as kept (key, points, expire, credit)
  select key, (value ->> 1)::int, ${databaseMs} + $2::int, $3::int - $3::int / 2
  from jsonb_each($1::jsonb) order by key collate "C"
  on conflict (key) do update set (points, expire, credit) = (
    select
      case when not open then excluded.points
        else kept.points + excluded.points + case when known then ($1::jsonb -> kept.key ->> 0)::int else 0 end end,
      case when open then kept.expire else ms + $2::int end,
      case when not open then $3::int - $3::int / 2
        when known then kept.credit
        when kept.credit >= $3::int then $3::int + 1
        else $3::int - ($3::int - kept.credit) / 2 end
    from (
      select ms, kept.expire > ms + ${earlyMs} and kept.expire <= ms + $2::int as open,
        kept.expire = ($1::jsonb -> kept.key ->> 2)::bigint as known
      from (select ${databaseMs} as ms) as clock
    ) as was)
  returning key, points, credit, expire, greatest(expire - ${databaseMs}, 1)::int as ms_left`

type Row = { key: string; points: number; credit: number; expire: string; ms_left: number }

/** Counts in the table `rate_limits`. @param name sets the keys apart from those of other limits */
export function settleIn(pool: Pick<pg.Pool, 'query'>, name: string, limit: RateLimit): Settle {
  return async settlements => {
    const byRow = new Map(settlements.map(one => [rowKey(name, one.key), one]))
    const given = Object.fromEntries(
      [...byRow].map(([key, { used, wanted, windowEnd }]) => [key, [used, wanted, windowEnd]]),
    )
    const asked = [JSON.stringify(given), limit.windowSeconds * 1_000, creditOf(limit)]
    const { rows } = await untilCommitted(() => pool.query<Row>(settlementStatement, asked))
    return rows.map(({ key, points, credit, expire, ms_left: msLeft }) => ({
      key: byRow.get(key)!.key,
      counted: points,
      credit,
      windowEnd: Number(expire),
      msLeft,
    }))
  }
}

/** A trust domain may be longer than the column has room for. */
function rowKey(name: string, key: string): string {
  return `${name} ${key.length <= keyCharactersMax ? key : createHash('sha256').update(key).digest('base64url')}`
}
