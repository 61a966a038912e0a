/** Counts of the fleet for the metrics, taken from the database every few seconds, not with every scrape. */
import type pg from 'pg'
import { clockOffsetMsTolerated } from '../clock.ts'
import type { Log } from '../telemetry/log.ts'
import { type PresenceName, presentDevices } from './presence.ts'

export type Census = {
  devicesByStatus(): ReadonlyMap<string, number>
  /** Active ones. */
  devicesByPresence(): ReadonlyMap<PresenceName, number>
  /** Active devices whose posture misses the requirements, is stale, or was never reported. */
  unhealthyDevices(): number
  /** Of devices that were heard of lately: how many have a clock that is wrong, and the most by which one is. */
  clocks(): { wrong: number; offsetMsMax: number }
  stop(): void
}

const intervalMs = 5_000
/**
 * Counting reads every device: a hundredth of a second for ten thousand, a second or two for a million. All instances together
 * must not keep the database busy with it, so who takes long counts seldom.
 */
const restPerCount = 50

export async function startCensus(options: { pool: pg.Pool; maxAgeMs: number; log: Log }): Promise<Census> {
  const { pool, maxAgeMs, log } = options
  let byStatus = new Map<string, number>()
  let byPresence = new Map<PresenceName, number>()
  let unhealthy = 0
  let clocks = { wrong: 0, offsetMsMax: 0 }

  async function count(): Promise<void> {
    const { rows } = await pool.query<{
      status: string
      devices: number
      unhealthy: number
      online: number
      present: number
      active: number
      wrong_clocks: number
      offset_ms_max: number
    }>(
      `select d.status, count(*)::int as devices,
         (count(*) filter (where d.status = 'active' and (p.device_id is null or p.failing <> '[]'
           or p.measured_at < now() - make_interval(secs => $1))))::int as unhealthy,
         (count(*) filter (where d.status = 'active' and here.device_id is not null
           and p.measured_at > now() - make_interval(secs => $1)))::int as online,
         (count(*) filter (where d.status = 'active' and here.device_id is not null))::int as present,
         (count(*) filter (where d.status = 'active'))::int as active,
         (count(*) filter (where p.received_at >= now() - make_interval(secs => $1)
           and abs(p.clock_offset_ms) > $2))::int as wrong_clocks,
         coalesce(max(abs(p.clock_offset_ms)) filter (
           where p.received_at >= now() - make_interval(secs => $1)), 0)::float8 as offset_ms_max
       from devices d left join device_postures p on p.device_id = d.id
         left join (${presentDevices}) here on here.device_id = d.id group by d.status`,
      [maxAgeMs / 1_000, clockOffsetMsTolerated],
    )
    const none = new Map(['pending', 'active', 'quarantined', 'revoked'].map(status => [status, 0]))
    byStatus = new Map([...none, ...rows.map(row => [row.status, row.devices] as const)])
    const { online, present, active } = rows.find(row => row.status === 'active') ?? {
      online: 0,
      present: 0,
      active: 0,
    }
    byPresence = new Map([
      ['online', online],
      ['stale', present - online],
      ['offline', active - present],
    ])
    unhealthy = rows.reduce((sum, row) => sum + row.unhealthy, 0)
    clocks = {
      wrong: rows.reduce((sum, row) => sum + row.wrong_clocks, 0),
      offsetMsMax: Math.max(0, ...rows.map(row => row.offset_ms_max)),
    }
  }

  let timer: NodeJS.Timeout | undefined
  let isStopped = false
  async function countAgainAndAgain(): Promise<void> {
    const startedAt = performance.now()
    await count().catch(error => log.debug({ err: error }, 'devices can not be counted now'))
    if (isStopped) return
    const tookMs = performance.now() - startedAt
    timer = setTimeout(countAgainAndAgain, Math.max(intervalMs, restPerCount * tookMs)).unref()
  }

  await countAgainAndAgain()
  return {
    devicesByStatus: () => byStatus,
    devicesByPresence: () => byPresence,
    unhealthyDevices: () => unhealthy,
    clocks: () => clocks,
    stop() {
      isStopped = true
      clearTimeout(timer)
    },
  }
}
