/** The agent and what it holds, while instances come and go. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { type EndedConnection, keepAuthorizations } from '../../src/client/authorizations.ts'
import { loadState } from '../../src/client/state.ts'
import { type EdgeMesh, eventually, startEdgeMesh, startSecondInstance, unary, wasClosed } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { link } from '../support/relay.ts'

const question = { user: 'ada', service: 'payroll' }

/** An agent that reaches the server by a way that can break and lead elsewhere, and what it holds. */
async function start(t: ExecutionContext, env: Record<string, string> = {}) {
  const mesh = await startEdgeMesh(t, { HEARTBEAT_INTERVAL_SECONDS: '1', ...env })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: 'finance', roles: [] })
  const way = await link(t, mesh.server.apiPort)
  const server = `127.0.0.1:${way.port}`
  const parent = await mkdtemp(join(tmpdir(), 'edgemesh-agent-moves-'))
  t.teardown(() => rm(parent, { recursive: true }))
  const stateDirectory = join(parent, 'state')
  const events: AgentEvent[] = []
  const ended: EndedConnection[] = []
  const posture = { ...healthy }
  let authorizations: ReturnType<typeof keepAuthorizations> | undefined
  const stopping = new AbortController()
  const done = runAgent({
    server,
    stateDirectory,
    token: await mesh.token(),
    device: { id: 'alpha' },
    posture: async () => posture,
    log: event => events.push(event),
    signal: stopping.signal,
    connected: async target => authorizations?.moveTo(target),
  })
  done.catch(() => {})
  const told = (name: AgentEvent['event']) => events.filter(({ event }) => event === name).length
  await eventually('the first report', () => told('reported') > 0)
  const credentials = await loadState(stateDirectory)
  if (!credentials) throw new Error('it has enrolled')
  authorizations = keepAuthorizations({ server, credentials, onEnded: end => void ended.push(end) })
  const kept = authorizations
  t.teardown(async () => {
    await kept.close()
    stopping.abort()
    await done.catch(() => {})
  })
  return { mesh, way, posture, ended, told, authorizations, target: { server, credentials } }
}

async function held(mesh: EdgeMesh) {
  const { rows } = await mesh.pool.query(
    'select id, status, resume_by is not null as waits, instance_id as instance from connections order by id',
  )
  return rows
}

const codes = (ended: EndedConnection[]) => ended.map(({ reasons }) => reasons.map(({ code }) => code).join())

test('while an instance is replaced an agent keeps all that it holds, and loses it when its ground goes', async t => {
  const { mesh, way, posture, ended, told, authorizations } = await start(t, { DRAIN_SECONDS: '8' })
  const answers = await authorizations.ask([question, question, question])
  t.true(answers.every(({ allowed }) => allowed))
  const ids = answers.map(({ connectionId }) => connectionId).sort()
  const second = await startSecondInstance(t, mesh, { HEARTBEAT_INTERVAL_SECONDS: '1' })
  way.leadTo(second.server.apiPort)
  await mesh.server.stop()
  t.is(told('disconnected'), 0, 'no stream was cut')
  t.deepEqual(authorizations.held().sort(), ids)
  t.deepEqual(ended, [])
  t.deepEqual(
    await held(mesh),
    ids.map(id => ({ id, status: 'active', waits: false, instance: second.server.instanceId })),
  )

  Object.assign(posture, { diskEncrypted: false })
  await eventually('all have ended', () => ended.length === 3)
  t.deepEqual(codes(ended), Array(3).fill('DISK_NOT_ENCRYPTED'))
  t.deepEqual(authorizations.held(), [])
  const text = await (await fetch(`http://127.0.0.1:${second.server.metricsPort}/metrics`)).text()
  t.true(text.includes('edgemesh_revocation_push_seconds_count 3'), text)
  await eventually('it has acknowledged', async () => {
    const text = await (await fetch(`http://127.0.0.1:${second.server.metricsPort}/metrics`)).text()
    return text.includes('edgemesh_revocation_acknowledged_seconds_count 3')
  })
})

test('what is being asked while an agent moves is moved along, and is taken back when its ground goes', async t => {
  const { mesh, posture, ended, authorizations, target } = await start(t)
  const answers = await authorizations.ask([question])
  for (let round = 0; round < 3; round++) {
    const inFlight = authorizations.ask([question])
    await authorizations.moveTo(target)
    answers.push(...(await inFlight))
  }
  t.true(answers.every(({ allowed }) => allowed))
  t.is(authorizations.held().length, 4)
  for (const { connectionId } of answers) t.false(await wasClosed(mesh, connectionId))
  Object.assign(posture, { diskEncrypted: false })
  await eventually('all have ended', () => ended.length === 4)
  t.deepEqual(codes(ended), Array(4).fill('DISK_NOT_ENCRYPTED'))
})

test('connections outlive a network that breaks, and what was taken back meanwhile is told', async t => {
  const { mesh, way, ended, authorizations } = await start(t)
  const [first, second] = await authorizations.ask([question, question])
  for (let round = 0; round < 3; round++) {
    way.cut()
    await eventually('the stream is back', async () => (await held(mesh)).every(({ waits }) => !waits))
    const [answer] = await authorizations.ask([question]).catch(() => [undefined])
    if (answer) t.true(answer.allowed)
  }
  t.deepEqual(ended, [])
  way.leadTo(1)
  way.cut()
  await eventually('they wait', async () => (await held(mesh)).every(({ waits }) => waits))
  await unary(mesh.admin, 'closeConnection', { id: first?.connectionId, reason: 'maintenance' })
  way.leadTo(mesh.server.apiPort)
  await eventually('it is told', () => ended.length > 0)
  t.deepEqual([ended[0]?.connectionId, codes(ended)], [first?.connectionId, ['CLOSED_BY_OPERATOR']])
  t.true(authorizations.held().includes(second?.connectionId ?? ''))
})

test('who can not come back in time is told that everything has ended', async t => {
  const { way, ended, authorizations } = await start(t, { LEASE_GRACE_SECONDS: '1' })
  const [answer] = await authorizations.ask([question])
  way.leadTo(1)
  way.cut()
  await eventually('it has ended', () => ended.length > 0)
  t.is(ended[0]?.connectionId, answer?.connectionId)
  t.deepEqual(codes(ended), ['NOT_RESUMED'])
})
