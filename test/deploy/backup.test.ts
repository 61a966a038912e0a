/** The scripts of `deploy/backup`, on a real PostgreSQL with the tools of its distribution. */
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { open, readdir, readFile, realpath, rename, stat, symlink, unlink, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import test, { type ExecutionContext } from 'ava'
import pg from 'pg'
import { accessEntities } from '../../src/access/entities.ts'
import { auditEntities } from '../../src/audit/entities.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { grantServiceRole } from '../../src/db/service-role.ts'
import { fleetEntities } from '../../src/fleet/entities.ts'
import { identityEntities } from '../../src/identity/entities.ts'
import { installScripts, manifestOf } from '../support/backup-scripts.ts'
import { eventually, shared } from '../support/edgemesh.ts'
import { findProgram } from '../support/find-program.ts'
import { promtool, run } from '../support/monitoring.ts'
import { type PlainUser, plainUser, type Ran } from '../support/plain-user.ts'
import { type PostgresWithTools, postgresBin, postgresWithTools } from '../support/postgres-with-tools.ts'
import { queryOnce } from '../support/small-postgres.ts'

const deploy = join(import.meta.dirname, '../../deploy')
const age = findProgram('age')
const shellcheck = findProgram('shellcheck')
const analyze = findProgram('systemd-analyze')

/** A test that a program decides: skipped, and saying so, where that is missing. */
function judged(title: string, needed: Record<string, unknown>, body: (t: ExecutionContext) => Promise<void>) {
  const missing = Object.keys(needed).filter(name => !needed[name])
  if (missing.length > 0) test.skip(`${title} (${missing.join(' and ')} is missing: .ci/tools installs it)`, body)
  // One after the other: each starts a server, and a machine has only so many cores.
  else test.serial(title, body)
}

const backedUp = (title: string, body: (t: ExecutionContext) => Promise<void>) =>
  judged(title, { 'PostgreSQL with pg_dump': postgresBin }, body)
const encrypted = (title: string, body: (t: ExecutionContext) => Promise<void>) =>
  judged(title, { 'PostgreSQL with pg_dump': postgresBin, age }, body)

const template = 'migrated'

/** One server for all of them; each test has a database of its own in it. */
const server = postgresBin
  ? shared(test, async file => {
      const who = await plainUser(file)
      const postgres = await postgresWithTools(file, who)
      await postgres.query(`create database ${template}`)
      await migrate(urlOf(postgres, template))
      return { who, postgres }
    })
  : () => {
      throw new Error('there is no PostgreSQL')
    }

async function migrate(url: string): Promise<void> {
  const entities = [...identityEntities, ...fleetEntities, ...accessEntities, ...auditEntities]
  const db = await openDatabase({ url, poolMax: 1, entities })
  await db.migrate()
  await db.close()
}

function urlOf({ url }: Pick<PostgresWithTools, 'url'>, database: string, user?: { name: string; password: string }) {
  const other = new URL(url)
  other.pathname = `/${database}`
  if (user) [other.username, other.password] = [user.name, user.password]
  return other.href
}

type Site = {
  who: PlainUser
  url: string
  database: string
  scripts: string
  /** Where backups are kept. */
  directory: string
  metrics: string
  /** The settings of `backup`, to which a test adds. */
  settings: Record<string, string>
  backup(env?: Record<string, string>): Promise<Ran>
  restore(args: string[], env?: Record<string, string>): Promise<Ran>
  query<Row extends pg.QueryResultRow>(statement: string, values?: unknown[]): Promise<Row[]>
  /** Another database, which is empty. */
  emptyDatabase(owner?: string): Promise<string>
  /** What is kept, without what hides. */
  kept(): Promise<string[]>
  /** What hides there: what a backup that is under way needs. */
  hidden(): Promise<string[]>
  /** The dump of the newest backup. */
  newest(): Promise<string>
}

let databases = 0

/** A database with EdgeMesh's schema and a few users, and a user of the host who backs it up. */
async function site(t: ExecutionContext): Promise<Site> {
  const { postgres } = server()
  const who = await plainUser(t)
  const database = `site_${++databases}`
  await postgres.query(`create database ${database} template ${template}`)
  const url = urlOf(postgres, database)
  await addUsers(url, 20)
  const scripts = await installScripts(who)
  const [directory, metrics] = [await who.subfolder('backups'), await who.subfolder('metrics')]
  const settings = { DATABASE_URL: url, BACKUP_DIR: directory, BACKUP_METRICS_DIR: metrics }
  const names = async (hide: boolean) =>
    (await readdir(directory)).filter(name => name.startsWith('.') === hide && name !== '.lock').sort()
  return {
    ...{ who, url, database, scripts, directory, metrics, settings },
    backup: (env = {}) => who.run('bash', [join(scripts, 'backup.sh')], { ...settings, ...env }),
    restore: (args, env = {}) => who.run('bash', [join(scripts, 'restore.sh'), ...args], { DATABASE_URL: url, ...env }),
    query: (statement, values) => queryOnce(url, statement, values),
    async emptyDatabase(owner = 'edgemesh') {
      const name = `site_${++databases}`
      await postgres.query(`create database ${name} owner ${owner}`)
      return urlOf(postgres, name)
    },
    kept: () => names(false),
    hidden: () => names(true),
    newest: async () => join(directory, (await names(false)).filter(name => /\.dump(\.age)?$/.test(name)).at(-1) ?? ''),
  }
}

async function addUsers(url: string, count: number, prefix = 'user'): Promise<void> {
  await queryOnce(
    url,
    `insert into users (id, email, name, role, status, created_at)
     select $1 || n, $1 || n || '@example.com', e'Ünï\\tcode\\\\' || n, 'admin', 'active', now() from generate_series(1, $2::int) n`,
    [prefix, count],
  )
}

/** PostgreSQL's programs, some of them with a shell's lines before or in the place of the real one, which is "$real". */
async function programs(who: PlainUser, own: Record<string, string>): Promise<string> {
  const folder = await who.subfolder('bin')
  for (const name of await readdir(postgresBin ?? '')) {
    const real = join(postgresBin ?? '', name)
    if (own[name] === undefined) await symlink(real, join(folder, name))
    else await writeFile(join(folder, name), `#!/bin/bash\nreal=${real}\n${own[name]}\n`, { mode: 0o755 })
  }
  return folder
}

async function contentOf(url: string): Promise<unknown> {
  return {
    users: await queryOnce(url, 'select u::text from users u order by id'),
    grants: await queryOnce(url, 'select * from role_grants'),
    rights: await queryOnce(
      url,
      `select name, array(select format('%s: %s %s', grantee::regrole, privilege_type, is_grantable) from aclexplode(acl) order by 1) as rights
       from (
         select relname as name, coalesce(relacl, acldefault('r', relowner)) as acl from pg_class
         where relnamespace = 'public'::regnamespace
         union all select proname, coalesce(proacl, acldefault('f', proowner)) from pg_proc
         where pronamespace = 'public'::regnamespace
       ) granted order by name`,
    ),
  }
}

judged('shellcheck finds nothing wrong with the scripts of backups', { shellcheck }, async t => {
  const scripts = (await readdir(join(deploy, 'backup'))).filter(name => name.endsWith('.sh'))
  t.deepEqual(scripts.sort(), ['backup.sh', 'postgres.sh', 'restore.sh'])
  t.deepEqual(await run(shellcheck ?? '', ['-x', ...scripts.map(name => join(deploy, 'backup', name))]), {
    exitCode: 0,
    said: '',
  })
})

judged('systemd finds nothing wrong with the units of backups', { 'systemd-analyze': analyze }, async t => {
  const units = ['edgemesh-backup.service', 'edgemesh-backup.timer', 'edgemesh-backup-failed.service']
  const { folder } = await plainUser(t)
  for (const name of units) {
    const shipped = await readFile(join(deploy, 'systemd', name), 'utf8')
    await writeFile(join(folder, name), shipped.replaceAll('/opt/edgemesh/backup', join(deploy, 'backup')))
  }
  t.deepEqual(await run(analyze ?? '', ['verify', '--man=no', ...units.map(name => join(folder, name))]), {
    exitCode: 0,
    said: '',
  })
})

backedUp(
  'a backup is a dump that restores, a manifest of what is in it, and its age and size for node-exporter',
  async t => {
    const { who, url, database, directory, metrics, backup, kept, hidden, newest, restore, emptyDatabase } =
      await site(t)
    const before = await contentOf(url)
    const argv = join(who.folder, 'argv')
    const seen = `printf '%s\\n' "$0 $*" >> ${argv}; exec "$real" "$@"`
    const recorded = await programs(who, { psql: seen, pg_dump: seen, pg_restore: seen, initdb: seen, createdb: seen })

    const startedAt = Math.floor(Date.now() / 1_000)
    const made = await backup({ BACKUP_POSTGRES_BIN: recorded })
    t.is(made.exitCode, 0, made.stderr)
    t.is(made.stderr, '')
    const [dump = '', manifest = ''] = await kept()
    t.regex(dump, /^edgemesh_\d{8}T\d{6}Z\.dump$/)
    t.is(manifest, dump.replace('.dump', '.manifest'))
    t.regex(
      made.stdout,
      new RegExp(`^${dump.replace('.dump', '')}: \\d+ bytes, \\d+ tables, \\d+ rows, restored and counted`),
    )
    t.deepEqual(await hidden(), [])
    const modes = await Promise.all(
      [dump, manifest].map(async name => (await stat(join(directory, name))).mode & 0o777),
    )
    t.deepEqual(modes, [0o600, 0o600], 'nobody else reads them')

    const facts = await manifestOf(join(directory, manifest))
    t.deepEqual(facts.get('database'), [[database]])
    t.true(facts.get('table')?.some(([name, rows]) => name === 'public.users' && rows === '20'))
    const bytes = (await stat(join(directory, dump))).size
    t.deepEqual(facts.get('bytes'), [[String(bytes)]])

    const shown = await readFile(join(metrics, 'edgemesh_backup.prom'), 'utf8')
    const metric = (name: string) => Number(new RegExp(`^edgemesh_backup_${name} (\\d+)$`, 'm').exec(shown)?.[1])
    t.true(metric('last_success_timestamp_seconds') >= startedAt - 1)
    t.is(metric('size_bytes'), bytes)
    t.is((await stat(join(metrics, 'edgemesh_backup.prom'))).mode & 0o777, 0o644, 'node-exporter is another user')
    t.deepEqual(await readdir(metrics), ['edgemesh_backup.prom'], 'written whole')

    const said = await readFile(argv, 'utf8')
    t.regex(said, /pg_dump .*--format=custom/)
    t.notRegex(said, /w√rd|w%E2/, 'a password is not among the arguments of a program')

    const empty = await emptyDatabase()
    const restored = await restore([await newest()], { DATABASE_URL: empty })
    t.is(restored.exitCode, 0, restored.stderr)
    t.regex(restored.stdout, /edgemesh migrate up[\s\S]*edgemesh audit verify/)
    t.deepEqual(await contentOf(empty), before)
    t.is((await restore(['--check', await newest()], { DATABASE_URL: '' })).exitCode, 0)
  },
)

judged(
  'promtool finds nothing wrong with the metrics of a backup',
  { 'PostgreSQL with pg_dump': postgresBin, promtool },
  async t => {
    const { who, metrics, backup } = await site(t)
    t.is((await backup()).exitCode, 0)
    const check = `${promtool} check metrics < ${join(metrics, 'edgemesh_backup.prom')}`
    t.deepEqual(await who.run('bash', ['--norc', '-c', check]), { exitCode: 0, stdout: '', stderr: '' })
  },
)

backedUp('what is written while a backup is made is not in it, and does not make it fail', async t => {
  const { who, url, backup, newest, query } = await site(t)
  const meanwhile = `[[ $* != *--snapshot* ]] || "\${0%/*}/psql" -Xqc "insert into users (id, email, name, role, status, created_at)
    select 'late' || n, 'late' || n, '', 'user', 'active', now() from generate_series(1, 7) n; create table later ()"
    exec "$real" "$@"`
  const made = await backup({ BACKUP_POSTGRES_BIN: await programs(who, { pg_dump: meanwhile }) })
  t.is(made.exitCode, 0, made.stderr)
  t.deepEqual(await query('select count(*)::int as users from users'), [{ users: 27 }], url)
  const facts = await manifestOf((await newest()).replace('.dump', '.manifest'))
  t.deepEqual(
    facts.get('table')?.filter(([name]) => name === 'public.users' || name === 'public.later'),
    [['public.users', '20']],
  )
})

encrypted('an encrypted backup is read by the private key alone, and restored with it', async t => {
  const { who, url, backup, kept, newest, restore, emptyDatabase } = await site(t)
  const pair = async (name: string) => {
    const identity = join(who.folder, name)
    await who.run('age-keygen', ['-o', identity])
    const { stdout } = await who.run('age-keygen', ['-y', identity])
    return { identity, recipients: await who.file(`${name}.pub`, stdout) }
  }
  const [ours, others] = [await pair('ours'), await pair('others')]
  const wrong = await backup({ BACKUP_AGE_RECIPIENTS_FILE: ours.recipients, BACKUP_AGE_IDENTITY_FILE: others.identity })
  t.is(wrong.exitCode, 1)
  t.regex(wrong.stderr, /age could not decrypt what it has encrypted/)
  t.deepEqual(await kept(), [])

  const made = await backup({ BACKUP_AGE_RECIPIENTS_FILE: ours.recipients })
  t.is(made.exitCode, 0, made.stderr)
  const file = await newest()
  t.regex(file, /\.dump\.age$/)
  t.is((await readFile(file)).toString('latin1', 0, 21), 'age-encryption.org/v1')
  t.is((await kept()).length, 2, 'nothing lies beside it that is not encrypted')

  const empty = await emptyDatabase()
  const without = await restore([file], { DATABASE_URL: empty })
  t.regex(without.stderr, /is encrypted: BACKUP_AGE_IDENTITY_FILE must name the private key/)
  const mistaken = await restore([file], { DATABASE_URL: empty, BACKUP_AGE_IDENTITY_FILE: others.identity })
  t.regex(mistaken.stderr, /can not be decrypted: .*no identity matched/)
  const restored = await restore([file], { DATABASE_URL: empty, BACKUP_AGE_IDENTITY_FILE: ours.identity })
  t.is(restored.exitCode, 0, restored.stderr)
  t.deepEqual(await contentOf(empty), await contentOf(url))
})

/** What goes wrong, by what it is; each with the end of its story. */
const failures: Record<string, { prepare(site: Site): Promise<Record<string, string>>; told: RegExp }> = {
  'the database is away': {
    prepare: async ({ url }) => ({ DATABASE_URL: url.replace(/@[^/]*/, '@127.0.0.1:1') }),
    told: /the database has failed: .*Connection refused/,
  },
  'it is not the database of EdgeMesh': {
    prepare: async ({ emptyDatabase }) => ({ DATABASE_URL: await emptyDatabase() }),
    told: /the database site_\d+ has no table devices: it is not EdgeMesh's/,
  },
  'pg_dump is older than the server': {
    prepare: async ({ who }) => ({
      BACKUP_POSTGRES_BIN: await programs(who, { pg_dump: 'echo "pg_dump (PostgreSQL) 14.1"' }),
    }),
    told: /pg_dump 14 can't dump a PostgreSQL \d+: /,
  },
  'the disk is full': {
    prepare: async ({ who }) => ({
      BACKUP_POSTGRES_BIN: await programs(who, {
        pg_dump:
          '[[ $* != *--snapshot* ]] && exec "$real" "$@"; echo half > "$BACKUP_DIR/.work."*/dump; echo "No space left on device" >&2; exit 1',
      }),
    }),
    told: /pg_dump has failed: .*No space left on device/,
  },
  'the dump is whole, and can not be restored': {
    // Each row is good when it is written. Restored, the rule looks at a table that is not filled yet.
    async prepare({ query }) {
      await query(
        `create function knows(u text) returns boolean language sql as 'select exists (select from public.users where id = u)'`,
      )
      await query('create table badges (u text check (knows(u)))')
      await query(`insert into badges values ('user1')`)
      return {}
    },
    told: /the dump can not be restored: .*violates check constraint/,
  },
  'a row is lost on the way': {
    prepare: async ({ who }) => ({
      BACKUP_POSTGRES_BIN: await programs(who, {
        pg_restore: `"$real" "$@" && "\${0%/*}/psql" -Xqd restored -c "delete from users where id = 'user3'"`,
      }),
    }),
    told: /what was restored is not what was dumped: < public\.users 20;> public\.users 19;/,
  },
}

for (const [what, { prepare, told }] of Object.entries(failures)) {
  backedUp(`where ${what} there is no backup, no half of one, and somebody is told`, async t => {
    const here = await site(t)
    const notice = join(here.who.folder, 'notice')
    const env = await prepare(here)
    const failed = await here.backup({ ...env, BACKUP_NOTIFY_COMMAND: `cat > ${notice}` })
    t.is(failed.exitCode, 1)
    t.regex(failed.stderr, told)
    t.regex(await readFile(notice, 'utf8'), told)
    t.notRegex(failed.stderr + failed.stdout, /w√rd|w%E2/)
    t.deepEqual([await here.kept(), await here.hidden(), await readdir(here.metrics)], [[], [], []])
  })
}

backedUp('a backup that can not be uploaded is kept, and counts as failed', async t => {
  const { who, directory, metrics, backup, kept } = await site(t)
  const notice = join(who.folder, 'notice')
  const env = { BACKUP_NOTIFY_COMMAND: `cat > ${notice}` }
  const failed = await backup({ ...env, BACKUP_UPLOAD_COMMAND: 'echo "no bucket for $1" >&2; exit 7' })
  t.is(failed.exitCode, 1)
  const [dump] = await kept()
  t.regex(failed.stderr, new RegExp(`no bucket for .*${dump}\\nerror: BACKUP_UPLOAD_COMMAND has failed for .*${dump}`))
  t.regex(await readFile(notice, 'utf8'), /BACKUP_UPLOAD_COMMAND has failed/)
  t.deepEqual(await readdir(metrics), [])

  const store = await who.subfolder('store')
  const made = await backup({ BACKUP_UPLOAD_COMMAND: `[ -z "$PGPASSWORD$DATABASE_URL" ] && cp "$1" ${store}/` })
  t.is(made.exitCode, 0, made.stderr)
  t.deepEqual(
    (await readdir(store)).sort(),
    (await kept()).filter(name => !name.startsWith(dump!.slice(0, -5))),
  )
  t.is((await readdir(directory)).includes('.lock'), true)
})

backedUp('backups that are older than BACKUP_KEEP_DAYS go once there is a new one, and nothing else does', async t => {
  const { who, url, directory, backup, kept } = await site(t)
  const day = (ago: number) => new Date(Date.now() - ago * 86_400_000).toISOString().replace(/[-:]|\.\d+/g, '')
  const name = (ago: number, end: string) => `edgemesh_${day(ago)}.${end}`
  const old = ['dump', 'manifest', 'dump.age'].map(end => name(31, end))
  const others = [
    ...['dump', 'manifest'].map(end => name(29, end)),
    'notes.txt',
    'edgemesh_forever.dump',
    'other_20200101T000000Z.dump',
  ]
  for (const file of [...old, ...others]) {
    await who.file(file, '')
    await rename(join(who.folder, file), join(directory, file))
    // A copy from elsewhere has the date of the copy.
    await utimes(join(directory, file), new Date(), new Date(old.includes(file) ? Date.now() : 0))
  }
  await backup({ DATABASE_URL: url.replace(/@[^/]*/, '@127.0.0.1:1') })
  t.deepEqual(await kept(), [...old, ...others].sort(), 'without a new one nothing goes')
  const made = await backup()
  t.is(made.exitCode, 0, made.stderr)
  t.is(made.stdout.match(/^deleted /gm)?.length, 3)
  const left = (await kept()).filter(file => !made.stdout.includes(file.replace(/\..*/, '')))
  t.deepEqual(left, others.sort())
})

backedUp('a second backup does not begin while one is running', async t => {
  const { who, scripts, settings, backup, kept } = await site(t)
  const gate = join(who.folder, 'gate')
  await who.run('mkfifo', [gate])
  // Reached once its dump is kept: it waits until the gate is opened.
  const env = { ...settings, BACKUP_UPLOAD_COMMAND: `case $1 in *.dump) cat ${gate};; esac` }
  const first = who.spawn('bash', [join(scripts, 'backup.sh')], { env })
  const [said, ended] = [text(first.stderr!), once(first, 'exit')]
  first.stdout?.resume()
  await eventually('the first is under way', async () => (await kept()).length === 2)
  const second = await backup()
  t.is(second.exitCode, 3)
  t.regex(second.stderr, /another backup is running/)
  await writeFile(gate, '')
  t.deepEqual(await ended, [0, null], await said)
  t.is((await kept()).length, 2)
})

/** What has ended and waits for an init that never asks does not run. */
function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false
  }
}

