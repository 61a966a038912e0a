/**
 * The database: MikroORM over PostgreSQL for control paths, its connection pool for the hot ones.
 *
 * Control paths fork an entity manager for each call (`db.em()`); hot paths send batched SQL through `db.pool`.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { Migrator } from '@mikro-orm/migrations'
import type { EntityManager } from '@mikro-orm/postgresql'
import { type EntitySchema, LockMode, MikroORM, type PostgreSqlConnection } from '@mikro-orm/postgresql'
import type pg from 'pg'
import { database, spanned } from '../telemetry/tracing.ts'
import { databaseFailure, untilCommitted } from './failure.ts'
import { FirstSchema } from './migrations/0001-first.ts'
import { IdentityLife } from './migrations/0002-identity-life.ts'
import { AuditSeals } from './migrations/0003-audit-seals.ts'
import { LeaseResume } from './migrations/0004-lease-resume.ts'
import { AuditPrivileges } from './migrations/0005-audit-privileges.ts'
import { RateLimitCredit } from './migrations/0006-rate-limit-credit.ts'
import { Presence } from './migrations/0007-presence.ts'
import { LifecycleRules } from './migrations/0008-lifecycle-rules.ts'
import { DeviceLabels } from './migrations/0009-device-labels.ts'
import { type DatabaseServers, databaseServers } from './servers.ts'

export type { EntityManager }
export { LockMode }

export type Database = {
  /** A fork for one call. */
  em(): EntityManager
  /**
   * Runs `work` in a transaction on a fork of its own, and again, a few times, when PostgreSQL takes that back for the sake
   * of another. So what `work` does outside of the database has to be as if it were run once.
   */
  transaction<T>(work: (em: EntityManager) => Promise<T>): Promise<T>
  pool: pg.Pool
  /** Where the pool connects to, for whoever has a connection of its own. */
  servers: DatabaseServers
  /**
   * Brings the schema up to date; safe to call from several instances at once. A role that does not own the tables may
   * call it where nothing is to be done. A schema of a newer version is left as it is: it serves this one, too.
   *
   * @throws {SchemaBehindError} when there is, and the role may not do it
   * @throws {SchemaInUseError} when others hold on to a table
   */
  migrate(): Promise<string[]>
  migrations(): Promise<Migrations>
  /**
   * Takes back the newest migration.
   *
   * @throws {SchemaAheadError} when a newer version has made it, which alone knows how
   * @throws {SchemaInUseError} when others hold on to a table
   */
  migrateDown(): Promise<string[]>
  close(): Promise<void>
}

/** Names of migrations: in the order in which they were applied, those that are not yet, and applied ones of newer versions. */
export type Migrations = { applied: string[]; pending: string[]; newer: string[] }

/** Any number will do, as long as every version of EdgeMesh uses the same. */
const migrationLock = 7_306_471

const migrationsList = [
  { name: '0001-first', class: FirstSchema },
  { name: '0002-identity-life', class: IdentityLife },
  { name: '0003-audit-seals', class: AuditSeals },
  { name: '0004-lease-resume', class: LeaseResume },
  { name: '0005-audit-privileges', class: AuditPrivileges },
  { name: '0006-rate-limit-credit', class: RateLimitCredit },
  { name: '0007-presence', class: Presence },
  { name: '0008-lifecycle-rules', class: LifecycleRules },
  { name: '0009-device-labels', class: DeviceLabels },
]

const connectTimeoutMs = 3_000
/**
 * How long a migration waits for a lock: all who come for the table wait behind it meanwhile, heartbeats among them. Then it
 * lets them pass, and tries again: for two minutes, which long reports have an end within.
 */
const lockWaitMs = 1_000
/** How often an instance asks whether it is its turn to migrate. */
const lockPollMs = 200
const lockPauseMs = 2_000
const lockTriesMax = 40
/** A statement that takes longer is a fault; nobody waits for it any more. */
const statementTimeoutMs = 10_000
/** An instance that vanishes within a transaction does not keep its locks for as long as TCP takes to find out. */
const idleInTransactionMs = 60_000
const idleConnectionMs = 60_000
/** Connections are replaced after this long, so that a balancer or a failover gets its turn. */
const connectionLifetimeSeconds = 3_600

