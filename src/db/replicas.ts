/**
 * Read replicas (DATABASE_REPLICA_URLS): where lists and reports are read, so that they do not weigh on the primary.
 *
 *     const { rows } = await reports.query('select …', [])
 *     const devices = await reports.read(em => em.find(Device, {}))
 *
 * Who reads here sees all that was committed before the read began, whoever wrote it, at whichever instance: so an operator
 * sees what the same operator has just changed. To that end each read first asks the primary how far it has come (its WAL,
 * flushed: nothing is acknowledged before) and begins once the replica has replayed as much. That is one cheap question;
 * the primary is needed anyway, as every call is put on record there. A token that callers hand back would need callers
 * that do; a table of who wrote what would make every write dearer.
 *
 * A replica is in one of these states:
 *
 * - `ready`: it was caught up when it was last looked at. It is read from.
 * - `behind`: it was not, within `catchUpMsMax`. It is looked at every second.
 * - `unproven`: it does not show what this instance has written to the primary: it may follow another one, from which the
 *   primary of today has parted at a failover. Or the instance has written nothing since then: a matter of seconds.
 * - `promoted`: it replays nothing, and may be a primary itself.
 * - `foreign`: it is a replica of another database.
 * - `away`: it can not be asked.
 *
 * Whatever a replica can't answer in time, the primary does. Nothing that decides is ever read here: no facts, leases, tokens,
 * nor the heads of seals.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import type { Database, EntityManager } from './orm.ts'

export type Reports = {
  /** `work` only reads, and may be run twice: at the primary, where a replica has failed at it. */
  read<T>(work: (em: EntityManager) => Promise<T>): Promise<T>
  /** One statement that only reads. */
  query: pg.Pool['query']
}

export type ReplicaState = 'ready' | 'behind' | 'unproven' | 'promoted' | 'foreign' | 'away'

export type ReplicaStatus = {
  /** `host:port/database`. */
  name: string
  state: ReplicaState
  /** How long ago it had all that the primary had; while it is ready, how long that was waited for. */
  lagMs: number | undefined
  /** What it had not replayed yet when it was last asked. */
  lagBytes: number | undefined
}

/** Where a read was answered: by a replica, or by the primary, and then why. */
export type ReadFrom = 'replica' | 'primary: none ready' | 'primary: replica behind' | 'primary: replica failed'

export type Replicas = Reports & {
  status(): ReplicaStatus[]
  stop(): Promise<void>
}

/** How long a read waits for a replica, from taking a connection to being caught up, before it goes to the primary. */
const catchUpMsMax = 300
/** Between two questions how far a replica has come: at first so long, then longer. */
const askAgainMsMin = 2
const askAgainMsMax = 25
const lookEveryMs = 1_000
/** What can not be asked, or is no replica of ours, is looked at less and less often, with jitter. */
const lookAgainMsMax = 30_000

type Replica = {
  name: string
  db: Database
  state: ReplicaState
  /** What the log has been told last. */
  told: ReplicaState | undefined
  lookAtMs: number
  /** Looks in vain, since it was last ready or behind. */
  failures: number
  /** When it was last known to have everything. */
  caughtUpAtMs: number | undefined
  /** How long it was waited for then. */
  tookMs: number | undefined
  lagBytes: number | undefined
}

/** How far the primary has come. */
type Position = {
  lsn: string
  /** When this instance last gave a sign of life there; undefined: not since the primary became one. */
  sign: string | undefined
}

/** A connection to a replica, kept for one read. */
type Pinned<C> = {
  context: C
  ask(sql: string): Promise<Record<string, unknown> | undefined>
  /** @param broken something may still be under way on it */
  release(broken?: boolean): Promise<void>
}

type Pin<C> = (db: Database) => Promise<Pinned<C>>
type Look = (pinned: Pinned<unknown>) => Promise<void>

/** Why a replica is not read from now. */
class NotUsable extends Error {
  readonly state: ReplicaState

  constructor(state: ReplicaState, message: string) {
    super(message)
    this.state = state
  }
}

/** Where there are no replicas. */
export function readAtPrimary({ em, pool }: Pick<Database, 'em' | 'pool'>): Reports {
  return { read: work => work(em()), query: pool.query.bind(pool) }
}

/**
 * @param options.replicas opened, each with its URL; it closes them when it stops
 * @param options.instanceId whose signs of life in `instances` prove that a replica follows this primary; they have to
 *   begin after this was called
 */
