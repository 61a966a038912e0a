/** Following and exporting the audit log, as its users see it: by the command line, against servers that come and go. */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { randomUUIDv7 } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import test, { type ExecutionContext } from 'ava'
import { auditEventsTable, startJournal } from '../../src/audit/journal.ts'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { saveCredentials } from '../../src/cli/operator-credentials.ts'
import { systemClock } from '../../src/clock.ts'
import { createLog } from '../../src/telemetry/log.ts'
import {
  type Clients,
  type EdgeMesh,
  eventually,
  refusal,
  refused,
  secrets,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'

const log = createLog({ level: 'silent' })
const main = join(import.meta.dirname, '../../src/main.ts')

/** The environment of a command of the mesh's operator. */
async function operatorOf(t: ExecutionContext, mesh: EdgeMesh, port = mesh.server.apiPort) {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-audit-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const { certificatePem = '', keyPem = '', rootsPem } = mesh.operator
  await saveCredentials(folder, { keyPem, certificatePem, rootsPem, server: `localhost:${port}` })
  return { folder, env: { PATH: process.env.PATH, EDGEMESH_CREDENTIALS: folder } }
}

function started(t: ExecutionContext, env: NodeJS.ProcessEnv, ...args: string[]) {
  const child = spawn(process.execPath, [main, ...args], { env, stdio: ['ignore', 'pipe', 'pipe'] })
  const [lines, said]: [string[], string[]] = [[], []]
  createInterface({ input: child.stdout }).on('line', line => lines.push(line))
  createInterface({ input: child.stderr }).on('line', line => said.push(line))
  t.teardown(() => ended(child, 'SIGKILL'))
  return { child, lines, said }
}

async function ended(child: ChildProcess, signal: NodeJS.Signals): Promise<number | null> {
  if (child.exitCode === null && child.signalCode === null) {
    const exited = once(child, 'exit')
    child.kill(signal)
    await exited
  }
  return child.exitCode
}

function edgemesh(env: NodeJS.ProcessEnv, ...args: string[]) {
  return new Promise<{ exitCode: number; lines: string[]; stderr: string }>(resolve => {
    execFile(process.execPath, [main, ...args], { env }, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, lines: stdout.split('\n').filter(Boolean), stderr })
    })
  })
}

const addUser = (admin: Clients['admin'], id: string) =>
  unary(admin, 'createUser', { id, email: `${id}@example.com`, name: id, role: 'dev' })

test('a tail begins with the newest events and goes on with those of all instances, also when its server was gone for a while', async t => {
  const port = String(await freePort())
  const one = await startEdgeMesh(t, { API_PORT: port })
  const two = await startSecondInstance(t, one)
  const { env } = await operatorOf(t, one)
  for (const id of ['u1', 'u2', 'u3']) await addUser(one.admin, id)

  const tail = started(t, env, 'audit', 'tail', '--json', '-n', '2', '--method', '/edgemesh.v1.AdminService/CreateUser')
  const targets = () => tail.lines.map(line => JSON.parse(line).target)
  await eventually('the newest are shown', () => tail.lines.length === 2)
  await addUser(two.admin, 'u4')
  await eventually('what the other instance did is shown', () => tail.lines.length === 3)
  t.deepEqual(targets(), ['user/u2', 'user/u3', 'user/u4'])

  await one.server.stop()
  await eventually('that the server has gone is said', () =>
    tail.said.some(line => /^note: .*connecting again$/.test(line)),
  )
  await addUser(two.admin, 'u5')
  const again = await startEdgeMesh(t, { API_PORT: port, DATABASE_URL: one.databaseUrl })
  await addUser(again.admin, 'u6')
  await eventually('nothing is left out', () => tail.lines.length >= 5)
  await addUser(two.admin, 'u7')
  await eventually('it follows on', () => tail.lines.length >= 6)
  t.deepEqual(targets(), ['user/u2', 'user/u3', 'user/u4', 'user/u5', 'user/u6', 'user/u7'])
  t.is(await ended(tail.child, 'SIGINT'), 0)
})

