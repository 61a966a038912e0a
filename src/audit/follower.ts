/**
 * Those who follow the audit log at this instance, and the one look at the database that they share.
 *
 * A reader is in one of two states:
 *
 * - catching up: it reads by itself, page by page, at the pace at which its caller takes what it reads.
 * - live: it is handed what the shared look has found, twice a second, however many readers there are.
 *
 * Who falls behind while live, by more than `queuedMax`, is back to catching up: nothing is lost, and nothing grows.
 * Both know by the checkpoint of the reader what it has had, so what both have found is given once.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type pg from 'pg'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import {
  type AuditRecord,
  type AuditTable,
  advance,
  type Checkpoint,
  copyOf,
  forgetOld,
  isBehind,
  type NextSeal,
  recordsOf,
  sealsAfter,
} from './follow.ts'

export type Following = {
  /** Goes on behind this. It is moved on as far as the records were given. */
  checkpoint: Checkpoint
  tables: ReadonlySet<AuditTable>
  /** Ends the following, with its reason. */
  signal: AbortSignal
}

/** Some of what one seal names. `whole` with the last of them: the checkpoint is behind that seal now. */
export type Followed = { records: AuditRecord[]; whole: boolean }

export type AuditFollower = {
  /** All that there is behind the checkpoint. @throws Fault RESOURCE_EXHAUSTED `TOO_MANY_FOLLOWERS` */
  rest(following: Following): AsyncGenerator<Followed>
  /** The same, and then what comes, without an end. A pause of ten seconds is given as an empty batch. */
  follow(following: Following): AsyncGenerator<Followed>
  /** Ends all of them, and those that would begin: the instance stops. */
  endAll(fault: Fault): void
}

/** Each has a query under way at most while it catches up. */
const followersMax = 32
const lookEveryMs = 500
/** 10 MB at 1 kB each, shared by all who wait for the same ones. */
const queuedMaxDefault = 10_000
/** After this long without a record a live reader is told that there was none. */
const quietMs = 10_000
const comeBackMs = 10_000

type Found = { seal: NextSeal; records: AuditRecord[] }

/** A row of decisions is as large as it has questions. */
const sizeOf = ({ records }: Found) =>
  records.reduce((size, { table, row }) => size + (table === 'decisions' ? row.questions.length : 1), 1)

type Live = { tables: ReadonlySet<AuditTable>; queue: Found[]; queued: number; overrun: boolean; wake: () => void }

