/**
 * PostgreSQL as a distribution has it, with pg_dump and all that the embedded server lacks; and the scripts of `deploy/backup`,
 * run as an operator does: by a user who is not root, from a folder of their own.
 */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync } from 'node:fs'
import { appendFile, chown, cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import type { ExecutionContext } from 'ava'
import pg from 'pg'
import { type Account, chooseAccount } from '../../src/db/embedded-account.ts'
import { eventually } from './edgemesh.ts'
import { isExecutable } from './executable.ts'
import { freePort } from './free-port.ts'

const installed = '/usr/lib/postgresql'
const programs = ['initdb', 'postgres', 'pg_ctl', 'pg_dump', 'pg_restore', 'psql', 'createdb']

/** The folder of the newest PostgreSQL that has them all. */
export const postgresBin: string | undefined = (existsSync(installed) ? readdirSync(installed) : [])
  .sort((one, other) => Number(other) - Number(one))
  .map(version => join(installed, version, 'bin'))
  .find(bin => programs.every(program => isExecutable(join(bin, program))))

export function findProgram(name: string): string | undefined {
  const directories = [...(process.env.PATH ?? '').split(delimiter), '/usr/bin']
  return directories.map(directory => join(directory, name)).find(isExecutable)
}

/** A user who is not root, and a folder that is theirs and gone with the test. */
export type Worker = {
  folder: string
  account: Account
  /** A file of theirs, which nobody else can read. @returns its path */
  file(name: string, text: string): Promise<string>
  /** A folder of theirs. */
  subfolder(name: string): Promise<string>
  spawn(program: string, args: string[], options?: { env?: Record<string, string> }): ChildProcess
  run(program: string, args: string[], env?: Record<string, string>): Promise<Ran>
}

export type Ran = { exitCode: number | null; stdout: string; stderr: string }

export async function worker(t: Pick<ExecutionContext, 'teardown'>): Promise<Worker> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-backup-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const account = await chooseAccount(folder, [tmpdir()])
  const own = async (path: string) => {
    if (account.owner) await chown(path, account.owner.uid, account.owner.gid)
    return path
  }
  await own(folder)
  const command = (program: string, args: string[], env: Record<string, string>) => {
    const { file, args: words, options } = account.command(program, args)
    // `chooseAccount` has the user; the shell of one who has no home of theirs gets this one.
    return { file, words, options: { ...options, cwd: folder, env: { PATH: process.env.PATH, HOME: folder, ...env } } }
  }
  return {
    folder,
    account,
    async file(name, text) {
      const path = join(folder, name)
      await writeFile(path, text, { mode: 0o600 })
      return own(path)
    },
    subfolder: async name => own(await mkdtemp(join(folder, `${name}-`))),
    spawn(program, args, { env = {} } = {}) {
      const { file, words, options } = command(program, args, env)
      return spawn(file, words, { ...options, stdio: ['ignore', 'pipe', 'pipe'] })
    },
    run(program, args, env = {}) {
      const { file, words, options } = command(program, args, env)
      return new Promise(resolve => {
        execFile(file, words, { ...options, maxBuffer: 64 * 2 ** 20 }, (error, stdout, stderr) => {
          const exitCode = error ? (typeof error.code === 'number' ? error.code : null) : 0
          resolve({ exitCode, stdout, stderr })
        })
      })
    },
  }
}

export type PostgresWithTools = {
  /** Database `edgemesh`, as a superuser of that name. */
  url: string
  port: number
  /** Its data. */
  directory: string
  query<Row extends pg.QueryResultRow>(statement: string, values?: unknown[]): Promise<Row[]>
  start(): Promise<void>
  /** Every session is ended. */
  stop(): Promise<void>
  /** Gone with all of its data: a server of the same address, user and password is made anew. */
  replaceByEmpty(): Promise<void>
}

/** Of the superuser: one that has to be escaped wherever that matters. */
export const password = "p/a's%s w√rd"

/**
 * @param options.settings of PostgreSQL, besides those that make it small
 * @param options.include a file of settings that is shipped
 * @param options.env of the server, and so of what it runs
 */
