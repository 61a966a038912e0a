/** Servers that connect as a role which owns nothing: what they do, and what PostgreSQL lets nobody do in their name. */
import test, { type ExecutionContext } from 'ava'
import pg from 'pg'
import { auditEntities } from '../../src/audit/entities.ts'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { verifyAudit } from '../../src/audit/verify.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { applyRetention } from '../../src/db/retention.ts'
import type { ExportAuditRecordsResponse } from '../../src/gen/edgemesh/v1/admin.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  type EdgeMesh,
  eventually,
  refused,
  secrets,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { link } from '../support/relay.ts'
import { type TwoRoles, twoRoles } from '../support/service-role.ts'

const log = createLog({ level: 'silent' })
const dayMs = 86_400_000
const dayOf = (ms: number) => new Date(ms).toISOString().slice(0, 10)

async function served(t: ExecutionContext): Promise<{ roles: TwoRoles; mesh: EdgeMesh }> {
  const roles = await twoRoles(t)
  const { exitCode, stdout, stderr } = await roles.migrateUp()
  t.is(exitCode, 0, stderr)
  t.regex(
    stdout,
    new RegExp(`^${roles.service.name} has what a server needs, and drops nothing younger than 90 days$`, 'm'),
  )
  return { roles, mesh: await startEdgeMesh(t, { DATABASE_URL: roles.service.url }) }
}

async function adaMayReachPayroll(mesh: EdgeMesh): Promise<void> {
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
}

const question = { question: { id: '1', user: 'ada', service: 'payroll', action: '' }, deviceId: '' }

test('servers do all that they do as a role that owns nothing, and say nothing of it', async t => {
  const { mesh } = await served(t)
  t.deepEqual((await mesh.server.readiness()).checks.audit, { ok: true })
  const other = await startSecondInstance(t, mesh)
  await adaMayReachPayroll(mesh)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  t.true((await unary(mesh.clients(device).authorize, 'check', question)).answer?.allowed)

  // A connection whose stream is lost goes on at the other instance.
  const { port, cut } = await link(t, mesh.server.apiPort)
  const lost = authorizations(t, { clients: (who: Credentials) => clientsOf(t, `127.0.0.1:${port}`, who) }, device)
  const { connectionId } = await lost.ask('ada', 'payroll')
  cut()
  const access = authorizations(t, other, device)
  t.like((await access.resume([connectionId]))[0], { allowed: true, connectionId })

  // All of the log is exported.
  const all = { kinds: [], since: undefined, until: undefined, afterCheckpoint: '', follow: false }
  const records: ExportAuditRecordsResponse[] = await Array.fromAsync(other.admin.exportAuditRecords(all))
  t.is(records.filter(({ record }) => record?.$case === 'decision').length, 3)

  // What one instance is told, the other acts on: a lease is taken back.
  t.true((await access.ask('ada', 'payroll'))?.allowed)
  await unary(mesh.admin, 'quarantineDevice', { id: 'alpha', reason: 'test' })
  await eventually('the lease is taken back', () => access.revoked.length > 0)
  await unary(mesh.admin, 'releaseDevice', { id: 'alpha', reason: '' })
  await unary(mesh.admin, 'deleteDevice', { id: 'alpha', reason: '' })
  await unary(mesh.admin, 'deleteUser', { id: 'ada' })
  const { events } = await unary(mesh.admin, 'searchAuditEvents', {
    ...{ pageSize: 0, pageToken: '', actor: '', method: '', target: 'device/alpha', code: '' },
    ...{ after: undefined, before: undefined },
  })
  t.true(events.length >= 3)

  await other.server.stop()
  await mesh.server.stop()
  const key = sealKeyFrom(secrets.ENROLLMENT_TOKEN_SECRET)
  const verification = await verifyAudit({ pool: mesh.pool, key, retentionDays: 90, nowMs: Date.now() })
  t.like(verification, { ok: true, findings: [] })
  t.true(verification.rows > 5)
})

