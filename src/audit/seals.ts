/**
 * Seals: what makes a change of the audit log show, whoever made it.
 *
 * Every process that serves is a writer with a chain of seals of its own, and each batch that its journal commits carries
 * one in the same statement. A seal names every row of the batch by table, time, id and the SHA-256 of its content, and
 * the seal before it; over all that is a MAC under a key derived from ENROLLMENT_TOKEN_SECRET:
 *
 *     seal 0 ◄── seal 1 ◄── seal 2 ◄── …          one writer
 *        └─ opening: where the chains of all other writers stood then, and once a minute again
 *
 * What `edgemesh audit verify` (`verify.ts`) proves by them against whoever can write to the database, but does not hold
 * the secret, even its superuser:
 *
 * - A row that was changed is not what its seal says, one that was removed is missing, one that was inserted has no seal,
 *   one that was copied is there once too often.
 * - A seal that was changed or made up has a wrong MAC, one that was removed is missing between its neighbours.
 * - The newest seals of a writer, removed with their rows, are missing under the writer's next one, which it writes with
 *   its next row; if it has died, under what another writer, or the next start, has said of where that chain stood.
 *
 * What it does not prove: anything against whoever holds the secret; that the last moments of a writer that was killed
 * are whole, until another has seen them, which is at most a minute; that the whole database was not put back to an
 * earlier state, as a restored backup does, except to those who keep the heads that `audit verify --json` prints; and
 * that rows which the service was made to write are true.
 *
 * Events that other transactions write (`recordCall`, enrollment) are committed with what they tell of, outside of any
 * batch. They carry a MAC of their own from the start, so that none can be made up or changed, and come into the chain
 * with the batch that follows their commit. An instance that dies between the two leaves a row that is genuine, but whose
 * removal would not show, until the next one that starts seals it (`unsealed.ts`); `audit verify` counts those.
 *
 * A process that does not learn whether its statement was committed begins a new chain: the old one is whole either way.
 */
import { createHmac, hash, hkdfSync, randomUUID } from 'node:crypto'
import type pg from 'pg'
import type { Clock } from '../clock.ts'
import type { JournalTable } from './journal-table.ts'

/** Whose rows are sealed, by the number that stands for the table in a seal. */
export const sealedTables = new Map([
  [1, 'audit_events'],
  [2, 'decisions'],
])
const numberOf = new Map([...sealedTables].map(([number, name]) => [name, number]))

/** A row as its seal knows it. `digest`: 32 bytes as `latin1`, since strings are made and compared faster than buffers. */
export type SealedRow = { table: number; atUs: number; id: string; digest: string }

/** Where the chain of a writer stands. */
export type Head = { writer: string; sequence: number; atMs: number; hash: string }

export type Seal = {
  writer: string
  sequence: number
  atMs: number
  instanceId: string
  /** The hash of the seal before, and its time: a chain may begin behind a seal that is older than the retention. */
  previous: Buffer | null
  previousAtMs: number | null
  /** The last one of a writer that was stopped. */
  closing: boolean
  anchors: readonly Head[]
  rows: Buffer
}

export type SealKey = { id: string; secret: Buffer }

/** Table, time, id, digest. */
export const sealedRowBytes = 1 + 8 + 16 + 32

export function sealKeyFrom(tokenSecret: string): SealKey {
  const secret = Buffer.from(hkdfSync('sha256', tokenSecret, '', 'edgemesh audit seals v1', 32))
  // Tells seals under another secret from seals that are wrong.
  return { secret, id: hash('sha256', secret).slice(0, 16) }
}

export function macOfSeal(key: SealKey, seal: Seal): Buffer {
  const { writer, sequence, atMs, instanceId, previous, previousAtMs, closing, rows } = seal
  const anchors = seal.anchors.map(head => [head.writer, head.sequence, head.atMs, head.hash])
  const head = [writer, sequence, atMs, instanceId, previous?.toString('hex') ?? '', previousAtMs, closing, anchors]
  return createHmac('sha256', key.secret)
    .update(`seal\n${JSON.stringify(head)}\n`)
    .update(rows)
    .digest()
}

/** What an event carries that a transaction of its own has written. */
export function macOfRow(key: SealKey, row: SealedRow): string {
  return createHmac('sha256', key.secret)
    .update('row\n')
    .update(encodeRows([row]))
    .digest('hex')
}

