/** The agent's whole life against real servers: approval, a certificate that has expired, deletion, another token. */
import { X509Certificate } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as wait } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import { type AgentOptions, runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { describeCallError } from '../../src/client/channel.ts'
import { createKey } from '../../src/client/csr.ts'
import { loadState, saveState } from '../../src/client/state.ts'
import { AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import { DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { specialLeaves } from '../support/authority.ts'
import {
  type EdgeMesh,
  eventually,
  freshCsr,
  shared,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { noTokenRequest } from '../support/token-request.ts'

const minuteMs = 60_000

/** On one database; they differ in what they do with a device that comes back. */
const instances = shared(test, async file => {
  const often = { HEARTBEAT_INTERVAL_SECONDS: '1' }
  const mesh = await startEdgeMesh(file, often)
  return { mesh, strict: await startSecondInstance(file, mesh, { ...often, CERT_RECOVERY: 'approval' }) }
})
const mesh = () => instances().mesh

async function folder(t: ExecutionContext): Promise<string> {
  const parent = await mkdtemp(join(tmpdir(), 'edgemesh-agent-life-'))
  t.teardown(() => rm(parent, { recursive: true }))
  return join(parent, 'state')
}

/** An agent that waits for a moment only, however long it has to. */
function start(
  t: ExecutionContext,
  at: EdgeMesh,
  id: string,
  options: Pick<AgentOptions, 'stateDirectory'> & Partial<AgentOptions>,
) {
  const events: AgentEvent[] = []
  const stopping = new AbortController()
  let passedMs = 0
  const done = runAgent({
    server: `127.0.0.1:${at.server.apiPort}`,
    device: { id },
    posture: async () => healthy,
    log: event => events.push(event),
    signal: stopping.signal,
    timer: {
      uptime: () => passedMs,
      async sleep(ms, signal) {
        await wait(Math.min(ms, 100), undefined, { signal }).catch(() => undefined)
        if (!signal.aborted) passedMs += ms
      },
    },
    ...options,
  })
  done.catch(() => {}) // whoever waits for it is told
  t.teardown(async () => {
    stopping.abort()
    await done.catch(() => {})
  })
  const told = (name: AgentEvent['event']) => events.filter(({ event }) => event === name).length
  const stop = () => {
    stopping.abort()
    return done
  }
  return { done, told, stop, events }
}

/** A device whose agent was off until its certificate had expired. @returns the folder of its agent */
async function away(t: ExecutionContext, id: string): Promise<string> {
  const stateDirectory = await folder(t)
  const before = start(t, mesh(), id, { stateDirectory, token: await mesh().token() })
  await eventually('its first report', () => before.told('reported') >= 1)
  await before.stop()
  const kept = await loadState(stateDirectory)
  if (!kept) throw new Error('nothing was kept')
  // As if its one certificate were older.
  await mesh().pool.query(`delete from certificates where subject_id = $1`, [id])
  const issue = await specialLeaves(mesh())
  const dates = { validFromMs: -50 * minuteMs, validForMs: -minuteMs }
  const expired = await issue({ spiffeId: kept.spiffeId, recordedFor: id, ...dates })
  await saveState(stateDirectory, { ...kept, keyPem: expired.keyPem, certificateChainPem: expired.certificatePem })
  return stateDirectory
}

const statusOf = async (id: string) => (await unary(mesh().admin, 'getDevice', { id })).device?.status

test('an agent that was away comes back by itself, quarantined, until an operator releases it', async t => {
  const stateDirectory = await away(t, 'sleeper')
  const agent = start(t, mesh(), 'sleeper', { stateDirectory })
  await eventually('it is back', () => agent.told('reported') >= 1)
  t.deepEqual([agent.told('certificate-expired'), agent.told('recovered'), agent.told('quarantined')], [1, 1, 1])
  t.is(await statusOf('sleeper'), DeviceStatus.QUARANTINED)
  const kept = await loadState(stateDirectory)
  t.true(new X509Certificate(kept?.certificateChainPem ?? '').validToDate.getTime() > Date.now())

  await unary(mesh().admin, 'releaseDevice', { id: 'sleeper' })
  await eventually('it hears of it', () => agent.told('released') === 1)
  await agent.stop()
})

test('where approval is asked for, an agent that was away waits for it, and goes on then', async t => {
  const stateDirectory = await away(t, 'supplicant')
  const agent = start(t, instances().strict, 'supplicant', { stateDirectory })
  await eventually('it waits', () => agent.told('recovery-pending') === 1)
  await eventually('it is seen to wait', async () => (await statusOf('supplicant')) === DeviceStatus.PENDING)
  await unary(mesh().admin, 'approveDevice', { id: 'supplicant' })
  await eventually('it is back', () => agent.told('reported') >= 1)
  t.is(agent.told('recovery-pending'), 1)
  t.is(await statusOf('supplicant'), DeviceStatus.ACTIVE)
  await agent.stop()
})

test('an agent goes on waiting for approval when its instance dies, and is let in by the next', async t => {
  const second = await startSecondInstance(t, mesh())
  const stateDirectory = await folder(t)
  const token = await mesh().token({ requiresApproval: true })
  const agent = start(t, second, 'patient', { stateDirectory, token })
  await eventually('it waits', () => agent.told('pending-approval') === 1)
  await second.server.stop()
  await eventually('it has lost its instance', () => agent.told('disconnected') >= 1)
  await startSecondInstance(t, mesh(), { API_PORT: String(second.server.apiPort) })
  await unary(mesh().admin, 'approveDevice', { id: 'patient' })
  await eventually('it is in', () => agent.told('reported') >= 1)
  t.is(agent.told('pending-approval'), 1)
  await agent.stop()
})

test('an agent whose device is deleted ends, and comes back with another token only', async t => {
  const stateDirectory = await folder(t)
  const token = await mesh().token({ reusable: true })
  const agent = start(t, mesh(), 'fickle', { stateDirectory, token })
  await eventually('its first report', () => agent.told('reported') >= 1)
  await unary(mesh().admin, 'deleteDevice', { id: 'fickle' })
  t.is(describeCallError(await t.throwsAsync(agent.done)).reason, 'DEVICE_DELETED')

  const again = start(t, mesh(), 'fickle', { stateDirectory, token })
  t.is(describeCallError(await t.throwsAsync(again.done)).reason, 'DEVICE_DELETED')

  const back = start(t, mesh(), 'fickle', { stateDirectory, token: await mesh().token() })
  await eventually('it is back', () => back.told('reported') >= 1)
  t.deepEqual([back.told('identity-lost'), back.told('enrolled')], [1, 1])
  t.is(await statusOf('fickle'), DeviceStatus.ACTIVE)
  await back.stop()
})

test('agents that were off while the authority was replaced are told so, and come back with another token', async t => {
  const own = await startEdgeMesh(t, { HEARTBEAT_INTERVAL_SECONDS: '1' })
  const folders = { retiring: await folder(t), stable: await folder(t) }
  for (const [id, stateDirectory] of Object.entries(folders)) {
    const before = start(t, own, id, { stateDirectory, token: await own.token() })
    await eventually('its first report', () => before.told('reported') >= 1)
    await before.stop()
  }
  let { admin } = own
  const rotate = async (stage: Stage) => {
    await unary(admin, 'rotateAuthority', { stage, force: true })
    await eventually('stage', async () => (await unary(admin, 'getAuthority', {})).rotationStage === stage)
  }
  await rotate(Stage.PUBLISHED)
  // This one hears of the new root, and is off when it would have to renew.
  const hearing = start(t, own, 'stable', { stateDirectory: folders.stable })
  await eventually('it has the new root', () => hearing.told('trust-bundle-changed') === 1)
  await hearing.stop()
  await rotate(Stage.ISSUING)
  const keyPem = createKey()
  const { enroll } = own.clients(own.operator)
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
  const rootsPem = identity!.trustBundle!.rootsPem.join('')
  admin = own.clients({ rootsPem, certificatePem: identity!.certificateChainPem.join(''), keyPem }).admin
  const tokenOfNewer = async () => (await unary(admin, 'createEnrollmentToken', noTokenRequest)).tokenText

  /** @returns why it had lost its identity */
  async function comesBack(id: keyof typeof folders): Promise<string | undefined> {
    const agent = start(t, own, id, { stateDirectory: folders[id], token: await tokenOfNewer() })
    await eventually('it is back', () => agent.told('reported') >= 1)
    await agent.stop()
    const lost = agent.events.find(({ event }) => event === 'identity-lost')
    return lost?.event === 'identity-lost' ? lost.error.reason : undefined
  }

  // While there is a way back, the old authority is known as one that was ours; after that it is a stranger's.
  await rotate(Stage.RETIRING)
  const alone = start(t, own, 'retiring', { stateDirectory: folders.retiring })
  t.is(describeCallError(await t.throwsAsync(alone.done)).reason, 'CERTIFICATE_RETIRED')
  t.is(await comesBack('retiring'), 'CERTIFICATE_RETIRED')
  await rotate(Stage.STABLE)
  t.is(await comesBack('stable'), 'CERTIFICATE_UNTRUSTED')
})
