/** Connections outlive the stream that they were allowed on, and the instance, for as long as their ground holds. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import test, { type ExecutionContext } from 'ava'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  type EdgeMesh,
  eventually,
  startEdgeMesh,
  startSecondInstance,
  type TestDevice,
  testEnvironment,
  unary,
  wasClosed,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { testDatabase } from '../support/postgres.ts'
import { link } from '../support/relay.ts'
import { serve } from '../support/serve.ts'

async function start(t: ExecutionContext, env: Record<string, string> = {}) {
  const mesh = await startEdgeMesh(t, env)
  const { admin } = mesh
  await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: 'finance', roles: [] })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  return { mesh, device, heart }
}

/** A stream on a connection of its own, which breaks when the test says so. */
async function breakable(t: ExecutionContext, mesh: EdgeMesh, device: TestDevice) {
  const { port, cut } = await link(t, mesh.server.apiPort)
  const clients = (who: Credentials) => clientsOf(t, `127.0.0.1:${port}`, who)
  return { ...authorizations(t, { clients }, device), lose: cut }
}

const codes = (reasons: { code: string }[]) => reasons.map(reason => reason.code)

type OnRecord = { status: string; waits: boolean; instance: string; reasons: string[] }

/** Where a connection has no row its status is `none`. */
async function recordOf({ pool }: Pick<EdgeMesh, 'pool'>, id: string): Promise<OnRecord> {
  const { rows } = await pool.query(
    `select status, resume_by is not null as waits, instance_id as instance, end_reasons from connections where id = $1`,
    [id],
  )
  if (rows.length === 0) return { status: 'none', waits: false, instance: '', reasons: [] }
  const { end_reasons, ...record } = rows[0]
  return { ...record, reasons: codes(end_reasons ?? []) }
}

const hasRow = (mesh: EdgeMesh, id: string) =>
  eventually('the connection has lasted', async () => (await recordOf(mesh, id)).status === 'active')

const isWaiting = (mesh: EdgeMesh, id: string) =>
  eventually('the connection waits', async () => (await recordOf(mesh, id)).waits)

async function metric({ server }: EdgeMesh, name: string): Promise<number> {
  const text = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  const line = text.split('\n').find(candidate => candidate.startsWith(`${name} `) || candidate.startsWith(`${name}{`))
  // What was never there has no series.
  return Number(line?.split(' ').at(-1) ?? 0)
}

test('a device whose stream was lost resumes its connection on another stream, and it is taken back there', async t => {
  const { mesh, device, heart } = await start(t)
  const lost = await breakable(t, mesh, device)
  const { connectionId: id } = await lost.ask('ada@example.com', 'payroll')
  lost.lose()
  await isWaiting(mesh, id)
  t.is(await metric(mesh, 'edgemesh_connections_suspended'), 1)
  t.is(await metric(mesh, 'edgemesh_connections_active'), 0)
  const { connections } = await unary(mesh.admin, 'listConnections', {
    deviceId: 'alpha',
    status: 0,
    pageSize: 0,
    pageToken: '',
  })
  t.true((connections[0]?.resumeBy?.getTime() ?? 0) > Date.now(), 'an operator sees until when it waits')

  const next = authorizations(t, mesh, device)
  const [answer] = await next.resume([id])
  t.like(answer, { allowed: true, connectionId: id, reasons: [], retryAfter: undefined })
  t.like(await recordOf(mesh, id), { status: 'active', waits: false })
  const [decision] = (answer?.decisionId ?? '').split('.')
  const { rows } = await mesh.pool.query('select method, questions from decisions where id = $1', [decision])
  t.like(rows[0], { method: '/edgemesh.v1.AuthorizeService/Authorize' })
  t.true(rows[0].questions[0].allow, 'the decision to go on is on record')

  await heart.beat({ diskEncrypted: false })
  t.deepEqual(codes((await next.revocationOf(id)).reasons), ['DISK_NOT_ENCRYPTED'])
  await eventually('it is on record', async () => (await recordOf(mesh, id)).status === 'revoked')
  t.is(await metric(mesh, 'edgemesh_connections_suspended'), 0)
})

