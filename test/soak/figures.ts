/** What must not grow while everything goes on, of the instance that lives through it all and of the database. */
import type pg from 'pg'
import { type Flatness, flatness } from './flat.ts'
import type { Instance } from './instance.ts'

export type Series = { name: string; unit: string } & Flatness

const sampleEveryMs = 2_000
/** Tables whose rows are as many as there are things, not as much as happens. */
const steadyTables = ['device_postures', 'device_presence', 'instances', 'rate_limits']
const growingTables = ['audit_events', 'decisions', 'connections', 'health_reports', 'audit_seals']

const mebibyte = 1024 * 1024

/** Figures of the instance that lives through it all, and of the database. */
export function startSampling({ pool, instance, say }: { pool: pg.Pool; instance: Instance; say: () => void }) {
  const kinds = {
    rss: { unit: 'MiB', allowedShare: 0.2, allowedLeast: 40 },
    heap: { unit: 'MiB', allowedShare: 0.15, allowedLeast: 10 },
    // The pool of database connections is full after one fault and empty after another.
    'open files': { unit: '', allowedShare: 0.15, allowedLeast: 30 },
    handles: { unit: '', allowedShare: 0.15, allowedLeast: 30 },
    'event loop late, p99': { unit: 'ms', allowedShare: 0.5, allowedLeast: 250 },
    ...Object.fromEntries(steadyTables.map(table => [table, { unit: 'MiB', allowedShare: 0.3, allowedLeast: 4 }])),
  } as Record<string, { unit: string; allowedShare: number; allowedLeast: number }>
  const samples = new Map<string, { atMs: number; value: number }[]>(Object.keys(kinds).map(name => [name, []]))
  const sizes: { atMs: number; bytes: Map<string, number> }[] = []
  let sampling: Promise<void> | undefined

  async function sample(): Promise<void> {
    const atMs = Date.now()
    const note = (name: string, value: number) => samples.get(name)?.push({ atMs, value })
    const probed = await instance.probe()
    if (probed) {
      note('rss', probed.rssBytes / mebibyte)
      note('heap', probed.heapBytes / mebibyte)
      note('open files', probed.files)
      note('handles', probed.handles)
      note('event loop late, p99', probed.lagMs)
    }
    // While the database is away there is none.
    const bytes = await tableBytes(pool).catch(() => undefined)
    if (!bytes) return
    for (const table of steadyTables) note(table, (bytes.get(table) ?? 0) / mebibyte)
    const growing = new Map(growingTables.map(table => [table, bytes.get(table) ?? 0]))
    if (sizes.length > 1) sizes.pop()
    sizes.push({ atMs, bytes: growing })
  }

  const timer = setInterval(() => {
    say()
    sampling ??= sample().finally(() => {
      sampling = undefined
    })
  }, sampleEveryMs)
  return {
    async stop() {
      clearInterval(timer)
      await sampling
    },
    series(): Series[] {
      return Object.entries(kinds).flatMap(([name, { unit, ...allowed }]) => {
        const flat = flatness(samples.get(name) ?? [], allowed)
        return flat ? [{ name, unit, ...flat }] : []
      })
    },
    growth(): Record<string, number> {
      const [begin, end] = [sizes[0], sizes.at(-1)]
      if (!begin || !end || begin === end) return {}
      const seconds = (end.atMs - begin.atMs) / 1_000
      return Object.fromEntries(
        growingTables.map(table => [
          table,
          Math.round(((end.bytes.get(table) ?? 0) - (begin.bytes.get(table) ?? 0)) / seconds),
        ]),
      )
    },
  }
}

/** With indexes and partitions, by the name of the table that they are of. */
async function tableBytes(pool: pg.Pool): Promise<Map<string, number>> {
  const { rows } = await pool.query<{ name: string; bytes: string }>(
    `select coalesce(parent.relname, c.relname) as name, sum(pg_total_relation_size(c.oid))::text as bytes
     from pg_class c left join pg_inherits i on i.inhrelid = c.oid left join pg_class parent on parent.oid = i.inhparent
     where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace group by 1`,
  )
  return new Map(rows.map(({ name, bytes }) => [name, Number(bytes)]))
}