test('PostgreSQL itself lets the role of the servers neither change what is on record nor what guards it', async t => {
  const { roles, mesh } = await served(t)
  await adaMayReachPayroll(mesh)
  const count = async () => {
    const { rows } = await roles.pool.query('select count(*)::int as events from audit_events')
    return rows[0].events as number
  }
  const before = await count()
  const today = dayOf(Date.now())
  const [tomorrow, stamp] = [dayOf(Date.now() + dayMs), today.replaceAll('-', '')]
  const attempts = ['audit_events', 'decisions', 'audit_seals'].flatMap(table => [
    `update ${table} set instance_id = 'forged'`,
    `delete from ${table}`,
    `truncate ${table}`,
    `drop table ${table}`,
    `alter table ${table} disable trigger ${table}_append_only`,
    `drop trigger ${table}_append_only on ${table}`,
    `alter table ${table} detach partition ${table}_default`,
    `alter table ${table} owner to ${roles.service.name}`,
    `create trigger mine before insert on ${table} for each row execute function refuse_change()`,
    `create rule mine as on insert to ${table} do instead nothing`,
    `update ${table}_${stamp} set instance_id = 'forged'`,
    `delete from ${table}_default`,
    `drop table ${table}_${stamp}`,
    `truncate ${table}_${stamp}`,
    `select drop_day_partition('${table}', '${today}')`,
    `select drop_day_partition('${table}', '${dayOf(Date.now() - 89 * dayMs)}')`,
    `select remove_default_rows('${table}', '${tomorrow}', 1000)`,
    `select make_day_partition('${table}', '${dayOf(Date.now() + 30 * dayMs)}')`,
  ])
  attempts.push(
    'create or replace function refuse_change() returns trigger language plpgsql as $$ begin return old; end $$',
    'drop function refuse_change() cascade',
    'drop function make_day_partition(text, date)',
    'update audit_retention set days_min = 1',
    "insert into migrations (name) values ('0006-mine')",
    'delete from migrations',
    'create table mine (id int)',
    'set session_replication_role = replica',
    `set role ${roles.owner.name}`,
    `grant ${roles.owner.name} to ${roles.service.name}`,
    'drop schema public cascade',
  )
  for (const attempt of attempts) {
    await t.throwsAsync(
      mesh.pool.query(attempt),
      { message: /permission denied|must be owner|younger|coming days/ },
      attempt,
    )
  }
  // 2026 before Christ is long ago, but the partition of that name is not.
  await t.throwsAsync(mesh.pool.query(`select drop_day_partition('audit_events', '${today} BC')`), {
    message: /no such day/,
  })
  await t.throwsAsync(mesh.pool.query(`select drop_day_partition('users', '2020-01-01')`), {
    message: /no days of users/,
  })
  // A table of one's own that has the name of what the function looks for.
  const client = await mesh.pool.connect()
  await client.query('create temp table audit_retention (id int, days_min int)')
  await client.query('insert into audit_retention values (1, 1)')
  await t.throwsAsync(client.query(`select drop_day_partition('audit_events', '${dayOf(Date.now() - 5 * dayMs)}')`), {
    message: /younger than 90 days/,
  })
  client.release(true)
  t.is(await count(), before)
})

test('the role of the servers has days made and dropped, but none dropped that the owner keeps', async t => {
  const { roles, mesh } = await served(t)
  const names = async () => {
    const { rows } = await roles.pool.query<{ name: string }>(
      `select inhrelid::regclass::text as name from pg_inherits where inhparent = 'audit_events'::regclass`,
    )
    return rows.map(({ name }) => name)
  }
  const owner = new pg.Pool({ connectionString: roles.owner.url, max: 1 })
  t.teardown(() => owner.end())
  const nameOf = (ms: number) => `audit_events_${dayOf(ms).replaceAll('-', '')}`
  const [old, young, coming] = [Date.now() - 95 * dayMs, Date.now() - 20 * dayMs, Date.now() + 7 * dayMs]
  for (const day of [old, young]) await owner.query(`select make_day_partition('audit_events', '${dayOf(day)}')`)
  await owner.query(`drop table ${nameOf(coming)}`)
  await applyRetention(mesh.pool, 1, Date.now(), log)
  const after = await names()
  t.false(after.includes(nameOf(old)))
  t.true(after.includes(nameOf(young)), 'AUDIT_RETENTION_DAYS of the server is 1, the owner keeps 90')
  t.true(after.includes(nameOf(coming)))
})

