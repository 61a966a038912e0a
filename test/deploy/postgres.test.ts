import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import pg from 'pg'
import { findBinaries } from '../../src/db/embedded.ts'
import { eventually, shared, testEnvironment } from '../support/edgemesh.ts'
import { findPostgres, findProgram } from '../support/find-program.ts'
import { freePort } from '../support/free-port.ts'
import { deploy, judged, root, say } from '../support/programs.ts'
import { serve } from '../support/serve.ts'
import {
  account,
  commandLine,
  type ShippedPostgres,
  shippedPostgres,
  startServer,
} from '../support/shipped-postgres.ts'

const psql = findProgram('psql')

/** Debian's, which has pg_basebackup as well; the embedded one has not. */
const debian = findPostgres('pg_basebackup')

/** Runs roles.sql as the superuser, who comes by the socket. */
async function makeRoles(server: ShippedPostgres, psql: string, passwords = join(server.secrets, 'postgres')) {
  // The first line lets in the system's user postgres; who runs tests is another one, and has the password.
  const env = { PATH: process.env.PATH, PGPASSWORD: await server.password('superuser'), PASSWORDS: passwords }
  const args = ['--no-psqlrc', `--host=${server.folder}`, `--port=${server.port}`, '--username=postgres', '--quiet']
  return say(psql, [...args, `--file=${join(deploy, 'postgres', 'roles.sql')}`, 'postgres'], { env })
}

async function query(url: string, statement: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 5_000 })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query(statement)).rows
  } finally {
    await client.end()
  }
}

/** For tests that leave it as it is. */
const one = shared(test, async file => {
  const server = await shippedPostgres(file, findBinaries())
  if (psql) {
    const { exitCode, said } = await makeRoles(server, psql)
    if (exitCode !== 0) throw new Error(said)
  }
  return server
})

test('PostgreSQL starts with the file that is shipped, and has what it says', async t => {
  const server = one()
  const env = { PATH: process.env.PATH, PGPASSWORD: await server.password('superuser') }
  const client = new pg.Client({ host: server.folder, port: server.port, user: 'postgres', password: env.PGPASSWORD })
  await client.connect()
  t.teardown(() => client.end())
  const rows = async (statement: string) => (await client.query(statement)).rows
  // These two the test gives besides.
  t.deepEqual(
    await rows(
      `select name, error from pg_file_settings where error is not null and name not in ('port', 'listen_addresses')`,
    ),
    [],
  )
  t.deepEqual(await rows('select line_number, error from pg_hba_file_rules where error is not null'), [])
  // What compose.production.yaml takes for a sign that the database is made.
  const pid = await readFile(join(server.folder, 'data', 'postmaster.pid'), 'utf8')
  t.is(pid.split('\n')[5], 'localhost')
  const of = Object.fromEntries(
    (await rows('select name, current_setting(name) as value from pg_settings')).map(({ name, value }) => [
      name,
      value,
    ]),
  )
  t.like(of, {
    max_connections: '200',
    effective_cache_size: '1GB',
    maintenance_work_mem: '64MB',
    checkpoint_completion_target: '0.9',
    wal_buffers: '16MB',
    default_statistics_target: '100',
    random_page_cost: '1.1',
    effective_io_concurrency: '200',
    work_mem: '2MB',
    max_wal_size: '4GB',
    ssl: 'on',
    ssl_min_protocol_version: 'TLSv1.3',
    password_encryption: 'scram-sha-256',
    data_checksums: 'on',
    log_parameter_max_length: '0',
    autovacuum_vacuum_scale_factor: '0.05',
    fsync: 'on',
    full_page_writes: 'on',
    synchronous_commit: 'on',
  })
})

judged(
  'with the roles that are shipped a server of EdgeMesh serves over TLS, as who can not change the audit log',
  { psql },
  async (t, { psql }) => {
    t.timeout(120_000)
    const server = await shippedPostgres(t, findBinaries())
    const made = await makeRoles(server, psql)
    t.is(made.exitCode, 0, made.said)
    const [service, owner] = [await server.password('service'), await server.password('owner')]
    const main = join(root, 'src', 'main.ts')
    const DATABASE_URL = server.url('edgemesh', service)
    const migrated = await say(process.execPath, [main, 'migrate', 'up'], {
      env: { PATH: process.env.PATH, DATABASE_URL, DATABASE_MIGRATION_URL: server.url('edgemesh_owner', owner) },
    })
    t.is(migrated.exitCode, 0, migrated.said)
    t.regex(migrated.said, /edgemesh has what a server needs/)
    const served = await serve(t, { ...testEnvironment, DATABASE_URL })
    const ready = await (await fetch(`${served.http}/readyz`)).json()
    t.like(ready, { ready: true })
    t.false(/could change/.test(JSON.stringify(ready)), JSON.stringify(ready))
    const [tls] = await query(DATABASE_URL, 'select version, ssl from pg_stat_ssl where pid = pg_backend_pid()')
    t.deepEqual(tls, { version: 'TLSv1.3', ssl: true })
    await t.throwsAsync(query(DATABASE_URL, 'delete from audit_events'), { message: /permission denied/ })
    await served.stop()

    // Run again, with another password: that one counts from then on.
    const secret = join(server.secrets, 'postgres', 'service-password')
    const another = 'another-password-of-32-characters'
    await writeFile(secret, another)
    t.is((await makeRoles(server, psql)).exitCode, 0)
    await t.throwsAsync(query(DATABASE_URL, 'select 1'), { message: /password authentication failed/ })
    t.deepEqual(await query(server.url('edgemesh', another), 'select 1 as one'), [{ one: 1 }])
    const log = await server.log()
    for (const password of [service, another, owner]) t.false(log.includes(password), 'a password is in the log')
  },
)

