/** `edgemesh serve` where it is started wrongly, or too early. */
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { awaitDatabase } from '../../src/db/await-database.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { secrets, testEnvironment } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { testDatabase } from '../support/postgres.ts'
import { link } from '../support/relay.ts'
import { serve as serveWell } from '../support/serve.ts'

const main = join(import.meta.dirname, '../../src/main.ts')

function serve(args: string[], env: Record<string, string> = {}): Promise<{ exitCode: number; stderr: string }> {
  return new Promise(resolve => {
    const options = { env: { PATH: process.env.PATH, ...secrets, ...env } }
    execFile(process.execPath, [main, 'serve', ...args], options, (error, _, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stderr })
    })
  })
}

for (const wrong of ['0', '65', 'two', '-1', '1.5', '']) {
  test(`--workers '${wrong}' ends in exit code 2, and it says what would be right`, async t => {
    const { exitCode, stderr } = await serve(['--workers', wrong])
    t.is(exitCode, 2)
    t.regex(stderr, /^error: .*--workers.*auto or a whole number from 1 to 64/)
  })
}

test('several workers without a database of their own are refused, with a hint', async t => {
  const { exitCode, stderr } = await serve(['--workers', '2'])
  t.is(exitCode, 2)
  t.regex(stderr, /^error: DATABASE_URL: is missing: .*\nhint: set it, or leave --workers away\n$/)
})

test('several workers are told of every wrong setting once, before any is started', async t => {
  const { exitCode, stderr } = await serve(['--workers', '2'], { API_PORT: 'http', DRAIN_SECONDS: '-1' })
  t.is(exitCode, 2)
  t.is(stderr.match(/^error: /gm)?.length, 2)
})

/** Takes connections and ends them, as a balancer does that has no server. */
async function nobody(t: ExecutionContext) {
  const { promise: asked, resolve } = Promise.withResolvers<void>()
  const server = createServer(socket => {
    socket.on('error', () => {})
    socket.destroy()
    resolve()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  return { port: (server.address() as AddressInfo).port, asked }
}

for (const args of [[], ['--workers', '2']]) {
  test(`${['serve', ...args].join(' ')} waits for a database that is away when it starts, says so, and serves once it is there`, async t => {
    const { url } = await testDatabase(t)
    const away = await nobody(t)
    const way = await link(t, away.port)
    const given = new URL(url)
    given.host = `127.0.0.1:${way.port}`
    const serving = serveWell(t, { ...testEnvironment, DATABASE_URL: given.href }, { args })
    await away.asked
    way.leadTo(Number(new URL(url).port))
    const { log, said, stop } = await serving
    const told = log.filter(({ msg }) => msg === 'waiting for the database')
    t.is(told.length, 1)
    t.regex(String(told[0]?.cause), /no connection to the database at 127\.0\.0\.1:\d+: /)
    t.false(said.join().includes(given.password))
    t.is(await stop(), 0)
  })
}

test('who stops it while it waits for the database does not wait', async t => {
  const away = await nobody(t)
  const env = {
    ...testEnvironment,
    PATH: process.env.PATH,
    DATABASE_URL: `postgresql://nobody@127.0.0.1:${away.port}/none`,
  }
  const child = spawn(process.execPath, [main, 'serve'], { env, stdio: 'ignore' })
  t.teardown(() => child.kill('SIGKILL'))
  const ended = once(child, 'exit')
  await away.asked
  child.kill('SIGTERM')
  t.deepEqual(await ended, [0, null])
})

test('a database that stays away is given up, with what was tried and what to look at', async t => {
  const url = `postgresql://nobody@127.0.0.1:${await freePort()}/none`
  const log = createLog({ level: 'silent' })
  const failure = await t.throwsAsync(awaitDatabase(url, { log, stopping: AbortSignal.any([]), waitMs: 1 }), {
    name: 'NoDatabaseError',
    message: /^no connection to the database at 127\.0\.0\.1:\d+: connect ECONNREFUSED .*; it was waited for 0 s$/,
  })
  t.regex((failure as Error & { hint: string }).hint, /see that the database runs and that DATABASE_URL names it/)
})

test('a database that does not exist, and a user that it does not know, are told at once', async t => {
  const { url } = await testDatabase(t)
  const database = new URL(url)
  database.pathname = '/nowhere'
  const user = new URL(url)
  user.username = 'stranger'
  for (const [wrong, hint] of [
    [database, /error: no connection .*"nowhere" does not exist\nhint: create the database/],
    [user, /error: no connection .*stranger.*\nhint: see the user and the password in DATABASE_URL/],
  ] as const) {
    const { exitCode, stderr } = await serve([], { DATABASE_URL: wrong.href })
    t.is(exitCode, 1)
    t.regex(stderr, hint)
  }
})
for (const args of [[], ['--workers', '2']]) {
  test(`a place for traces that is no URL ends in exit code 2, by name: serve ${args.join(' ')}`, async t => {
    const env = { DATABASE_URL: 'postgresql://localhost/none', OTEL_EXPORTER_OTLP_ENDPOINT: 'collector:4318' }
    const { exitCode, stderr } = await serve(args, env)
    t.is(exitCode, 2)
    t.regex(stderr, /^error: OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL/)
  })
}
