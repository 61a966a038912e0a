/**
 * What `edgemesh doctor` looks at: a configuration as `edgemesh serve` would read it, and what that leads to. What several checks
 * need is opened once, when the first one asks, and closed at the end.
 */
import { readFileSync } from 'node:fs'
import { networkInterfaces } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { bulkhead } from 'cockatiel'
import type pg from 'pg'
import { type Clock, systemClock } from '../clock.ts'
import { type Database, type Migrations, openDatabase } from '../db/orm.ts'
import { type AuthoritySet, readAuthorities } from '../identity/authorities.ts'
import { identityEntities } from '../identity/entities.ts'
import { readSettings, SETTINGS_REFERENCE, type Settings, SettingsError } from '../settings.ts'
import { CannotLook } from './finding.ts'
import { type Instance, lookAtInstance } from './instance-http.ts'

export type Environment = Readonly<Record<string, string | undefined>>

export type SubjectOptions = {
  env: Environment
  /** Where `env` was read from, if it is a file. */
  envFile?: string | undefined
  /** As for `edgemesh serve --workers`. */
  workers?: number | 'auto' | undefined
  /** How many there are to be; unless given, as many as are alive. */
  instances?: number | undefined
  /** Where devices connect to. */
  publicAddress?: { host: string; port: number } | undefined
  /** How long a stream is to be left alone to see whether it is cut. */
  idleMs?: number | undefined
  /** A node-exporter textfile, or the folder of it. */
  backupMetrics?: string | undefined
  clock?: Clock
  nodeVersion?: string
}

export type Subject = Required<Pick<SubjectOptions, 'env' | 'clock' | 'nodeVersion'>> &
  Pick<SubjectOptions, 'envFile' | 'instances' | 'publicAddress' | 'idleMs' | 'backupMetrics'> & {
    workers: number | 'auto'
    /** @throws {CannotLook} */
    settings(): Settings
    problems(): SettingsError | undefined
    /** Texts that nobody may see. */
    secrets(): string[]
    /** Runs `work` on a connection of its own. @throws {CannotLook} where there is no database to ask */
    connected<T>(work: (client: pg.PoolClient, db: Database) => Promise<T>): Promise<T>
    /** The same, in a transaction that only reads. */
    read<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T>
    migrations(): Promise<Migrations>
    /** @throws why it can't be had; `DATABASE_URL` has to be set */
    database(): Promise<Database>
    /** Undefined: there is none yet. @throws {CannotLook} where there is no database to ask, else what does not fit */
    authorities(): Promise<AuthoritySet | undefined>
    /** The instance behind METRICS_PORT on this host. @throws {CannotLook} */
    instance(): Promise<Instance>
    /** Addresses of this host. */
    addresses(): string[]
    close(): Promise<void>
  }

/** A server that is short of connections has these to spare. */
const poolMax = 3
/** Checks wait for each other here, not in the pool, which gives up after three seconds. */
const waitingMax = 64
/** Of three seconds each: a host that is very busy is no database that is away. */
const connectTriesMax = 4
const statementMs = 8_000
const closeMs = 2_000
/** Shorter values may be a word that messages use. */
const secretCharactersMin = 6