test('a schema that is behind is told by name, with what to do, and is not touched', async t => {
  const { roles, mesh } = await served(t)
  await mesh.server.stop()
  const db = await openDatabase({ url: roles.owner.url, poolMax: 1, entities: auditEntities })
  const [newest] = await db.migrateDown()
  await db.close()
  const error = await t.throwsAsync(startEdgeMesh(t, { DATABASE_URL: roles.service.url }), {
    message: new RegExp(
      `the schema is not up to date \\(${newest}\\), and the role ${roles.service.name} does not own it`,
    ),
  })
  t.regex((error as Error & { hint: string }).hint, /edgemesh migrate up/)
  t.is((await roles.migrateUp()).exitCode, 0)
  await startEdgeMesh(t, { DATABASE_URL: roles.service.url })
})

test('a role that owns the tables, or is not there, is not granted anything', async t => {
  const roles = await twoRoles(t)
  const env = { DATABASE_MIGRATION_URL: roles.owner.url }
  const own = await roles.migrateUp(env, '--service-role', roles.owner.name)
  t.is(own.exitCode, 1)
  t.regex(own.stderr, /error: the role \S+ owns the tables.*\nhint: .*docs\/audit\.md/)
  const nobody = await roles.migrateUp(env, '--service-role', 'no_such_role')
  t.is(nobody.exitCode, 1)
  t.regex(nobody.stderr, /error: there is no role no_such_role\nhint: make it: create role/)
  await roles.pool.query('grant create on schema public to public')
  const open = await roles.migrateUp(env, '--service-role', roles.service.name)
  t.is(open.exitCode, 1)
  t.regex(open.stderr, /hint: have its owner run: revoke create on schema "public" from public/)
})

test('where one role does all, the server says once that it could change what is on record', async t => {
  const mesh = await startEdgeMesh(t)
  const { audit } = (await mesh.server.readiness()).checks
  t.true(audit?.ok)
  t.regex(audit?.detail ?? '', /the role \S+ could change what is on record: see docs\/audit\.md/)
})

test('while audit can not be written nothing is allowed and nothing is changed; when it can be again, all goes on', async t => {
  const { roles, mesh } = await served(t)
  await adaMayReachPayroll(mesh)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const clients = mesh.clients(device)
  const check = () => unary(clients.authorize, 'check', question)
  t.true((await check()).answer?.allowed)
  const access = authorizations(t, mesh, device)
  t.true((await access.ask('ada', 'payroll'))?.allowed)

  for (const table of ['decisions', 'audit_events']) {
    await roles.pool.query(`revoke insert on ${table} from ${roles.service.name}`)
  }
  const outcomes = {
    check: await refused(check()),
    admin: await refused(
      unary(mesh.admin, 'createUser', { id: 'eve', email: 'eve@example.com', name: 'Eve', role: 'admin' }),
    ),
    look: await refused(unary(mesh.admin, 'getUser', { id: 'ada' })),
    token: await refused(mesh.token()),
  }
  for (const [what, { code }] of Object.entries(outcomes)) t.is(code, 'UNAVAILABLE', what)
  const streamed = await access.ask('ada', 'payroll')
  t.false(streamed.allowed)
  t.regex(streamed.reasons[0]?.code ?? '', /^(AUDIT|DATABASE)_UNAVAILABLE$/)
  const { rows } = await roles.pool.query(`select id from users where id = 'eve'`)
  t.deepEqual(rows, [])

  for (const table of ['decisions', 'audit_events']) {
    await roles.pool.query(`grant insert on ${table} to ${roles.service.name}`)
  }
  t.true((await check()).answer?.allowed)
  await mesh.token()
})
