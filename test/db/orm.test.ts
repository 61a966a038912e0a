import test from 'ava'
import { auditEntities } from '../../src/audit/entities.ts'
import { isDatabaseOutage } from '../../src/db/failure.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { inTransaction } from '../../src/db/transaction.ts'
import { eventually } from '../support/edgemesh.ts'
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
  '0009-device-labels',
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
  t.deepEqual(await instances[0]?.migrations(), { applied: allMigrations, pending: [], newer: [] })
})

test('migrations can be taken back and applied again', async t => {
  const db = await testDatabase(t)
  for (const name of allMigrations.toReversed()) t.deepEqual(await db.migrateDown(), [name])
  const { rows } = await db.pool.query("select to_regclass('devices') as devices")
  t.is(rows[0].devices, null)
  t.deepEqual(await db.migrate(), allMigrations)
})

test('a migration keeps nobody waiting behind a table that it can not have yet', async t => {
  const db = await testDatabase(t)
  const changing = '0008-lifecycle-rules'
  for (const name of allMigrations.slice(allMigrations.indexOf(changing) + 1).toReversed()) {
    t.deepEqual(await db.migrateDown(), [name])
  }
  const holder = await db.pool.connect()
  await holder.query('begin')
  await holder.query('lock table lifecycle_rules in access share mode')
  let isDone = false
  const migrating = db.migrateDown().then(names => {
    isDone = true
    return names
  })
  // Twice, as it tries again.
  for (let round = 0; round < 2; round++) {
    await eventually('the migration waits', async () => {
      const { rows } = await db.pool.query(
        `select from pg_locks where relation = 'lifecycle_rules'::regclass and mode = 'AccessExclusiveLock' and not granted`,
      )
      return rows.length > 0
    })
    // Who comes now is behind it, and would wait for as long as it does.
    await db.pool.query('select id from lifecycle_rules')
    t.false(isDone)
  }
  await holder.query('rollback')
  holder.release()
  t.deepEqual(await migrating, [changing])
})

test('a version that finds the schema of a newer one serves on it, and takes nothing of it back', async t => {
  const { pool, ...db } = await testDatabase(t)
  await pool.query("insert into migrations (name) values ('9999-of-tomorrow')")
  t.deepEqual(await db.migrate(), [])
  const { applied, pending, newer } = await db.migrations()
  t.deepEqual([applied.at(-1), pending, newer], ['9999-of-tomorrow', [], ['9999-of-tomorrow']])
  await t.throwsAsync(db.migrateDown(), { name: 'SchemaAheadError', message: /9999-of-tomorrow/ })
  t.deepEqual((await db.migrations()).applied, applied)
})

test('a connection that dies within a transaction costs the pool nothing', async t => {
  const { url } = await testDatabase(t)
  const db = await openDatabase({ url, poolMax: 2, entities: auditEntities })
  t.teardown(() => db.close())
  const dying = 'select pg_terminate_backend(pg_backend_pid())'
  for (let times = 0; times < 5; times++) {
    t.true(isDatabaseOutage(await t.throwsAsync(db.transaction(em => em.execute(dying)))))
    t.true(isDatabaseOutage(await t.throwsAsync(inTransaction(db.pool, client => client.query(dying)))))
  }
  t.deepEqual(
    await Promise.all([1, 2].map(() => db.transaction(async em => (await em.execute('select 1')).length))),
    [1, 1],
  )
})

test('a server that is gone is told from a statement that is wrong', async t => {
  const { pool } = await testDatabase(t)
  const wrong = await t.throwsAsync(pool.query('select nonsense'))
  t.false(isDatabaseOutage(wrong))
  const gone = await openDatabase({ url: 'postgresql://nobody@127.0.0.1:1/none', poolMax: 1, entities: auditEntities })
  t.teardown(() => gone.close())
  t.true(isDatabaseOutage(await t.throwsAsync(gone.pool.query('select 1'))))
})