function encodeRows(rows: readonly SealedRow[]): Buffer {
  const bytes = Buffer.allocUnsafe(rows.length * sealedRowBytes)
  rows.forEach(({ table, atUs, id, digest }, at) => {
    const offset = at * sealedRowBytes
    bytes.writeUInt8(table, offset)
    const high = Math.floor(atUs / 2 ** 32)
    bytes.writeInt32BE(high, offset + 1)
    bytes.writeUInt32BE(atUs - high * 2 ** 32, offset + 5)
    writeUuid(bytes, id, offset + 9)
    bytes.write(digest, offset + 25, 32, 'latin1')
  })
  return bytes
}

/** Where the two digits of each byte begin in the text of a UUID. */
const uuidPlaces = Uint8Array.of(0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34)
/** By character code. */
const hexValues = Uint8Array.from({ length: 128 }, (_, code) => Number.parseInt(String.fromCharCode(code), 16) || 0)
const hexValue = (text: string, at: number) => hexValues[text.charCodeAt(at) & 127] as number

/** Without another string to make, and without a branch for each of its digits. */
function writeUuid(bytes: Buffer, id: string, offset: number): void {
  for (let byte = 0; byte < 16; byte++) {
    const at = uuidPlaces[byte] as number
    bytes[offset + byte] = (hexValue(id, at) << 4) | hexValue(id, at + 1)
  }
}

export function decodeRows(bytes: Buffer): SealedRow[] {
  return Array.from({ length: Math.floor(bytes.length / sealedRowBytes) }, (_, at) => {
    const row = bytes.subarray(at * sealedRowBytes, (at + 1) * sealedRowBytes)
    const hex = row.toString('hex', 9, 25)
    const id = [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-')
    return { table: row.readUInt8(0), atUs: Number(row.readBigInt64BE(1)), id, digest: row.toString('latin1', 25) }
  })
}

/**
 * The digest of a row is that of one text, whichever way it is come by: the table's name, and JSON with the columns as keys, `at` in
 * microseconds, what is null left out, and keys in one order, since jsonb keeps none.
 *
 * A column that is added to a sealed table has to be null in the rows that are there, or they read as changed; and of type
 * text, uuid, int, boolean or jsonb, which have one spelling as JSON here and in PostgreSQL.
 */
function digestOf(named: string | Buffer): string {
  return hash('sha256', named, 'latin1')
}

/** A row that is about to be written. @param encoded by `encodeRow` @returns undefined for tables that are not sealed */
export function sealedRow(table: JournalTable, row: readonly unknown[], encoded: Buffer): SealedRow | undefined {
  const number = numberOf.get(table.name)
  if (number === undefined) return undefined
  const { at, id } = placesIn(table)
  const atUs = (row[at] as Date).getTime() * 1_000
  return { table: number, atUs, id: row[id] as string, digest: digestOf(encoded) }
}

const places = new WeakMap<JournalTable, { at: number; id: number }>()

function placesIn(table: JournalTable): { at: number; id: number } {
  const known = places.get(table)
  if (known) return known
  const place = (wanted: string) => table.columns.findIndex(({ name }) => name === wanted)
  const found = { at: place('at'), id: place('id') }
  places.set(table, found)
  return found
}

/** The same row as the database gives it back. @param content its columns but `at`, as JSON */
export function keptRow(number: number, atUs: number, content: Record<string, unknown>): SealedRow {
  const kept = Object.entries({ ...content, at: atUs }).filter(([, value]) => value !== null)
  const text = JSON.stringify(inOrder(Object.fromEntries(kept)))
  return { table: number, atUs, id: String(content.id), digest: digestOf(`${sealedTables.get(number) ?? ''}\n${text}`) }
}

/** JSON with the keys of all objects in one order: what `encodeRow` expects of columns of type jsonb. */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(inOrder(value))
}

/** The value with the keys of its objects sorted; the value itself where they are. */
function inOrder(value: unknown): unknown {
  if (typeof value !== 'object' || value === null) return value
  if (Array.isArray(value)) {
    let sorted: unknown[] | undefined
    for (let at = 0; at < value.length; at++) {
      const item = inOrder(value[at])
      if (item === value[at]) continue
      sorted ??= [...value]
      sorted[at] = item
    }
    return sorted ?? value
  }
  const before = value as Record<string, unknown>
  let last = ''
  let isInOrder = true
  /** What is not as it was, by its key. Each value is looked at once: twice a level would be without end a few dozen deep. */
  let made: Map<string, unknown> | undefined
  for (const key in before) {
    if (key < last) isInOrder = false
    last = key
    const item = inOrder(before[key])
    if (item === before[key]) continue
    made ??= new Map()
    made.set(key, item)
  }
  if (isInOrder && !made) return value
  // One key out of order, or something within: all of it is made anew.
  const keys = Object.keys(before).sort()
  return Object.fromEntries(keys.map(key => [key, made?.has(key) ? made.get(key) : before[key]]))
}