export function createFollower(options: {
  pool: pg.Pool
  /** Where those who catch up read. It has all that `pool` had when it is asked. */
  reports: Pick<pg.Pool, 'query'>
  clock: Clock
  log: Log
  /** Between two looks. */
  everyMs?: number
  /** Records and seals that wait for a live reader. */
  queuedMax?: number
}): AuditFollower {
  const { pool, reports, clock, log, everyMs = lookEveryMs, queuedMax = queuedMaxDefault } = options
  const live = new Set<Live>()
  const ending = new AbortController()
  let followers = 0
  let looking = false

  /** Looks for as long as anybody is live. @param at where it begins: somebody who goes live has read as far */
  async function look(at: Checkpoint): Promise<void> {
    while (live.size > 0 && !ending.signal.aborted) {
      try {
        for (let isLast = false; !isLast; ) {
          const page = await sealsAfter(pool, at, clock())
          for (const seal of page.seals) {
            const tables = new Set([...live].flatMap(reader => [...reader.tables]))
            const records: AuditRecord[] = []
            for await (const some of recordsOf(pool, seal, tables)) records.push(...some)
            for (const reader of live) hand(reader, { seal, records })
            advance(at, seal)
          }
          ;({ isLast } = page)
        }
        forgetOld(at, clock())
      } catch (error) {
        // It goes on where it was: what was committed meanwhile is found then.
        log.debug({ err: error }, 'the audit log can not be followed now')
      }
      await sleep(everyMs, undefined, { signal: ending.signal }).catch(() => {})
    }
    // In the same turn in which nobody was left: who goes live from now on begins anew.
    looking = false
  }

  function hand(reader: Live, found: Found): void {
    if (reader.overrun) return
    reader.queue.push(found)
    reader.queued += sizeOf(found)
    if (reader.queued > queuedMax) {
      reader.overrun = true
      reader.queue = []
    }
    reader.wake()
  }

  function goLive({ checkpoint, tables }: Following): Live {
    const reader: Live = { tables, queue: [], queued: 0, overrun: false, wake: () => {} }
    live.add(reader)
    if (!looking) {
      looking = true
      void look(copyOf(checkpoint))
    }
    return reader
  }

  async function* catchUp({ checkpoint, tables }: Following, signal: AbortSignal): AsyncGenerator<Followed> {
    for (let isLast = false; !isLast; ) {
      const page = await sealsAfter(reports, checkpoint, clock())
      for (const seal of page.seals) {
        for await (const records of recordsOf(reports, seal, tables)) {
          signal.throwIfAborted()
          yield { records, whole: false }
        }
        advance(checkpoint, seal)
        yield { records: [], whole: true }
      }
      signal.throwIfAborted()
      ;({ isLast } = page)
    }
    forgetOld(checkpoint, clock())
  }

  async function* stayLive({ checkpoint, tables }: Following, signal: AbortSignal, reader: Live) {
    while (!reader.overrun) {
      const found = reader.queue.shift()
      if (!found) {
        await somethingNew(reader, signal)
        signal.throwIfAborted()
        if (reader.queue.length > 0 || reader.overrun) continue
        forgetOld(checkpoint, clock())
        yield { records: [], whole: true }
        continue
      }
      reader.queued -= sizeOf(found)
      if (isBehind(checkpoint, found.seal)) continue
      advance(checkpoint, found.seal)
      yield { records: found.records.filter(({ table }) => tables.has(table)), whole: true }
    }
  }

  /** Resolves when the shared look has found something, after `quietMs`, or when it is to end. */
  function somethingNew(reader: Live, signal: AbortSignal): Promise<void> {
    return new Promise(resolve => {
      const done = () => {
        clearTimeout(timer)
        signal.removeEventListener('abort', done)
        reader.wake = () => {}
        resolve()
      }
      const timer = setTimeout(done, quietMs)
      signal.addEventListener('abort', done)
      reader.wake = done
    })
  }

  async function* counted(
    following: Following,
    work: (signal: AbortSignal) => AsyncGenerator<Followed>,
  ): AsyncGenerator<Followed> {
    if (followers >= followersMax) {
      const message = `${followersMax} already follow the audit log at this instance; try again later`
      throw new Fault('RESOURCE_EXHAUSTED', 'TOO_MANY_FOLLOWERS', message, { retryAfterMs: comeBackMs })
    }
    followers++
    try {
      const signal = AbortSignal.any([following.signal, ending.signal])
      signal.throwIfAborted()
      yield* work(signal)
    } finally {
      followers--
    }
  }

  return {
    rest: following => counted(following, signal => catchUp(following, signal)),
    follow: following =>
      counted(following, async function* (signal) {
        for (;;) {
          yield* catchUp(following, signal)
          // From here on nothing escapes the shared look; what it had found before is caught up with first.
          const reader = goLive(following)
          try {
            yield* catchUp(following, signal)
            yield* stayLive(following, signal, reader)
          } finally {
            live.delete(reader)
          }
        }
      }),
    endAll: fault => ending.abort(fault),
  }
}

/** What `read` finds in several statements is of one moment. */
export async function inOneSnapshot<T>(pool: pg.Pool, read: (client: pg.ClientBase) => Promise<T>): Promise<T> {
  const client = await pool.connect()
  try {
    await client.query('begin isolation level repeatable read read only')
    return await read(client)
  } finally {
    await client.query('rollback').catch(() => {})
    client.release()
  }
}
