/** The database server: whether it is there, whom one talks to, whether it keeps what it has acknowledged, and how far away it is. */
import { randomBytes } from 'node:crypto'
import type { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { TLSSocket } from 'node:tls'
import type pg from 'pg'
import { databaseFailure } from '../db/failure.ts'
import { isLoopback } from '../network.ts'
import { databaseConnectionsMin, instanceOf } from '../workers/shares.ts'
import { CannotLook, type Check, type Finding, failed, ok, orOk, span, warning } from './finding.ts'
import type { Subject } from './subject.ts'

const versionMin = 15

const mendsByKind: Readonly<Record<string, string>> = {
  unreachable: 'see that PostgreSQL runs and listens on that address, and that a firewall lets this host through',
  too_many_connections: 'end what is idle, make the pools smaller, or raise max_connections',
  shutdown: 'wait until it has started; its log says what it does',
  read_only: 'let DATABASE_URL name the primary, or all servers: docs/database-failures.md',
  not_set_up: 'edgemesh migrate up, as the owner of the tables: docs/audit.md',
}

export const databaseCheck: Check<Subject> = {
  name: 'database',
  async look(subject) {
    if (subject.settings().database.url === undefined) {
      return [
        warning({
          what: 'DATABASE_URL is not set, so a server starts an embedded PostgreSQL of its own',
          why: 'that is for trying things out: one process, no replica, no backup',
          mend: 'set DATABASE_URL, or DATABASE_URL_FILE',
        }),
      ]
    }
    try {
      await subject.database()
    } catch (error) {
      if (error instanceof CannotLook) throw error
      const { message } = error as Error
      const why = 'nothing is enrolled, allowed or changed without it'
      return [failed({ what: message, why, mend: mendFor(error) })]
    }
    return subject.read(async client => {
      const { rows } = await client.query<{ version: string; number: number; name: string }>(
        `select current_setting('server_version') as version, current_setting('server_version_num')::int as number,
           current_database() as name`,
      )
      const { version, number, name } = rows[0]!
      if (number >= versionMin * 10_000) return [ok(`PostgreSQL ${version}, the primary of ${name}`)]
      const why = 'statements of EdgeMesh are refused by it'
      const mend = `upgrade it to ${versionMin} or newer`
      return [failed({ what: `PostgreSQL is ${version}, and EdgeMesh needs ${versionMin}`, why, mend })]
    })
  },
}

function mendFor(error: unknown): string {
  const { message } = error as Error
  if (/password|authentication|pg_hba|role .* does not exist/i.test(message)) {
    return 'give DATABASE_URL the user and the password that PostgreSQL has; pg_hba.conf says who may come from where'
  }
  if (/does not support SSL/i.test(message)) {
    return 'ssl = on in postgresql.conf, with a certificate; or ?ssl=disable where it is on this host'
  }
  if (/certificate|self.signed|altname/i.test(message)) {
    return 'sslrootcert in DATABASE_URL has to be the authority of the certificate, and the host one of its names'
  }
  if (/unsupported startup parameter/i.test(message)) {
    return 'PgBouncer: ignore_startup_parameters = statement_timeout, idle_in_transaction_session_timeout, lock_timeout; and pool_mode = session'
  }
  if (/database .* does not exist/i.test(message)) return 'create database, then edgemesh migrate up'
  return mendsByKind[databaseFailure(error) ?? 'unreachable'] ?? mendsByKind.unreachable!
}

// ── TLS ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const dayMs = 86_400_000
const certificateDaysMin = 21

export const databaseTlsCheck: Check<Subject> = {
  name: 'database-tls',
  async look(subject) {
    const mode = new URL(subject.settings().database.url ?? 'postgresql://').searchParams.get('sslmode') ?? 'none'
    return subject.read(async client => {
      const { stream } = (client as unknown as { connection: { stream: Socket } }).connection
      const isNear = stream.remoteAddress === undefined || isLoopback(stream.remoteAddress)
      if (!(stream instanceof TLSSocket)) {
        if (isNear) return [ok('without TLS, and on this host')]
        return [
          failed({
            what: `the connection to ${stream.remoteAddress} is not encrypted`,
            why: 'whoever is on the way reads the password, and may change what is answered',
            mend: 'ssl = on at the server, and ?ssl=verify-full&sslrootcert=… in DATABASE_URL',
          }),
        ]
      }
      const troubles: Finding[] = []
      if (!isNear && mode === 'require') {
        troubles.push(
          warning({
            what: 'the connection is encrypted, but nobody checks whose certificate it is: ssl=require',
            why: 'whoever can lead the connection elsewhere can pretend to be the database',
            mend: '?ssl=verify-full&sslrootcert=PATH in DATABASE_URL',
          }),
        )
      }
      const until = new Date(stream.getPeerCertificate().valid_to)
      const leftMs = until.getTime() - subject.clock()
      if (leftMs < certificateDaysMin * dayMs) {
        const what = `the certificate of the database ${leftMs < 0 ? 'has expired' : 'ends'} on ${until.toISOString()}`
        const trouble = {
          what,
          why: 'with verify-full no server connects then',
          mend: 'renew it, and reload PostgreSQL',
        }
        troubles.push(leftMs < 0 ? failed(trouble) : warning(trouble))
      }
      return orOk(troubles, `${stream.getProtocol()}, ${mode}, certificate until ${until.toISOString().slice(0, 10)}`)
    })
  },
}

// ── What is kept ───────────────────────────────────────────────────────────────────────────────────────────────────

type ServerSettings = Record<string, string>

/** By setting: what is wrong with its value, if anything is. */
const keeping: Record<string, (value: string, all: ServerSettings) => Finding | undefined> = {
  fsync: value =>
    value === 'off'
      ? failed(lossy('fsync is off', 'after a power cut the database may be beyond repair', 'fsync = on'))
      : undefined,
  full_page_writes: value =>
    value === 'off'
      ? failed(
          lossy('full_page_writes is off', 'a page that was half written is lost at a crash', 'full_page_writes = on'),
        )
      : undefined,
  synchronous_commit(value, { synchronous_standby_names: standbys }) {
    const isWhole = value !== 'off' && (value !== 'local' || standbys === '')
    if (isWhole) return undefined
    const why = 'what was acknowledged to devices and operators is lost at a crash, or at a failover'
    return failed(
      lossy(`synchronous_commit is ${value}`, why, 'synchronous_commit = on, also for this role and database'),
    )
  },
  default_transaction_read_only: value =>
    value === 'on'
      ? failed({
          what: 'default_transaction_read_only is on',
          why: 'a server can write nothing, and so allows nothing',
          mend: 'alter role or alter database … reset default_transaction_read_only',
        })
      : undefined,
  default_transaction_isolation: value =>
    value === 'read committed'
      ? undefined
      : warning({
          what: `default_transaction_isolation is ${value}`,
          why: 'transactions are taken back for the sake of others far more often, and tried again',
          mend: "default_transaction_isolation = 'read committed'",
        }),
  wal_level: value =>
    value === 'minimal'
      ? warning({
          what: 'wal_level is minimal',
          why: 'there can be no replica, and no backup that goes on to the last commit',
          mend: 'wal_level = replica, and a restart of PostgreSQL',
        })
      : undefined,
}

function lossy(what: string, why: string, line: string) {
  return {
    what,
    why,
    mend: `${line}; see who has set it: select * from pg_settings where name like '${line.split(' ')[0]}'`,
  }
}

export const databaseDurabilityCheck: Check<Subject> = {
  name: 'database-durability',
  look: subject =>
    subject.read(async client => {
      const names = [...Object.keys(keeping), 'synchronous_standby_names']
      const { rows } = await client.query<{ name: string; setting: string }>(
        'select name, setting from pg_settings where name = any ($1)',
        [names],
      )
      const all = Object.fromEntries(rows.map(({ name, setting }) => [name, setting]))
      const troubles = Object.entries(keeping).flatMap(([name, judge]) => {
        const value = all[name]
        return value === undefined ? [] : (judge(value, all) ?? [])
      })
      return orOk(troubles, 'what is committed is on disk')
    }),
}

// ── Connections ────────────────────────────────────────────────────────────────────────────────────────────────────

/** An instance writes its sign of life every five seconds. */
export const aliveSeconds = 30
/** Beside those of its pool, each process has one that hears of changes. */
const listenersPerProcess = 1

export const databaseConnectionsCheck: Check<Subject> = {
  name: 'database-connections',
  look: subject =>
    subject.read(async client => {
      const { poolMax } = subject.settings().database
      const alive = await aliveProcesses(client)
      const found = new Set(alive.map(instanceOf)).size
      const instances = subject.instances ?? Math.max(1, found)
      const workers = Math.max(subject.workers === 'auto' ? 1 : subject.workers, Math.ceil(alive.length / (found || 1)))
      const each = Math.max(poolMax, workers * databaseConnectionsMin) + workers * listenersPerProcess
      const { rows } = await client.query<{
        most: number
        reserved: number
        role: number
        base: number
        others: number
      }>(
        `select current_setting('max_connections')::int as most,
           current_setting('superuser_reserved_connections')::int
             + coalesce(current_setting('reserved_connections', true), '0')::int as reserved,
           (select rolconnlimit from pg_roles where rolname = current_user) as role,
           (select datconnlimit from pg_database where datname = current_database()) as base,
           (select count(*)::int from pg_stat_activity
            where backend_type = 'client backend'
              and not (application_name like 'edgemesh%' and datname = current_database())) as others`,
      )
      const { most, reserved, role, base, others } = rows[0]!
      const free = most - reserved - others
      const room = Math.min(free, ...[role, base].filter(limit => limit >= 0))
      const sum = `${instances} × ${each} connections`
      const seen = `${sum}, room for ${room} (max_connections ${most}, ${reserved} reserved, ${others} of others)`
      const why = 'calls wait for a connection, or are refused with UNAVAILABLE'
      const mend = 'lower DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW, or raise max_connections'
      if (instances * each > room) return [failed({ what: `there are too few connections: ${seen}`, why, mend })]
      if ((instances + 1) * each > room) {
        const update = 'during an update the old and the new instance run side by side, and one more does not fit'
        return [warning({ what: `there is no room for one instance more: ${seen}`, why: update, mend })]
      }
      return [ok(seen)]
    }),
}

async function aliveProcesses(client: pg.PoolClient): Promise<string[]> {
  const { rows: made } = await client.query<{ made: boolean }>(`select to_regclass('instances') is not null as made`)
  if (!made[0]?.made) return []
  const { rows } = await client.query<{ id: string }>(
    `select id from instances where seen_at > now() - make_interval(secs => $1)`,
    [aliveSeconds],
  )
  return rows.map(({ id }) => id)
}

// ── How far ────────────────────────────────────────────────────────────────────────────────────────────────────────

const clockOffMs = 1_000
const clockFarOffMs = 30_000

export const databaseClockCheck: Check<Subject> = {
  name: 'database-clock',
  look: subject =>
    subject.read(async client => {
      const beforeMs = subject.clock()
      const { rows } = await client.query<{ ms: number }>(
        'select (extract(epoch from clock_timestamp()) * 1000)::float8 as ms',
      )
      const afterMs = subject.clock()
      const aheadMs = (rows[0]?.ms ?? 0) - (beforeMs + afterMs) / 2
      // Less what the way may have taken.
      const sureMs = Math.abs(aheadMs) - (afterMs - beforeMs) / 2
      if (sureMs < clockOffMs) return [ok('the clock of the database is that of this host')]
      const trouble = {
        what: `the clock of the database is ${span(aheadMs)} ${aheadMs > 0 ? 'ahead of' : 'behind'} that of this host`,
        why: 'tokens and certificates end early or late, and what is on record is not in order',
        mend: 'NTP on both hosts: timedatectl, or chronyc tracking, says which one is wrong',
      }
      return [sureMs < clockFarOffMs ? warning(trouble) : failed(trouble)]
    }),
}

const latencyTries = 25
/** Of the fastest answer: what the way alone takes. Each decision waits for it once, each enrollment a dozen times. */
const latencyMsMax = 10
const latencyMsFar = 100

export const databaseLatencyCheck: Check<Subject> = {
  name: 'database-latency',
  look: subject =>
    subject.read(async client => {
      let bestMs = Number.POSITIVE_INFINITY
      for (let attempt = 0; attempt < latencyTries; attempt++) {
        const startedAt = performance.now()
        await client.query('select 1')
        bestMs = Math.min(bestMs, performance.now() - startedAt)
      }
      const seen = `${bestMs.toFixed(1)} ms there and back`
      if (bestMs <= latencyMsMax) return [ok(seen)]
      const trouble = {
        what: `the database is far away: ${seen}`,
        why: 'each decision waits until it is on record there, and each enrollment asks several times',
        mend: 'run instances in the network, or at least in the region, of the primary',
      }
      return [bestMs <= latencyMsFar ? warning(trouble) : failed(trouble)]
    }),
}

// ── Notifications ──────────────────────────────────────────────────────────────────────────────────────────────────

const connectMs = 6_000
const heardMs = 6_000

export const databaseNotificationsCheck: Check<Subject> = {
  name: 'database-notifications',
  look: subject =>
    subject.connected(async (client, db) => {
      const listener = new db.servers.Client({
        connectionTimeoutMillis: connectMs,
        application_name: 'edgemesh doctor',
      })
      listener.on('error', () => {})
      const over = new AbortController()
      try {
        await listener.connect()
        // Nobody else listens there, and nothing is kept.
        const channel = `edgemesh_doctor_${randomBytes(8).toString('hex')}`
        const heard = new Promise<true>(resolve => listener.once('notification', () => resolve(true)))
        await listener.query(`listen ${channel}`)
        await client.query(`notify ${channel}`)
        if (await Promise.race([heard, sleep(heardMs, false, { signal: over.signal })])) {
          return [ok('what is announced at one connection is heard at another')]
        }
        return [
          failed({
            what: `LISTEN hears nothing: a notification did not arrive within ${heardMs / 1_000} s`,
            why: 'instances do not hear of revocations and changes, so they decide nothing from memory and end what they hold',
            mend: 'a pooler on the way can not share connections between transactions: pool_mode = session with PgBouncer, or none',
          }),
        ]
      } finally {
        over.abort()
        await listener.end().catch(() => {})
      }
    }),
}
