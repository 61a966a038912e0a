/** pgBackRest with the files that are shipped, on a real PostgreSQL of its distribution: back to a moment between two writes. */
import { readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import { eventually } from '../support/edgemesh.ts'
import { findProgram } from '../support/find-program.ts'
import { type PlainUser, plainUser } from '../support/plain-user.ts'
import { password, postgresBin, postgresWithTools } from '../support/postgres-with-tools.ts'

type Backup = { type: string; error: boolean; timestamp: { stop: number } }

const deploy = join(import.meta.dirname, '../../deploy/backup')
const pgbackrest = findProgram('pgbackrest')

/** The configuration that is shipped, with the paths of this test. @returns what its programs and PostgreSQL are started with */
async function configured(who: PlainUser, pg: { directory: string; port: number; sockets: string }) {
  const [repository, logs, locks, spool, secrets] = await Promise.all(
    ['repository', 'logs', 'locks', 'spool', 'conf.d'].map(name => who.subfolder(name)),
  )
  const paths: [RegExp, string][] = [
    [/^repo1-path=.*$/m, `repo1-path=${repository}`],
    [/^pg1-path=.*$/m, `pg1-path=${pg.directory}`],
    [/^pg1-port=.*$/m, `pg1-port=${pg.port}`],
    [/^pg1-socket-path=.*$/m, `pg1-socket-path=${pg.sockets}\npg1-user=edgemesh\npg1-database=edgemesh`],
  ]
  let shipped = await readFile(join(deploy, 'pgbackrest.conf'), 'utf8')
  for (const [from, to] of paths) {
    if (!from.test(shipped)) throw new Error(`${from} is to be in the file`)
    shipped = shipped.replace(from, to)
  }
  await who.file('pgbackrest.conf', shipped)
  await who.file(`${secrets?.split('/').at(-1)}/secrets.conf`, '[global]\nrepo1-cipher-pass=a-passphrase-of-a-test\n')
  return {
    PGBACKREST_CONFIG: join(who.folder, 'pgbackrest.conf'),
    PGBACKREST_CONFIG_INCLUDE_PATH: secrets ?? '',
    PGBACKREST_LOG_PATH: logs ?? '',
    PGBACKREST_LOCK_PATH: locks ?? '',
    PGBACKREST_SPOOL_PATH: spool ?? '',
  }
}

const missing = Object.entries({ 'PostgreSQL with its tools': postgresBin, pgbackrest }).filter(([, found]) => !found)
const restored = missing.length > 0 ? test.skip : test
const why =
  missing.length > 0 ? ` (${missing.map(([name]) => name).join(' and ')} is missing: .ci/tools installs it)` : ''

restored(
  `a database that was lost is brought back to a moment between two writes, and goes on from there${why}`,
  async t => {
    t.timeout(240_000)
    const who = await plainUser(t)
    const sockets = await who.subfolder('s')
    const environment: Record<string, string> = {}
    const postgres = await postgresWithTools(t, who, {
      settings: { unix_socket_directories: sockets },
      include: join(deploy, 'postgresql-archive.conf'),
      env: environment,
    })
    // The server is started before its port is known to the file, and anew once it is.
    Object.assign(environment, await configured(who, { ...postgres, sockets }))
    await postgres.stop()
    await postgres.start()
    const run = async (...args: string[]) => {
      const { exitCode, stdout, stderr } = await who.run(pgbackrest ?? '', ['--stanza=edgemesh', ...args], {
        ...environment,
        PGPASSWORD: password,
      })
      t.is(exitCode, 0, `${args.join(' ')}: ${stdout}${stderr}`)
      return stdout
    }
    const backups = async () => {
      const [stanza] = JSON.parse(await run('info', '--output=json')) as { backup: Backup[] }[]
      return stanza?.backup ?? []
    }
    const archived = async () => {
      await postgres.query('select pg_switch_wal()')
      const waiting = `select 1 from pg_stat_archiver
      where last_archived_wal >= (select pg_walfile_name(pg_current_wal_lsn() - 1)) and last_archived_time > $1`
      const [{ now }] = (await postgres.query<{ now: Date }>('select now()')) as [{ now: Date }]
      await postgres.query('select pg_switch_wal()')
      await eventually(
        'what was written is in the archive',
        async () => (await postgres.query(waiting, [now])).length > 0,
      )
    }

    await run('stanza-create')
    await run('check')
    await postgres.query('create table devices (id text primary key)')
    await postgres.query(`insert into devices values ('before the backup')`)
    await run('--type=full', 'backup')
    // A backup is chosen by whole seconds.
    const [{ timestamp } = { timestamp: { stop: 0 } }] = await backups()
    await eventually('the second in which the backup ended is over', async () => {
      const over = 'select 1 where extract(epoch from clock_timestamp()) >= $1'
      return (await postgres.query(over, [timestamp.stop + 1])).length > 0
    })
    await postgres.query(`insert into devices values ('before the mistake')`)
    const [{ moment }] = (await postgres.query<{ moment: string }>('select clock_timestamp()::text as moment')) as [
      { moment: string },
    ]
    await postgres.query('delete from devices')
    await postgres.query(`insert into devices values ('after the mistake')`)
    await archived()
    await run('--type=diff', 'backup')
    t.deepEqual(
      (await backups()).map(({ type, error }) => [type, error]),
      [
        ['full', false],
        ['diff', false],
      ],
    )
    await run('verify')

    await postgres.stop()
    await rm(postgres.directory, { recursive: true })
    await run('--type=time', `--target=${moment}`, '--target-action=promote', 'restore')
    await postgres.start()
    await eventually('it takes writes', async () => {
      const [row] = await postgres.query<{ recovers: boolean }>('select pg_is_in_recovery() as recovers')
      return row?.recovers === false
    })
    t.deepEqual(await postgres.query('select id from devices order by id'), [
      { id: 'before the backup' },
      { id: 'before the mistake' },
    ])

    // A history of its own from here on, which is archived and backed up like the one before.
    await postgres.query(`insert into devices values ('after the restore')`)
    await archived()
    await run('--type=full', 'backup')
    t.is((await backups()).length, 3)
    await postgres.stop()
    await rm(postgres.directory, { recursive: true })
    await run('restore')
    await postgres.start()
    await eventually('all of the new history is there', async () => {
      const rows = await postgres.query(`select 1 from devices where id = 'after the restore'`).catch(() => [])
      return rows.length === 1
    })
  },
)