backedUp('a backup that was killed leaves nothing that counts as one, and the next clears up behind it', async t => {
  const { who, scripts, directory, settings, backup, kept, hidden } = await site(t)
  const gate = join(who.folder, 'gate')
  await who.run('mkfifo', [gate])
  const bin = await programs(who, { pg_restore: `cat ${gate} > /dev/null; exit 1` })
  const killed = who.spawn('bash', [join(scripts, 'backup.sh')], { env: { ...settings, BACKUP_POSTGRES_BIN: bin } })
  killed.stdout?.resume()
  killed.stderr?.resume()
  await eventually('it restores', async () => (await hidden()).length === 2)
  // Open for writing as soon as the other end waits.
  const handle = await open(gate, 'w')
  const scratch = join(directory, (await hidden())[0] ?? '')
  const pid = Number((await readFile(join(scratch, 'data/postmaster.pid'), 'utf8')).split('\n')[0])
  const socket = await realpath(join(scratch, 'socket'))
  const ended = once(killed, 'exit')
  killed.kill('SIGKILL')
  await ended
  await handle.close()
  t.deepEqual(await kept(), [])
  t.is((await hidden()).length, 2)
  t.true(isRunning(pid), 'the server that it had started goes on')

  const next = await eventually('what it had started lets go', async () => {
    const ran = await backup()
    return ran.exitCode !== 3 && ran
  })
  t.is(next.exitCode, 0, next.stderr)
  t.deepEqual(await hidden(), [])
  t.false(existsSync(socket))
  await eventually('the server that it had started is gone', () => !isRunning(pid))
})

