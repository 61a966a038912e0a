/** A PostgreSQL of a test's own, to be stopped, killed, filled up, copied and promoted: the real server, and a real standby of it. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readlinkSync } from 'node:fs'
import { appendFile, chown, mkdtemp, open, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { ExecutionContext } from 'ava'
import pg from 'pg'
import { findBinaries, startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { chooseAccount } from '../../src/db/embedded-account.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from './edgemesh.ts'
import { freePort } from './free-port.ts'
import { queryOnce, smallServerArguments } from './small-postgres.ts'

export type OwnPostgres = {
  /** Database `edgemesh`, as superuser. */
  url: string
  port: number
  directory: string
  /** One statement, on a connection of its own. */
  query<Row extends pg.QueryResultRow>(statement: string, values?: unknown[]): Promise<Row[]>
  start(): Promise<void>
  /** As an administrator does: every session ends with 57P01. */
  stop(): Promise<void>
  /** As a machine that dies: all of its processes, with -9. */
  kill(): Promise<void>
  /** With -9, one of the processes that serve sessions: PostgreSQL ends all others (57P02) and recovers. */
  crash(): Promise<void>
  /** With a certificate that it has signed itself; for new connections. */
  enableTls(): Promise<void>
  /** A standby with all that is here, which follows. */
  standby(name: string): Promise<OwnPostgres>
  /** A standby takes writes from now on. */
  promote(): Promise<void>
}

type Cluster = { directory: string; password: string; settings: Record<string, string> }

/** @param settings of PostgreSQL, besides those that make it small */
export async function ownPostgres(
  t: ExecutionContext,
  settings: Record<string, string> = {},
  parent = tmpdir(),
): Promise<OwnPostgres> {
  const folder = await mkdtemp(join(parent, 'edgemesh-own-postgres-'))
  // The embedded server lays it out: with a user, a password and a database.
  const embedded = await startEmbeddedPostgres({ directory: folder, log: createLog({ level: 'error' }) })
  const { password } = new URL(embedded.url)
  await embedded.stop()
  const server = own(t, folder, { directory: join(folder, 'data'), password, settings }, await freePort())
  await server.start()
  return server
}

function own(t: ExecutionContext, folder: string, cluster: Cluster, port: number): OwnPostgres {
  const { directory, password, settings } = cluster
  const url = `postgresql://edgemesh:${password}@127.0.0.1:${port}/edgemesh`
  let server: ChildProcess | undefined
  t.teardown(async () => {
    await kill()
    await rm(folder, { recursive: true, force: true })
  })

  async function query<Row extends pg.QueryResultRow>(statement: string, values: unknown[] = []): Promise<Row[]> {
    const options = '-c default_transaction_read_only=off -c lock_timeout=0'
    return queryOnce<Row>(url, statement, values, options)
  }

  async function start(): Promise<void> {
    const bin = findBinaries()
    const account = await chooseAccount(directory, [dirname(folder), join(bin, 'postgres'), join(bin, '../lib')])
    const { file, args, options } = account.command(join(bin, 'postgres'), [
      '-D',
      directory,
      ...smallServerArguments(port, settings),
    ])
    const output = await open(join(folder, 'own.log'), 'a')
    const started = spawn(file, args, { ...options, cwd: '/', stdio: ['ignore', output.fd, output.fd] })
    server = started
    await output.close()
    await eventually('PostgreSQL answers', async () => {
      if (started.exitCode !== null) throw new Error(await readFile(join(folder, 'own.log'), 'utf8'))
      return query('select 1').catch(() => undefined)
    })
  }

  /** Of all of its processes: each has its data for a working folder. */
  function pids(): number[] {
    return readdirSync('/proc')
      .filter(name => /^\d+$/.test(name))
      .filter(name => {
        try {
          return readlinkSync(`/proc/${name}/cwd`) === directory
        } catch {
          return false
        }
      })
      .map(Number)
  }

  async function kill(): Promise<void> {
    for (const pid of pids()) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // It has gone by itself meanwhile.
      }
    }
    await gone()
  }

  async function gone(): Promise<void> {
    if (server && server.exitCode === null && server.signalCode === null) await once(server, 'exit')
    await eventually('all of its processes have gone', () => pids().length === 0)
  }

  return {
    url,
    port,
    directory,
    query,
    start,
    kill,
    async stop() {
      server?.kill('SIGINT')
      await gone()
    },
    async crash() {
      const [row] = await query<{ pid: number }>(
        `select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() limit 1`,
      )
      if (!row) throw new Error('nobody is connected')
      process.kill(row.pid, 'SIGKILL')
    },
    async enableTls() {
      const [key, certificate] = ['server.key', 'server.crt'].map(name => join(directory, name)) as [string, string]
      const words = 'req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost'
      execFileSync('openssl', [...words.split(' '), '-keyout', key, '-out', certificate], { stdio: 'ignore' })
      const { uid, gid } = await stat(directory)
      for (const path of [key, certificate]) await chown(path, uid, gid)
      await query('alter system set ssl = on')
      await query('select pg_reload_conf()')
    },
    async standby(name) {
      const copy = await mkdtemp(join(tmpdir(), 'edgemesh-own-standby-'))
      await query(`select pg_create_physical_replication_slot('${name}')`)
      const data = join(copy, 'data')
      await copyWhileItRuns(url, directory, data)
      const info = `host=127.0.0.1 port=${port} user=edgemesh password=${password} application_name=${name}`
      await appendFile(
        join(data, 'postgresql.auto.conf'),
        `\nprimary_conninfo = '${info}'\nprimary_slot_name = '${name}'\n`,
      )
      await writeFile(join(data, 'standby.signal'), '')
      const account = await chooseAccount(data, [dirname(copy)])
      if (account.owner) {
        for (const path of [copy, join(data, 'standby.signal'), join(data, 'backup_label')]) {
          await chown(path, account.owner.uid, account.owner.gid)
        }
      }
      const server = own(t, copy, { directory: data, password, settings }, await freePort())
      await server.start()
      return server
    },
    async promote() {
      await query('select pg_promote(true, 30)')
    },
  }
}

/** What pg_basebackup does, which does not come with the embedded server. */
async function copyWhileItRuns(url: string, from: string, to: string): Promise<void> {
  const client = new pg.Client({ connectionString: url })
  await client.connect()
  try {
    await client.query(`select pg_backup_start('standby', true)`)
    execFileSync('cp', ['-a', from, to])
    await rm(join(to, 'postmaster.pid'), { force: true })
    const { rows } = await client.query<{ labelfile: string }>('select labelfile from pg_backup_stop(false)')
    await writeFile(join(to, 'backup_label'), rows[0]!.labelfile)
  } finally {
    await client.end()
  }
}
