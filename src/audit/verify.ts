/**
 * Verification of the audit log: nothing was changed, removed or inserted since it was written. `seals.ts` says what that
 * proves, and against whom.
 *
 * It reads the database itself, in one snapshot, and believes nobody but the secret:
 *
 * 1. Every chain, seal by seal: its MAC, its place behind the seal before. The rows that it names are looked up and
 *    compared; a sum over their ids is kept for each hour.
 * 2. What chains have said of each other: none is shorter than it was seen to be.
 * 3. The same sum over all rows that there are. Where the two differ, the rows of that hour are gone through one by one.
 *
 * So its memory does not grow with the log, and each row is looked up once.
 */
import { hash } from 'node:crypto'
import type pg from 'pg'
import {
  decodeRows,
  type Head,
  keptRow,
  macOfRow,
  macOfSeal,
  type Seal,
  type SealedRow,
  type SealKey,
  sealedRowBytes,
  sealedTables,
} from './seals.ts'

/** What is wrong, where. */
export type Finding = {
  kind:
    | 'row-changed'
    | 'row-removed'
    | 'row-inserted'
    | 'row-repeated'
    | 'seal-changed'
    | 'seal-removed'
    | 'seals-missing'
    | 'other-secret'
  table: string
  /** Of a row: its id. Of a seal: `writer/sequence`. */
  id: string
  at: string
  message: string
}

export type Verification = {
  ok: boolean
  /** What was looked at begins here. */
  since: string
  seals: number
  rows: number
  /** Rows from before the first seal, which nothing speaks for. */
  rowsBeforeSeals: number
  /** Genuine, but not in a chain: their writer is about to seal them, or died before it could. */
  rowsNotChained: number
  /** Writers that were killed, or still write. */
  open: number
  findings: Finding[]
  /** Findings beyond `findingsMax`. */
  furtherFindings: number
  /** Keep these elsewhere: a later verification has to have them all, or longer ones. */
  heads: Head[]
}

export type Progress = (done: { seals: number; rows: number; at: string }) => void

/** Findings that are kept; a log that was tampered with at large has as many as it has rows. */
const findingsMax = 1_000
/** Seals read at once: at 1,000 rows a seal that is under 6 MB. */
const sealsPerPage = 100
/** Rows looked up or read at once, at about 1 kB each. */
const rowsPerPage = 2_000
/** A statement may take longer than one of the service: it counts a whole log. */
const statementTimeoutMs = 600_000
const hourUs = 3_600_000_000
const dayMs = 86_400_000

export async function verifyAudit(options: {
  pool: pg.Pool
  key: SealKey
  /** AUDIT_RETENTION_DAYS: what is older may be gone. */
  retentionDays: number
  nowMs: number
  sinceMs?: number | undefined
  onProgress?: Progress
}): Promise<Verification> {
  const client = await options.pool.connect()
  try {
    await client.query('begin isolation level repeatable read read only')
    await client.query(`set local statement_timeout = ${statementTimeoutMs}`)
    return await verifySnapshot(client, options)
  } finally {
    await client.query('rollback').catch(() => {})
    client.release()
  }
}

type SealRow = Omit<Seal, 'sequence'> & { sequence: string; hash: Buffer; keyId: string }