backedUp('a setting that is wrong is told by its name', async t => {
  const { who, url, directory, backup, restore, kept } = await site(t)
  const wrong: [Record<string, string>, RegExp][] = [
    [{ BACKUP_DIR: '/nowhere' }, /BACKUP_DIR is no folder that .* may write to: \/nowhere\nhint: install -d/],
    [{ BACKUP_KEEP_DAYS: '0' }, /BACKUP_KEEP_DAYS must be a whole number, 1 or more/],
    [{ BACKUP_KEEP_DAYS: '30d' }, /BACKUP_KEEP_DAYS must be a whole number/],
    [{ BACKUP_METRICS_DIR: '/nowhere' }, /BACKUP_METRICS_DIR is no folder/],
    [{ BACKUP_SCRATCH_DIR: '/nowhere' }, /BACKUP_SCRATCH_DIR is no folder/],
    [{ BACKUP_POSTGRES_BIN: '/nowhere' }, /BACKUP_POSTGRES_BIN has no pg_dump: \/nowhere/],
    [
      { BACKUP_AGE_RECIPIENTS_FILE: '/nowhere' },
      /BACKUP_AGE_RECIPIENTS_FILE names a file that can't be read: \/nowhere/,
    ],
    [{ DATABASE_URL: '' }, /DATABASE_URL is not set/],
    [{ DATABASE_URL_FILE: '/nowhere' }, /DATABASE_URL and DATABASE_URL_FILE are both given/],
    [{ DATABASE_URL: '', DATABASE_URL_FILE: '/nowhere' }, /DATABASE_URL_FILE names a file that can't be read/],
    [
      { DATABASE_URL: `${url}?sslmode=prefer` },
      /ssl of DATABASE_URL must be disable, require, verify-ca or verify-full/,
    ],
    [{ DATABASE_URL: `${url}?pool=9` }, /DATABASE_URL has a parameter that is not known here: pool/],
  ]
  for (const [env, told] of wrong) {
    const { exitCode, stderr } = await backup(env)
    t.is(exitCode, 2, stderr)
    t.regex(stderr, told)
    t.notRegex(stderr, /w√rd|w%E2/)
  }
  t.deepEqual(await kept(), [])

  const file = await who.file('url', url)
  const check = await restore(['--check', join(directory, 'edgemesh_20260131T020000Z.dump')])
  t.regex(check.stderr, /FILE names a file that can't be read/)
  t.is(check.exitCode, 2)
  const made = await backup({ DATABASE_URL: '', DATABASE_URL_FILE: file })
  t.is(made.exitCode, 0, made.stderr)
})

test('the URL of the database is read as EdgeMesh reads it', async t => {
  const read = (url: string) =>
    new Promise<string[]>(resolve => {
      const lines = `work=; . ${join(deploy, 'backup/postgres.sh')}; read_database_url; for name in "\${!PG@}"; do echo "$name=\${!name}"; done`
      execFile(
        'bash',
        ['--norc', '-c', lines],
        { env: { PATH: process.env.PATH, DATABASE_URL: url } },
        (_, stdout, stderr) => {
          const ours = (line: string) => line !== '' && !/^PG(APPNAME|CONNECT_TIMEOUT)=/.test(line)
          resolve([...stdout.split('\n'), ...stderr.split('\n')].filter(ours))
        },
      )
    })
  t.deepEqual(await read('postgresql+asyncpg://edgemesh:pa/ss%20w\\o?d@db:5433/edge%20mesh?ssl=require'), [
    'PGDATABASE=edge mesh',
    'PGHOST=db',
    'PGPASSWORD=pa/ss w\\o?d',
    'PGPORT=5433',
    'PGSSLMODE=require',
    'PGUSER=edgemesh',
  ])
  t.deepEqual(await read('postgres://one,[::1]:5433/edgemesh?target_session_attrs=read-write&ssl=disable'), [
    'PGDATABASE=edgemesh',
    'PGHOST=one,::1',
    'PGPORT=5432,5433',
    'PGSSLMODE=disable',
    'PGTARGETSESSIONATTRS=read-write',
  ])
  t.deepEqual(
    await read('postgresql://ada@/edgemesh?host=/var/run/postgresql&sslmode=verify-full&sslrootcert=/ca.crt'),
    [
      'PGDATABASE=edgemesh',
      'PGHOST=/var/run/postgresql',
      'PGSSLMODE=verify-full',
      'PGSSLROOTCERT=/ca.crt',
      'PGUSER=ada',
    ],
  )
  t.true((await read('postgresql://ada:100%20%@db/edgemesh')).includes('PGPASSWORD=100%20%'))
  t.deepEqual(await read('mysql://db/edgemesh'), ['error: DATABASE_URL must begin with postgresql://'])
  t.deepEqual(await read('postgresql://db'), ['error: DATABASE_URL names no database: end it with /edgemesh'])
})

backedUp('a restore that can not be right is refused, and changes nothing', async t => {
  const { who, url, database, directory, backup, newest, restore, emptyDatabase } = await site(t)
  t.is((await backup()).exitCode, 0)
  const file = await newest()
  const manifest = file.replace('.dump', '.manifest')
  await addUsers(url, 5, 'since')
  const now = await contentOf(url)
  const empty = await emptyDatabase()
  const refuses = async (told: RegExp, args: string[], env: Record<string, string> = {}) => {
    const { exitCode, stderr } = await restore(args, env)
    t.not(exitCode, 0, String(told))
    t.regex(stderr, told)
    t.deepEqual(await contentOf(url), now)
    t.deepEqual(await queryOnce(empty, 'select * from pg_tables where schemaname = $1', ['public']), [])
  }

  await refuses(/is not empty\nhint: to give up all that is in it: restore\.sh --replace site_\d+ /, [file])
  await refuses(/--replace names other, and DATABASE_URL names site_/, ['--replace', 'other', file])

  const client = new pg.Client({ connectionString: url })
  await client.connect()
  await refuses(/site_\d+ is in use, by: edgemesh\nhint: stop all instances/, ['--replace', database, file])
  await client.end()

  const copy = async (name: string, change: (bytes: Buffer, facts: string) => { bytes?: Buffer; facts?: string }) => {
    const { bytes = await readFile(file), facts = await readFile(manifest, 'utf8') } = change(
      await readFile(file),
      await readFile(manifest, 'utf8'),
    )
    await writeFile(join(directory, `${name}.manifest`), facts)
    await writeFile(join(directory, `${name}.dump`), bytes)
    return join(directory, `${name}.dump`)
  }
  const target = { DATABASE_URL: empty }
  const flipped = await copy('flipped', bytes => ({ bytes: bytes.fill(bytes[9_000]! ^ 1, 9_000, 9_001) }))
  await refuses(/is not as backup\.sh has left it: its SHA-256 is another/, [flipped], target)
  const cut = await copy('cut', bytes => ({ bytes: bytes.subarray(0, 20_000) }))
  await refuses(/is not as backup\.sh has left it/, ['--check', cut], target)
  const less = await copy('less', (_, facts) => ({ facts: facts.replace('public.users\t20', 'public.users\t21') }))
  await refuses(
    /nothing was restored .*table public\.users has 20 rows, and had 21 when the backup was taken/,
    [less],
    target,
  )
  const newer = await copy('newer', (_, facts) => ({ facts: facts.replace(/server\t\d+/, 'server\t99') }))
  await refuses(/the backup is of a PostgreSQL 99\S* .*which is older/, [newer], target)
  const foreign = await copy('foreign', (_, facts) => ({ facts: `${facts}role\tsomebody-else\n` }))
  await refuses(
    /roles that have rights in the backup are not here: somebody-else\nhint: .*create role/,
    [foreign],
    target,
  )
  await unlink(less.replace('.dump', '.manifest'))
  await refuses(/less\.manifest is not there/, [less], target)

  // Killed or failing half way through.
  const bin = await programs(who, {
    pg_restore: `case $* in *--list*) exec "$real" "$@";; *) "$real" "$@" | head -n 300; exit 1;; esac`,
  })
  await refuses(/nothing was restored and nothing has changed/, [file], { ...target, BACKUP_POSTGRES_BIN: bin })
  await refuses(/nothing was restored/, ['--replace', database, file], { BACKUP_POSTGRES_BIN: bin })

  // Somebody who comes while it restores.
  const late = await programs(who, {
    pg_restore: `case $* in *--list*) ;; *) "\${0%/*}/psql" -Xqc 'select pg_sleep(60)' >&2 & echo $! > ${who.folder}/late
      until "\${0%/*}/psql" -XqAtc "select 1 from pg_stat_activity where datname = current_database() and query ~ '^select pg_sleep'" | grep -q 1; do :; done;; esac
      exec "$real" "$@"`,
  })
  await refuses(/somebody has connected to the database meanwhile/, [file], { ...target, BACKUP_POSTGRES_BIN: late })
  process.kill(Number(await readFile(join(who.folder, 'late'), 'utf8')))
  for (const args of [[], ['--now', file], [file, file], ['/etc/passwd']]) {
    t.is((await restore(args)).exitCode, 2)
  }
})

backedUp('a database is replaced as a whole: what has come since is gone, and what was there is back', async t => {
  const { url, database, backup, newest, restore, query } = await site(t)
  const then = await contentOf(url)
  t.is((await backup()).exitCode, 0)
  await addUsers(url, 5, 'since')
  await query('create table of_tomorrow (id int)')
  await query('create schema tomorrow create table things (id int)')
  await query(`delete from users where id = 'user7'`)
  const { exitCode, stdout, stderr } = await restore(['--replace', database, await newest()])
  t.is(exitCode, 0, stderr)
  t.regex(stdout, /restored: \d+ tables and \d+ rows, each counted/)
  t.deepEqual(await contentOf(url), then)
  t.deepEqual(await query(`select 1 from pg_class where relname in ('of_tomorrow', 'things')`), [])
})

backedUp(
  'backed up by a role that only reads and restored by the owner, each role has the rights that it had',
  async t => {
    const here = await site(t)
    const { query, backup, newest, restore, emptyDatabase } = here
    const { postgres } = server()
    const secret = { owner: 'owner-secret', service: 'service-secret', reader: 'reader-secret' }
    for (const [name, password] of Object.entries(secret))
      await query(`create role edgemesh_${name} login password '${password}'`)
    await query('grant pg_read_all_data to edgemesh_reader')
    await query(`do $$ declare name text; begin
    for name in select oid::regclass from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') loop
      execute format('alter table %s owner to edgemesh_owner', name);
    end loop;
    for name in select oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace loop
      execute format('alter function %s owner to edgemesh_owner', name);
    end loop;
  end $$`)
    await query(`alter database ${here.database} owner to edgemesh_owner`)
    const as = (name: keyof typeof secret, url: string) =>
      urlOf(postgres, new URL(url).pathname.slice(1), { name: `edgemesh_${name}`, password: secret[name] })
    const granted = async (url: string) => {
      const pool = new pg.Pool({ connectionString: as('owner', url), max: 1 })
      await grantServiceRole(pool, 'edgemesh_service', 30)
      await pool.end()
    }
    await granted(here.url)
    const made = await backup({ DATABASE_URL: as('reader', here.url) })
    t.is(made.exitCode, 0, made.stderr)
    t.deepEqual((await manifestOf((await newest()).replace('.dump', '.manifest'))).get('role'), [['edgemesh_service']])

    const fresh = await emptyDatabase('edgemesh_owner')
    const { exitCode, stderr } = await restore([await newest()], { DATABASE_URL: as('owner', fresh) })
    t.is(exitCode, 0, stderr)
    t.deepEqual(await contentOf(fresh), await contentOf(here.url))
    const service = (statement: string) => queryOnce(as('service', fresh), statement)
    await t.throwsAsync(service('delete from audit_events'), { code: '42501' } as object)
    await t.throwsAsync(service('drop table users'), { code: '42501' } as object)
    t.is((await service('select id from users')).length, 20)
    // What `edgemesh migrate up` does finds nothing in its way.
    await t.notThrowsAsync(granted(fresh))
  },
)

test('systemd tells of a backup that has died without a word', async t => {
  const who = await plainUser(t)
  const notice = join(who.folder, 'notice')
  const script = join(await installScripts(who), 'backup.sh')
  const env = { BACKUP_NOTIFY_COMMAND: `cat > ${notice}`, MONITOR_SERVICE_RESULT: 'oom-kill' }
  const { exitCode, stderr } = await who.run('bash', [script, '--tell-failed'], env)
  t.is(exitCode, 0, stderr)
  t.regex(await readFile(notice, 'utf8'), /^EdgeMesh backup failed on \S+ \(oom-kill\): the last it has said is\n/)
  const silent = await who.run('bash', [script, '--tell-failed'], { ...env, BACKUP_NOTIFY_COMMAND: 'exit 5' })
  t.is(silent.exitCode, 5, 'a notice that nobody gets is a failed unit of its own')
})

if (process.getuid?.() === 0) {
  test('root is told to have somebody else make backups', async t => {
    const { stderr, exitCode } = await new Promise<{ stderr: string; exitCode: unknown }>(resolve => {
      const script = join(deploy, 'backup/backup.sh')
      execFile('bash', [script], (error, _, stderr) => resolve({ stderr, exitCode: error?.code }))
    })
    t.is(exitCode, 2)
    t.regex(stderr, /PostgreSQL refuses to be run by root/)
  })
}
