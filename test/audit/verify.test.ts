import { execFile } from 'node:child_process'
import { randomUUIDv7 } from 'node:crypto'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import type pg from 'pg'
import { auditEventsTable, type JournalEntry, startJournal } from '../../src/audit/journal.ts'
import { canonicalJson, sealKeyFrom } from '../../src/audit/seals.ts'
import { type Verification, verifyAudit } from '../../src/audit/verify.ts'
import { createKey } from '../../src/client/csr.ts'
import { systemClock } from '../../src/clock.ts'
import { maintainPartitions } from '../../src/db/partitions.ts'
import { openOffline } from '../../src/server.ts'
import { readSettings } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  clientsOf,
  type EdgeMesh,
  eventually,
  refused,
  secrets,
  startEdgeMesh,
  startSecondInstance,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { testDatabase } from '../support/postgres.ts'
import { serve } from '../support/serve.ts'
import { noTokenRequest } from '../support/token-request.ts'

const key = sealKeyFrom(secrets.ENROLLMENT_TOKEN_SECRET)
const log = createLog({ level: 'silent' })
const dayMs = 86_400_000

function verify(pool: pg.Pool, options: { sinceMs?: number; retentionDays?: number; nowMs?: number } = {}) {
  return verifyAudit({ pool, key, retentionDays: 90, nowMs: Date.now(), ...options })
}

const kindsOf = ({ findings }: Verification) => findings.map(({ kind }) => kind)

/** What whoever owns the tables can do, but the service can't. */
async function tamper(pool: pg.Pool, ...statements: string[]): Promise<void> {
  const client = await pool.connect()
  try {
    await client.query('begin')
    await client.query('set local session_replication_role = replica')
    for (const statement of statements) await client.query(statement)
    await client.query('commit')
  } finally {
    client.release()
  }
}

/** Calls of every kind that leaves something on record. */
async function use(t: ExecutionContext, mesh: EdgeMesh, name: string): Promise<void> {
  await unary(mesh.admin, 'createUser', { id: name, email: `${name}@example.com`, name, role: 'admin' })
  await refused(unary(mesh.admin, 'getDevice', { id: 'nobody' }))
  const device = await mesh.enroll({ device: { id: `laptop-${name}`, labels: { zone: '1', area: 'b' } } })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  await access.ask(name, 'payroll')
  access.end()
  await access.ended
}

async function countOf(pool: pg.Pool): Promise<number> {
  const { rows } = await pool.query<{ count: number }>(
    'select (select count(*) from audit_events)::int + (select count(*) from decisions)::int as count',
  )
  return rows[0]?.count ?? 0
}

test('every call, change, enrollment and decision of two instances is in a chain, and verifies', async t => {
  const first = await startEdgeMesh(t)
  const second = await startSecondInstance(t, first)
  await Promise.all([use(t, first, 'ada'), use(t, second, 'grace')])
  // While they serve nothing is wrong either.
  t.deepEqual((await verify(first.pool)).findings, [])
  await Promise.all([first.server.stop(), second.server.stop()])

  const verification = await verify(first.pool)
  t.deepEqual(verification.findings, [])
  t.is(verification.heads.length, 2)
  const { rows, rowsNotChained, rowsBeforeSeals, open } = verification
  t.deepEqual([rows, rowsNotChained, rowsBeforeSeals, open], [await countOf(first.pool), 0, 0, 0])
  const own = await first.pool.query('select 1 from audit_events where mac is not null')
  t.true((own.rowCount ?? 0) >= 4, 'changes and enrollments were recorded by their transactions')
})

const one = (table: string) => `(select ctid from ${table} order by at, id limit 1)`
const newestSeal = '(select writer, sequence from audit_seals order by at desc, sequence desc limit 1)'
const sealInTheMiddle = '(select writer, 2 from audit_seals limit 1)'