test('what was taken back while it waited is denied with the reasons for that', async t => {
  const { mesh, device, heart } = await start(t)
  const lost = await breakable(t, mesh, device)
  const { connectionId: id } = await lost.ask('ada', 'payroll')
  lost.lose()
  await isWaiting(mesh, id)
  await heart.beat({ diskEncrypted: false })
  await eventually('it is taken back', async () => (await recordOf(mesh, id)).status === 'revoked')
  await heart.beat({ diskEncrypted: true })

  const [answer] = await authorizations(t, mesh, device).resume([id])
  t.false(answer?.allowed)
  t.deepEqual(codes(answer?.reasons ?? []), ['DISK_NOT_ENCRYPTED'])
})

test('what is not resumed in time is closed, and says so', async t => {
  const { mesh, device } = await start(t, { LEASE_GRACE_SECONDS: '1.5' })
  const lost = await breakable(t, mesh, device)
  const { connectionId: id } = await lost.ask('ada', 'payroll')
  lost.lose()
  const closed = await eventually('it is closed', async () => {
    const record = await recordOf(mesh, id)
    return record.status !== 'active' && record
  })
  t.like(closed, { status: 'closed', reasons: ['NOT_RESUMED'] })
  const [answer] = await authorizations(t, mesh, device).resume([id])
  t.deepEqual([answer?.allowed, codes(answer?.reasons ?? [])], [false, ['CONNECTION_NOT_HELD']])
  t.is(await metric(mesh, 'edgemesh_connections_suspended'), 0)
})

test("nobody resumes another device's connection, one that was closed, or one that never was", async t => {
  const { mesh, device } = await start(t)
  const other = await mesh.enroll({ device: { id: 'beta' } })
  await heartbeats(t, mesh, other).beat(healthy)
  const lost = await breakable(t, mesh, device)
  const [mine, closed] = [await lost.ask('ada', 'payroll'), await lost.ask('ada', 'payroll')]
  lost.send({ $case: 'close', value: { connectionIds: [closed.connectionId] } })
  await eventually('it is closed', () => wasClosed(mesh, closed.connectionId))
  lost.lose()
  await isWaiting(mesh, mine.connectionId)

  const ids = [mine.connectionId, '00000000-0000-4000-8000-000000000000', "'; drop table connections", '']
  for (const answer of await authorizations(t, mesh, other).resume(ids)) {
    t.deepEqual([answer.allowed, codes(answer.reasons)], [false, ['CONNECTION_NOT_HELD']])
  }
  t.like(await recordOf(mesh, mine.connectionId), { status: 'active', waits: true })
  const own = authorizations(t, mesh, device)
  const answers = await own.resume([closed.connectionId, mine.connectionId, mine.connectionId])
  t.deepEqual(
    answers.map(({ allowed }) => allowed),
    [false, true, true],
  )
})

test('ending the stream closes its connections for good', async t => {
  const { mesh, device } = await start(t)
  const access = authorizations(t, mesh, device)
  const { connectionId: id } = await access.ask('ada', 'payroll')
  access.end()
  await eventually('it is closed', () => wasClosed(mesh, id))
  const [answer] = await authorizations(t, mesh, device).resume([id])
  t.deepEqual(codes(answer?.reasons ?? []), ['CONNECTION_NOT_HELD'])
})

test('a connection moves to another instance before the first has noticed, which then has no part in it', async t => {
  const { mesh, device, heart } = await start(t)
  const second = await startSecondInstance(t, mesh)
  const halfOpen = authorizations(t, mesh, device)
  const { connectionId: id } = await halfOpen.ask('ada', 'payroll')

  const next = authorizations(t, second, device)
  t.true((await next.resume([id]))[0]?.allowed)
  await eventually('the first has let go', async () => (await metric(mesh, 'edgemesh_connections_active')) === 0)
  halfOpen.end()
  t.is(await halfOpen.ended, undefined)
  t.deepEqual(halfOpen.revoked, [])
  t.like(await recordOf(mesh, id), { status: 'active', waits: false, instance: second.server.instanceId })

  await heart.beat({ diskEncrypted: false })
  t.deepEqual(codes((await next.revocationOf(id)).reasons), ['DISK_NOT_ENCRYPTED'])
  await eventually('it is on record', async () => (await recordOf(mesh, id)).status === 'revoked')
  t.deepEqual(halfOpen.revoked, [])
})

