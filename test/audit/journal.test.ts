import { randomUUIDv7 } from 'node:crypto'
import test from 'ava'
import pg from 'pg'
import { auditEventsTable, type JournalEntry, startJournal } from '../../src/audit/journal.ts'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { systemClock } from '../../src/clock.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const sealKey = sealKeyFrom('a secret of tests that is long enough')
const writer = { log, sealKey, instanceId: 'instance', clock: systemClock }

function event(target: string, detail = '{}'): JournalEntry {
  const row = [new Date(), randomUUIDv7(), 'tester', '/test', target, '127.0.0.1', 'OK', '', detail, 'instance']
  return { table: auditEventsTable, row }
}

test('a crowd of appends shares few commits, and each is on record when it is told so', async t => {
  const { pool } = await testDatabase(t)
  const commits: number[] = []
  const journal = startJournal({ ...writer, pool, onCommit: rows => commits.push(rows) })
  await Promise.all(
    Array.from({ length: 500 }, async (_, at) => {
      await journal.append([event(`target/${at}`)])
      if (at % 100 !== 0) return
      const { rows } = await pool.query('select 1 from audit_events where target = $1', [`target/${at}`])
      t.is(rows.length, 1)
    }),
  )
  t.is(
    commits.reduce((sum, rows) => sum + rows, 0),
    500,
  )
  t.true(commits.length < 50, `${commits.length} commits`)
})

test('large entries share a commit only up to a bound', async t => {
  const { pool } = await testDatabase(t)
  const commits: number[] = []
  const journal = startJournal({ ...writer, pool, onCommit: rows => commits.push(rows) })
  const large = JSON.stringify({ x: 'x'.repeat(1_024 * 1_024) })
  await Promise.all(Array.from({ length: 20 }, () => journal.append([event('target', large)])))
  t.is(
    commits.reduce((sum, rows) => sum + rows, 0),
    20,
  )
  t.true(Math.max(...commits) <= 9, `commits of ${commits} megabytes`)
})

test('appends of one writer, each made the moment that the one before is on record, need nobody else to move on', async t => {
  const { pool } = await testDatabase(t)
  const journal = startJournal({ ...writer, pool })
  for (let at = 0; at < 20; at++) await journal.append([event(`target/${at}`)])
  const { rows } = await pool.query('select 1 from audit_events')
  t.is(rows.length, 20)
})

test('one row that the database refuses takes none of its neighbours down', async t => {
  const { pool } = await testDatabase(t)
  const journal = startJournal({ ...writer, pool })
  const outcomes = await Promise.allSettled([
    journal.append([event('good/1')]),
    journal.append([event('bad/\0')]),
    journal.append([event('good/2')]),
  ])
  t.deepEqual(
    outcomes.map(({ status }) => status),
    ['fulfilled', 'rejected', 'fulfilled'],
  )
  const { rows } = await pool.query('select target from audit_events order by target')
  t.deepEqual(rows, [{ target: 'good/1' }, { target: 'good/2' }])
})

test('the entries of one append are all on record, or none of them', async t => {
  const { pool } = await testDatabase(t)
  const journal = startJournal({ ...writer, pool })
  await t.throwsAsync(journal.append([event('half'), event('bad/\0')]))
  const { rows } = await pool.query('select target from audit_events')
  t.deepEqual(rows, [])
})

test('while the database refuses, who waits is told so, and what has happened already is written later', async t => {
  const { pool, url } = await testDatabase(t)
  const journal = startJournal({ ...writer, pool })
  const { pathname } = new URL(url)
  const database = pathname.slice(1)
  const admin = new pg.Client({ connectionString: url.replace(pathname, '/postgres') })
  await admin.connect()
  t.teardown(() => admin.end())
  // Nobody is let in and everyone is thrown out: to the journal that is a server that has gone.
  await admin.query(`alter database ${database} with allow_connections false`)
  await admin.query('select pg_terminate_backend(pid) from pg_stat_activity where datname = $1', [database])
  journal.appendLater([event('revocation')])
  const refused = await t.throwsAsync(journal.append([event('question')]))
  t.is((refused as { reason?: string }).reason, 'AUDIT_UNAVAILABLE')

  await admin.query(`alter database ${database} with allow_connections true`)
  await journal.drained()
  const { rows } = await pool.query('select target from audit_events')
  t.deepEqual(rows, [{ target: 'revocation' }])
})
