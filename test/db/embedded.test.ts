import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, existsSync, mkdtempSync, readdirSync, readlinkSync, realpathSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import pg from 'pg'
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { createLog } from '../../src/telemetry/log.ts'

const log = createLog({ level: 'silent' })

/** A data folder whose test fails when a process of its server is left. */
function dataFolder(t: ExecutionContext, mode = 0o755): string {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), 'embedded-')))
  chmodSync(folder, mode)
  t.teardown(async () => {
    const left = processesIn(folder)
    for (const pid of left) process.kill(pid, 'SIGKILL')
    await until(() => processesIn(folder).length === 0)
    rmSync(folder, { recursive: true })
    if (left.length > 0) throw new Error(`left behind: ${left.join(', ')}`)
  })
  return join(folder, 'postgres')
}

function processesIn(folder: string): number[] {
  return readdirSync('/proc')
    .filter(name => /^\d+$/.test(name))
    .map(Number)
    .filter(pid => {
      try {
        return readlinkSync(`/proc/${pid}/cwd`).startsWith(folder)
      } catch {
        return false // has ended meanwhile
      }
    })
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await sleep(10)
}

async function query(url: string, sql: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client(url)
  await client.connect()
  const { rows } = await client.query(sql)
  await client.end()
  return rows
}

/** A process of its own that owns the folder, and what it says first. */
function startOwner(directory: string): { owner: ChildProcess; said: Promise<Record<string, unknown>> } {
  const owner = spawn(process.execPath, [join(import.meta.dirname, 'owner.ts'), directory], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const said = once(createInterface(owner.stdout!), 'line').then(([line]) => JSON.parse(line))
  return { owner, said }
}

async function end(owner: ChildProcess): Promise<void> {
  const exited = once(owner, 'exit')
  owner.stdin!.end()
  await exited
}

test('data is still there after a stop and a start, and a stop leaves no process behind', async t => {
  const directory = dataFolder(t)
  const first = await startEmbeddedPostgres({ directory, log })
  await query(first.url, 'create table kept (n int); insert into kept values (7)')
  await first.stop()
  t.deepEqual(processesIn(directory), [])

  const second = await startEmbeddedPostgres({ directory, log, port: first.port })
  t.is(second.url, first.url)
  t.deepEqual(await query(second.url, 'select n from kept'), [{ n: 7 }])
  await second.stop()
})

test('it syncs to disk, has checksums, listens on 127.0.0.1 alone and asks for the password', async t => {
  const postgres = await startEmbeddedPostgres({ directory: dataFolder(t), log })
  const rows = await query(
    postgres.url,
    `select name, setting from pg_settings where name in
     ('data_checksums', 'fsync', 'listen_addresses', 'server_encoding', 'unix_socket_directories') order by name`,
  )
  t.deepEqual(
    rows.map(({ setting }) => setting),
    ['on', 'on', '127.0.0.1', 'UTF8', ''],
  )
  const wrongPassword = new URL(postgres.url)
  wrongPassword.password = 'guess'
  await t.throwsAsync(query(wrongPassword.href, 'select 1'), { code: '28P01' })
  await postgres.stop()
})

test('a second start on a folder in use is refused with the pid and a hint', async t => {
  const directory = dataFolder(t)
  const postgres = await startEmbeddedPostgres({ directory, log })
  const error = await t.throwsAsync(startEmbeddedPostgres({ directory, log }), { code: 'IN_USE' })
  t.is(error?.message, `the data folder ${directory} is in use by another edgemesh (PostgreSQL pid ${postgres.pid})`)
  t.deepEqual(await query(postgres.url, 'select 1 as n'), [{ n: 1 }])
  await postgres.stop()
})

test('of two simultaneous first starts exactly one wins', async t => {
  const directory = dataFolder(t)
  const starts = [startOwner(directory), startOwner(directory)]
  const said = await Promise.all(starts.map(start => start.said))
  t.deepEqual(said.map(({ code }) => code ?? 'OWNER').sort(), ['IN_USE', 'OWNER'])
  const winner = starts[said.findIndex(({ url }) => url !== undefined)]!
  await end(winner.owner)
})

test('after kill -9 of its owner, the next start takes over the server that was left running', async t => {
  const directory = dataFolder(t)
  const { owner, said } = startOwner(directory)
  const { url, pid } = await said
  await query(url as string, 'create table kept (n int); insert into kept values (7)')
  owner.kill('SIGKILL')

  const next = await startEmbeddedPostgres({ directory, log })
  t.is(next.pid, Number(pid))
  t.deepEqual(await query(next.url, 'select n from kept'), [{ n: 7 }])
  await next.stop()
})

test('a server left running on another port than the wanted one is started again there', async t => {
  const directory = dataFolder(t)
  const first = await startEmbeddedPostgres({ directory, log })
  await first.stop()
  const { owner, said } = startOwner(directory)
  await said
  owner.kill('SIGKILL')

  const next = await startEmbeddedPostgres({ directory, log, port: first.port })
  t.is(next.url, first.url)
  t.deepEqual(await query(next.url, 'select 1 as n'), [{ n: 1 }])
  await next.stop()
})

test('after kill -9 of owner and server, the next start recovers what was committed', async t => {
  const directory = dataFolder(t)
  const { owner, said } = startOwner(directory)
  const { url, pid } = await said
  await query(url as string, 'create table kept (n int); insert into kept values (7)')
  owner.kill('SIGKILL')
  process.kill(Number(pid), 'SIGKILL')

  const next = await startEmbeddedPostgres({ directory, log })
  t.deepEqual(await query(next.url, 'select n from kept'), [{ n: 7 }])
  await next.stop()
})

test('a server that dies is started again on the same port', async t => {
  const { promise: exited, resolve: onExit } = Promise.withResolvers<void>()
  const postgres = await startEmbeddedPostgres({ directory: dataFolder(t), log, onExit })
  const { pid } = postgres
  postgres.kill()
  await exited
  await until(() => postgres.pid !== pid)
  t.deepEqual(await query(postgres.url, 'select 1 as n'), [{ n: 1 }])
  await postgres.stop()
})

test('being killed while the database is being made does no harm', async t => {
  const directory = dataFolder(t)
  const { owner, said } = startOwner(directory)
  said.catch(() => {})
  await until(() => existsSync(directory) && readdirSync(directory).some(name => name.startsWith('new-')))
  const exited = once(owner, 'exit')
  owner.kill('SIGKILL')
  await exited

  const next = await startEmbeddedPostgres({ directory, log })
  t.deepEqual(readdirSync(directory).sort(), ['data', 'postgres.log'])
  await next.stop()
})

const asRoot = process.getuid?.() === 0 ? test : test.skip

asRoot('root can use a folder that no other user may enter', async t => {
  const postgres = await startEmbeddedPostgres({ directory: dataFolder(t, 0o700), log })
  t.deepEqual(await query(postgres.url, 'select 1 as n'), [{ n: 1 }])
  await postgres.stop()
})