async function verifySnapshot(
  client: pg.ClientBase,
  { key, retentionDays, nowMs, sinceMs = 0, onProgress = () => {} }: Parameters<typeof verifyAudit>[0],
): Promise<Verification> {
  // Partitions go by whole days.
  const horizonMs = (Math.floor(nowMs / dayMs) - retentionDays) * dayMs
  const fromMs = Math.max(sinceMs, horizonMs)
  const findings: Finding[] = []
  let furtherFindings = 0
  const found = (finding: Finding) => {
    if (findings.length < findingsMax) findings.push(finding)
    else furtherFindings++
  }
  const sealFound = (
    kind: Finding['kind'],
    seal: { writer: string; sequence: number; atMs: number },
    message: string,
  ) => found({ kind, table: 'audit_seals', id: `${seal.writer}/${seal.sequence}`, at: isoOf(seal.atMs), message })
  const rowFound = (kind: Finding['kind'], row: SealedRow, message: string) =>
    found({ kind, table: sealedTables.get(row.table) ?? '', id: row.id, at: isoOf(row.atUs / 1_000), message })

  // Step 1: Every chain, seal by seal.
  const heads = new Map<string, Head>()
  const anchors = new Map<string, Head>()
  const sums = new Map<string, bigint>()
  let [seals, rows, open] = [0, 0, 0]
  let firstMs = Number.POSITIVE_INFINITY
  let firstIsOpening = false
  let last: SealRow | undefined
  for await (const seal of sealsSince(client, fromMs)) {
    seals++
    const sequence = Number(seal.sequence)
    const before = last?.writer === seal.writer ? last : undefined
    if (last && !before && !last.closing) open++
    last = seal
    const place = { ...seal, sequence }
    heads.set(seal.writer, { writer: seal.writer, sequence, atMs: seal.atMs, hash: seal.hash.toString('hex') })
    if (seal.keyId !== key.id) {
      sealFound('other-secret', place, 'sealed under another ENROLLMENT_TOKEN_SECRET than the one given')
      continue
    }
    if (!macOfSeal(key, place).equals(seal.hash) || seal.rows.length % sealedRowBytes !== 0) {
      sealFound('seal-changed', place, 'the seal was changed, or not made by the service')
      continue
    }
    if (seal.atMs < firstMs) [firstMs, firstIsOpening] = [seal.atMs, sequence === 0 && seal.anchors.length === 0]
    const missing = missingBefore(place, before, fromMs)
    if (missing) sealFound('seal-removed', place, missing)
    for (const head of seal.anchors) {
      if (head.sequence > (anchors.get(head.writer)?.sequence ?? -1)) anchors.set(head.writer, head)
    }
    const named = decodeRows(seal.rows).filter(({ atUs }) => atUs >= fromMs * 1_000)
    rows += named.length
    await compare(named)
    if (seals % sealsPerPage === 0) onProgress({ seals, rows, at: isoOf(seal.atMs) })
  }
  if (last && !last.closing) open++

  /** The rows of one seal as they are now. */
  async function compare(named: SealedRow[]): Promise<void> {
    for (let at = 0; at < named.length; at += rowsPerPage) {
      const page = named.slice(at, at + rowsPerPage)
      const kept = await rowsNamed(client, page)
      for (const row of page) {
        const now = kept.get(row.id) ?? []
        if (now.length === 0) rowFound('row-removed', row, 'the row is not there, or has another time')
        else if (!now.every(({ digest }) => digest === row.digest)) rowFound('row-changed', row, 'the row was changed')
        // What was changed is not found a second time below.
        if (now.length > 0) addTo(sums, row)
      }
    }
  }

  // Step 2: What chains have said of each other.
  for (const [writer, anchor] of anchors) {
    if (anchor.atMs < fromMs) continue
    const head = heads.get(writer)
    const short = !head || head.sequence < anchor.sequence
    if (short) {
      const until = head ? `ends with seal ${head.sequence}` : 'is not there'
      sealFound('seals-missing', anchor, `the chain ${until}; another writer has seen it with seal ${anchor.sequence}`)
    } else if ((await hashOf(client, anchor)) !== anchor.hash) {
      sealFound('seal-changed', anchor, 'another writer has seen another seal in this place')
    }
  }

  // Step 3: Rows that no seal names.
  let [rowsBeforeSeals, rowsNotChained] = [0, 0]
  for (const [number, table] of sealedTables) {
    for (const { hour, sum } of await sumsByHour(client, table, fromMs)) {
      if (BigInt(sum) === sums.get(`${number}/${hour}`)) continue
      onProgress({ seals, rows, at: isoOf(hour * 3_600_000) })
      const named = await namedIn(client, number, hour, fromMs)
      for await (const { row, mac } of rowsIn(client, number, hour, fromMs)) {
        const left = named.get(row.id)
        if (left !== undefined) {
          named.set(row.id, left - 1)
          if (left <= 0) rowFound('row-repeated', row, 'the row is there more often than it was written')
        } else if (mac !== null && mac === macOfRow(key, row)) {
          // Of each there is one: a copy of it was not written by the service.
          named.set(row.id, 0)
          rowsNotChained++
        } else if (row.atUs < firstMs * 1_000 && firstIsOpening) rowsBeforeSeals++
        else rowFound('row-inserted', row, 'no seal names the row: the service has not written it')
      }
    }
  }

  return {
    ok: findings.length === 0,
    since: isoOf(fromMs),
    ...{ seals, rows, rowsBeforeSeals, rowsNotChained, open, findings, furtherFindings },
    heads: [...heads.values()],
  }
}

