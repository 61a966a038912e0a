/**
 * The audit log as a sequence: everything that is on record, once, in an order in which one can go on.
 *
 * Neither the times nor the ids of rows can be such an order: a transaction that began earlier may commit later, so
 * whoever asks for "greater than the last one" never sees it. The seals (`seals.ts`) can. Every row comes into the chain of
 * the process that wrote it, with its commit or right after; the seals of one chain have numbers without gaps and become
 * visible in that order. A checkpoint says how far each chain was read, and what comes after it is exactly what was not
 * there before, whoever committed when. It costs the writers nothing, and a reader looks rows up by their keys.
 *
 *     checkpoint: from ─────────────────────────────►       the day before yesterday and older: all read
 *                   writer a   0 1 2 3 4 │ 5 6              read up to 4
 *                   writer b           0 1 │ 2              read up to 1
 *                   writer c               │ 0 1 2          not known yet: a new process
 *
 * What is behind `from` need not be named, so a checkpoint stays small: it names the chains of two days.
 *
 * Not in this sequence: rows of before the first seal, and those of a process that was killed between the commit of an
 * event and its seal, until the next process that starts takes them into its chain (`unsealed.ts`). The same id comes
 * twice only where a process did not learn whether its commit had gone well, and wrote a revocation again.
 */
import type pg from 'pg'
import { decodeRows, readHeads, type SealedRow, sealedTables } from './seals.ts'

/** An event as it is kept. */
export type EventRow = {
  id: string
  at: Date
  actor: string
  method: string
  target: string
  sourceAddress: string
  code: string
  reason: string
  detail: Record<string, unknown>
  instanceId: string
}

/** A row of `decisions`: all that one message asked, each question with its answer. */
export type DecisionsRow = {
  id: string
  at: Date
  deviceId: string
  caller: string
  instanceId: string
  policyRevision: string
  questions: unknown[]
}

export type AuditRecord = { table: 'audit_events'; row: EventRow } | { table: 'decisions'; row: DecisionsRow }
export type AuditTable = AuditRecord['table']

/** How far the log was read. */
export type Checkpoint = {
  /** What was sealed before this has been read. The begin of a day, because partitions go by days. */
  fromMs: number
  /** By writer: its last seal that was read. */
  seen: Map<string, { sequence: number; atMs: number }>
}

/** A seal that was not read before. */
export type NextSeal = { writer: string; sequence: number; atMs: number; rows: SealedRow[] }

/** Seals read at once: at 1,000 rows a seal that is under 3 MB. */
const sealsPerPage = 50
/** Rows looked up at once: at 1 kB an event, and 30 kB a decision of many questions, that is 0.1 to 3 MB. */
const rowsPerPage = 100
const dayMs = 86_400_000
/** A seal becomes visible later than it is dated, by the time of its commit and by what the clocks of instances differ. */
const lateMsMax = dayMs
/**
 * How long a missing seal is waited for. Its successor can only be visible first where a writer has several commits under
 * way; a seal that does not come at all was removed, which is for `edgemesh audit verify` to say.
 */
const gapMsMax = 30_000
/** Names the chains of some 4,000 processes that ran within two days; no request may be larger than 256 kB. */
const checkpointCharactersMax = 180_000

/** Where a reader begins who wants everything that was sealed since then. */
export function checkpointAt(sinceMs: number): Checkpoint {
  return { fromMs: dayOf(sinceMs), seen: new Map() }
}

/** Where a reader begins who wants what comes from now on. */
export async function checkpointOfNow(client: Pick<pg.Pool, 'query'>, nowMs: number): Promise<Checkpoint> {
  const fromMs = dayOf(nowMs - lateMsMax)
  const heads = await readHeads(client, fromMs)
  return { fromMs, seen: new Map(heads.map(({ writer, sequence, atMs }) => [writer, { sequence, atMs }])) }
}

export function copyOf({ fromMs, seen }: Checkpoint): Checkpoint {
  return { fromMs, seen: new Map(seen) }
}

/** Whether a reader at `checkpoint` has read the seal. */
export function isBehind({ fromMs, seen }: Checkpoint, { writer, sequence, atMs }: Omit<NextSeal, 'rows'>): boolean {
  return atMs < fromMs || sequence <= (seen.get(writer)?.sequence ?? -1)
}

export function advance({ seen }: Checkpoint, { writer, sequence, atMs }: Omit<NextSeal, 'rows'>): void {
  seen.set(writer, { sequence, atMs })
}

/** Opaque to callers, and no secret: version, first day, and for each chain its writer, number and time. */
export function checkpointText({ fromMs, seen }: Checkpoint): string {
  const bytes = Buffer.alloc(5 + seen.size * chainBytes)
  bytes.writeUInt8(1, 0)
  bytes.writeUInt32BE(fromMs / dayMs, 1)
  let at = 5
  for (const [writer, { sequence, atMs }] of seen) {
    bytes.write(writer.replaceAll('-', ''), at, 'hex')
    bytes.writeUIntBE(sequence, at + 16, 6)
    bytes.writeUIntBE(atMs, at + 22, 6)
    at += chainBytes
  }
  return bytes.toString('base64url')
}

/** @returns undefined for what `checkpointText` has not made */
export function readCheckpoint(text: string): Checkpoint | undefined {
  if (text.length > checkpointCharactersMax) return undefined
  const bytes = Buffer.from(text, 'base64url')
  if (bytes.length < 5 || bytes.readUInt8(0) !== 1 || (bytes.length - 5) % chainBytes !== 0) return undefined
  const seen: Checkpoint['seen'] = new Map()
  for (let at = 5; at < bytes.length; at += chainBytes) {
    const writer = bytes.toString('hex', at, at + 16).replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')
    const [sequence, atMs] = [bytes.readUIntBE(at + 16, 6), bytes.readUIntBE(at + 22, 6)]
    if (atMs > latestMs) return undefined
    seen.set(writer, { sequence, atMs })
  }
  const checkpoint = { fromMs: bytes.readUInt32BE(1) * dayMs, seen }
  // Buffer skips what is not base64url; and a chain is named once.
  return checkpoint.fromMs <= latestMs && checkpointText(checkpoint) === text ? checkpoint : undefined
}