const tampering: Record<string, { statements: string[]; finds: string[] }> = {
  'an event that was changed': {
    statements: [`update audit_events set actor = 'nobody' where ctid = ${one('audit_events')}`],
    finds: ['row-changed'],
  },
  'an event whose detail was changed': {
    statements: [
      `update audit_events set detail = detail || '{"email": "eve@example.com"}' where method ~ 'CreateUser'`,
    ],
    finds: ['row-changed'],
  },
  'an event that was moved in time by a microsecond': {
    statements: [`update audit_events set at = at + interval '1 microsecond' where method ~ 'CreateUser'`],
    finds: ['row-removed'],
  },
  'a decision that was changed': {
    statements: [`update decisions set questions = jsonb_set(questions, '{0,allow}', 'true')`],
    finds: ['row-changed'],
  },
  'an event that was removed': {
    statements: [`delete from audit_events where ctid = ${one('audit_events')}`],
    finds: ['row-removed'],
  },
  'a decision that was removed': { statements: ['delete from decisions'], finds: ['row-removed'] },
  'an event that was inserted': {
    statements: [
      `insert into audit_events select at, gen_random_uuid(), 'nobody', method, target, source_address, code, reason,
         detail, instance_id, mac from audit_events where method ~ 'CreateUser'`,
    ],
    finds: ['row-inserted'],
  },
  'an event that was copied': {
    statements: [`insert into audit_events select * from audit_events where method ~ 'CreateUser'`],
    finds: ['row-repeated'],
  },
  'one event exchanged for another of the same hour': {
    statements: [
      `insert into audit_events select at, gen_random_uuid(), 'nobody', method, target, source_address, code, reason,
         detail, instance_id, mac from audit_events where method ~ 'CreateUser'`,
      `delete from audit_events where method ~ 'CreateUser' and actor <> 'nobody'`,
    ],
    finds: ['row-inserted', 'row-removed'],
  },
  'a seal that was removed': {
    statements: [`delete from audit_seals where (writer, sequence) = ${sealInTheMiddle}`],
    finds: ['row-inserted', 'seal-removed'],
  },
  'a seal that was changed': {
    statements: [`update audit_seals set instance_id = 'another' where (writer, sequence) = ${sealInTheMiddle}`],
    finds: ['seal-changed'],
  },
  'a removed event whose seal was mended without the secret': {
    statements: [
      `delete from audit_events where method ~ 'CreateUser'`,
      `update audit_seals set rows = '', hash = sha256('') where sequence = 2`,
    ],
    finds: ['seal-changed'],
  },
  'the beginning of a chain, removed with its rows': {
    statements: [
      'create temporary table gone as select at from audit_seals where sequence = 3',
      'delete from audit_events where at <= (select at from gone)',
      'delete from audit_seals where sequence < 3',
    ],
    finds: ['seal-removed'],
  },
  'all seals removed': { statements: ['delete from audit_seals'], finds: ['row-inserted'] },
}

test.serial('what was tampered with is found, and told by its kind', async t => {
  const mesh = await startEdgeMesh(t)
  await use(t, mesh, 'ada')
  await mesh.server.stop()
  const { pool } = mesh
  const tables = ['audit_events', 'decisions', 'audit_seals']
  for (const table of tables) await pool.query(`create table kept_${table} as table ${table}`)
  for (const [what, { statements, finds }] of Object.entries(tampering)) {
    await tamper(pool, ...statements)
    const verification = await verify(pool)
    t.false(verification.ok, what)
    const kinds = new Set(kindsOf(verification))
    for (const kind of finds) t.true(kinds.has(kind as never), `${what}: ${[...kinds]}`)
    await tamper(
      pool,
      `truncate ${tables}`,
      ...tables.map(table => `insert into ${table} select * from kept_${table}`),
      'drop table if exists gone',
    )
    t.deepEqual((await verify(pool)).findings, [], `restored after ${what}`)
  }
})

test('the newest rows, removed with their seals, are missed as soon as the instance writes again', async t => {
  const mesh = await startEdgeMesh(t)
  await use(t, mesh, 'ada')
  await refused(unary(mesh.admin, 'getDevice', { id: 'the-last' }))
  await tamper(
    mesh.pool,
    `delete from audit_events where target = 'device/the-last'`,
    `delete from audit_seals where (writer, sequence) = ${newestSeal}`,
  )
  await refused(unary(mesh.admin, 'getDevice', { id: 'after' }))
  const verification = await verify(mesh.pool)
  t.true(kindsOf(verification).includes('seal-removed'), JSON.stringify(verification.findings))
})