/** Why the seal before this one should be there, where it is not. */
function missingBefore(
  seal: Pick<Seal, 'sequence' | 'previous' | 'previousAtMs'>,
  before: SealRow | undefined,
  fromMs: number,
): string | undefined {
  if (before) {
    const next = Number(before.sequence) + 1
    if (seal.sequence === next + 1) return `seal ${next} before it is not there`
    if (seal.sequence > next) return `seals ${next} to ${seal.sequence - 1} before it are not there`
    if (!seal.previous?.equals(before.hash)) return 'it follows another seal than the one before it'
    return undefined
  }
  if (seal.sequence === 0 || (seal.previousAtMs ?? 0) < fromMs) return undefined
  return `all seals before it are not there, of which the last is of ${isoOf(seal.previousAtMs ?? 0)}`
}

/** All seals, chain by chain. */
async function* sealsSince(client: pg.ClientBase, fromMs: number): AsyncGenerator<SealRow> {
  let [writer, sequence, atMs] = ['00000000-0000-0000-0000-000000000000', '-1', 0]
  for (;;) {
    const { rows } = await client.query<SealRow>(
      `select (extract(epoch from at) * 1000)::float8 as "atMs", writer, sequence, instance_id as "instanceId", previous,
         (extract(epoch from previous_at) * 1000)::float8 as "previousAtMs", closing, anchors, rows, key_id as "keyId",
         hash
       from audit_seals where at >= $1 and (writer, sequence, at) > ($2, $3, $4::timestamptz)
       order by writer, sequence, at limit ${sealsPerPage}`,
      [new Date(fromMs), writer, sequence, new Date(atMs)],
    )
    yield* rows
    const last = rows.at(-1)
    if (rows.length < sealsPerPage || !last) return
    ;({ writer, sequence, atMs } = last)
  }
}

const contentOf = (table: string) =>
  `(extract(epoch from t.at) * 1000000)::float8 as "atUs", to_jsonb(t) - 'at' - 'mac' as content` +
  (table === 'audit_events' ? ', t.mac' : ', null as mac')

type Kept = { atUs: number; content: Record<string, unknown>; mac: string | null }

/** The rows that a seal names, by their ids. A row with another time than it was written with is not there. */
async function rowsNamed(client: pg.ClientBase, named: readonly SealedRow[]): Promise<Map<string, SealedRow[]>> {
  const kept = new Map<string, SealedRow[]>()
  for (const [number, table] of sealedTables) {
    const ofTable = named.filter(row => row.table === number)
    if (ofTable.length === 0) continue
    const { rows } = await client.query<Kept>(
      `select ${contentOf(table)} from unnest($1::float8[], $2::uuid[]) as n(at_us, id)
       join ${table} t on t.at = to_timestamp(n.at_us / 1000000) and t.id = n.id`,
      [ofTable.map(({ atUs }) => atUs), ofTable.map(({ id }) => id)],
    )
    for (const { atUs, content } of rows) {
      const row = keptRow(number, atUs, content)
      const sameId = kept.get(row.id)
      if (sameId) sameId.push(row)
      else kept.set(row.id, [row])
    }
  }
  return kept
}

