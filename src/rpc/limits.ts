/**
 * Rate limits, by source address, by token or by device. What exceeds one is told when to come back.
 *
 * `rateLimit` counts in this instance's memory. `sharedRateLimit` counts in the database, for all instances together, with
 * a statement for whoever comes; `sharedAllowance` (`shared-allowance.ts`) does that for what comes with every message.
 */
import { LRUCache } from 'lru-cache'
import type pg from 'pg'
import type { Call } from '../caller.ts'
import { untilCommitted } from '../db/failure.ts'
import { Fault } from '../fault.ts'
import { networkOf } from '../network.ts'
import type { RateLimit } from '../settings.ts'
import type { Log } from '../telemetry/log.ts'

/** Keys counted at the same time, about 150 bytes each. Whoever has more addresses than that has as many allowances too. */
const keysMax = 100_000

/**
 * @param name the setting, for the message
 * @param clock one that never jumps, in milliseconds
 * @returns a function that takes `points` from the allowance of `key`, in the window that the first call has opened
 * @throws Fault RESOURCE_EXHAUSTED `RATE_LIMITED` with RetryInfo
 */
export function rateLimit(name: string, limit: RateLimit, clock = () => performance.now()) {
  const windows = new LRUCache<string, { points: number; endsAt: number }>({ max: keysMax })
  return (key: string, points = 1): void => {
    const now = clock()
    let window = windows.get(key)
    if (!window || window.endsAt <= now + earlyMs) {
      window = { points: 0, endsAt: now + limit.windowSeconds * 1_000 }
      windows.set(key, window)
    }
    window.points += points
    if (window.points > limit.count) throw rateLimited(name, limit, Math.ceil(window.endsAt - now))
  }
}

/** An enrollment takes one call of a kind; devices that lose answers, and several behind one address, make more. */
const openCallsPerEnrollment = 20
/** What has been counted is forgotten before it is much: a day's addresses of a flood would be gigabytes. */
const openCallWindowSecondsMax = 60

/**
 * For what anyone may call beside Enroll: each call is cheap, but a flood of them is signatures, megabytes of revocation
 * lists and audit events without end. Counts in this instance, by source address; those who have shown a certificate by
 * that, whether it still stands or not.
 *
 * @param name the setting that bounds enrollments
 */
export function openCallLimit(name: string, { count, windowSeconds }: RateLimit) {
  const limit = rateLimit(`${openCallsPerEnrollment} times ${name}`, {
    count: count * openCallsPerEnrollment,
    windowSeconds: Math.min(windowSeconds, openCallWindowSecondsMax),
  })
  return ({ caller, address }: Call): void => limit(caller.kind === 'anonymous' ? networkOf(address) : caller.spiffeId)
}

/** @returns what is thrown, told in words and in RetryInfo */
export function rateLimited(name: string, { count, windowSeconds }: RateLimit, retryAfterMs: number): Fault {
  const message = `more than ${count} in ${windowSeconds} s (${name}); try again later`
  return new Fault('RESOURCE_EXHAUSTED', 'RATE_LIMITED', message, { retryAfterMs })
}

/** Keys over their limit that are refused from memory, about 200 bytes each. Those beyond cost a statement again. */
const exhaustedKeysMax = 10_000
/** Rows of windows that are over; as many at most as callers with an address of their own come within it. */
const sweepMs = 60_000

/**
 * A window is over so much sooner than those are told who have to wait for that. Both ends are rounded to the
 * millisecond, a timer may fire one early, and clocks are slewed: who comes a moment too soon would be refused again.
 */
export const earlyMs = 5

export const databaseMs = '(extract(epoch from clock_timestamp()) * 1000)::bigint'
/**
 * Counts calls under their key, in the window that the first of them has opened.
 *
 * The clock is the database's: an instance whose own runs ahead by a window would never refuse anybody. It is read once,
 * and after the wait for the row's lock, so that every call is counted in the window in which its turn has come.
 */
const countCalls = `
  insert into rate_limits as kept (key, points, expire) values ($1, $2, ${databaseMs} + $3)
  on conflict (key) do update set (points, expire) = (
    select case when kept.expire > clock.ms + ${earlyMs} then kept.points + $2 else $2 end,
           case when kept.expire > clock.ms + ${earlyMs} then kept.expire else clock.ms + $3 end
    from (select ${databaseMs} as ms) as clock)
  returning points, greatest(expire - ${databaseMs}, 1)::int as ms_left`

type Caller = { admit: () => void; refuse: (error: unknown) => void }

/**
 * The number is exact, however many instances race. When the database is away nobody is let through.
 *
 * What a storm costs is bounded: one statement at a time for a key, in which all that came meanwhile are counted; none
 * at all once the key is over its limit, until its window is over.
 *
 * @param name the setting, for the message
 * @param subject what the keys are, such as `address`; sets them apart from those of other limits
 * @returns a function that takes one from the allowance of `key`, of 200 characters at most
 * @throws Fault RESOURCE_EXHAUSTED `RATE_LIMITED` with RetryInfo
 */
export function sharedRateLimit(pool: pg.Pool, name: string, subject: string, limit: RateLimit) {
  /**
   * When the window of a key that is over its limit ends, by `performance.now()`: between these two, since what the
   * database said was some time on its way.
   */
  const exhausted = new LRUCache<string, { earliest: number; latest: number }>({ max: exhaustedKeysMax })
  /** By key that is being counted: who has come meanwhile. */
  const waiting = new Map<string, Caller[]>()

  async function count(key: string, callers: Caller[]): Promise<void> {
    const askedAt = performance.now()
    try {
      const counted = [`${name} ${subject} ${key}`, callers.length, limit.windowSeconds * 1_000]
      const { rows } = await untilCommitted(() => pool.query<{ points: number; ms_left: number }>(countCalls, counted))
      const { points, ms_left: msLeft } = rows[0] as (typeof rows)[0]
      if (points >= limit.count) {
        exhausted.set(key, { earliest: askedAt + msLeft - earlyMs, latest: performance.now() + msLeft })
      }
      const admitted = limit.count - (points - callers.length)
      callers.forEach(({ admit, refuse }, place) => {
        if (place < admitted) admit()
        else refuse(rateLimited(name, limit, msLeft))
      })
    } catch (error) {
      for (const { refuse } of callers) refuse(error)
    }
  }

  async function countAll(key: string, first: Caller): Promise<void> {
    const callers = [first]
    waiting.set(key, callers)
    while (callers.length > 0) await count(key, callers.splice(0))
    waiting.delete(key)
  }

  return async (key: string): Promise<void> => {
    const end = exhausted.get(key)
    const now = performance.now()
    if (end && now < end.earliest) throw rateLimited(name, limit, Math.ceil(end.latest - now))
    return new Promise((resolve, reject) => {
      const caller = { admit: resolve, refuse: reject }
      const together = waiting.get(key)
      if (together) together.push(caller)
      else void countAll(key, caller)
    })
  }
}

/** Removes what shared limits have counted in windows that are over. @returns what ends it */
export function sweepRateLimits(pool: pg.Pool, log: Log, everyMs = sweepMs): () => void {
  const timer = setInterval(() => {
    pool
      .query(`delete from rate_limits where expire <= ${databaseMs}`)
      .catch(error => log.debug({ err: error }, 'rate limits can not be swept now'))
  }, everyMs)
  timer.unref()
  return () => clearInterval(timer)
}
