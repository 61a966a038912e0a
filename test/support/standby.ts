/** A real streaming replica, made as an operator would: a base backup of the primary's folder while it runs. */
import { execFile } from 'node:child_process'
import { appendFile, chown, mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { ExecutionContext } from 'ava'
import pg from 'pg'
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { createLog } from '../../src/telemetry/log.ts'

const run = promisify(execFile)
const log = createLog({ level: 'silent' })

export type TestServer = {
  url: string
  /** The folder that `startEmbeddedPostgres` was given. */
  directory: string
  /** Connected to the server as its superuser. */
  pool: pg.Pool
  /** Comes back by itself, on the same port. */
  crash(): void
  stop(): Promise<void>
  start(): Promise<void>
}

/** A PostgreSQL of the test's own. */
export async function primaryServer(t: ExecutionContext): Promise<TestServer> {
  return serve(t, await mkdtemp(join(tmpdir(), 'edgemesh-primary-')))
}

/** A hot standby of `primary` that replays what it is streamed. */
export async function standbyOf(t: ExecutionContext, primary: TestServer): Promise<TestServer> {
  const directory = await mkdtemp(join(tmpdir(), 'edgemesh-standby-'))
  const data = join(directory, 'data')
  // A backup is begun and ended on one connection; its label is what the copy is recovered by.
  const backup = await primary.pool.connect()
  try {
    await backup.query(`select pg_backup_start('standby', true)`)
    // Keeps owners and modes, on which PostgreSQL insists.
    await run('cp', ['-a', join(primary.directory, 'data'), data])
    const { rows } = await backup.query<{ labelfile: string }>('select labelfile from pg_backup_stop(false)')
    await writeInto(data, 'backup_label', rows[0]!.labelfile)
  } finally {
    backup.release()
  }
  await rm(join(data, 'postmaster.pid'), { force: true })
  const { hostname, port, username, password } = new URL(primary.url)
  const source = `host=${hostname} port=${port} user=${username} password=${decodeURIComponent(password)}`
  await appendFile(
    join(data, 'postgresql.auto.conf'),
    `primary_conninfo = '${source}'\nwal_retrieve_retry_interval = '100ms'\n`,
  )
  await writeInto(data, 'standby.signal', '')
  return serve(t, directory)
}

/** As the owner of the folder: tests may run as root, PostgreSQL does not. */
async function writeInto(data: string, name: string, text: string): Promise<void> {
  const { uid, gid } = await stat(data)
  await writeFile(join(data, name), text, { mode: 0o600 })
  await chown(join(data, name), uid, gid)
}

async function serve(t: ExecutionContext, directory: string): Promise<TestServer> {
  let running = await startEmbeddedPostgres({ directory, log })
  const { url, port } = running
  const pool = new pg.Pool({ connectionString: url, max: 4 })
  pool.on('error', () => {})
  t.teardown(async () => {
    await pool.end()
    await running.stop()
    await rm(directory, { recursive: true, force: true })
  })
  return {
    url,
    directory,
    pool,
    crash: () => running.kill(),
    stop: () => running.stop(),
    async start() {
      running = await startEmbeddedPostgres({ directory, log, port })
    },
  }
}