export function openSubject(options: SubjectOptions): Subject {
  const { env, envFile, workers = 1, instances, publicAddress, idleMs, backupMetrics } = options
  const { clock = systemClock, nodeVersion = process.versions.node } = options
  const read = readOrProblems(env)
  let opening: Promise<Database> | undefined
  let reading: Promise<AuthoritySet | undefined> | undefined
  let migrations: Promise<Migrations> | undefined
  let looking: Promise<Instance> | undefined

  function settings(): Settings {
    if (read instanceof SettingsError) throw new CannotLook('the settings are wrong: see the check settings')
    return read
  }

  function database(): Promise<Database> {
    const { url } = settings().database
    if (url === undefined) throw new CannotLook('DATABASE_URL is not set')
    opening ??= open(url)
    return opening
  }

  const slots = bulkhead(poolMax, waitingMax)

  async function reached(): Promise<Database> {
    try {
      return await database()
    } catch (error) {
      if (error instanceof CannotLook) throw error
      throw new CannotLook('the database can not be reached: see the check database')
    }
  }

  async function connected<T>(work: (client: pg.PoolClient, db: Database) => Promise<T>): Promise<T> {
    const db = await reached()
    return slots.execute(async () => {
      const client = await patiently(() => db.pool.connect())
      let isBroken = true
      try {
        const result = await work(client, db)
        isBroken = false
        return result
      } finally {
        client.release(isBroken)
      }
    })
  }

  const readDatabase = <T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> =>
    connected(async client => {
      await client.query('begin transaction read only')
      await client.query(`set local statement_timeout = ${statementMs}`)
      const result = await work(client)
      await client.query('rollback')
      return result
    })

  async function readStored(): Promise<AuthoritySet | undefined> {
    const made = await readDatabase(client => client.query(`select to_regclass('authorities') is not null as made`))
    if (!made.rows[0]?.made) return undefined
    const { trustDomain, caKeyPassphrase: passphrase, caCertPem, caKeyPem } = settings().identity
    const files = caCertPem && caKeyPem ? { certPem: caCertPem, keyPem: caKeyPem } : undefined
    const db = await reached()
    return slots.execute(async () => {
      const em = db.em()
      await patiently(() => em.begin({ readOnly: true }))
      return readAuthorities(em, { trustDomain, passphrase, files, clock }).finally(() => em.rollback())
    })
  }

  return {
    ...{ env, envFile, workers, instances, publicAddress, idleMs, backupMetrics, clock, nodeVersion },
    settings,
    problems: () => (read instanceof SettingsError ? read : undefined),
    secrets: () => secretsIn(env, read instanceof SettingsError ? undefined : read),
    connected,
    read: readDatabase,
    migrations() {
      migrations ??= reached().then(db => slots.execute(() => patiently(db.migrations)))
      return migrations
    },
    database,
    authorities() {
      reading ??= readStored()
      return reading
    },
    instance() {
      looking ??= lookAtInstance(settings().metrics)
      return looking
    },
    addresses: () => Object.values(networkInterfaces()).flatMap(found => found?.map(({ address }) => address) ?? []),
    async close() {
      const closed = opening?.then(
        db => db.close(),
        () => {},
      )
      // A database that is silent does not say goodbye either.
      await Promise.race([closed, sleep(closeMs, undefined, { ref: false })])
    },
  }
}

function readOrProblems(env: Environment): Settings | SettingsError {
  try {
    return readSettings(env)
  } catch (error) {
    if (error instanceof SettingsError) return error
    throw error
  }
}

/** Opened and asked once, so that who waits for it hears why it can't be had. */
async function open(url: string): Promise<Database> {
  const db = await openDatabase({ url, poolMax, entities: identityEntities })
  try {
    await patiently(() => db.pool.query('select 1'))
    return db
  } catch (error) {
    await db.close().catch(() => {})
    throw error
  }
}

/** Tries again where it is only that nobody has answered in time. */
async function patiently<T>(connect: () => Promise<T>): Promise<T> {
  for (let tries = 1; ; tries++) {
    try {
      return await connect()
    } catch (error) {
      if (tries === connectTriesMax || !/time(d )?out/i.test((error as Error).message)) throw error
    }
  }
}

/** Also from variables that are wrong: what is no secret yet may have been meant to be one. */
function secretsIn(env: Environment, settings: Settings | undefined): string[] {
  const given = SETTINGS_REFERENCE.filter(({ secret }) => secret).flatMap(({ name }) => [
    env[name],
    textOf(env[`${name}_FILE`]),
  ])
  const urls = [settings?.database.url, settings?.database.migrationUrl, ...(settings?.database.replicaUrls ?? [])]
  const passwords = urls.flatMap(url => {
    if (url === undefined) return []
    const { password, searchParams } = new URL(url)
    return [password, decodeURIComponent(password), searchParams.get('password') ?? '']
  })
  return [...given, ...passwords]
    .filter((text): text is string => text !== undefined && text.length >= secretCharactersMin)
    .sort((one, other) => other.length - one.length)
}

function textOf(path: string | undefined): string | undefined {
  if (!path) return undefined
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined
  }
}