/**
 * Opens the database without touching it: the first statement connects.
 *
 * @param options.url postgresql:// URL, of several servers perhaps: see `servers.ts`
 * @param options.poolMax most connections at once
 * @param options.entities the entity schemas of all domains
 * @param options.takesStandby it is only read from, so a standby does
 */
export async function openDatabase(options: {
  url: string
  poolMax: number
  entities: EntitySchema[]
  takesStandby?: boolean
}): Promise<Database> {
  const servers = databaseServers(options.url, options)
  const orm = await initialise(options, servers, {
    statement_timeout: statementTimeoutMs,
    query_timeout: statementTimeoutMs + 1_000,
    idle_in_transaction_session_timeout: idleInTransactionMs,
    application_name: 'edgemesh',
  })
  const connection = orm.em.getConnection() as PostgreSqlConnection
  const pool = await connection.getNativeClient()
  takeBackTheDead(pool)
  countVainWaits(pool, () => servers.count('pool_exhausted'))

  /**
   * Runs `work` while no other instance migrates. The lock is the session's, so a dead instance gives it back. What a migration
   * does may take as long as it takes; what it may not is keep others waiting.
   */
  async function alone<T>(work: (migrator: MikroORM['migrator']) => Promise<T>): Promise<T> {
    const client = new servers.Client({ connectionTimeoutMillis: connectTimeoutMs })
    await client.connect()
    try {
      while (!(await takesLock(client))) await sleep(lockPollMs)
      const migrating = await initialise({ ...options, poolMax: 2 }, servers, {
        lock_timeout: lockWaitMs,
        application_name: 'edgemesh migrate',
      })
      return await work(migrating.migrator).finally(() => migrating.close(true))
    } finally {
      await client.end()
    }
  }

  return {
    em: () => orm.em.fork() as EntityManager,
    transaction: work =>
      spanned('database transaction', database, () =>
        untilCommitted(() => orm.em.fork().transactional(em => work(em as EntityManager))),
      ),
    pool,
    servers,
    async migrate() {
      const { pending } = await migrationsOf(pool)
      if (pending.length === 0) return []
      await demandOwner(pool, pending)
      return alone(async migrator => {
        const applied: string[] = []
        // Each in a transaction of its own, so that nobody waits for the locks of all.
        for (const name of (await migrationsOf(pool)).pending) {
          await lettingOthersPass(name, () => migrator.up({ migrations: [name] }))
          applied.push(name)
        }
        return applied
      })
    },
    migrateDown: () =>
      alone(async migrator => {
        const { applied, newer } = await migrationsOf(pool)
        const newest = applied.at(-1)
        if (newest === undefined) return []
        if (newer.includes(newest)) throw new SchemaAheadError(newest)
        await lettingOthersPass(newest, () => migrator.down({ migrations: [newest] }))
        return [newest]
      }),
    migrations: () => migrationsOf(pool),
    async close() {
      await orm.close(true)
      // Kysely ends the pool only where it has used it itself.
      if (!pool.ending) await pool.end()
    },
  }
}

/** Asked for again and again: who waited for it in a statement would be waited for by an index that is made concurrently. */
async function takesLock(client: pg.Client): Promise<boolean> {
  const { rows } = await client.query<{ taken: boolean }>('select pg_try_advisory_lock($1) as taken', [migrationLock])
  return rows[0]?.taken === true
}

/** The schema is older than this version, and the role that we are may not change it. */
export class SchemaBehindError extends Error {
  readonly hint = 'run edgemesh migrate up as the owner of the tables: DATABASE_MIGRATION_URL'

  constructor(pending: readonly string[], role: string) {
    super(`the schema is not up to date (${pending.join(', ')}), and the role ${role} does not own it`)
    this.name = 'SchemaBehindError'
  }
}

/** The newest migration is of a newer version than this one. */
export class SchemaAheadError extends Error {
  readonly hint = 'run edgemesh migrate down of the version that has made it; this version serves beside it as it is'

  constructor(newest: string) {
    super(`this version can not take back ${newest}, which a newer one has made`)
    this.name = 'SchemaAheadError'
  }
}

/** Others did not let go of a table that a migration changes. */
export class SchemaInUseError extends Error {
  readonly hint =
    "see who holds it: select pid, application_name, xact_start, query from pg_stat_activity where state <> 'idle' order by xact_start"

