/**
 * Makes heartbeats durable: many devices' reports in one statement.
 *
 * A report waits until the batch is full or its time is up, then for the commit; only then is it acknowledged. While the
 * database is away reports wait (acknowledgements slow down, streams stay); the queue is bounded, and what does not fit
 * is refused, not forgotten.
 */
import type pg from 'pg'
import { announcements, announcing } from '../db/change-feed.ts'
import { isDatabaseOutage, untilCommitted } from '../db/failure.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import { apart, database, spanned } from '../telemetry/tracing.ts'
import type { PostureValues } from './posture.ts'

export type Report = {
  deviceId: string
  sequence: number
  posture: PostureValues
  failing: string[]
  measuredAtMs: number
  receivedAtMs: number
  /** How far the device's clock is ahead of ours; undefined: it has not said. */
  clockOffsetMs: number | undefined
  /** What the device goes by; empty: it has not said. */
  trustBundleId: string
  /** Of the certificate over which it came. */
  issuerKeyId: string
  /** What policy can see has changed: every instance has to hear of it. */
  announce: boolean
}

export type ReportWriter = {
  /** Resolves when the report is committed. @throws Fault UNAVAILABLE `REPORTS_BEHIND` when too many wait */
  write(report: Report): Promise<void>
  drained(): Promise<void>
}

/** A flush is due at this many reports or after this time, whichever comes first. */
const batchReportsMax = 500
const flushDelayMs = 100
/** Reports in memory, about 1 kB each: one a stream, and more streams than one instance can hold. */
const queuedReportsMax = 100_000
const retryMs = 500

type Waiting = { report: Report; resolve: () => void; reject: (error: unknown) => void }

/**
 * The newest posture of each device, and the history of all reports.
 *
 * One statement for both and for the announcement: one round trip, one commit, and no other instance hears of a change
 * that is not there yet. Arrays through `unnest` keep one plan for every batch size. Rows come sorted by device, so that
 * two instances that write the same devices wait for each other instead of deadlocking. The join drops reports of
 * devices that were deleted meanwhile.
 */
const writeReports = `
  with posture as (
    insert into device_postures as kept
      (device_id, posture, failing, measured_at, received_at, clock_offset_ms, trust_bundle_id, issuer_key_id)
    select t.device_id, t.posture::jsonb, t.failing::jsonb, t.measured_at, t.received_at,
      t.clock_offset_ms, t.trust_bundle_id, t.issuer_key_id
    from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[], $6::bigint[], $7::text[],
        $8::text[])
      as t(device_id, posture, failing, measured_at, received_at, clock_offset_ms, trust_bundle_id, issuer_key_id)
    join devices on devices.id = t.device_id
    on conflict (device_id) do update set
      posture = excluded.posture, failing = excluded.failing,
      measured_at = excluded.measured_at, received_at = excluded.received_at,
      clock_offset_ms = coalesce(excluded.clock_offset_ms, kept.clock_offset_ms),
      trust_bundle_id = coalesce(nullif(excluded.trust_bundle_id, ''), kept.trust_bundle_id),
      issuer_key_id = excluded.issuer_key_id
    where kept.received_at <= excluded.received_at
  ), history as (
    insert into health_reports (device_id, sequence, posture, measured_at, received_at)
    select t.device_id, t.sequence, t.posture::jsonb, t.measured_at, t.received_at
    from unnest($9::text[], $10::bigint[], $11::text[], $12::timestamptz[], $13::timestamptz[])
      as t(device_id, sequence, posture, measured_at, received_at)
  )
  select ${announcing('payload')} from unnest($14::text[]) as payload`

export function startReportWriter(options: {
  pool: pg.Pool
  log: Log
  /** After the commit: reports that every instance needn't hear of, but this one's memory should. */
  onDurable: (report: Report) => void
}): ReportWriter {
  const { pool, log } = options
  const queue: Waiting[] = []
  let timer: NodeJS.Timeout | undefined
  let flushing: Promise<void> | undefined

  function flushSoon(): void {
    if (flushing) return
    if (queue.length >= batchReportsMax) apart(flushNow)
    else timer ??= apart(() => setTimeout(flushNow, flushDelayMs))
  }

  function flushNow(): void {
    clearTimeout(timer)
    timer = undefined
    flushing ??= flush().finally(() => {
      flushing = undefined
      if (queue.length > 0) flushSoon()
    })
  }

  async function flush(): Promise<void> {
    const batch = queue.splice(0, batchReportsMax)
    for (;;) {
      try {
        await commit(batch.map(waiting => waiting.report))
        break
      } catch (error) {
        // Whoever closes the pool has waited for as long as it could.
        if (!isDatabaseOutage(error) || pool.ending) {
          log.error({ err: error, reports: batch.length }, 'a batch of reports was refused by the database')
          for (const { reject } of batch) reject(error)
          return
        }
        log.warn({ err: error, reports: batch.length + queue.length }, 'reports can not be written yet')
        await new Promise(resolve => setTimeout(resolve, retryMs))
      }
    }
    for (const { report, resolve } of batch) {
      options.onDurable(report)
      resolve()
    }
  }

  async function commit(reports: Report[]): Promise<void> {
    const newest = new Map(reports.map(report => [report.deviceId, report]))
    const latest = [...newest.values()].sort((a, b) => (a.deviceId < b.deviceId ? -1 : 1))
    const changed = new Set(reports.filter(report => report.announce).map(report => `device:${report.deviceId}`))
    const rows = [
      latest.map(report => report.deviceId),
      latest.map(report => JSON.stringify(report.posture)),
      latest.map(report => JSON.stringify(report.failing)),
      latest.map(report => new Date(report.measuredAtMs)),
      latest.map(report => new Date(report.receivedAtMs)),
      latest.map(report => report.clockOffsetMs),
      latest.map(report => report.trustBundleId),
      latest.map(report => report.issuerKeyId),
      reports.map(report => report.deviceId),
      reports.map(report => report.sequence),
      reports.map(report => JSON.stringify(report.posture)),
      reports.map(report => new Date(report.measuredAtMs)),
      reports.map(report => new Date(report.receivedAtMs)),
      announcements([...changed]),
    ]
    await untilCommitted(() => pool.query(writeReports, rows))
  }

  return {
    write(report) {
      if (queue.length >= queuedReportsMax) {
        const message = 'health reports can not be written fast enough; try again'
        return Promise.reject(new Fault('UNAVAILABLE', 'REPORTS_BEHIND', message, { retryAfterMs: retryMs }))
      }
      return spanned('report commit', database, () => {
        return new Promise<void>((resolve, reject) => {
          queue.push({ report, resolve, reject })
          flushSoon()
        })
      })
    },
    async drained() {
      while (flushing || queue.length > 0) {
        flushNow()
        await flushing
      }
    },
  }
}
