/** PostgreSQL as a distribution has it, with pg_dump and all that the embedded server lacks, run by a user who is not root. */
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { appendFile, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import type pg from 'pg'
import { eventually } from './edgemesh.ts'
import { findPostgres } from './find-program.ts'
import { freePort } from './free-port.ts'
import type { PlainUser } from './plain-user.ts'
import { queryOnce, smallServerArguments } from './small-postgres.ts'

/** The folder of the newest PostgreSQL that has them all. */
export const postgresBin = findPostgres('initdb', 'pg_ctl', 'pg_dump', 'pg_restore', 'psql', 'createdb')

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
  who: PlainUser,
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
    return queryOnce<Row>(url, statement, values)
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
    const started = who.spawn(join(bin, 'postgres'), ['-D', directory, ...smallServerArguments(port, settings)], {
      env,
    })
    server = started
    let said = ''
    started.stderr?.setEncoding('utf8').on('data', (text: string) => {
      said = (said + text).slice(-8_000)
    })
    started.stdout?.resume()
    await eventually('PostgreSQL answers', async () => {
      if (started.exitCode !== null) throw new Error(`PostgreSQL has ended: ${said}`)
      return queryOnce(url.replace(/edgemesh$/, 'postgres'), 'select 1').catch(() => undefined)
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
  await queryOnce(url.replace(/edgemesh$/, 'postgres'), 'create database edgemesh')
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
      await queryOnce(url.replace(/edgemesh$/, 'postgres'), 'create database edgemesh')
    },
  }
}
