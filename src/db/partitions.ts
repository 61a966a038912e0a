/**
 * Daily partitions: made ahead of time, dropped when the retention is over. The owner's functions do it (migration 0005), so
 * that a service that owns nothing can ask for it.
 */
import type pg from 'pg'

const partitionedTables = ['health_reports', 'decisions', 'audit_events', 'audit_seals'] as const

/** Days made ahead: a server that is down for longer than this writes into the default partition, which is harmless. */
const daysAhead = 7
/** Rows of the default partition that are removed under one lock. */
const rowsPerRemoval = 1_000
/**
 * 55P03 is `lock_not_available`, after a second: somebody reads the whole log. 42501 is `insufficient_privilege`: by the clock
 * of the database it is too early.
 */
const laterCodes = ['55P03', '42501']
const dayMs = 86_400_000

/**
 * Makes the partitions of today and the days ahead, and drops those older than `retentionDays`, or than the owner has laid
 * down, whichever is older. Each in a transaction of its own, so that nobody waits for more than one lock. Safe to run
 * anywhere, at any time.
 *
 * @returns how many steps have to be left for later, because others would have waited behind them
 */
export async function maintainPartitions(pool: pg.Pool, retentionDays: number, nowMs: number): Promise<number> {
  const today = Math.floor(nowMs / dayMs)
  let postponed = 0
  async function orLater(sql: string, ...values: unknown[]): Promise<number> {
    try {
      const { rows } = await pool.query<{ done: number }>(`select ${sql}::int as done`, values)
      return rows[0]?.done ?? 0
    } catch (error) {
      if (!laterCodes.includes((error as { code?: string }).code ?? '')) throw error
      postponed++
      return 0
    }
  }

  const { rows: laidDown } = await pool.query<{ days: number }>('select days_min as days from audit_retention')
  const oldest = today - Math.max(retentionDays, laidDown[0]?.days ?? 0)
  for (const table of partitionedTables) {
    const { rows: existing } = await pool.query<{ name: string }>(
      'select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = $1::regclass',
      [table],
    )
    const names = new Set(existing.map(({ name }) => name))
    for (let day = today; day <= today + daysAhead; day++) {
      if (!names.has(`${table}_${dayStamp(day)}`)) await orLater('make_day_partition($1, $2)', table, isoDay(day))
    }
    for (const name of names) {
      const stamp = /_(\d{4})(\d\d)(\d\d)$/.exec(name)
      if (!stamp || name >= `${table}_${dayStamp(oldest)}`) continue
      await orLater('drop_day_partition($1, $2)', table, stamp.slice(1).join('-'))
    }
    let removed: number
    do removed = await orLater('remove_default_rows($1, $2, $3)', table, isoDay(oldest), rowsPerRemoval)
    while (removed > 0)
  }
  return postponed
}

/**
 * How far ahead there are partitions, for who only looks.
 *
 * @returns by table, for how many days from today on there is one without a gap; and the names of those that `maintainPartitions`
 *   should have dropped a day ago
 */
export async function partitionDays(
  client: Pick<pg.Pool, 'query'>,
  retentionDays: number,
  nowMs: number,
): Promise<{ ahead: Record<string, number>; overdue: string[] }> {
  const today = Math.floor(nowMs / dayMs)
  const { rows: laidDown } = await client.query<{ days: number }>('select days_min as days from audit_retention')
  const oldest = today - Math.max(retentionDays, laidDown[0]?.days ?? 0) - 1
  const { rows } = await client.query<{ name: string }>(
    `select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
     where i.inhparent = any ($1::regclass[]::oid[]) order by 1`,
    [partitionedTables],
  )
  const names = new Set(rows.map(({ name }) => name))
  const ahead = partitionedTables.map(table => {
    let days = 0
    while (names.has(`${table}_${dayStamp(today + days)}`)) days++
    return [table, days]
  })
  const overdue = [...names].filter(name => /_\d{8}$/.test(name) && name.slice(-8) < dayStamp(oldest))
  return { ahead: Object.fromEntries(ahead), overdue }
}

const isoDay = (day: number) => new Date(day * dayMs).toISOString().slice(0, 10)
const dayStamp = (day: number) => isoDay(day).replaceAll('-', '')
