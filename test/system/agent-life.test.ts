/** The agent through the life of its identity, on the real service: let in, away for too long, thrown out. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import { describeCallError } from '../../src/agent/channel.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { loadState, saveState } from '../../src/agent/state.ts'
import { systemTimer, type Timer } from '../../src/agent/waiting.ts'
import { DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { specialLeaves } from '../support/authority.ts'
import {
  type EdgeMesh,
  eventually,
  healthy,
  shared,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'

const instances = shared(test, async file => {
  const env = { HEARTBEAT_INTERVAL_SECONDS: '1' }
  const lenient = await startEdgeMesh(file, env)
  return { lenient, strict: await startSecondInstance(file, lenient, { ...env, CERT_RECOVERY: 'approval' }) }
})

/** What is left of a wait, whatever the server asks for. */
const waitMsMax = 200

/** Time that passes faster where somebody waits for long. */
function hastyTimer(): Timer {
  let skippedMs = 0
  return {
    uptime: () => systemTimer.uptime() + skippedMs,
    async sleep(ms, signal) {
      const waitedMs = Math.min(ms, waitMsMax)
      await systemTimer.sleep(waitedMs, signal)
      if (!signal.aborted) skippedMs += ms - waitedMs
    },
  }
}

async function stateFolder(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-agent-life-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  return folder
}

function startAgent(t: ExecutionContext, mesh: EdgeMesh, id: string, stateDirectory: string, token = '') {
  const events: AgentEvent[] = []
  const stopping = new AbortController()
  const done = runAgent({
    server: `127.0.0.1:${mesh.server.apiPort}`,
    stateDirectory,
    token,
    device: { id },
    posture: async () => healthy,
    log: event => void events.push(event),
    signal: stopping.signal,
    timer: hastyTimer(),
  })
  done.catch(() => {})
  t.teardown(async () => {
    stopping.abort()
    await Promise.allSettled([done])
  })
  return {
    done,
    stop: () => stopping.abort(),
    heard: (name: AgentEvent['event']) => eventually(name, () => events.find(({ event }) => event === name)),
    count: (name: AgentEvent['event']) => events.filter(({ event }) => event === name).length,
  }
}

/** A device that has been away until its certificate expired: what its agent has kept. */
async function away(t: ExecutionContext, id: string): Promise<string> {
  const { lenient } = instances()
  const folder = await stateFolder(t)
  const before = startAgent(t, lenient, id, folder, await lenient.token())
  await before.heard('reported')
  before.stop()
  await before.done
  const issue = await specialLeaves(lenient)
  const spiffeId = `spiffe://edgemesh.local/device/${id}`
  const leaf = await issue({ spiffeId, recordedFor: id, validFromMs: -50 * 60_000, validForMs: -60_000 })
  const kept = (await loadState(folder))!
  const { keyPem, certificatePem: certificateChainPem } = leaf
  await saveState(folder, { ...kept, keyPem, certificateChainPem, notAfter: new Date(Date.now() - 60_000) })
  return folder
}

const statusOf = async (id: string) => (await unary(instances().lenient.admin, 'getDevice', { id })).device?.status

test('an agent that was away too long comes back quarantined, and goes on when an operator releases it', async t => {
  const { lenient } = instances()
  const folder = await away(t, 'sailor')
  const agent = startAgent(t, lenient, 'sailor', folder)
  await agent.heard('quarantined')
  t.is(await statusOf('sailor'), DeviceStatus.QUARANTINED)
  await unary(lenient.admin, 'releaseDevice', { id: 'sailor' })
  await agent.heard('released')
  t.true((await loadState(folder))!.notAfter.getTime() > Date.now(), 'with a certificate that it has kept')
  agent.stop()
  await agent.done
})

test('where an operator has to approve, the agent waits, and is in when one has', async t => {
  const { lenient, strict } = instances()
  const folder = await away(t, 'hermit')
  const agent = startAgent(t, strict, 'hermit', folder)
  await agent.heard('recovery-pending')
  t.is(await statusOf('hermit'), DeviceStatus.PENDING)
  await unary(lenient.admin, 'approveDevice', { id: 'hermit' })
  await agent.heard('reported')
  t.is(await statusOf('hermit'), DeviceStatus.ACTIVE)
})

test('an agent whose token takes an approval waits for it, once said, and reports then', async t => {
  const { lenient, strict } = instances()
  const token = await lenient.token({ requiresApproval: true })
  const agent = startAgent(t, strict, 'guest', await stateFolder(t), token)
  await agent.heard('pending-approval')
  await unary(lenient.admin, 'approveDevice', { id: 'guest' })
  await agent.heard('reported')
  t.is(agent.count('pending-approval'), 1)
})

for (const [what, method, reason] of [
  ['revoked', 'revokeDevice', 'DEVICE_REVOKED'],
  ['deleted', 'deleteDevice', 'DEVICE_DELETED'],
] as const) {
  test(`an agent whose device is ${what} ends, and says why`, async t => {
    const { lenient } = instances()
    const agent = startAgent(t, lenient, what, await stateFolder(t), await lenient.token())
    await agent.heard('reported')
    await unary(lenient.admin, method, { id: what, reason: 'left on a train' })
    const failure = await t.throwsAsync(agent.done)
    t.is(describeCallError(failure).reason, reason)
  })
}