/** Whether a seal is to be written for its own sake. */
type Edge = { opening?: boolean | undefined; closing?: boolean | undefined }

/** The chain of one writer. */
export type Chain = {
  /** Whether the next seal is the first: it has to say where the chains of others stand. */
  isNew(): boolean
  /**
   * The next seal of the chain. Nothing has happened before `advance`.
   *
   * @param heads where all chains stand, if that was looked up
   * @returns undefined where there is nothing to say
   */
  next(rows: readonly SealedRow[], heads: readonly Head[], at?: Edge): SealDraft | undefined
  /** The seal has been committed. */
  advance(draft: SealDraft): void
  /** Nobody knows whether the last one was committed. */
  abandon(): void
}

export type SealDraft = { seal: Seal; mac: Buffer; keyId: string; firstAtUs: number | null; lastAtUs: number | null }

export function createChain(options: { key: SealKey; instanceId: string; clock: Clock }): Chain {
  const { key, instanceId, clock } = options
  let writer: string = randomUUID()
  let last: { sequence: number; atMs: number; mac: Buffer } | undefined
  /** What this chain has said of others: said once, it need not be said again. */
  const anchored = new Map<string, number>()

  return {
    isNew: () => last === undefined,
    next(rows, heads, { opening = false, closing = false } = {}) {
      const anchors = heads.filter(head => head.writer !== writer && anchored.get(head.writer) !== head.sequence)
      const forItself = last ? closing : opening
      if (rows.length === 0 && anchors.length === 0 && !forItself) return undefined
      let firstAtUs: number | null = null
      let lastAtUs: number | null = null
      for (const { atUs } of rows) {
        firstAtUs = Math.min(firstAtUs ?? atUs, atUs)
        lastAtUs = Math.max(lastAtUs ?? atUs, atUs)
      }
      const seal: Seal = {
        writer,
        sequence: last ? last.sequence + 1 : 0,
        // Never before what it seals, even where a clock was set back: retention drops the rows first.
        atMs: Math.max(clock(), last?.atMs ?? 0, Math.ceil((lastAtUs ?? 0) / 1_000)),
        instanceId,
        previous: last?.mac ?? null,
        previousAtMs: last?.atMs ?? null,
        closing,
        anchors,
        rows: encodeRows(rows),
      }
      return { seal, mac: macOfSeal(key, seal), keyId: key.id, firstAtUs, lastAtUs }
    },
    advance({ seal, mac }) {
      last = { sequence: seal.sequence, atMs: seal.atMs, mac }
      for (const head of seal.anchors) anchored.set(head.writer, head.sequence)
    },
    abandon() {
      writer = randomUUID()
      last = undefined
      anchored.clear()
    },
  }
}

/** The insert of a seal, with its parameters numbered behind others. */
export function insertSeal(draft: SealDraft, parameters: unknown[]): string {
  const { seal, mac, keyId, firstAtUs, lastAtUs } = draft
  const values = [
    ...[new Date(seal.atMs), seal.writer, seal.sequence, seal.instanceId, seal.previous],
    seal.previousAtMs === null ? null : new Date(seal.previousAtMs),
    ...[seal.closing, JSON.stringify(seal.anchors), seal.rows, firstAtUs, lastAtUs, keyId, mac],
  ]
  const places = values.map((_, at) => `$${parameters.length + at + 1}`)
  parameters.push(...values)
  return `insert into audit_seals (at, writer, sequence, instance_id, previous, previous_at, closing, anchors, rows,
    first_at_us, last_at_us, key_id, hash) values (${places.join(', ')})`
}

/**
 * Where the chains stand that have grown since `sinceMs`. It leaps from writer to writer along the primary key; a plain
 * `distinct on` would read every seal.
 */
export async function readHeads(client: Pick<pg.Pool, 'query'>, sinceMs: number): Promise<Head[]> {
  const { rows } = await client.query<{ writer: string; sequence: string; atMs: number; hash: string }>(
    `with recursive writers as (
       (select writer from audit_seals where at >= $1 order by writer limit 1)
       union all
       select (select s.writer from audit_seals s where s.at >= $1 and s.writer > w.writer order by s.writer limit 1)
       from writers w where w.writer is not null
     )
     select head.writer, head.sequence, (extract(epoch from head.at) * 1000)::float8 as "atMs",
       encode(head.hash, 'hex') as hash
     from writers w cross join lateral (
       select * from audit_seals s where s.at >= $1 and s.writer = w.writer order by s.sequence desc limit 1
     ) head
     where w.writer is not null`,
    [new Date(sinceMs)],
  )
  return rows.map(({ writer, sequence, atMs, hash }) => ({ writer, sequence: Number(sequence), atMs, hash }))
}
