/** What is wrong with a real PostgreSQL, made wrong for it. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chown, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { look, outsideAddress, strongSecret, told } from '../support/doctor.ts'
import { eventually } from '../support/edgemesh.ts'
import { findProgram } from '../support/find-program.ts'
import { freePort } from '../support/free-port.ts'
import { ownPostgres } from '../support/own-postgres.ts'
import { testDatabase } from '../support/postgres.ts'
import { link, relay } from '../support/relay.ts'

const all = [
  'database',
  'database-tls',
  'database-durability',
  'database-connections',
  'database-clock',
  'database-latency',
  'database-notifications',
] as const

/** The same database by another way. */
function through(url: string, port: number, host = '127.0.0.1'): string {
  const other = new URL(url)
  other.host = `${host}:${port}`
  return other.href
}

test('a database as it should be has no finding', async t => {
  const { url } = await testDatabase(t)
  // Other tests have connections to the same server.
  const small = { DATABASE_POOL_SIZE: '1', DATABASE_MAX_OVERFLOW: '0' }
  const found = await look({ DATABASE_URL: url, ...small }, all)
  t.deepEqual(
    found.map(({ check, severity }) => `${check} ${severity}`),
    all.map(name => `${name} ok`),
    JSON.stringify(found),
  )
  t.regex(found[0]!.what, /^PostgreSQL \d+\.\d+.*, the primary of edgemesh_test_/)
})

test('without DATABASE_URL it is said that the embedded database is no production', async t => {
  const found = await look({}, all)
  t.like(found[0], { check: 'database', severity: 'warning' })
  t.deepEqual(
    [...new Set(found.slice(1).map(({ severity, what }) => `${severity}: ${what}`))],
    ['skipped: DATABASE_URL is not set'],
  )
})

test('a database that is not there, or does not know us, fails once, and what needs it waits', async t => {
  const port = await freePort()
  const [gone, ...rest] = await look({ DATABASE_URL: `postgresql://edgemesh:x@127.0.0.1:${port}/edgemesh` }, all)
  t.is(gone?.severity, 'failed')
  t.regex(gone?.what ?? '', /^no connection to the database at 127\.0\.0\.1:\d+: connect ECONNREFUSED/)
  t.regex(gone?.mend ?? '', /^see that PostgreSQL runs/)
  t.true(rest.every(({ what }) => what === 'the database can not be reached: see the check database'))

  const { url } = await testDatabase(t)
  const wrong = new URL(url)
  wrong.username = 'nobody_of_that_name'
  const [stranger] = await look({ DATABASE_URL: wrong.href }, 'database')
  t.is(stranger?.severity, 'failed')
  t.regex(stranger?.mend ?? '', /^give DATABASE_URL the user and the password/)
  wrong.username = new URL(url).username
  wrong.pathname = '/no_such_database'
  const [empty] = await look({ DATABASE_URL: wrong.href }, 'database')
  t.regex(empty?.mend ?? '', /^create database/)
})

test('a database that is silent is told within its deadline', async t => {
  const { url } = await testDatabase(t)
  const way = await link(t, Number(new URL(url).port))
  way.hold()
  const [found] = await look({ DATABASE_URL: through(url, way.port) }, 'database')
  t.is(found?.severity, 'failed')
})

// ── One that was made wrong ────────────────────────────────────────────────────────────────────────────────────────

