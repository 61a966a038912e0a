/** Daily partitions: made ahead of time, dropped when the retention is over. */
import type pg from 'pg'

const partitionedTables = ['health_reports', 'decisions', 'audit_events', 'audit_seals'] as const

/** Days made ahead: a server that is down for longer than this writes into the default partition, which is harmless. */
const daysAhead = 7
const dayMs = 86_400_000

/** Makes the partitions of today and the days ahead, and drops those older than `retentionDays`. Safe to run anywhere, at any time. */
export async function maintainPartitions(pool: pg.Pool, retentionDays: number, nowMs: number): Promise<void> {
  const today = Math.floor(nowMs / dayMs)
  const client = await pool.connect()
  try {
    // One instance at a time; the others find the work done.
    await client.query('begin')
    await client.query(`select pg_advisory_xact_lock(hashtext('edgemesh partitions'))`)
    for (const table of partitionedTables) {
      const existing = await client.query<{ name: string }>(
        'select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = $1::regclass',
        [table],
      )
      const names = new Set(existing.rows.map(row => row.name))
      for (let day = today; day <= today + daysAhead; day++) {
        const name = `${table}_${dayStamp(day)}`
        if (names.has(name)) continue
        await client.query('savepoint partition')
        try {
          await client.query(
            `create table ${name} partition of ${table} for values from ('${isoDay(day)}') to ('${isoDay(day + 1)}')`,
          )
        } catch (error) {
          // Rows of that day already lie in the default partition: they stay there, whole and found as ever.
          if ((error as { code?: string }).code !== '23514') throw error
          await client.query('rollback to savepoint partition')
        }
      }
      const oldest = `${table}_${dayStamp(today - retentionDays)}`
      for (const name of names) {
        if (/_\d{8}$/.test(name) && name < oldest) await client.query(`drop table ${name}`)
      }
    }
    await client.query('commit')
  } catch (error) {
    await client.query('rollback').catch(() => {})
    throw error
  } finally {
    client.release()
  }
}

const isoDay = (day: number) => new Date(day * dayMs).toISOString()
const dayStamp = (day: number) => isoDay(day).slice(0, 10).replaceAll('-', '')
