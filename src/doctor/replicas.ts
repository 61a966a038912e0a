/** Each of DATABASE_REPLICA_URLS: whether lists can be read there. */
import { setTimeout as sleep } from 'node:timers/promises'
import type pg from 'pg'
import { databaseServers } from '../db/servers.ts'
import { CannotLook, type Check, type Finding, failed, ok, warning } from './finding.ts'
import type { Subject } from './subject.ts'

const connectMs = 3_000
const statementMs = 4_000
/** Servers wait for 300 ms, then they read at the primary. */
const catchUpMsMax = 2_000
const askAgainMs = 50

export const replicasCheck: Check<Subject> = {
  name: 'replicas',
  async look(subject) {
    const { replicaUrls } = subject.settings().database
    if (replicaUrls.length === 0)
      throw new CannotLook('DATABASE_REPLICA_URLS names none: lists are read at the primary')
    const primary = await subject.read(async client => {
      const { rows } = await client.query<{ lsn: string; system: string }>(
        `select pg_current_wal_flush_lsn()::text as lsn, (select system_identifier::text from pg_control_system()) as system`,
      )
      return rows[0]!
    })
    return Promise.all(replicaUrls.map(url => lookAtReplica(url, primary)))
  },
}

const atPrimary = 'lists and reports are read at the primary meanwhile, which has to bear them as well'

async function lookAtReplica(url: string, primary: { lsn: string; system: string }): Promise<Finding> {
  const name = nameOf(url)
  const { Client } = databaseServers(url, { takesStandby: true })
  const client: pg.Client = new Client({
    connectionTimeoutMillis: connectMs,
    query_timeout: statementMs,
    application_name: 'edgemesh doctor',
  })
  client.on('error', () => {})
  try {
    await client.connect()
    await client.query('begin transaction read only')
    const { rows } = await client.query<{ standby: boolean; system: string }>(
      `select pg_is_in_recovery() as standby, (select system_identifier::text from pg_control_system()) as system`,
    )
    const { standby, system } = rows[0]!
    if (system !== primary.system) {
      const mend = 'name a standby that was copied from this primary'
      return failed({ what: `${name} is a replica of another database`, why: atPrimary, mend })
    }
    if (!standby) {
      const mend = 'name a standby in DATABASE_REPLICA_URLS; one that was promoted by mistake has to be copied anew'
      return failed({ what: `${name} is no standby: it takes writes itself`, why: atPrimary, mend })
    }
    const behind = await bytesBehind(client, primary.lsn)
    if (behind === 0) return ok(`${name} has all that the primary has`)
    return warning({
      what: `${name} is ${behind} bytes behind for ${catchUpMsMax / 1_000} s`,
      why: atPrimary,
      mend: 'docs/runbooks/database.md#postgresreplicalag: a long query there, its disk, or the network',
    })
  } catch (error) {
    const mend = 'see that it runs, and takes this host and this role; or take it out of DATABASE_REPLICA_URLS'
    return failed({ what: (error as Error).message, why: atPrimary, mend })
  } finally {
    await client.end().catch(() => {})
  }
}

/** Of what the primary had when it was asked. */
async function bytesBehind(client: pg.Client, lsn: string): Promise<number> {
  const untilMs = performance.now() + catchUpMsMax
  for (;;) {
    const { rows } = await client.query<{ bytes: number | null }>(
      'select pg_wal_lsn_diff($1::pg_lsn, pg_last_wal_replay_lsn())::float8 as bytes',
      [lsn],
    )
    const bytes = Math.max(0, rows[0]?.bytes ?? Number.POSITIVE_INFINITY)
    if (bytes === 0 || performance.now() > untilMs) return bytes
    await sleep(askAgainMs)
  }
}

function nameOf(url: string): string {
  const { hostname, port, searchParams } = new URL(url)
  return `${searchParams.get('host') ?? hostname}:${searchParams.get('port') ?? (port || 5432)}`
}