test('a server that loses what it has acknowledged is told, setting by setting', async t => {
  const server = await ownPostgres(t, {
    fsync: 'off',
    full_page_writes: 'off',
    synchronous_commit: 'off',
    default_transaction_isolation: 'serializable',
    default_transaction_read_only: 'on',
    wal_level: 'minimal',
    max_wal_senders: '0',
    max_connections: '60',
  })
  const found = await look({ DATABASE_URL: server.url }, 'database-durability')
  t.deepEqual(
    found.map(({ severity, what }) => `${severity}: ${what}`),
    [
      'failed: fsync is off',
      'failed: full_page_writes is off',
      'failed: synchronous_commit is off',
      'failed: default_transaction_read_only is on',
      'warning: default_transaction_isolation is serializable',
      'warning: wal_level is minimal',
    ],
  )
  t.regex(found[0]!.mend!, /^fsync = on; /)

  // Connections: three are reserved for superusers, and each instance has 30 and one that hears of changes.
  const said = async (instances: number, env: Record<string, string> = {}) =>
    (await told({ DATABASE_URL: server.url, ...env }, 'database-connections', { instances })).join()
  t.regex(await said(2), /^failed: there are too few connections: 2 × 31 connections, room for 57 /)
  t.regex(await said(1), /^warning: there is no room for one instance more: 1 × 31 connections, room for 57 /)
  t.regex(await said(2, { DATABASE_POOL_SIZE: '5', DATABASE_MAX_OVERFLOW: '5' }), /^ok: 2 × 11 connections/)
  await server.query('alter role edgemesh connection limit 20')
  t.regex(await said(1), /^failed: .*room for 20 /)
})

test('a standby is no database for servers, and says who is', async t => {
  const primary = await ownPostgres(t)
  const standby = await primary.standby('doctor')
  const [found] = await look({ DATABASE_URL: standby.url }, 'database')
  t.is(found?.severity, 'failed')
  t.regex(found?.what ?? '', /is a standby, which takes no writes$/)
  t.regex(found?.mend ?? '', /name the primary/)
})

test('a setting of the role alone, or of the database, is found as well', async t => {
  const { url, pool } = await testDatabase(t)
  const name = new URL(url).pathname.slice(1)
  await pool.query(`alter database ${name} set synchronous_commit = local`)
  // Local is whole where there is no standby that would have to have it.
  t.deepEqual(await told({ DATABASE_URL: url }, 'database-durability'), ['ok: what is committed is on disk'])
  await pool.query(`alter database ${name} set synchronous_commit = off`)
  t.deepEqual(await told({ DATABASE_URL: url }, 'database-durability'), ['failed: synchronous_commit is off'])
})

// ── TLS ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const host = outsideAddress()
const tlsTitle = 'a connection in plain text, one that checks nobody, and a certificate that ends are told'
if (host === undefined) {
  test.skip(`${tlsTitle}: this host has no address beside 127.0.0.1`, t => t.pass())
} else {
  test(tlsTitle, async t => {
    const server = await ownPostgres(t)
    const url = through(server.url, await relay(t, server.port, { on: host }), host)
    t.deepEqual(await told({ DATABASE_URL: url }, 'database-tls'), [
      `failed: the connection to ${host} is not encrypted`,
    ])
    const [refusedFinding] = await look({ DATABASE_URL: `${url}?ssl=require` }, 'database')
    t.regex(refusedFinding?.mend ?? '', /^ssl = on in postgresql\.conf/)
    // Its certificate is good for a day.
    await server.enableTls()
    const found = await told({ DATABASE_URL: `${url}?ssl=require` }, 'database-tls')
    t.is(found[0], 'warning: the connection is encrypted, but nobody checks whose certificate it is: ssl=require')
    t.regex(found[1] ?? '', /^warning: the certificate of the database ends on /)
    const clock = () => Date.now() + 2 * 86_400_000
    const later = await told({ DATABASE_URL: `${server.url}?ssl=require` }, 'database-tls', { clock })
    t.regex(later.join(), /^failed: the certificate of the database has expired on /)
    const [untrusted] = await look({ DATABASE_URL: `${url}?ssl=verify-full` }, 'database')
    t.regex(untrusted?.mend ?? '', /^sslrootcert in DATABASE_URL/)
  })
}

// ── Time and distance ──────────────────────────────────────────────────────────────────────────────────────────────

