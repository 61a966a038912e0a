import test from 'ava'
import { auditEntities } from '../../src/audit/entities.ts'
import { isDatabaseOutage, openDatabase } from '../../src/db/orm.ts'
import { inTransaction } from '../../src/db/transaction.ts'
import { testDatabase } from '../support/postgres.ts'

test('a database URL that demands TLS is not answered in plain text', async t => {
  const { url, pool } = await testDatabase(t)
  const { rows } = await pool.query<{ ssl: string }>("select current_setting('ssl') as ssl")
  if (rows[0]?.ssl === 'on') {
    t.log('skipped: the server of this run speaks TLS')
    t.pass()
    return
  }
  const demanding = new URL(url)
  demanding.searchParams.set('sslmode', 'require')
  const db = await openDatabase({ url: demanding.href, poolMax: 1, entities: auditEntities })
  t.teardown(() => db.close())
  await t.throwsAsync(db.pool.query('select 1'), { message: /does not support SSL/ })
  await t.throwsAsync(db.em().execute('select 1'), { message: /does not support SSL/ })
})

const allMigrations = [
  '0001-first',
  '0002-identity-life',
  '0003-audit-seals',
  '0004-lease-resume',
  '0005-audit-privileges',
  '0006-rate-limit-credit',
  '0007-presence',
  '0008-lifecycle-rules',
]

test('several instances that start at once migrate an empty database exactly once', async t => {
  const { url, pool } = await testDatabase(t)
  await pool.query('drop schema public cascade')
  await pool.query('create schema public')
  const instances = await Promise.all(
    [1, 2, 3, 4].map(() => openDatabase({ url, poolMax: 2, entities: auditEntities })),
  )
  t.teardown(() => Promise.all(instances.map(db => db.close())))
  const applied = await Promise.all(instances.map(db => db.migrate()))
  t.deepEqual(applied.flat(), allMigrations)
  t.deepEqual(await instances[0]?.migrations(), { applied: allMigrations, pending: [] })
})

test('migrations can be taken back and applied again', async t => {
  const db = await testDatabase(t)
  for (const name of allMigrations.toReversed()) t.deepEqual(await db.migrateDown(), [name])
  const { rows } = await db.pool.query("select to_regclass('devices') as devices")
  t.is(rows[0].devices, null)
  t.deepEqual(await db.migrate(), allMigrations)
})

test('a connection that dies within a transaction gives its place to the next one', async t => {
  const { url } = await testDatabase(t)
  const db = await openDatabase({ url, poolMax: 1, entities: auditEntities })
  t.teardown(() => db.close())
  for (let round = 0; round < 3; round++) {
    const dying = db.em().transactional(em => em.execute('select pg_terminate_backend(pg_backend_pid())'))
    await t.throwsAsync(dying, { message: /terminat/i })
    await t.throwsAsync(inTransaction(db.pool, client => client.query('select pg_terminate_backend(pg_backend_pid())')))
    t.deepEqual(await db.em().transactional(em => em.execute('select 1 as one')), [{ one: 1 }])
  }
})

test('a server that is gone is told from a statement that is wrong', async t => {
  const { pool } = await testDatabase(t)
  const wrong = await t.throwsAsync(pool.query('select nonsense'))
  t.false(isDatabaseOutage(wrong))
  const gone = await openDatabase({ url: 'postgresql://nobody@127.0.0.1:1/none', poolMax: 1, entities: auditEntities })
  t.teardown(() => gone.close())
  t.true(isDatabaseOutage(await t.throwsAsync(gone.pool.query('select 1'))))
})