test('a tail shows people a line an event, and is for operators', async t => {
  const mesh = await startEdgeMesh(t)
  const { env } = await operatorOf(t, mesh)
  await addUser(mesh.admin, 'ada')
  const tail = started(t, env, 'audit', 'tail', '--since', new Date(Date.now() - 60_000).toISOString(), '--code', 'OK')
  await eventually('the event is shown', () => tail.lines.some(line => line.includes('user/ada')))
  t.regex(
    tail.lines.find(line => line.includes('user/ada')) ?? '',
    /^\d{4}-\S+Z {2}OK {15} {2}\/edgemesh\.v1\.AdminService\/CreateUser {2}spiffe:\S+\/operator\/tester {2}user\/ada {2}127\.0\.0\.1$/,
  )
  await ended(tail.child, 'SIGTERM')

  const device = await mesh.enroll()
  for (const open of [
    (client: Clients['admin']) => client.tailAuditEvents(noFilter),
    (client: Clients['admin']) =>
      client.exportAuditRecords({ ...noFilter, kinds: [], until: undefined, follow: false }),
  ]) {
    const ask = (client: Clients['admin']) =>
      new Promise((resolve, reject) => open(client).on('error', reject).on('end', resolve).resume())
    t.is((await refused(ask(mesh.clients(device).admin))).code, 'PERMISSION_DENIED')
    t.is((await refused(ask(mesh.clients(mesh.anonymous).admin))).code, 'UNAUTHENTICATED')
  }
})

const noFilter = { actor: '', method: '', target: '', code: '', last: 0, since: undefined, afterCheckpoint: '' }

test('a draining instance ends its tails with the word to come back, and a wrong request is told what is wrong', async t => {
  const mesh = await startEdgeMesh(t)
  const tail = (changes: object) =>
    new Promise((resolve, reject) => {
      mesh.admin
        .tailAuditEvents({ ...noFilter, ...changes })
        .on('error', reject)
        .on('end', resolve)
        .resume()
    })
  t.deepEqual((await refused(tail({ afterCheckpoint: 'nonsense', last: 5_000 }))).fields.sort(), [
    'after_checkpoint',
    'last',
  ])
  const following = refused(tail({}))
  await eventually('it follows', async () => {
    const { rows } = await mesh.pool.query(
      `select 1 from audit_events where method like '%TailAuditEvents' and code = 'OK'`,
    )
    return rows.length === 1
  })
  await mesh.server.stop()
  const { code, reason } = await following
  t.deepEqual([code, reason], ['UNAVAILABLE', 'DRAINING'])
})

test('more than 32 followers of one instance are sent away, and make room when they go', async t => {
  const mesh = await startEdgeMesh(t)
  const open = () => mesh.admin.tailAuditEvents(noFilter)
  const streams: ReturnType<typeof open>[] = []
  /** Resolves when it follows: it hears of its own call. */
  const follows = () =>
    new Promise<boolean>((resolve, reject) => {
      const stream = open()
      streams.push(stream)
      stream.on('error', reject).on('data', ({ event }) => {
        if (event) resolve(true)
      })
    })
  await Promise.all(Array.from({ length: 32 }, follows))
  const { code, reason, retryAfterMs } = await refused(follows())
  t.deepEqual([code, reason], ['RESOURCE_EXHAUSTED', 'TOO_MANY_FOLLOWERS'])
  t.true((retryAfterMs ?? 0) > 0)
  streams[0]?.cancel()
  await eventually('there is room again', () => follows().catch(() => false))
  for (const stream of streams) stream.cancel()
})