const chainBytes = 16 + 6 + 6
/** The end of the year 9999, which is all that a PostgreSQL timestamp of ours may be. */
const latestMs = 253_402_300_799_999

type Page = {
  seals: NextSeal[]
  /** Nothing more is there now. */
  isLast: boolean
}

/**
 * The seals behind `checkpoint`, in the order of their times as far as their chains allow. It leaps from writer to writer
 * along the primary key, like `readHeads`; of each chain as many are read as the page may need, so their order is that of
 * all.
 */
export async function sealsAfter(
  client: Pick<pg.Pool, 'query'>,
  { fromMs, seen }: Checkpoint,
  nowMs: number,
): Promise<Page> {
  type Row = { writer: string; sequence: string; atMs: number; previousAtMs: number | null; rows: Buffer }
  const { rows: found } = await client.query<Row>(
    `with recursive writers as (
       (select writer from audit_seals where at >= $1 order by writer limit 1)
       union all
       select (select s.writer from audit_seals s where s.at >= $1 and s.writer > w.writer order by s.writer limit 1)
       from writers w where w.writer is not null
     )
     select next.writer, next.sequence, (extract(epoch from next.at) * 1000)::float8 as "atMs",
       (extract(epoch from next.previous_at) * 1000)::float8 as "previousAtMs", next.rows
     from writers w
     left join unnest($2::uuid[], $3::bigint[]) as seen (writer, sequence) on seen.writer = w.writer
     cross join lateral (
       select s.writer, s.sequence, s.at, s.previous_at, s.rows from audit_seals s
       where s.at >= $1 and s.writer = w.writer and s.sequence > coalesce(seen.sequence, -1)
       order by s.sequence limit ${sealsPerPage}
     ) next
     where w.writer is not null
     order by next.at, next.writer, next.sequence limit ${sealsPerPage}`,
    [new Date(fromMs), [...seen.keys()], [...seen.values()].map(({ sequence }) => sequence)],
  )
  const seals: NextSeal[] = []
  const reached = new Map([...seen].map(([writer, { sequence }]) => [writer, sequence]))
  const heldBack = new Set<string>()
  for (const { writer, sequence: number, atMs, previousAtMs, rows } of found) {
    const sequence = Number(number)
    const before = reached.get(writer)
    const follows = before === undefined ? sequence === 0 || (previousAtMs ?? 0) < fromMs : sequence === before + 1
    if (!follows && atMs > nowMs - gapMsMax) heldBack.add(writer)
    if (heldBack.has(writer)) continue
    reached.set(writer, sequence)
    seals.push({ writer, sequence, atMs, rows: decodeRows(rows) })
  }
  return { seals, isLast: found.length < sealsPerPage || seals.length === 0 }
}

/** Forgets the chains of days that nobody will write to any more. For who has read all that there is. */
export function forgetOld(checkpoint: Checkpoint, nowMs: number): void {
  const fromMs = dayOf(nowMs - lateMsMax)
  if (fromMs <= checkpoint.fromMs) return
  checkpoint.fromMs = fromMs
  for (const [writer, { atMs }] of checkpoint.seen) if (atMs < fromMs) checkpoint.seen.delete(writer)
}

/** The rows that a seal names, a few at a time. Rows that the retention has dropped are not there any more. */
export async function* recordsOf(
  client: Pick<pg.Pool, 'query'>,
  { rows }: Pick<NextSeal, 'rows'>,
  tables: ReadonlySet<AuditTable>,
): AsyncGenerator<AuditRecord[]> {
  const wanted = rows.filter(({ table }) => tables.has(sealedTables.get(table) as AuditTable))
  for (let at = 0; at < wanted.length; at += rowsPerPage) {
    const page = wanted.slice(at, at + rowsPerPage)
    const records = new Map<string, AuditRecord>()
    for (const [number, name] of sealedTables) {
      const named = page.filter(({ table }) => table === number)
      if (named.length === 0) continue
      const table = name as AuditTable
      const { rows: kept } = await client.query(
        // A row that was copied is shown once: that there are two is for `edgemesh audit verify` to say.
        `select distinct on (t.id) ${columnsOf[table]} from unnest($1::float8[], $2::uuid[]) as named (at_us, id)
         join ${table} t on t.at = to_timestamp(named.at_us / 1000000) and t.id = named.id`,
        [named.map(({ atUs }) => atUs), named.map(({ id }) => id)],
      )
      for (const row of kept) records.set(`${number}/${row.id}`, { table, row: dated(row) } as AuditRecord)
    }
    yield page.flatMap(({ table, id }) => records.get(`${table}/${id}`) ?? [])
  }
}

/** The pool hands times on as PostgreSQL spells them. */
function dated<R extends { at: string }>(row: R) {
  return { ...row, at: new Date(row.at) }
}

const columnsOf: Record<AuditTable, string> = {
  audit_events: `t.id, t.at, t.actor, t.method, t.target, t.source_address as "sourceAddress", t.code, t.reason, t.detail,
    t.instance_id as "instanceId"`,
  decisions: `t.id, t.at, t.device_id as "deviceId", t.caller, t.instance_id as "instanceId",
    t.policy_revision as "policyRevision", t.questions`,
}

function dayOf(ms: number): number {
  return Math.floor(ms / dayMs) * dayMs
}
