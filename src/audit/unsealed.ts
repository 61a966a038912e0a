/**
 * Events whose server was killed between their commit and their seal: the next server that starts takes them into its
 * chain. They are genuine, as their MACs say; but until then their removal would not show, and nobody who follows the log
 * hears of them.
 */
import type pg from 'pg'
import type { Journal } from './journal.ts'
import { decodeRows, keptRow, macOfRow, readHeads, type SealedRow, type SealKey } from './seals.ts'

/** A server that was killed longer ago than this had a successor meanwhile, or none will come. */
const killedBackMs = 7 * 86_400_000
/** A server is taken for gone that has not been seen for so long. */
const unseenSecondsMax = 30
/** How long before its last seal an event may have begun that is not in it, and how long after it. */
const beforeHeadMs = 600_000
const afterHeadMs = 3_600_000
/** Events of one server that are looked at, at about 1 kB each; there are as many as it committed in those minutes. */
const eventsMax = 50_000
const auditEvents = 1

/**
 * Safe to run by several servers at once: they take turns.
 *
 * @param startedAtMs when this process began: what an earlier one of the same name has left is older
 * @returns how many events were sealed
 */
export async function sealLeftovers(options: {
  pool: pg.Pool
  key: SealKey
  journal: Pick<Journal, 'seal'>
  instanceId: string
  startedAtMs: number
}): Promise<number> {
  const { pool, key, journal, instanceId, startedAtMs } = options
  const client = await pool.connect()
  try {
    await client.query(`select pg_advisory_lock(hashtext('edgemesh unsealed events'))`)
    const leftovers: SealedRow[] = []
    for (const chain of await endedWithoutClosing(client, instanceId, startedAtMs)) {
      const genuine = (await ownEventsAround(client, chain, startedAtMs)).filter(
        ({ row, mac }) => mac === macOfRow(key, row),
      )
      const unnamed = new Map(genuine.map(({ row }) => [row.id, row]))
      // Nearly always the chain itself names them all.
      for (const which of ['its own', 'any'] as const) {
        if (unnamed.size > 0) await forgetNamed(client, unnamed, which === 'any' ? undefined : chain.writer)
      }
      leftovers.push(...unnamed.values())
    }
    if (leftovers.length > 0) await journal.seal(leftovers)
    return leftovers.length
  } finally {
    // The lock goes with the connection.
    client.release(true)
  }
}

type Chain = { writer: string; instanceId: string; atMs: number }

async function endedWithoutClosing(client: pg.ClientBase, instanceId: string, nowMs: number): Promise<Chain[]> {
  const heads = await readHeads(client, nowMs - killedBackMs)
  const { rows } = await client.query<Chain>(
    `select s.writer, s.instance_id as "instanceId", (extract(epoch from s.at) * 1000)::float8 as "atMs"
     from unnest($1::uuid[], $2::bigint[]) as head (writer, sequence)
     join audit_seals s on s.at >= $3 and s.writer = head.writer and s.sequence = head.sequence
     where not s.closing and s.at < $4 and (s.instance_id = $5 or not exists (
       select from instances i where i.id = s.instance_id and i.seen_at > now() - interval '${unseenSecondsMax} seconds'))`,
    [
      heads.map(({ writer }) => writer),
      heads.map(({ sequence }) => sequence),
      new Date(nowMs - killedBackMs),
      new Date(nowMs),
      instanceId,
    ],
  )
  return rows
}

async function ownEventsAround(client: pg.ClientBase, { instanceId, atMs }: Chain, startedAtMs: number) {
  type Kept = { atUs: number; content: Record<string, unknown>; mac: string }
  const { rows } = await client.query<Kept>(
    `select (extract(epoch from t.at) * 1000000)::float8 as "atUs", to_jsonb(t) - 'at' - 'mac' as content, t.mac
     from audit_events t where at >= $1 and at < $2 and mac is not null and instance_id = $3 limit ${eventsMax}`,
    [new Date(atMs - beforeHeadMs), new Date(Math.min(atMs + afterHeadMs, startedAtMs)), instanceId],
  )
  return rows.map(({ atUs, content, mac }) => ({ row: keptRow(auditEvents, atUs, content), mac }))
}

/** @param writer whose seals are looked at; undefined: those of all */
async function forgetNamed(
  client: pg.ClientBase,
  unnamed: Map<string, SealedRow>,
  writer: string | undefined,
): Promise<void> {
  const times = [...unnamed.values()].map(({ atUs }) => atUs)
  const firstUs = times.reduce((first, at) => Math.min(first, at))
  const lastUs = times.reduce((last, at) => Math.max(last, at))
  await client.query('begin read only')
  try {
    // A cursor: the seals of a busy hour are many.
    await client.query({
      text: `
        declare unsealed no scroll cursor for select rows from audit_seals
        where at >= to_timestamp($1::float8 / 1000000) and first_at_us <= $2 and last_at_us >= $1::float8
          and ($3::uuid is null or writer = $3)`,
      values: [firstUs, lastUs, writer ?? null],
    })
    for (;;) {
      const { rows } = await client.query<{ rows: Buffer }>('fetch 100 from unsealed')
      for (const row of rows.flatMap(seal => decodeRows(seal.rows))) unnamed.delete(row.id)
      if (rows.length === 0 || unnamed.size === 0) return
    }
  } finally {
    await client.query('rollback')
  }
}