test('of streams that resume the same connection at the same time at two instances exactly one ends up with it', async t => {
  const { mesh, device, heart } = await start(t)
  const second = await startSecondInstance(t, mesh)
  const meshes = [mesh, second]
  for (let round = 0; round < 8; round++) {
    const lost = await breakable(t, mesh, device)
    const { connectionId: id } = await lost.ask('ada', 'payroll')
    lost.lose()
    const streams = await Promise.all([...meshes, ...meshes].map(at => breakable(t, at, device)))
    const answers = await Promise.all(streams.map(stream => stream.resume([id])))
    t.true(answers.some(([answer]) => answer?.allowed))
    await eventually('one has it', async () => {
      const active = await Promise.all(meshes.map(at => metric(at, 'edgemesh_connections_active')))
      return active.reduce((sum, count) => sum + count, 0) === 1
    })
    await heart.beat({ diskEncrypted: false })
    await eventually('one is told', () => streams.some(({ revoked }) => revoked.length > 0))
    await eventually('it is on record', async () => (await recordOf(mesh, id)).status === 'revoked')
    t.is(streams.flatMap(({ revoked }) => revoked).length, 1, `round ${round}`)
    await heart.beat({ diskEncrypted: true })
    for (const stream of streams) stream.lose()
    for (const at of meshes) {
      t.is(await metric(at, 'edgemesh_connections_active'), 0)
      t.is(await metric(at, 'edgemesh_connections_suspended'), 0)
    }
  }
})

test('a rolling update takes nothing back: what one instance held lives on at another', async t => {
  const { mesh, device, heart } = await start(t, { DRAIN_SECONDS: '10' })
  const second = await startSecondInstance(t, mesh)
  const access = authorizations(t, mesh, device)
  const ids = []
  for (let count = 0; count < 5; count++) ids.push((await access.ask('ada', 'payroll')).connectionId)

  const stopped = mesh.server.stop()
  await eventually('the device is asked to leave', () =>
    heart.responses.some(({ directives }) => directives.some(({ kind }) => kind?.$case === 'reconnect')),
  )
  // Nothing is cut: the old streams live until the new ones are there.
  const nextHeart = heartbeats(t, second, device)
  await nextHeart.beat(healthy)
  const next = authorizations(t, second, device)
  const answers = await next.resume(ids)
  t.deepEqual(
    answers.map(({ allowed, connectionId }) => [allowed, connectionId]),
    ids.map(id => [true, id]),
  )
  access.end()
  heart.end()
  t.is(await access.ended, undefined)
  t.is(await heart.ended, undefined)
  await stopped
  t.deepEqual(access.revoked, [])
  for (const id of ids) {
    t.like(await recordOf(mesh, id), { status: 'active', waits: false, instance: second.server.instanceId })
  }

  await nextHeart.beat({ diskEncrypted: false })
  for (const id of ids) t.deepEqual(codes((await next.revocationOf(id)).reasons), ['DISK_NOT_ENCRYPTED'])
})

test('a device that did not leave in time resumes what waits after the instance is gone', async t => {
  const { mesh, device } = await start(t)
  const second = await startSecondInstance(t, mesh)
  const access = authorizations(t, mesh, device)
  const { connectionId: id } = await access.ask('ada', 'payroll')
  await mesh.server.stop()
  t.like(await access.ended, { code: 'UNAVAILABLE', reason: 'DRAINING' })
  t.like(await recordOf(mesh, id), { status: 'active', waits: true })

  const next = authorizations(t, second, device)
  t.true((await next.resume([id]))[0]?.allowed)
  t.like(await recordOf(mesh, id), { status: 'active', waits: false, instance: second.server.instanceId })
})