test('a clock that is not that of the database is told, and how far it is off', async t => {
  const { url } = await testDatabase(t)
  const said = (offMs: number) =>
    told({ DATABASE_URL: url }, 'database-clock', { clock: () => Date.now() + offMs }).then(found => found.join())
  t.regex(await said(10_000), /^warning: the clock of the database is \d+ s behind that of this host$/)
  t.regex(
    await said(-3 * 3_600_000),
    /^failed: the clock of the database is (3|2) h|\d+ min ahead of that of this host$/,
  )
})

test('a database that is far away is told', async t => {
  const { url } = await testDatabase(t)
  const said = async (lateMs: number) => {
    const port = await relay(t, Number(new URL(url).port), { lateMs })
    return (await told({ DATABASE_URL: through(url, port) }, 'database-latency')).join()
  }
  t.regex(await said(15), /^(warning|failed): the database is far away: \d+\.\d ms there and back$/)
  t.regex(await said(110), /^failed: the database is far away: \d+\.\d ms there and back$/)
})

// ── A pooler on the way ────────────────────────────────────────────────────────────────────────────────────────────

const pgbouncer = findProgram('pgbouncer')

/** In front of the database, until the test ends. @returns its URL */
async function pooled(t: ExecutionContext, url: string, settings: Record<string, string>): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-pgbouncer-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const { username, password, port: behind, pathname } = new URL(url)
  const port = await freePort()
  const to = `host=127.0.0.1 port=${behind} dbname=${pathname.slice(1)} user=${username} password=${password}`
  const lines = {
    listen_addr: '127.0.0.1',
    listen_port: String(port),
    auth_type: 'any',
    unix_socket_dir: '',
    ...settings,
  }
  const text = Object.entries(lines).map(([name, value]) => `${name} = ${value}\n`)
  const file = join(folder, 'pgbouncer.ini')
  await writeFile(file, `[databases]\nedgemesh = ${to}\n[pgbouncer]\n${text.join('')}`)
  // It does not run as root.
  const isRoot = process.getuid?.() === 0
  if (isRoot) for (const path of [folder, file]) await chown(path, nobody, nobody)
  const as = isRoot ? { uid: nobody, gid: nobody } : {}
  const child = spawn(pgbouncer as string, [file], { stdio: 'ignore', cwd: '/', ...as })
  const exited = once(child, 'exit')
  t.teardown(() => child.kill('SIGKILL') && exited)
  await eventually('PgBouncer listens', () => {
    if (child.exitCode !== null) throw new Error(`PgBouncer has ended with ${child.exitCode}`)
    return new Promise<boolean>(resolve => {
      const probe = connect({ port, host: '127.0.0.1' })
      probe.on('connect', () => resolve(true)).on('error', () => resolve(false))
      probe.on('connect', () => probe.destroy())
    })
  })
  return `postgresql://edgemesh:${strongSecret()}@127.0.0.1:${port}/edgemesh`
}

const nobody = 65_534
const poolerTitle = 'a pooler through which no notification comes, or no connection, is told'
if (!pgbouncer) test.skip(`${poolerTitle}: pgbouncer is missing, .ci/tools installs it`, t => t.pass())
else {
  test(poolerTitle, async t => {
    const { url } = await testDatabase(t)
    const ignore_startup_parameters = 'statement_timeout, idle_in_transaction_session_timeout, lock_timeout'
    const look = async (settings: Record<string, string>) =>
      told({ DATABASE_URL: await pooled(t, url, settings) }, ['database', 'database-notifications'])
    t.regex((await look({ ignore_startup_parameters, pool_mode: 'session' })).join('\n'), /^ok: .*\nok: /)
    t.regex(
      (await look({ ignore_startup_parameters, pool_mode: 'transaction' })).join('\n'),
      /^ok: .*\nfailed: LISTEN hears nothing: /,
    )
    t.regex((await look({ pool_mode: 'session' })).join('\n'), /^failed: .*unsupported startup parameter.*\nskipped: /)
  })
}