test('kill -9 leaves a log that verifies, and the end of its chain can not be cut off once another has seen it', async t => {
  const { url, pool } = await testDatabase(t)
  const settings = readSettings({ ...testEnvironment, DATABASE_URL: url })
  const offline = await openOffline(settings, log)
  const keyPem = createKey()
  const { signingRequestFor } = await import('../../src/client/csr.ts')
  const csr = signingRequestFor(keyPem)
  const issued = await offline.issueOperator({ name: 'tester', role: 'admin', csr, validityMs: 3_600_000 })
  await offline.close()

  const running = await serve(t, { ...testEnvironment, DATABASE_URL: url })
  const { admin } = clientsOf(t, running.address, { ...issued, keyPem })
  const calls = Array.from({ length: 50 }, async (_, at) => {
    await unary(admin, 'createEnrollmentToken', { ...noTokenRequest, usesMax: 1 })
    await refused(unary(admin, 'getDevice', { id: `nobody-${at}` }))
  })
  await Promise.race(calls)
  await running.kill()
  await Promise.allSettled(calls)
  const killed = await verify(pool)
  t.deepEqual(killed.findings, [])
  t.is(killed.rows + killed.rowsNotChained, await countOf(pool))
  t.is(killed.open, 1)

  const next = await serve(t, { ...testEnvironment, DATABASE_URL: url })
  await unary(clientsOf(t, next.address, { ...issued, keyPem }).admin, 'createEnrollmentToken', noTokenRequest)
  await eventually('the next chain has begun', async () => (await verify(pool)).heads.length === 2)
  t.deepEqual((await verify(pool)).findings, [])
  const [head] = killed.heads
  await tamper(pool, `delete from audit_seals where writer = '${head?.writer}' and sequence = ${head?.sequence}`)
  const cut = await verify(pool)
  t.true(kindsOf(cut).includes('seals-missing'), JSON.stringify(cut.findings))
})

function eventAt(at: Date, detail: unknown = {}): JournalEntry {
  const row = [at, randomUUIDv7(), 'tester', '/test', 'é/"\\', '127.0.0.1', 'OK', '', canonicalJson(detail), 'instance']
  return { table: auditEventsTable, row }
}

test('a chain whose old days retention has dropped verifies; a day that was dropped before its time does not', async t => {
  const { pool } = await testDatabase(t)
  const start = Date.UTC(2026, 0, 1, 12)
  const time = { now: start }
  const journal = startJournal({ pool, log, sealKey: key, instanceId: 'instance', clock: () => time.now })
  t.teardown(journal.stop)
  await maintainPartitions(pool, 2, start)
  for (let day = 0; day < 7; day++) {
    time.now = start + day * dayMs
    await journal.append([eventAt(new Date(time.now))])
    await journal.append([eventAt(new Date(time.now))])
  }
  await maintainPartitions(pool, 2, time.now)
  const kept = await verify(pool, { retentionDays: 2, nowMs: time.now })
  t.deepEqual(kept.findings, [])
  t.deepEqual([kept.rows, kept.seals], [6, 6])
  const early = await verify(pool, { retentionDays: 5, nowMs: time.now })
  t.deepEqual(kindsOf(early), ['seal-removed'])
  t.deepEqual((await verify(pool, { sinceMs: time.now - dayMs, nowMs: time.now })).rows, 4)
})