export async function postgresWithTools(
  t: Pick<ExecutionContext, 'teardown'>,
  who: Worker,
  options: { settings?: Record<string, string>; include?: string; env?: Record<string, string> } = {},
): Promise<PostgresWithTools> {
  const { settings = {}, include, env = {} } = options
  const bin = postgresBin ?? ''
  const directory = join(await who.subfolder('postgres'), 'data')
  const port = await freePort()
  const url = `postgresql://edgemesh:${encodeURIComponent(password)}@127.0.0.1:${port}/edgemesh`
  const log = join(directory, '../log')
  let server: ChildProcess | undefined
  t.teardown(() => stop())

  async function query<Row extends pg.QueryResultRow>(statement: string, values: unknown[] = []): Promise<Row[]> {
    return queryAt<Row>(url, statement, values)
  }

  async function init(): Promise<void> {
    const file = await who.file('password', password)
    const args = ['-D', directory, '-U', 'edgemesh', `--pwfile=${file}`, '--auth=scram-sha-256', '--encoding=UTF8']
    const { exitCode, stderr } = await who.run(join(bin, 'initdb'), [
      ...args,
      '--locale=C',
      '--no-sync',
      '--data-checksums',
    ])
    if (exitCode !== 0) throw new Error(`initdb: ${stderr}`)
    if (include) await appendFile(join(directory, 'postgresql.conf'), await readFile(include, 'utf8'))
  }

  async function start(): Promise<void> {
    const words = Object.entries({
      listen_addresses: '127.0.0.1',
      port: String(port),
      unix_socket_directories: '',
      max_connections: '60',
      shared_buffers: '16MB',
      ...settings,
    }).flatMap(([name, value]) => ['-c', `${name}=${value}`])
    const started = who.spawn(join(bin, 'postgres'), ['-D', directory, ...words], { env })
    server = started
    let said = ''
    started.stderr?.setEncoding('utf8').on('data', (text: string) => {
      said = (said + text).slice(-8_000)
    })
    started.stdout?.resume()
    await eventually('PostgreSQL answers', async () => {
      if (started.exitCode !== null) throw new Error(`PostgreSQL has ended: ${said}`)
      return queryAt(url.replace(/edgemesh$/, 'postgres'), 'select 1').catch(() => undefined)
    })
    await writeFile(log, said)
  }

  async function stop(): Promise<void> {
    const running = server
    server = undefined
    if (!running || running.exitCode !== null || running.signalCode !== null) return
    const exited = once(running, 'exit')
    running.kill('SIGINT')
    await exited
  }

  await init()
  await start()
  await queryAt(url.replace(/edgemesh$/, 'postgres'), 'create database edgemesh')
  return {
    url,
    port,
    directory,
    query,
    start,
    stop,
    async replaceByEmpty() {
      await stop()
      await rm(directory, { recursive: true })
      await init()
      await start()
      await queryAt(url.replace(/edgemesh$/, 'postgres'), 'create database edgemesh')
    },
  }
}

/** One statement, on a connection of its own. */
export async function queryAt<Row extends pg.QueryResultRow>(
  url: string,
  statement: string,
  values: unknown[] = [],
): Promise<Row[]> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 5_000 })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query<Row>(statement, values)).rows
  } finally {
    await client.end()
  }
}

/** The scripts that are shipped, where that user finds them. @returns their folder */
export async function installScripts(who: Worker): Promise<string> {
  const folder = await who.subfolder('opt')
  await cp(join(import.meta.dirname, '../../deploy/backup'), folder, { recursive: true })
  if (who.account.owner) execFileSync('chown', ['-R', `${who.account.owner.uid}:${who.account.owner.gid}`, folder])
  return folder
}

/** The lines of a manifest, by their first word. */
export async function manifestOf(path: string): Promise<Map<string, string[][]>> {
  const lines = new Map<string, string[][]>()
  for (const line of (await readFile(path, 'utf8')).trimEnd().split('\n')) {
    const [word = '', ...values] = line.split('\t')
    lines.set(word, [...(lines.get(word) ?? []), values])
  }
  return lines
}