judged(
  'PostgreSQL lets in nobody without TLS, from afar no superuser, and each role only where it belongs',
  { psql },
  async t => {
    const server = one()
    const url = async (role: 'service' | 'superuser' | 'monitor' | 'replication', name: string) =>
      server.url(name, await server.password(role))
    const service = await url('service', 'edgemesh')
    const refused = { message: /pg_hba.conf rejects connection/ }
    await t.throwsAsync(query(service.replace('verify-full', 'disable'), 'select 1'), refused)
    await t.throwsAsync(query(await url('superuser', 'postgres'), 'select 1'), refused)
    await t.throwsAsync(query(service.replace('/edgemesh?', '/postgres?'), 'select 1'), refused)
    await t.throwsAsync(query(await url('replication', 'edgemesh_replication'), 'select 1'), refused)
    // Who does not know the authority does not believe the server.
    const unknown = server.url('edgemesh', await server.password('service'), '')
    await t.throwsAsync(query(unknown, 'select 1'), { message: /self-signed certificate|unable to verify/ })
    const monitor = await url('monitor', 'edgemesh_monitor')
    t.is((await query(monitor, 'select count(*) > 0 as some from pg_stat_activity')).length, 1)
    await t.throwsAsync(query(monitor, 'create table x ()'), { message: /permission denied/ })
  },
)

judged(
  'roles are not made with passwords that are missing, and what is wrong is told',
  { psql },
  async (t, { psql }) => {
    const { exitCode, said } = await makeRoles(one(), psql, '/nowhere')
    t.not(exitCode, 0)
    t.regex(said, /a password is missing or shorter than 24 characters[\s\S]+PASSWORDS names a folder/)
  },
)

judged(
  "a replica copies the primary over TLS, follows it, and goes on where it was (needs Debian's PostgreSQL)",
  { psql, 'pg_basebackup beside postgres': debian },
  async (t, { psql, 'pg_basebackup beside postgres': bin }) => {
    t.timeout(120_000)
    const server = await shippedPostgres(t, bin)
    t.is((await makeRoles(server, psql)).exitCode, 0)
    const owner = server.url('edgemesh_owner', await server.password('owner'))
    await query(owner, 'create table followed (at int)')
    const port = await freePort()
    const data = join(server.folder, 'replicas', 'one')
    const log = join(server.folder, 'replica.log')
    const env = {
      PATH: `${bin}:${process.env.PATH}`,
      PGDATA: data,
      PRIMARY_HOST: 'localhost',
      PRIMARY_PORT: String(server.port),
      PRIMARY_CA_FILE: join(server.secrets, 'postgres', 'ca.crt'),
      REPLICATION_PASSWORD_FILE: join(server.secrets, 'postgres', 'replication-password'),
      REPLICATION_SLOT: 'one',
    }
    const start = () =>
      startServer(t, join(server.folder, 'files', 'start-replica'), commandLine(server.folder, port), log, env)
    const replica = owner.replace(`:${server.port}/`, `:${port}/`)
    const followed = (at: number) =>
      eventually(`the replica has ${at}`, async () => {
        const rows = await query(replica, 'select max(at) as at, pg_is_in_recovery() as follows from followed').catch(
          () => [],
        )
        return rows[0]?.at === at && rows[0].follows === true
      }).catch(async error => t.fail(`${error.message}: ${await readFile(log, 'utf8')}`))

    const first = await start()
    await query(owner, 'insert into followed values (1)')
    await followed(1)
    const ended = new Promise(resolve => first.once('exit', resolve))
    first.kill('SIGINT')
    await ended
    await query(owner, 'insert into followed values (2)')
    await start()
    await followed(2)
    const arguments_ = await readFile(join(data, 'postmaster.opts'), 'utf8')
    const password = await server.password('replication')
    t.false(arguments_.includes(password), 'the password is in the arguments')
    t.false((await readFile(join(data, 'postgresql.auto.conf'), 'utf8')).includes(password))

    const without = await say(join(deploy, 'postgres', 'start-replica'), [], {
      env: { PATH: process.env.PATH },
      ...account,
    })
    t.is(without.exitCode, 2)
    t.regex(without.said, /error: PGDATA is not set/)
  },
)
