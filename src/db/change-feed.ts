/**
 * The change feed: what one instance learns takes effect on all of them.
 *
 * Who changes a fact calls `announce` inside the transaction that changes it; PostgreSQL delivers the keys to every
 * instance once that transaction has committed. A key is `<kind>:<id>`, such as `device:alpha`. With the keys travels when
 * they were announced, by the database's clock (`at:<ms>`). The clocks of instances differ, so each estimates from its
 * ticks how far the database's is from its own, and hears of that moment in terms of its own.
 *
 * Each instance also sends itself a tick through the feed. Notifications arrive in the order of their commits, so a tick
 * that has come back proves that every change committed before it was sent has come too. States:
 *
 * - `live`: the newest tick to come back was sent less than `behindAfterMs` ago. Memory may be used.
 * - `behind`: it was not, or the connection is gone. Nothing may be decided from memory (`caughtUp` waits).
 *
 * A connection that was lost may have lost notifications with it. When it is back, `reset` listeners drop all they
 * have cached before the feed is `live` again.
 */
import type pg from 'pg'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import type { EntityManager } from './orm.ts'
import type { DatabaseServers } from './servers.ts'

export type ChangeFeed = {
  /** Keys that have changed, as they arrive. `announcedAtMs`: when, by this instance's clock; absent if that was not said. */
  onChange(listener: (keys: string[], announcedAtMs?: number) => void): void
  /** Anything may have changed: drop all that is cached. */
  onReset(listener: () => void): void
  /** What the database's clock shows when this instance's shows `ms`. */
  databaseTimeMs(ms: number): number
  /** Age of the newest tick that has come back, in ms. */
  lagMs(): number
  isLive(nowMs?: number): boolean
  /** Resolves once memory may be used. @throws Fault UNAVAILABLE `FACTS_BEHIND` when that takes too long */
  caughtUp(): Promise<void>
  stop(): Promise<void>
}

const channel = 'edgemesh_changes'
const tickMs = 250
const behindAfterMs = 1_000
/** How long a call waits for a feed that is behind before it is told to try again. */
const waitMs = 1_500
const connectTimeoutMs = 3_000
const reconnectMinMs = 100
const reconnectMaxMs = 2_000
/** PostgreSQL takes payloads under 8,000 bytes. */
const payloadBytesMax = 7_000
/** The clocks are compared by the quickest of so many ticks: two seconds of them. */
const ticksCompared = 8

/** Tells every instance that the facts behind `keys` have changed, if and when the transaction of `em` commits. */
export async function announce(em: EntityManager, keys: string[]): Promise<void> {
  for (const payload of announcements(keys)) await em.execute(`select ${announcing('?')}`, [payload])
}

/**
 * What announces, for a statement of one's own: SQL to be selected.
 *
 * @param payload SQL that stands for one of `announcements`
 */
export function announcing(payload: string): string {
  return `pg_notify('${channel}', 'at:' || round(extract(epoch from clock_timestamp()) * 1000, 3) || E'\\n' || ${payload})`
}

/** The same for a batch that goes through the pool: the payloads, each to be announced by `announcing`. */
export function announcements(keys: string[]): string[] {
  const payloads: string[] = []
  let payload = ''
  for (const key of keys) {
    if (payload && payload.length + key.length + 1 > payloadBytesMax) {
      payloads.push(payload)
      payload = ''
    }
    payload += payload ? `\n${key}` : key
  }
  if (payload) payloads.push(payload)
  return payloads
}

/** The keys of a payload, and when it was announced. A key `at:…` is none: versions before know of no moment. */
export function readPayload(payload: string): { keys: string[]; announcedAtMs: number | undefined } {
  const keys = payload.split('\n')
  const [first = ''] = keys
  if (!first.startsWith('at:')) return { keys, announcedAtMs: undefined }
  const announcedAtMs = Number(first.slice('at:'.length))
  return { keys: keys.slice(1), announcedAtMs: Number.isFinite(announcedAtMs) ? announcedAtMs : undefined }
}

export const changeChannel = channel