export async function startReplicas(options: {
  primary: Database
  replicas: { url: string; db: Database }[]
  instanceId: string
  log: Log
  clock?: Clock
  onRead?: (from: ReadFrom) => void
}): Promise<Replicas> {
  const { primary, instanceId, log, clock = systemClock, onRead = () => {} } = options
  const replicas = options.replicas.map(
    ({ url, db }): Replica => ({
      name: nameOf(url),
      db,
      state: 'away',
      told: undefined,
      lookAtMs: 0,
      failures: 0,
      caughtUpAtMs: undefined,
      tookMs: undefined,
      lagBytes: undefined,
    }),
  )
  const atPrimary = readAtPrimary(primary)
  const stopping = new AbortController()
  const me = pg.escapeLiteral(instanceId)
  let turn = 0
  let timeline = ''
  let signBefore: string | null = null

  /**
   * The timeline changes when another server has become the primary. What was written before that proves nothing: replicas
   * of the old primary have it, too.
   */
  async function position(): Promise<Position> {
    const { rows } = await primary.pool.query<{ lsn: string; timeline: string; sign: string | null }>(
      `select pg_current_wal_flush_lsn()::text as lsn, left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) as timeline,
         (select seen_at::text from instances where id = ${me}) as sign`,
    )
    const { lsn, sign, ...row } = rows[0]!
    if (row.timeline !== timeline) {
      if (timeline)
        log.warn({ timeline: row.timeline }, 'another server is the primary now; replicas have to prove themselves')
      timeline = row.timeline
      signBefore = sign
    }
    return { lsn, sign: sign === null || sign === signBefore ? undefined : sign }
  }

  /**
   * Waits until the replica has replayed that much and shows our sign of life.
   *
   * @throws {NotUsable}
   */
  async function catchUp(replica: Replica, pinned: Pinned<unknown>, { lsn, sign }: Position, untilMs: number) {
    const startedAtMs = performance.now()
    let isUnproven = false
    for (let askAgainMs = askAgainMsMin; ; askAgainMs = Math.min(askAgainMs * 2, askAgainMsMax)) {
      const row = (await pinned.ask(
        `select pg_is_in_recovery() as standby,
           case when pg_is_in_recovery() then pg_wal_lsn_diff('${lsn}', pg_last_wal_replay_lsn())::float8 end as bytes,
           exists (select from instances where id = ${me} and seen_at >= ${pg.escapeLiteral(sign ?? 'infinity')}) as proven`,
      )) as { standby: boolean; bytes: number | null; proven: boolean }
      if (!row.standby) throw new NotUsable('promoted', 'it is not a standby')
      replica.lagBytes = Math.max(0, row.bytes ?? 0)
      if (row.bytes !== null && row.bytes <= 0) {
        if (row.proven) {
          replica.caughtUpAtMs = clock()
          replica.tookMs = performance.now() - startedAtMs
          return
        }
        // What it had replayed when it was asked may be more than what the statement could see. The next one sees it.
        if (isUnproven || !sign) throw new NotUsable('unproven', 'it does not show what was written to the primary')
        isUnproven = true
      }
      if (performance.now() + askAgainMs > untilMs) throw new NotUsable('behind', `it is ${row.bytes} bytes behind`)
      await sleep(askAgainMs)
    }
  }

  /** A connection of the replica on which all is there that was committed before `at`. */
  async function pinCaughtUp<C>(replica: Replica, pin: Pin<C>, at: Position, look?: Look): Promise<Pinned<C>> {
    const untilMs = performance.now() + catchUpMsMax
    const pinning = pin(replica.db)
    const inTime = beforeThen(untilMs)
    const pinned = await inTime(pinning).catch(error => {
      // Should it come after all, nobody waits for it any more.
      pinning.then(late => late.release(true)).catch(() => {})
      throw error
    })
    try {
      if (look) await inTime(look(pinned))
      await inTime(catchUp(replica, pinned, at, untilMs))
      return pinned
    } catch (error) {
      void pinned.release(true)
      throw error
    }
  }

  /** Notes what a replica is worth, and when to look at it again. */
  function note(replica: Replica, state: ReplicaState): void {
    replica.state = state
    const lasts = state === 'ready' || state === 'behind' || state === 'unproven'
    replica.failures = lasts ? 0 : replica.failures + 1
    const pauseMs = Math.min(lookAgainMsMax, lookEveryMs * 2 ** Math.max(0, replica.failures - 1))
    replica.lookAtMs = clock() + (lasts ? 0 : pauseMs * (0.5 + Math.random() / 2))
  }

  const stateFor = (error: unknown): ReplicaState => (error instanceof NotUsable ? error.state : 'away')

  async function readFrom<C, T>(pin: Pin<C>, work: (context: C) => Promise<T>, fallBack: () => Promise<T>): Promise<T> {
    // Step 1. A replica that was caught up a moment ago, each in its turn.
    const ready = replicas.filter(({ state }) => state === 'ready')
    const replica = ready[turn++ % ready.length]
    if (!replica) {
      if (replicas.length > 0) onRead('primary: none ready')
      return fallBack()
    }
    // Step 2. What it has to have replayed. From here on others may write; they had not been told that it is done.
    const at = await position()
    let pinned: Pinned<C>
    try {
      pinned = await pinCaughtUp(replica, pin, at)
    } catch (error) {
      note(replica, stateFor(error))
      onRead(stateFor(error) === 'away' ? 'primary: replica failed' : 'primary: replica behind')
      return fallBack()
    }
    // Step 3. Read. What fails there for reasons of the replica's own (a conflict with what it replays) works at the primary.
    try {
      const result = await work(pinned.context)
      onRead('replica')
      void pinned.release()
      return result
    } catch (error) {
      void pinned.release(true)
      if (error instanceof Fault) throw error
      log.debug({ err: error, replica: replica.name }, 'a read has failed at a replica; the primary answers')
      onRead('primary: replica failed')
      return fallBack()
    }
  }

  // ── Looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

  const system = replicas.length > 0 && (await systemOf(async sql => (await primary.pool.query(sql)).rows[0]))

  async function look(replica: Replica, at: Position): Promise<void> {
    let why: Error | undefined
    try {
      const pinned = await pinCaughtUp(replica, pinClient, at, async ({ ask }) => {
        if ((await systemOf(ask)) !== system) throw new NotUsable('foreign', 'it is a replica of another database')
      })
      await pinned.release()
    } catch (error) {
      why = error as Error
    }
    note(replica, why ? stateFor(why) : 'ready')
    if (replica.state === replica.told) return
    replica.told = replica.state
    const about = { replica: replica.name, ...(why && { state: replica.state, why: why.message }) }
    if (!why) log.info(about, 'lists and reports are read from this replica')
    else log.warn(about, 'lists and reports are not read from this replica for now')
  }

  async function lookAround(): Promise<void> {
    const due = replicas.filter(({ lookAtMs }) => lookAtMs <= clock())
    if (due.length === 0) return
    const at = await position()
    await Promise.all(due.map(replica => look(replica, at)))
  }

  async function keepLooking(): Promise<void> {
    for (;;) {
      await sleep(lookEveryMs, undefined, { signal: stopping.signal }).catch(() => {})
      if (stopping.signal.aborted) return
      await lookAround().catch(error => log.debug({ err: error }, 'the primary does not say how far it has come'))
    }
  }
  if (replicas.length > 0) await position()
  const looking = replicas.length > 0 ? keepLooking() : Promise.resolve()

  return {
    read: work => readFrom(pinEntityManager, work, () => atPrimary.read(work)),
    query: ((sql: string, values: unknown[]) =>
      readFrom(
        pinClient,
        client => client.query(sql, values),
        () => atPrimary.query(sql, values),
      )) as unknown as pg.Pool['query'],
    status: () =>
      replicas.map(({ name, state, tookMs, caughtUpAtMs, lagBytes }) => {
        const agoMs = caughtUpAtMs === undefined ? undefined : clock() - caughtUpAtMs
        return { name, state, lagMs: state === 'ready' ? tookMs : agoMs, lagBytes }
      }),
    async stop() {
      stopping.abort()
      await looking
      await Promise.all(replicas.map(({ db }) => db.close()))
    },
  }
}