test('exports that go on from each other hold every event and every decision once, while the fleet is at work', async t => {
  const mesh = await startEdgeMesh(t)
  const two = await startSecondInstance(t, mesh)
  const { folder, env } = await operatorOf(t, mesh)
  const file = join(folder, 'checkpoint')
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const check = (at: number) =>
    unary([mesh, two][at % 2]!.clients(device).authorize, 'check', {
      question: { id: '1', user: 'ada', service: 'payroll', action: '' },
      deviceId: '',
    })
  const [events, decisions]: [string[], string[]] = [[], []]
  const exportOnce = async () => {
    const { exitCode, lines, stderr } = await edgemesh(env, 'audit', 'export', '--checkpoint-file', file)
    t.is(exitCode, 0, stderr)
    t.regex(stderr, /^\d+ records$/m)
    for (const line of lines) {
      const { type, id } = JSON.parse(line)
      ;(type === 'event' ? events : decisions).push(id)
    }
  }
  let working = true
  const work = (async () => {
    for (let at = 0; working; at++) {
      await Promise.all([addUser([mesh.admin, two.admin][at % 2]!, `u${at}`), check(at)])
    }
  })()
  for (let at = 0; at < 3; at++) await exportOnce()
  working = false
  await work
  // What was committed a moment ago is sealed by now.
  await eventually('all seals are there', async () => {
    await exportOnce()
    const { rows } = await mesh.pool.query<{ events: string; decisions: string }>(
      `select (select count(*) from audit_events) as events, (select count(*) from decisions) as decisions`,
    )
    // The export itself is on record too, behind what it has read.
    return events.length >= Number(rows[0]?.events) - 1 && decisions.length === Number(rows[0]?.decisions)
  })
  t.is(new Set(events).size, events.length)
  t.is(new Set(decisions).size, decisions.length)
  t.true(decisions.length > 3)
  const { rows: kept } = await mesh.pool.query<{ id: string }>('select id from audit_events')
  t.deepEqual(
    events.filter(id => !kept.some(row => row.id === id)),
    [],
  )
  t.true((await readFile(file, 'utf8')).length > 10)
})

test('an export of a span of time holds that and no more, of the kinds that were asked for', async t => {
  const mesh = await startEdgeMesh(t)
  const { env } = await operatorOf(t, mesh)
  await addUser(mesh.admin, 'before')
  const { rows } = await mesh.pool.query<{ at: string }>('select max(at) as at from audit_events')
  const since = new Date(Date.parse(rows[0]!.at) + 1).toISOString()
  await eventually('time has passed', () => Date.now() > Date.parse(since))
  await addUser(mesh.admin, 'within')
  const until = new Date().toISOString()
  await eventually('time has passed', () => Date.now() > Date.parse(until))
  await addUser(mesh.admin, 'after')
  const targetsOf = async (...args: string[]) => {
    const { lines, stderr, exitCode } = await edgemesh(env, 'audit', 'export', ...args)
    t.is(exitCode, 0, stderr)
    return { targets: lines.map(line => JSON.parse(line).target).filter(target => target?.startsWith('user/')), stderr }
  }
  const span = await targetsOf('--since', since, '--until', until)
  t.deepEqual(span.targets, ['user/within'])
  t.notRegex(span.stderr, /checkpoint/)
  const rest = await targetsOf('--since', since, '--what', 'events')
  t.deepEqual(rest.targets, ['user/within', 'user/after'])
  const checkpoint = /^checkpoint: (\S+)$/m.exec(rest.stderr)?.[1] ?? ''
  await addUser(mesh.admin, 'later')
  t.deepEqual((await targetsOf('--after-checkpoint', checkpoint)).targets, ['user/later'])
  t.deepEqual((await targetsOf('--what', 'decisions')).targets, [])
  const wrong = await edgemesh(env, 'audit', 'export', '--until', until, '--follow')
  t.is(wrong.exitCode, 2)
})