/** How often seals name each row of an hour. */
async function namedIn(
  client: pg.ClientBase,
  number: number,
  hour: number,
  fromMs: number,
): Promise<Map<string, number>> {
  const named = new Map<string, number>()
  const [firstUs, endUs] = [hour * hourUs, (hour + 1) * hourUs]
  let [writer, sequence] = ['00000000-0000-0000-0000-000000000000', '-1']
  for (;;) {
    const { rows } = await client.query<{ writer: string; sequence: string; rows: Buffer }>(
      `select writer, sequence, rows from audit_seals
       where at >= $1 and first_at_us < $2 and last_at_us >= $3 and (writer, sequence) > ($4, $5)
       order by writer, sequence limit ${sealsPerPage}`,
      [new Date(Math.max(firstUs / 1_000, fromMs)), endUs, firstUs, writer, sequence],
    )
    for (const row of rows.flatMap(seal => decodeRows(seal.rows))) {
      const inHour = row.table === number && row.atUs >= firstUs && row.atUs < endUs
      if (inHour) named.set(row.id, (named.get(row.id) ?? 0) + 1)
    }
    const last = rows.at(-1)
    if (rows.length < sealsPerPage || !last) return named
    ;({ writer, sequence } = last)
  }
}

async function* rowsIn(client: pg.ClientBase, number: number, hour: number, fromMs: number) {
  const table = sealedTables.get(number) ?? ''
  // A cursor, since rows that were made up need not differ in their keys.
  await client.query(
    `declare audit_hour no scroll cursor for select ${contentOf(table)} from ${table} t
     where t.at >= to_timestamp($1::float8) and t.at < to_timestamp($2::float8)`,
    [Math.max(hour * 3_600, fromMs / 1_000), (hour + 1) * 3_600],
  )
  for (;;) {
    const { rows } = await client.query<Kept>(`fetch ${rowsPerPage} from audit_hour`)
    for (const { atUs, content, mac } of rows) yield { row: keptRow(number, atUs, content), mac }
    if (rows.length < rowsPerPage) break
  }
  await client.query('close audit_hour')
}

async function hashOf(client: pg.ClientBase, { writer, sequence }: Head): Promise<string | undefined> {
  const { rows } = await client.query<{ hash: string }>(
    `select encode(hash, 'hex') as hash from audit_seals where writer = $1 and sequence = $2`,
    [writer, sequence],
  )
  return rows[0]?.hash
}

/**
 * A sum of digests, not a count of rows: where a row was written twice because a commit got lost, its copy could be
 * exchanged for another row.
 */
function addTo(sums: Map<string, bigint>, { table, atUs, id }: SealedRow): void {
  const hour = `${table}/${Math.floor(atUs / hourUs)}`
  const digest = hash('sha256', Buffer.from(id.replaceAll('-', ''), 'hex'))
  sums.set(hour, (sums.get(hour) ?? 0n) + BigInt(`0x${digest.slice(0, 15)}`))
}

async function sumsByHour(client: pg.ClientBase, table: string, fromMs: number) {
  const { rows } = await client.query<{ hour: number; sum: string }>({
    text: `
      select floor(extract(epoch from at) / 3600)::float8 as hour,
        sum(('x' || left(encode(sha256(uuid_send(id)), 'hex'), 15))::bit(60)::bigint)::text as sum
      from ${table} where at >= $1 group by 1 order by 1`,
    values: [new Date(fromMs)],
    ...{ query_timeout: statementTimeoutMs },
  })
  return rows
}

function isoOf(ms: number): string {
  return new Date(ms).toISOString()
}