/** Rolls back what has nothing to commit. The connection goes back to the pool, or is closed where it is broken. */
async function pinEntityManager(db: Database): Promise<Pinned<EntityManager>> {
  const em = db.em()
  await em.begin({ readOnly: true })
  return {
    context: em,
    ask: async sql => (await em.execute<Record<string, unknown>[]>(sql))[0],
    release: () => em.rollback().catch(() => {}),
  }
}

async function pinClient(db: Database): Promise<Pinned<pg.ClientBase>> {
  const client = await db.pool.connect()
  return {
    context: client,
    ask: async sql => (await client.query(sql)).rows[0],
    release: async broken => client.release(broken),
  }
}

/** Gives up waiting at `untilMs` of `performance.now()`. */
function beforeThen(untilMs: number) {
  return async <T>(work: Promise<T>): Promise<T> => {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      const reason = new NotUsable('away', `it does not answer within ${catchUpMsMax} ms`)
      timer = setTimeout(() => reject(reason), untilMs - performance.now())
    })
    return await Promise.race([work, late]).finally(() => clearTimeout(timer))
  }
}

/** Names the cluster: a replica has that of its primary. */
async function systemOf(ask: (sql: string) => Promise<Record<string, unknown> | undefined>): Promise<unknown> {
  return (await ask('select system_identifier::text as system from pg_control_system()'))?.system
}

function nameOf(url: string): string {
  const { hostname, port, pathname, searchParams } = new URL(url)
  return `${hostname || searchParams.get('host')}:${port || searchParams.get('port') || 5432}${pathname}`
}
