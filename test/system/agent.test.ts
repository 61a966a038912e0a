import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { type AgentOptions, runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { describeCallError } from '../../src/client/channel.ts'
import { loadState } from '../../src/client/state.ts'
import { eventually, sharedEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const mesh = sharedEdgeMesh(test, { HEARTBEAT_INTERVAL_SECONDS: '1' })

async function folder(t: ExecutionContext): Promise<string> {
  const parent = await mkdtemp(join(tmpdir(), 'edgemesh-real-agent-'))
  t.teardown(() => rm(parent, { recursive: true }))
  return join(parent, 'state')
}

/** The agent as `edgemesh agent` runs it, but for the posture. */
function start(t: ExecutionContext, options: Pick<AgentOptions, 'stateDirectory'> & Partial<AgentOptions>) {
  const events: AgentEvent[] = []
  const stopping = new AbortController()
  const done = runAgent({
    server: `127.0.0.1:${mesh().server.apiPort}`,
    device: { id: 'alpha' },
    posture: async () => healthy,
    log: event => events.push(event),
    signal: stopping.signal,
    ...options,
  })
  done.catch(() => {}) // whoever waits for it is told
  t.teardown(async () => {
    stopping.abort()
    await done.catch(() => {})
  })
  const told = (name: AgentEvent['event']) => events.filter(({ event }) => event === name).length
  return { done, told, stop: () => stopping.abort() }
}

test('an agent enrolls, reports, renews, and is not missed for a moment', async t => {
  const stateDirectory = await folder(t)
  const first = start(t, { stateDirectory, token: await mesh().token() })
  await eventually('its first report', () => first.told('reported') >= 1)
  first.stop()
  await first.done
  const before = await loadState(stateDirectory)

  // Two thirds of a certificate's life go by.
  const path = join(stateDirectory, 'identity.json')
  const identity = JSON.parse(await readFile(path, 'utf8'))
  await writeFile(path, JSON.stringify({ ...identity, renewAfter: new Date(0) }))

  const agent = start(t, { stateDirectory })
  await eventually('a report on the new stream', () => agent.told('renewed') === 1 && agent.told('reported') >= 3)
  t.deepEqual([agent.told('connecting'), agent.told('disconnected'), agent.told('reconnection-failed')], [2, 0, 0])
  const after = await loadState(stateDirectory)
  t.not(after?.keyPem, before?.keyPem)

  const { device } = await unary(mesh().admin, 'getDevice', { id: 'alpha' })
  t.is(device?.certificates.filter(({ revokedAt }) => revokedAt === undefined).length, 2)

  // And out.
  await unary(mesh().admin, 'revokeDevice', { id: 'alpha', reason: 'left on a train' })
  t.is(describeCallError(await t.throwsAsync(agent.done)).reason, 'DEVICE_REVOKED')
})