  constructor(migration: string, cause: unknown) {
    super(`${migration} has to wait: somebody keeps a table that it changes`, { cause })
    this.name = 'SchemaInUseError'
  }
}

/** 55P03 is `lock_not_available`; 40P01, a deadlock, is one that PostgreSQL has resolved at the cost of the migration. */
async function lettingOthersPass(migration: string, step: () => Promise<unknown>): Promise<void> {
  for (let tries = 1; ; tries++) {
    try {
      await step()
      return
    } catch (error) {
      const { code } = error as { code?: string }
      if (code !== '55P03' && code !== '40P01') throw error
      if (tries === lockTriesMax) throw new SchemaInUseError(migration, error)
      await sleep(lockPauseMs * (0.5 + Math.random()))
    }
  }
}

function initialise(
  { url, poolMax, entities }: { url: string; poolMax: number; entities: EntitySchema[] },
  servers: DatabaseServers,
  session: pg.ClientConfig,
): Promise<MikroORM> {
  return MikroORM.init({
    clientUrl: url,
    entities,
    extensions: [Migrator],
    pool: { min: 0, max: poolMax, idleTimeoutMillis: idleConnectionMs },
    driverOptions: {
      // MikroORM reads host, port, user and database out of the URL and drops the rest, TLS among it; this reads it all.
      Client: servers.Client,
      connectionTimeoutMillis: connectTimeoutMs,
      maxLifetimeSeconds: connectionLifetimeSeconds,
      keepAlive: true,
      ...session,
    },
    migrations: {
      tableName: 'migrations',
      snapshot: false,
      migrationsList,
    },
    logger: () => {},
    ensureDatabase: false,
  })
}

/** Changes nothing, unlike MikroORM, which makes its table first. */
async function migrationsOf(pool: pg.Pool): Promise<Migrations> {
  const { rows: table } = await pool.query<{ made: boolean }>(`select to_regclass('migrations') is not null as made`)
  const { rows } = table[0]?.made
    ? await pool.query<{ name: string }>('select name from migrations order by id')
    : { rows: [] }
  const applied = rows.map(({ name }) => name)
  const known = migrationsList.map(({ name }) => name)
  return {
    applied,
    pending: known.filter(name => !applied.includes(name)),
    newer: applied.filter(name => !known.includes(name)),
  }
}

async function demandOwner(pool: pg.Pool, pending: readonly string[]): Promise<void> {
  const { rows } = await pool.query<{ role: string; owns: boolean }>(
    `select current_user as role, coalesce(has_schema_privilege(current_schema(), 'create'), false)
       and coalesce((select pg_has_role(relowner, 'member') from pg_class where oid = to_regclass('devices')), true) as owns`,
  )
  if (rows[0]?.owns === false) throw new SchemaBehindError(pending, rows[0].role)
}

/**
 * A connection that dies while somebody has it goes back to the pool at once, so that there is room for another. Kysely, below
 * MikroORM, never gives one back on which `begin`, `commit` or `rollback` has failed (kysely-org/kysely#1990): an outage would
 * cost the pool all of its connections, and the process would have to be started anew.
 */
function takeBackTheDead(pool: pg.Pool): void {
  const held = new Set<pg.PoolClient>()
  pool.on('acquire', client => held.add(client))
  pool.on('release', (_, client) => held.delete(client))
  pool.on('connect', client => {
    client.once('end', () => {
      if (!held.has(client)) return
      client.release(true)
      // Who had it may still give it back.
      client.release = () => {}
    })
  })
}

/** The pool says nothing of those who have waited for a connection for as long as they may, and got none. */
function countVainWaits(pool: pg.Pool, count: () => void): void {
  const connect = pool.connect.bind(pool) as (callback?: (error: unknown) => void) => Promise<pg.PoolClient> | undefined
  const counted = (error: unknown) => {
    if (databaseFailure(error) === 'pool_exhausted') count()
  }
  // biome-ignore lint/suspicious/noExplicitAny: the two ways to ask `pg` for a connection have no type in common
  pool.connect = ((callback?: any) => {
    if (!callback)
      return connect()?.catch(error => {
        counted(error)
        throw error
      })
    return connect(((error: unknown, ...given: unknown[]) => {
      if (error) counted(error)
      callback(error, ...given)
    }) as never)
  }) as typeof pool.connect
}