test('whatever JSON an event carries, it is the same row when it is read back', async t => {
  const { pool } = await testDatabase(t)
  const journal = startJournal({ pool, log, sealKey: key, instanceId: 'instance', clock: systemClock })
  t.teardown(journal.stop)
  const details: unknown[] = []
  // PostgreSQL keeps neither U+0000 nor half a character in JSON.
  const keeps = (value: unknown) => !/\\u(0000|d[89a-f]..)/i.test(JSON.stringify(value))
  fc.assert(
    fc.property(fc.jsonValue().filter(keeps), value => {
      details.push(value)
    }),
    { numRuns: 500 },
  )
  details.push(null, { b: 1, a: { 10: 1, 9: [{ z: 1e21, y: -0 }], '': null } }, { ['__proto__']: 1, x: 2 })
  const entries = details.map(detail => eventAt(new Date(), { detail }))
  await Promise.all(entries.map(entry => journal.append([entry])))
  const verification = await verify(pool)
  const wrong = verification.findings.map(({ id }) => details[entries.findIndex(({ row }) => row[1] === id)])
  t.deepEqual(wrong, [])
  t.is(verification.rows, details.length)
})

test('an event that somebody has made forty levels deep does not keep the verification busy for ever', t => {
  let deep: unknown = { b: 1, a: 2 }
  for (let level = 0; level < 40; level++) deep = { of: [deep] }
  t.is(canonicalJson(deep), `${'{"of":['.repeat(40)}{"a":2,"b":1}${']}'.repeat(40)}`)
})

test('rows that one commit wrote twice, because its first answer was lost, are no finding', async t => {
  const { pool } = await testDatabase(t)
  const entry = eventAt(new Date())
  for (let attempt = 0; attempt < 2; attempt++) {
    const journal = startJournal({ pool, log, sealKey: key, instanceId: 'instance', clock: systemClock })
    await journal.append([entry])
    await journal.stop()
  }
  t.deepEqual((await verify(pool)).findings, [])
  await tamper(pool, `delete from audit_events where ctid = ${one('audit_events')}`)
  await pool.query(
    `insert into audit_events values (now(), gen_random_uuid(), 'nobody', '', '', '', 'OK', '', '{}', 'instance', null)`,
  )
  t.true(kindsOf(await verify(pool)).includes('row-inserted'))
})

type Outcome = { exitCode: number; stdout: string; stderr: string }

function edgemesh(args: string[], env: Record<string, string>): Promise<Outcome> {
  const main = join(import.meta.dirname, '../../src/main.ts')
  return new Promise(resolve => {
    const options = { env: { PATH: process.env.PATH, DATA_DIR: '/nonexistent', ...env } }
    execFile(process.execPath, [main, ...args], options, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

test('edgemesh audit verify exits 0 for a whole log, and 1 with what is wrong and where', async t => {
  const mesh = await startEdgeMesh(t)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await mesh.server.stop()
  const { ENROLLMENT_TOKEN_SECRET } = secrets
  const env = { DATABASE_URL: mesh.databaseUrl, ENROLLMENT_TOKEN_SECRET }
  const whole = await edgemesh(['audit', 'verify'], env)
  t.is(whole.exitCode, 0, whole.stderr)
  t.regex(whole.stdout, /^\d+ rows under \d+ seals, since \d{4}-/m)

  const otherSecret = { ...env, ENROLLMENT_TOKEN_SECRET: 'another-secret-for-tokens-that-is-long-enough' }
  const other = await edgemesh(['audit', 'verify'], otherSecret)
  t.is(other.exitCode, 1)
  t.regex(other.stderr, /^hint: see that ENROLLMENT_TOKEN_SECRET is that of the servers/m)
  const none = await edgemesh(['audit', 'verify'], { DATABASE_URL: mesh.databaseUrl })
  t.is(none.exitCode, 2)
  t.regex(none.stderr, /^error: ENROLLMENT_TOKEN_SECRET: /m)

  await tamper(mesh.pool, `update audit_events set actor = 'nobody' where target = 'user/ada'`)
  const broken = await edgemesh(['audit', 'verify', '--json'], env)
  t.is(broken.exitCode, 1)
  t.regex(broken.stderr, /^error: the audit log is not as it was written: 1 finding$/m)
  const { findings } = JSON.parse(broken.stdout) as Verification
  const { rows } = await mesh.pool.query(`select id from audit_events where target = 'user/ada'`)
  t.like(findings[0], { kind: 'row-changed', table: 'audit_events', id: rows[0].id })
  t.is((await edgemesh(['audit', 'verify', '--since', new Date(Date.now() + dayMs).toISOString()], env)).exitCode, 0)
})
