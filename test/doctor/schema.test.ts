/** What is wrong within the database. */
import { randomUUID } from 'node:crypto'
import test from 'ava'
import { authorizations } from '../support/device.ts'
import { told } from '../support/doctor.ts'
import { eventually, startEdgeMesh } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'
import { twoRoles } from '../support/service-role.ts'

// ── The schema ─────────────────────────────────────────────────────────────────────────────────────────────────────

test('a schema that is missing, behind or ahead is told, and what mends it', async t => {
  const { url, pool } = await testDatabase(t)
  const look = () => told({ DATABASE_URL: url }, ['migrations', 'partitions'])
  t.regex((await look())[0] ?? '', /^ok: \d+ migrations, none pending$/)

  await pool.query(`insert into migrations (name) values ('9999-tomorrow')`)
  t.is((await look())[0], 'warning: the schema is of a newer version: 9999-tomorrow')

  const { rows } = await pool.query(
    `delete from migrations where name like '0009%' or name like '9999%' returning name`,
  )
  const [behind, waits] = await look()
  t.is(behind, `failed: the schema is behind: ${rows.map(({ name }) => name).find(name => name.startsWith('0'))}`)
  t.is(waits, 'skipped: the schema is behind: see the check migrations')

  await pool.query('drop schema public cascade')
  await pool.query('create schema public')
  t.is((await look())[0], 'failed: there is no schema yet')
})

// ── The role ───────────────────────────────────────────────────────────────────────────────────────────────────────

test('a role that may too much, or too little, is told', async t => {
  const roles = await twoRoles(t)
  const { exitCode, stderr } = await roles.migrateUp()
  t.is(exitCode, 0, stderr)
  const look = (url: string) => told({ DATABASE_URL: url }, 'database-role')
  const { name, url } = roles.service
  t.deepEqual(await look(url), [`ok: ${name} adds to what is on record, and can neither change nor remove it`])

  const owner = roles.owner.name
  t.deepEqual(await look(roles.owner.url), [`warning: the role ${owner} could change or remove what is on record`])

  await roles.pool.query(`grant update on decisions to ${name}`)
  t.deepEqual(await look(url), [`warning: the role ${name} could change or remove what is on record`])
  await roles.pool.query(`revoke update on decisions from ${name}`)

  await roles.pool.query(`alter role ${name} createdb createrole`)
  t.deepEqual(await look(url), [`warning: the role ${name} may do more than it needs: createrole, createdb`])
  await roles.pool.query(`alter role ${name} nocreatedb nocreaterole`)

  await roles.pool.query(`revoke insert on audit_events from ${name}`)
  await roles.pool.query(`revoke execute on function make_day_partition(text, date) from ${name}`)
  t.deepEqual(await look(url), [
    `failed: the role ${name} lacks rights: insert on audit_events; execute on make_day_partition(text, date)`,
  ])
  // What it names as the mend is one.
  t.is((await roles.migrateUp()).exitCode, 0)
  t.regex((await look(url)).join(), /^ok: /)
})

test('a superuser is no role for servers', async t => {
  const { url, pool } = await testDatabase(t)
  const { rows } = await pool.query<{ isSuper: boolean; role: string }>(
    'select rolsuper as "isSuper", rolname as role from pg_roles where rolname = current_user',
  )
  t.true(rows[0]?.isSuper, 'tests connect as one')
  t.deepEqual(await told({ DATABASE_URL: url }, 'database-role'), [`failed: the role ${rows[0]?.role} is a superuser`])
})

// ── Partitions ─────────────────────────────────────────────────────────────────────────────────────────────────────

test('days that are not made ahead, and days that should have gone, are told', async t => {
  const mesh = await startEdgeMesh(t)
  const env = { DATABASE_URL: mesh.databaseUrl }
  t.deepEqual(await told(env, 'partitions'), ['ok: partitions of 8 days from today on, none older than the retention'])

  const stampOf = (days: number) =>
    new Date(Date.now() + days * 86_400_000).toISOString().slice(0, 10).replaceAll('-', '')
  await mesh.pool.query(`drop table audit_events_${stampOf(2)}`)
  t.deepEqual(await told(env, 'partitions'), [
    'warning: partitions are missing: audit_events has those of 2 days from today on',
  ])
  // As it would be seen in ten days, had no server run meanwhile.
  const clock = () => Date.now() + 10 * 86_400_000
  t.regex((await told(env, 'partitions', { clock })).join(), /^failed: partitions are missing: /)

  await mesh.pool.query(`select make_day_partition('decisions', date '2020-02-02')`)
  t.true(
    (await told(env, 'partitions')).includes(
      'warning: 1 partitions are older than the retention, such as decisions_20200202',
    ),
  )
})

// ── The audit log ──────────────────────────────────────────────────────────────────────────────────────────────────

test('events that are in no seal are told, of an instance that lives and of one that was killed', async t => {
  // What happens there is five minutes old, when seals have long followed.
  const mesh = await startEdgeMesh(t, {}, undefined, () => Date.now() - 300_000)
  await mesh.token()
  const env = { DATABASE_URL: mesh.databaseUrl }
  const old = `select from audit_events where at < now() - interval '4 minutes'`
  await eventually('an event is on record, and sealed', async () => {
    const { rowCount } = await mesh.pool.query(old)
    return rowCount && (await told(env, 'audit-writers')).join() === 'ok: what happened is on record, and sealed'
  })
  const leave = (instance: string, minutes: number) =>
    mesh.pool.query(
      `insert into audit_events (at, id, actor, method, target, source_address, code, reason, detail, instance_id)
       values (now() - make_interval(mins => $1), $2, '', '/test', '', '', 'OK', '', '{}', $3)`,
      [minutes, randomUUID(), instance],
    )
  await leave('killed', 6)
  await leave(mesh.server.instanceId, 3)
  t.deepEqual(await told(env, 'audit-writers'), [
    'warning: killed was killed before it had sealed its last events, 6 min ago',
    `failed: ${mesh.server.instanceId} is behind: its event of 3 min ago is in no seal`,
  ])
})

// ── Where clients come from ────────────────────────────────────────────────────────────────────────────────────────

test('devices that all come from one address are told, unless a proxy tells theirs', async t => {
  const mesh = await startEdgeMesh(t)
  const env = { DATABASE_URL: mesh.databaseUrl }
  t.deepEqual(await told(env, 'client-addresses'), ['ok: no device came within the hour'])
  for (const id of ['alpha', 'beta', 'gamma', 'delta', 'epsilon']) {
    const device = await mesh.enroll({ device: { id } })
    const access = authorizations(t, mesh, device)
    await access.ask('nobody', 'nothing')
  }
  t.deepEqual(await told(env, 'client-addresses'), ['warning: 5 devices all come from 127.0.0.1'])
  t.deepEqual(await told({ ...env, TRUSTED_PROXIES: '192.0.2.0/24' }, 'client-addresses'), [
    'ok: devices from 1 addresses',
  ])
})

test('a balancer that is to send the PROXY protocol and does not is told', async t => {
  const mesh = await startEdgeMesh(t, { TRUSTED_PROXIES: '127.0.0.1' })
  await t.throwsAsync(mesh.enroll({ token: 'none' }))
  const METRICS_PORT = String(mesh.server.metricsPort)
  const env = { DATABASE_URL: mesh.databaseUrl, METRICS_PORT, TRUSTED_PROXIES: '127.0.0.1' }
  const found = await told(env, 'client-addresses')
  t.regex(
    found.join(),
    /^failed: \d+ connections of TRUSTED_PROXIES came without a PROXY protocol header, and were refused/,
  )
})