test('after kill -9 of its instance a device resumes at another, and nothing of it was lost', async t => {
  const { url, pool } = await testDatabase(t)
  const environment = { ...testEnvironment, DATABASE_URL: url }
  const killed = await serve(t, { ...environment, INSTANCE_ID: 'killed' })
  const mesh = await startEdgeMesh(t, { DATABASE_URL: url })
  const { admin } = mesh
  await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: 'finance', roles: [] })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const there = { clients: (who: Credentials) => clientsOf(t, killed.address, who) }
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, there, device)
  const { connectionId: id } = await access.ask('ada', 'payroll')
  await killed.kill()
  await access.ended
  t.is((await recordOf({ pool }, id)).status, 'none', 'its decision is all that is left of it')

  const next = authorizations(t, mesh, device)
  t.true((await next.resume([id]))[0]?.allowed)
  t.like(await recordOf({ pool }, id), { status: 'active', instance: mesh.server.instanceId })
  await heart.beat({ diskEncrypted: false })
  t.deepEqual(codes((await next.revocationOf(id)).reasons), ['DISK_NOT_ENCRYPTED'])
})

test('what a process left under its name waits once another has started under it', async t => {
  const { mesh, device } = await start(t)
  const second = await startSecondInstance(t, mesh, { INSTANCE_ID: 'pod-0' })
  const { connectionId: id } = await authorizations(t, second, device).ask('ada', 'payroll')
  await hasRow(mesh, id)
  // As if it had been killed.
  await mesh.pool.query("insert into instances (id, started_at, seen_at) values ('pod-1', now(), now())")
  await mesh.pool.query("update connections set instance_id = 'pod-1' where id = $1", [id])
  const again = await startSecondInstance(t, mesh, { INSTANCE_ID: 'pod-1' })
  t.like(await recordOf(mesh, id), { status: 'active', waits: true })
  t.true((await authorizations(t, again, device).resume([id]))[0]?.allowed)
})

test('nothing is taken over from an instance of the version before, which would end it on record', async t => {
  const { mesh, device } = await start(t)
  const second = await startSecondInstance(t, mesh)
  const { connectionId: id } = await authorizations(t, mesh, device).ask('ada', 'payroll')
  await hasRow(mesh, id)
  await mesh.pool.query("insert into instances (id, started_at, seen_at) values ('old', now(), now())")
  await mesh.pool.query("update connections set instance_id = 'old' where id = $1", [id])
  const [answer] = await authorizations(t, second, device).resume([id])
  t.deepEqual(codes(answer?.reasons ?? []), ['CONNECTION_NOT_HELD'])
  t.like(await recordOf(mesh, id), { status: 'active', instance: 'old' })
})

test('while policy can not be had nothing is resumed and nothing is lost: it goes on waiting', async t => {
  const opa = createServer((_, response) => response.writeHead(503).end())
  t.teardown(() => opa.close())
  await once(opa.listen(0, '127.0.0.1'), 'listening')
  const { mesh, device } = await start(t)
  const lost = await breakable(t, mesh, device)
  const { connectionId: id } = await lost.ask('ada', 'payroll')
  lost.lose()
  await isWaiting(mesh, id)
  const { port } = opa.address() as AddressInfo
  const blind = await startSecondInstance(t, mesh, { OPA_URL: `http://127.0.0.1:${port}` })
  const [undecided] = await authorizations(t, blind, device).resume([id])
  t.like(undecided, { allowed: false, connectionId: id })
  t.truthy(undecided?.retryAfter)
  t.deepEqual(codes(undecided?.reasons ?? []), ['POLICY_UNAVAILABLE'])
  await authorizations(t, blind, device).ask('ada', 'payroll')
  const counted = await (await fetch(`http://127.0.0.1:${blind.server.metricsPort}/metrics`)).text()
  t.regex(counted, /^edgemesh_authorization_undecided_total\{reason="POLICY_UNAVAILABLE"\} 1$/m, 'an operator sees it')
  await eventually('it waits there', async () => {
    const { waits, instance } = await recordOf(mesh, id)
    return waits && instance === blind.server.instanceId
  })
  t.true((await authorizations(t, mesh, device).resume([id]))[0]?.allowed)
  t.like(await recordOf(mesh, id), { status: 'active', waits: false, instance: mesh.server.instanceId })
})