/** Connects and listens; resolves when the first tick has come back. */
export async function startChangeFeed(options: {
  servers: DatabaseServers
  instanceId: string
  log: Log
  clock?: Clock
}): Promise<ChangeFeed> {
  const { servers, clock = systemClock } = options
  const changeListeners: ((keys: string[], announcedAtMs?: number) => void)[] = []
  const resetListeners: (() => void)[] = []
  const waiting = new Set<() => void>()
  const tickPrefix = `tick:${options.instanceId}:`
  let client: pg.Client | undefined
  const databaseClock = compareClocks()
  let newestTickSentAt = 0
  /** Where a tick is under way. The next waits for it: a database that is slow is not asked faster than it answers. */
  let ticking: pg.Client | undefined
  /** Whether a tick has come back on the connection that there is now. */
  let isVouchedFor = false
  let stopped = false
  let reconnectTimer: NodeJS.Timeout | undefined
  let failures = 0

  const isLive = (nowMs = clock()) => isVouchedFor && nowMs - newestTickSentAt < behindAfterMs

  function receive(payload: string): void {
    if (payload.startsWith('tick:')) {
      if (!payload.startsWith(tickPrefix)) return
      newestTickSentAt = Number(payload.slice(tickPrefix.length))
      isVouchedFor = true
      if (isLive()) {
        for (const resume of waiting) resume()
        waiting.clear()
      }
      return
    }
    const { keys, announcedAtMs } = readPayload(payload)
    const at = announcedAtMs === undefined ? undefined : announcedAtMs - databaseClock.aheadMs()
    for (const listener of changeListeners) listener(keys, at)
  }

  async function connect(): Promise<void> {
    const next = new servers.Client({
      connectionTimeoutMillis: connectTimeoutMs,
      query_timeout: connectTimeoutMs,
      application_name: 'edgemesh change feed',
      keepAlive: true,
    })
    next.on('error', error => lost(next, error))
    next.on('end', () => lost(next, new Error('connection ended')))
    next.on('notification', message => {
      if (next === client) receive(message.payload ?? '')
    })
    try {
      await next.connect()
      await next.query(`listen ${channel}`)
    } catch (error) {
      next.end().catch(() => {})
      throw error
    }
    if (stopped) {
      await next.end()
      return
    }
    client = next
    failures = 0
    for (const listener of resetListeners) listener()
    // From here on the connection is in use: should it fail, `lost` makes the next one.
    await tick(next).catch(error => lost(next, error))
  }

  function lost(which: pg.Client, error: Error): void {
    if (which !== client || stopped) return
    client = undefined
    isVouchedFor = false
    options.log.warn({ err: error }, 'change feed lost; nothing is decided from memory until it is back')
    which.end().catch(() => {})
    reconnectSoon()
  }

  function reconnectSoon(): void {
    if (stopped) return
    const ceiling = Math.min(reconnectMaxMs, reconnectMinMs * 2 ** failures++)
    reconnectTimer = setTimeout(
      () => {
        connect().then(
          () => options.log.info('change feed is back'),
          error => {
            options.log.debug({ err: error }, 'change feed can not connect yet')
            reconnectSoon()
          },
        )
      },
      ceiling * (0.5 + Math.random() / 2),
    )
  }

  async function tick(on: pg.Client): Promise<void> {
    const sentAtMs = clock()
    ticking = on
    const { rows } = await on.query<{ ms: number }>(
      `select pg_notify('${channel}', $1), (extract(epoch from clock_timestamp()) * 1000)::float8 as ms`,
      [`${tickPrefix}${sentAtMs}`],
    )
    if (ticking === on) ticking = undefined
    databaseClock.compare(sentAtMs, rows[0]?.ms ?? Number.NaN, clock())
  }

  await connect()
  const everyTick = setInterval(() => {
    const on = client
    // A tick that fails ends the connection: half-open ones are found that way.
    if (on && ticking !== on) tick(on).catch(error => lost(on, error))
  }, tickMs)

  const feed: ChangeFeed = {
    onChange: listener => void changeListeners.push(listener),
    onReset: listener => void resetListeners.push(listener),
    databaseTimeMs: ms => ms + databaseClock.aheadMs(),
    lagMs: () => clock() - newestTickSentAt,
    isLive,
    caughtUp() {
      if (isLive()) return Promise.resolve()
      return new Promise((resolve, reject) => {
        const resume = () => {
          clearTimeout(timer)
          resolve()
        }
        const timer = setTimeout(() => {
          waiting.delete(resume)
          reject(
            new Fault('UNAVAILABLE', 'FACTS_BEHIND', 'this instance has lost touch with the database; try again', {
              retryAfterMs: 1_000,
            }),
          )
        }, waitMs)
        waiting.add(resume)
      })
    },
    async stop() {
      stopped = true
      clearInterval(everyTick)
      clearTimeout(reconnectTimer)
      await client?.end().catch(() => {})
    },
  }
  await feed.caughtUp()
  return feed
}

/**
 * How far another clock is ahead of ours: it was asked at some moment between sending and receiving, so half of what lies
 * between is the most by which the middle of both is wrong. The quickest answer of the last few counts.
 */
export function compareClocks(): {
  compare(sentAtMs: number, theirsMs: number, receivedAtMs: number): void
  aheadMs(): number
} {
  const compared: { tookMs: number; aheadMs: number }[] = []
  let aheadMs = 0
  return {
    compare(sentAtMs, theirsMs, receivedAtMs) {
      const tookMs = receivedAtMs - sentAtMs
      // Ours was set back meanwhile.
      if (tookMs < 0 || !Number.isFinite(theirsMs)) return
      compared.push({ tookMs, aheadMs: theirsMs - (sentAtMs + receivedAtMs) / 2 })
      if (compared.length > ticksCompared) compared.shift()
      const quickest = compared.reduce((best, next) => (next.tookMs < best.tookMs ? next : best))
      aheadMs = quickest.aheadMs
    },
    aheadMs: () => aheadMs,
  }
}
