/**
 * What goes when it is older than AUDIT_RETENTION_DAYS: days of audit and of health reports (`partitions.ts`), and, a few rows
 * at a time, what would else grow for ever: connections that have ended, and tokens that nobody can use any more, with
 * their redemptions.
 */
import type pg from 'pg'
import type { Log } from '../telemetry/log.ts'
import { maintainPartitions } from './partitions.ts'

const rowsPerBatch = 1_000
/** Of one kind and run, of which there is one every ten minutes: far more than a busy fleet leaves behind. */
const batchesMax = 100
const dayMs = 86_400_000

/** Rows that another instance removes at this moment are left to it. */
const expired = [
  {
    what: 'connections',
    sql: `
      delete from connections where id in (
        select id from connections where granted_at < $1 and ended_at < $1 and status <> 'active'
        order by granted_at limit ${rowsPerBatch} for update skip locked)`,
  },
  {
    // A token is kept for as long as a device that it let in may ask again, or still waits for an approval.
    what: 'token redemptions',
    sql: `
      delete from token_redemptions where (token_id, public_key_sha256) in (
        select r.token_id, r.public_key_sha256 from enrollment_tokens t join token_redemptions r on r.token_id = t.id
        where least(t.expires_at, t.revoked_at) < $1 and r.redeemed_at < $1 and coalesce(r.completed_at, $1) <= $1
          and not exists (select from devices d where d.id = r.device_id and d.status = 'pending')
        limit ${rowsPerBatch} for update of r skip locked)`,
  },
  {
    what: 'enrollment tokens',
    sql: `
      delete from enrollment_tokens where id in (
        select t.id from enrollment_tokens t
        where least(t.expires_at, t.revoked_at) < $1
          and not exists (select from token_redemptions r where r.token_id = t.id)
        limit ${rowsPerBatch} for update skip locked)`,
  },
]

/** Safe to run anywhere, at any time, by several instances at once. */
export async function applyRetention(pool: pg.Pool, retentionDays: number, nowMs: number, log: Log): Promise<void> {
  const postponed = await maintainPartitions(pool, retentionDays, nowMs)
  if (postponed > 0) log.info({ postponed }, 'partitions are in use: some were not made or dropped, and will be later')
  const before = new Date(nowMs - retentionDays * dayMs)
  for (const { what, sql } of expired) {
    let removed = 0
    for (let batch = 0; batch < batchesMax; batch++) {
      const { rowCount } = await pool.query(sql, [before])
      removed += rowCount ?? 0
      if ((rowCount ?? 0) < rowsPerBatch) break
    }
    if (removed > 0) log.info({ removed }, `${what} older than the retention were removed`)
  }
}
