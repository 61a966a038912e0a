/**
 * The journal: every call and every decision is on disk before an allow is answered.
 *
 * Writers append and wait. While one commit is under way, what arrives gathers for the next (group commit): alone a
 * row waits for one commit, in a crowd hundreds share one. Nothing is dropped: a full journal or an unreachable database
 * refuses, and who was refused must not allow anything. A revocation is the exception: it takes effect at once and is
 * written as soon as it can be (`appendLater`).
 *
 * Each batch of events and decisions is sealed by the statement that writes it: see `seals.ts`.
 */
import { hash, randomUUIDv7 } from 'node:crypto'
import type pg from 'pg'
import { type Call, callerName, type OwnEvents } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { isDatabaseOutage, untilCommitted } from '../db/failure.ts'
import type { EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import { apart, database, spanned } from '../telemetry/tracing.ts'
import { AuditEvent } from './entities.ts'
import { createRowArray, encodeRow, insertStatement, type JournalTable } from './journal-table.ts'
import {
  canonicalJson,
  createChain,
  insertSeal,
  macOfRow,
  readHeads,
  type SealedRow,
  type SealKey,
  sealedRow,
} from './seals.ts'

export type JournalEntry = { table: JournalTable; row: readonly unknown[] }

export type Journal = {
  /** Resolves once all entries are committed, all or none. @throws Fault UNAVAILABLE `AUDIT_UNAVAILABLE` */
  append(entries: readonly JournalEntry[]): Promise<void>
  /** Written as soon as the database takes it, for what has already happened. */
  appendLater(entries: readonly JournalEntry[]): void
  /** For a call whose transactions write their events themselves, in the columns of `auditEventsTable`. */
  ownEvents(): OwnEvents
  /** Takes events into the chain that are on disk already, and in no chain. Resolves once they are. */
  seal(committed: readonly SealedRow[]): Promise<void>
  /** Waits for what is queued. */
  drained(): Promise<void>
  /** Writes what is queued, and closes the chain of seals. */
  stop(): Promise<void>
}

/** Appends that share a commit: of 1 kB each, mostly. A message of many questions may be of a quarter megabyte. */
const batchAppendsMax = 1_000
const batchCharactersMax = 4_000_000
/**
 * From so many appends in a batch on, the next one waits a moment for company, as with PostgreSQL's commit_delay: half as
 * many commits cost half as much. Who comes alone waits for nobody.
 */
const crowdAppendsMin = 8
const crowdWaitMs = 2
/** Text waiting to be written; what comes then is refused. */
const queuedCharactersMax = 100_000_000
/** Appends waiting; more are refused. Twenty batches are over two seconds of PostgreSQL's work. */
const queuedAppendsMax = 20_000
const retryMs = 500
/**
 * Appends that wait for the database to come back, at about 1 kB each. An outage that makes more of them than this loses
 * the rest, each with an error in the log: a process that dies of them would lose all.
 */
const persistentAppendsMax = 100_000
/** How often the chains of other writers are looked at: what is cut off their ends later than that shows. */
const anchorMs = 60_000
/** How far back it is looked then: a few anchors, in case one was missed. */
const anchorBackMs = 10 * anchorMs
/** How far back a new chain looks: nobody may have run for a while. */
const openingBackMs = 7 * 86_400_000

type Append = {
  entries: readonly JournalEntry[]
  /** How much text that is, about. */
  characters: number
  resolve: () => void
  reject: (error: unknown) => void
  /** Tried again for as long as the database is away. */
  persistent: boolean
  /** Rows that are on disk already and come into the chain now. */
  committed?: readonly SealedRow[]
  /** To seal that this chain begins, where others stand, or that it ends. */
  also?: 'open' | 'anchor' | 'close'
}

/** Those of one table in a batch. `latest`, by their key: where only the last of several counts. */
type RowsOfTable = { array: ReturnType<typeof createRowArray>; latest: Map<string, readonly unknown[]> }

export function startJournal(options: {
  pool: pg.Pool
  log: Log
  sealKey: SealKey
  instanceId: string
  clock: Clock
  onCommit?: (rows: number, seconds: number) => void
}): Journal {
  const { pool, sealKey, clock } = options
  const queue: Append[] = []
  const chain = createChain({ ...options, key: sealKey })
  let flushing: Promise<void> | undefined
  const names = new Map<string, string>()
  /** Appends of the batch before. */
  let crowd = 0

  let queuedCharacters = 0

  function enqueue(append: Append): void {
    queue.push(append)
    queuedCharacters += append.characters
    flushing ??= apart(flush)
  }

  async function flush(): Promise<void> {
    // What arrives within this turn of the event loop joins the first batch.
    await new Promise(resolve => setImmediate(resolve))
    try {
      while (queue.length > 0) await flushBatch()
    } finally {
      // In the same turn in which the queue was seen empty: what is appended from now on is flushed anew.
      flushing = undefined
    }
  }

  async function flushBatch(): Promise<void> {
    if (crowd >= crowdAppendsMin) await new Promise(resolve => setTimeout(resolve, crowdWaitMs))
    const batch = nextBatch()
    crowd = batch.length
    const startedAt = performance.now()
    try {
      const rows = await commit(batch)
      options.onCommit?.(rows, (performance.now() - startedAt) / 1_000)
      for (const append of batch) append.resolve()
    } catch (error) {
      // It may have been committed: that is all that may be known of this chain for good.
      if (isDatabaseOutage(error)) chain.abandon()
      if (pool.ending) giveUp([...batch, ...queue.splice(0)], error)
      else if (isDatabaseOutage(error)) await postpone(batch, error)
      else await commitOneByOne(batch)
    }
  }

  function nextBatch(): Append[] {
    let [appends, characters] = [0, 0]
    while (appends < Math.min(queue.length, batchAppendsMax) && characters < batchCharactersMax) {
      characters += queue[appends++]?.characters ?? 0
    }
    queuedCharacters -= characters
    return queue.splice(0, appends)
  }

  async function commit(batch: readonly Append[]): Promise<number> {
    const rowsOf = new Map<JournalTable, RowsOfTable>()
    const sealed: SealedRow[] = []
    for (const append of batch) {
      if (append.committed) sealed.push(...append.committed)
      for (const { table, row } of append.entries) {
        let rows = rowsOf.get(table)
        if (!rows) {
          rows = { array: createRowArray(table), latest: new Map() }
          rowsOf.set(table, rows)
        }
        // No row of a table that is sealed takes the place of another.
        if (table.key) {
          rows.latest.set(table.key(row), row)
          continue
        }
        const encoded = encodeRow(table, row)
        rows.array.add(encoded)
        const inSeal = sealedRow(table, row, encoded)
        if (inSeal) sealed.push(inSeal)
      }
    }
    let count = 0
    const inserts: string[] = []
    const parameters: unknown[] = []
    for (const [table, { array, latest }] of rowsOf) {
      for (const row of latest.values()) array.add(encodeRow(table, row))
      count += array.count()
      parameters.push(array.close())
      inserts.push(insertStatement(table, parameters.length))
    }
    const [opening, closing] = (['open', 'close'] as const).map(what => batch.some(({ also }) => also === what))
    const draft = chain.next(sealed, await otherChains(batch), { opening, closing })
    if (draft) inserts.push(insertSeal(draft, parameters))
    if (inserts.length === 0) return 0
    // One statement is one transaction and one round trip.
    const last = inserts.pop()
    const before = inserts.map((insert, index) => `w${index} as (${insert})`)
    const text = `${before.length ? `with ${before.join(', ')} ` : ''}${last}`
    await untilCommitted(() => pool.query({ name: nameOf(text), text, values: parameters }))
    if (draft) chain.advance(draft)
    return count
  }

  /** The few statements that there are, by what they write, are prepared once a connection. */
  function nameOf(text: string): string {
    let name = names.get(text)
    if (!name) {
      // By what it says: whoever shares the connections gives other statements other names.
      name = `journal-${hash('sha256', text).slice(0, 16)}`
      names.set(text, name)
    }
    return name
  }

  /** Looked at when a chain begins, then every now and then. */
  async function otherChains(batch: readonly Append[]) {
    if (chain.isNew()) return readHeads(pool, clock() - openingBackMs)
    return batch.some(({ also }) => also === 'anchor') ? readHeads(pool, clock() - anchorBackMs) : []
  }

  /** One bad row must not take its neighbours down. */
  async function commitOneByOne(batch: readonly Append[]): Promise<void> {
    for (const append of batch) {
      try {
        await commit([append])
        append.resolve()
      } catch (error) {
        if (isDatabaseOutage(error)) {
          chain.abandon()
          await postpone([append], error)
          continue
        }
        options.log.error({ err: error }, 'a journal entry was refused by the database')
        append.reject(error)
      }
    }
  }

  /** The service stops, and the database has not come back in time. */
  function giveUp(appends: readonly Append[], error: unknown): void {
    options.log.error({ err: error, appends: appends.length }, 'stopping without having written the whole journal')
    for (const append of appends) append.reject(error)
  }

  async function postpone(batch: readonly Append[], error: unknown): Promise<void> {
    options.log.warn({ err: error, appends: batch.length }, 'the journal can not be written')
    const unavailable = new Fault('UNAVAILABLE', 'AUDIT_UNAVAILABLE', 'the audit log can not be written; try again', {
      retryAfterMs: retryMs,
      cause: error,
    })
    const kept = batch.filter(append => append.persistent)
    for (const append of batch) if (!append.persistent) append.reject(unavailable)
    if (kept.length === 0) return
    queue.unshift(...kept)
    // Whoever waits for an answer meanwhile hears at once that there is none.
    for (let at = queue.length - 1; at >= 0; at--) {
      if (!queue[at]?.persistent) for (const append of queue.splice(at, 1)) append.reject(unavailable)
    }
    queuedCharacters = sum(queue)
    await new Promise(resolve => setTimeout(resolve, retryMs))
  }

  async function drained(): Promise<void> {
    await flushing
  }

  const anchoring = setInterval(() => {
    if (queue.length < persistentAppendsMax) enqueue({ ...itself, also: 'anchor' })
  }, anchorMs)
  anchoring.unref()
  // Before the first row: what has no seal after that is not from here.
  enqueue({ ...itself, also: 'open' })

  return {
    append(entries) {
      if (queue.length >= queuedAppendsMax || queuedCharacters >= queuedCharactersMax) {
        const full = new Fault('UNAVAILABLE', 'AUDIT_BEHIND', 'the audit log is behind; try again', {
          retryAfterMs: retryMs,
        })
        return Promise.reject(full)
      }
      const characters = charactersOf(entries)
      return spanned('audit commit', database, () => {
        return new Promise((resolve, reject) => enqueue({ entries, characters, resolve, reject, persistent: false }))
      })
    },
    appendLater(entries) {
      if (queue.length >= persistentAppendsMax) {
        options.log.error({ entries: entries.map(({ table, row }) => [table.name, row]) }, 'the journal is full: lost')
        return
      }
      enqueue({ ...itself, entries, characters: charactersOf(entries) })
    },
    ownEvents() {
      let uncommitted: SealedRow[] = []
      return {
        vouch(row) {
          const event = sealedRow(auditEventsTable, row, encodeRow(auditEventsTable, row)) as SealedRow
          uncommitted.push(event)
          return macOfRow(sealKey, event)
        },
        committed() {
          // Where there is no room the events keep their own MACs.
          if (uncommitted.length > 0 && queue.length < persistentAppendsMax)
            enqueue({ ...itself, committed: uncommitted })
          uncommitted = []
        },
        rolledBack() {
          uncommitted = []
        },
      }
    },
    seal: committed => new Promise((resolve, reject) => enqueue({ ...itself, committed, resolve, reject })),
    drained,
    async stop() {
      clearInterval(anchoring)
      enqueue({ ...itself, also: 'close' })
      await drained()
    },
  }
}

function charactersOf(entries: readonly JournalEntry[]): number {
  let count = 0
  for (const { row } of entries) {
    for (let at = 0; at < row.length; at++) {
      const value = row[at]
      if (typeof value === 'string') count += value.length
      else if (Array.isArray(value)) for (const text of value as string[]) count += text.length
    }
  }
  return count
}

const sum = (appends: readonly Append[]) => appends.reduce((count, { characters }) => count + characters, 0)

/** What the journal writes of its own accord: nobody waits for it. */
const itself: Append = { entries: [], characters: 0, resolve: () => {}, reject: () => {}, persistent: true }

export const auditEventsTable: JournalTable = {
  name: 'audit_events',
  columns: [
    { name: 'at', type: 'timestamptz' },
    { name: 'id', type: 'uuid' },
    { name: 'actor', type: 'text' },
    { name: 'method', type: 'text' },
    { name: 'target', type: 'text' },
    { name: 'source_address', type: 'text' },
    { name: 'code', type: 'text' },
    { name: 'reason', type: 'text' },
    { name: 'detail', type: 'jsonb' },
    { name: 'instance_id', type: 'text' },
  ],
}

/** How a call ended: the canonical gRPC code, and the stable reason where it is not OK. */
export type CallOutcome = { code: string; reason?: string }

/** The audit event of a call, for `Journal.append`. */
export function callEntry(call: Omit<Call, 'signal'>, outcome: CallOutcome): JournalEntry {
  const { audit } = call
  return {
    table: auditEventsTable,
    row: [
      new Date(call.startedAt),
      randomUUIDv7(),
      callerName(call.caller),
      call.method,
      audit.target,
      call.address,
      outcome.code,
      outcome.reason ?? '',
      canonicalJson(audit.detail),
      call.instanceId,
    ],
  }
}

/** Writes the audit event of a call in the transaction that does what it asks for: both happen, or neither. */
export async function recordCall(em: EntityManager, call: Call, outcome: CallOutcome): Promise<void> {
  const { row } = callEntry(call, outcome)
  em.persist(
    em.create(AuditEvent, {
      at: new Date(call.startedAt),
      id: row[1] as string,
      actor: callerName(call.caller),
      method: call.method,
      target: call.audit.target,
      sourceAddress: call.address,
      code: outcome.code,
      reason: outcome.reason ?? '',
      detail: call.audit.detail,
      instanceId: call.instanceId,
      mac: call.audit.own?.vouch(row) ?? null,
    }),
  )
  await em.flush()
  call.audit.written = true
}