test('who does not take what is exported is waited for, and gives its place back when it goes', async t => {
  const mesh = await startEdgeMesh(t)
  const sealKey = sealKeyFrom(secrets.ENROLLMENT_TOKEN_SECRET)
  const journal = startJournal({ pool: mesh.pool, log, sealKey, instanceId: 'another', clock: systemClock })
  const detail = JSON.stringify({ text: 'x'.repeat(2_000) })
  const event = () => ({
    table: auditEventsTable,
    row: [new Date(), randomUUIDv7(), 'tester', '/test', 'target', '127.0.0.1', 'OK', '', detail, 'another'],
  })
  await Promise.all(Array.from({ length: 3_000 }, () => journal.append([event()])))
  const all = { kinds: [], since: undefined, until: undefined, afterCheckpoint: '', follow: false }
  const unread: ReturnType<typeof mesh.admin.exportAuditRecords>[] = []
  const openUnread = () => {
    const stream = mesh.admin.exportAuditRecords(all)
    // grpc-js takes all that comes until it is asked for the first message.
    stream.on('error', () => {}).once('data', () => stream.pause())
    unread.push(stream)
  }
  const count = () =>
    new Promise<number>((resolve, reject) => {
      let records = 0
      const stream = mesh.admin.exportAuditRecords(all)
      stream.on('data', ({ record }) => {
        if (record) records++
      })
      stream.on('error', reject).on('end', () => resolve(records))
    })
  for (let at = 0; at < 31; at++) openUnread()
  // Each takes as long as the others would take if they were not waited for.
  for (let at = 0; at < 3; at++) t.true((await count()) >= 3_000)
  openUnread()
  const refusedCount = () =>
    count().then(
      () => false,
      error => refusal(error).reason,
    )
  t.is(await eventually('all places are taken', refusedCount), 'TOO_MANY_FOLLOWERS')
  for (const stream of unread) stream.cancel()
  t.true((await eventually('there is room again', () => count().catch(() => undefined))) > 3_000)
})

test('an export that follows keeps its checkpoint, and ends with Ctrl-C', async t => {
  const mesh = await startEdgeMesh(t)
  const { folder, env } = await operatorOf(t, mesh)
  const file = join(folder, 'checkpoint')
  const follow = () => started(t, env, 'audit', 'export', '--follow', '--what', 'events', '--checkpoint-file', file)
  const shown = ({ lines }: ReturnType<typeof follow>) => lines.map(line => JSON.parse(line).target).filter(isUser)
  await addUser(mesh.admin, 'u1')
  const first = follow()
  await eventually('what was is out', () => shown(first).length === 1)
  await addUser(mesh.admin, 'u2')
  await eventually('what comes is out', () => shown(first).length === 2)
  await eventually('its checkpoint is kept', () => readFile(file, 'utf8').catch(() => ''))
  const kept = await readFile(file, 'utf8')
  await addUser(mesh.admin, 'u3')
  await eventually('it moves on', async () => shown(first).length === 3 && (await readFile(file, 'utf8')) !== kept)
  t.is(await ended(first.child, 'SIGINT'), 0)
  await addUser(mesh.admin, 'u4')
  const second = follow()
  await eventually('the next goes on', () => shown(second).length > 0)
  t.deepEqual([...shown(first), ...shown(second)], ['user/u1', 'user/u2', 'user/u3', 'user/u4'])
})

const isUser = (target: string | undefined) => target?.startsWith('user/')

test('an export that is cut short exits with 1, and its checkpoint stays where it was', async t => {
  const mesh = await startEdgeMesh(t)
  const { folder, env } = await operatorOf(t, mesh)
  for (let at = 0; at < 20; at++) await addUser(mesh.admin, `u${at}`)
  // A database that fails while the rows are read.
  await mesh.pool.query('alter table audit_events rename column detail to details')
  const file = join(folder, 'checkpoint')
  const { exitCode, stderr } = await edgemesh(env, 'audit', 'export', '--checkpoint-file', file)
  t.is(exitCode, 1)
  t.regex(stderr, /^error: /m)
  await t.throwsAsync(readFile(file), { code: 'ENOENT' })
})
