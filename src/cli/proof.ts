/**
 * The proof that `edgemesh dev` gives of itself: one simulated device lives through everything that EdgeMesh promises,
 * over real TLS and with nothing but the public interfaces.
 */
import { generateKeyPairSync } from 'node:crypto'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'
import { type ConnectionRevoked, check, openAuthorizations } from '../client/authorize-stream.ts'
import type { Credentials } from '../client/channel.ts'
import { enrollDevice } from '../client/enroll.ts'
import { openHeartbeats } from '../client/heartbeat-stream.ts'
import { ServiceStatus, UserStatus } from '../gen/edgemesh/v1/admin.ts'
import { DeviceStatus, DeviceType, type Reason } from '../gen/edgemesh/v1/types.ts'
import { ownerOnly, readIfThere, writeOnce } from '../whole-file.ts'
import { type AdminClient, openAdminClient } from './admin-client.ts'
import { CommandFailure } from './failure.ts'

export type Proven<T> = {
  value: T
  /** For programs. */
  detail: Record<string, unknown>
  /** For people. */
  said: string
}

/** Runs one step and tells how it went. A step that fails ends the proof. */
export type Step = <T>(name: ProofStep, work: () => Promise<Proven<T>>) => Promise<T>

const proofSteps = ['token', 'enroll', 'heartbeat', 'allow', 'posture', 'revoked', 'deny', 'metrics'] as const
export type ProofStep = (typeof proofSteps)[number]

export const demo = { device: 'demo-laptop', user: 'demo', service: 'demo-database' } as const

const question = { user: demo.user, service: demo.service, action: 'connect' }

const goodPosture = {
  cpuPercent: 12,
  memoryPercent: 48,
  diskPercent: 61,
  patchesCurrent: true,
  antivirusEnabled: true,
  diskEncrypted: true,
  firewallEnabled: true,
}

/** Guaranteed is one second; whatever takes longer than this is broken and not slow. */
const revocationMsMax = 10_000
const metricsMsMax = 5_000
const tokenLifetimeSeconds = 600

/** @throws what the step that failed has thrown */
export async function prove(
  target: { server: string; metricsUrl: string; operator: Credentials; dataDir: string },
  step: Step,
): Promise<void> {
  const { server } = target
  const admin = openAdminClient(server, target.operator)
  const revocations = Promise.withResolvers<ConnectionRevoked>()
  const streams: { close(): Promise<void> }[] = []
  try {
    const token = await step('token', async () => {
      await prepareDemo(admin)
      const { token, tokenText } = await admin.call('createEnrollmentToken', {
        usesMax: 1,
        lifetime: { seconds: tokenLifetimeSeconds, nanos: 0 },
        labels: { demo: 'true' },
        deviceType: DeviceType.LAPTOP,
        deviceId: demo.device,
        requiresApproval: false,
        reusable: false,
        deviceIdPattern: '',
        sourceNetworks: [],
      })
      const detail = { id: token?.id, user: demo.user, service: demo.service }
      return { value: tokenText, detail, said: `the operator has made a token for one device: ${token?.id}` }
    })

    const device = await step('enroll', async () => {
      const device = { id: demo.device, type: DeviceType.LAPTOP, os: process.platform, osVersion: '1.0' }
      const credentials = await enrollDevice({ server, token, device, keyPem: await deviceKey(target.dataDir) })
      const detail = { device: credentials.deviceId, spiffeId: credentials.spiffeId, notAfter: credentials.notAfter }
      return { value: credentials, detail, said: `the device is now ${credentials.spiffeId}` }
    })

    const heartbeats = openHeartbeats({ server, credentials: device })
    streams.push(heartbeats)
    await step('heartbeat', async () => {
      const { acknowledgedSequence, failingPosture } = await heartbeats.report(goodPosture)
      if (failingPosture.length > 0) throw new CommandFailure(`a good posture fails: ${failingPosture.join(', ')}`)
      return {
        value: undefined,
        detail: { acknowledgedSequence },
        said: 'it reports good health, which is now durable',
      }
    })

    const authorizations = openAuthorizations({ server, credentials: device, onRevoked: revocations.resolve })
    streams.push(authorizations)
    const connectionId = await step('allow', async () => {
      const [answer] = await authorizations.ask([question])
      if (!answer?.allowed) throw new CommandFailure(`the connection is denied: ${sentence(answer?.reasons ?? [])}`)
      const { connectionId, decisionId, policyRevision } = answer
      const detail = { connectionId, decisionId, policyRevision }
      return { value: connectionId, detail, said: `${demo.user} may connect to ${demo.service}: ${connectionId}` }
    })

    await step('posture', async () => {
      const { acknowledgedSequence, failingPosture } = await heartbeats.report({ diskEncrypted: false })
      if (failingPosture.length === 0) throw new CommandFailure('a disk without encryption counts as healthy')
      const detail = { acknowledgedSequence, failingPosture }
      return { value: undefined, detail, said: 'its disk is no longer encrypted' }
    })

    const revokedCodes = await step('revoked', async () => {
      const revoked = await within(revocationMsMax, revocations.promise, 'the connection was not revoked')
      if (revoked.connectionId !== connectionId)
        throw new CommandFailure(`another was revoked: ${revoked.connectionId}`)
      if (revoked.reasons.length === 0) throw new CommandFailure('the connection was revoked without a reason')
      const reasons = codes(revoked.reasons)
      return {
        value: reasons,
        detail: { connectionId, reasons },
        said: `the server took it back: ${sentence(revoked.reasons)}`,
      }
    })

    await step('deny', async () => {
      const answer = await check({ server, credentials: device, question })
      const reasons = codes(answer.reasons)
      if (answer.allowed) throw new CommandFailure('the device may connect again, although its disk is not encrypted')
      if (reasons.join() !== revokedCodes.join()) {
        throw new CommandFailure(`denied for other reasons than revoked: ${reasons.join(', ')}`)
      }
      const detail = { decisionId: answer.decisionId, reasons }
      return { value: undefined, detail, said: `asked anew, the answer is no: ${reasons.join(', ')}` }
    })

    await step('metrics', async () => {
      const response = await fetch(target.metricsUrl, { signal: AbortSignal.timeout(metricsMsMax) })
      const text = await response.text()
      const detail = {
        enrollments: sum(text, 'edgemesh_device_enrollments_total'),
        allowed: sum(text, 'edgemesh_authorization_decisions_total', 'decision="allow"'),
        denied: sum(text, 'edgemesh_authorization_decisions_total', 'decision="deny"'),
      }
      const absent = Object.entries(detail).filter(([, count]) => count === 0)
      if (absent.length > 0)
        throw new CommandFailure(`/metrics does not count ${absent.map(([name]) => name).join(', ')}`)
      return { value: undefined, detail, said: 'all of it is counted for Prometheus' }
    })
  } finally {
    await Promise.all(streams.map(stream => stream.close()))
    admin.close()
  }
}

/** Whoever has played with the demo between two starts finds it whole again. */
async function prepareDemo(admin: AdminClient): Promise<void> {
  const user = await ifThere(admin.call('getUser', { id: demo.user }))
  if (!user) {
    const email = `${demo.user}@example.com`
    // Administrators are not bound to business hours, so the proof holds at night too.
    await admin.call('createUser', { id: demo.user, email, name: 'Demo user', role: 'admin' })
  } else if (user.user?.status !== UserStatus.ACTIVE || user.user.role !== 'admin') {
    await admin.call('updateUser', { id: demo.user, name: undefined, role: 'admin', status: UserStatus.ACTIVE })
  }

  const service = await ifThere(admin.call('getService', { id: demo.service }))
  if (!service) {
    const name = 'Demo database'
    await admin.call('createService', { id: demo.service, name, labels: {}, owner: 'demo', roles: ['admin'] })
  } else if (service.service?.status !== ServiceStatus.ACTIVE) {
    const status = ServiceStatus.ACTIVE
    await admin.call('updateService', { id: demo.service, name: undefined, owner: undefined, status })
  }

  const device = await ifThere(admin.call('getDevice', { id: demo.device }))
  if (device?.device?.status === DeviceStatus.QUARANTINED) await admin.call('releaseDevice', { id: demo.device })
  if (device?.device?.status === DeviceStatus.REVOKED) await admin.call('deleteDevice', { id: demo.device })
}

/** `undefined` where the answer is NOT_FOUND. */
async function ifThere<T>(answer: Promise<T>): Promise<T | undefined> {
  return answer.catch(error => {
    if ((error as { code?: unknown }).code === status.NOT_FOUND) return undefined
    throw error
  })
}

/** The demo device's key stays the same, so that every start enrolls the same device again. */
async function deviceKey(dataDir: string): Promise<string> {
  const path = join(dataDir, 'demo-device', 'device.key')
  const kept = await readIfThere(path)
  if (kept) return kept
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  return writeOnce(path, privateKey.export({ format: 'pem', type: 'pkcs8' }), ownerOnly)
}

async function within<T>(ms: number, promise: Promise<T>, failure: string): Promise<T> {
  const timer = new AbortController()
  const timeout = sleep(ms, undefined, { signal: timer.signal }).then(() => {
    throw new CommandFailure(`${failure} within ${ms / 1_000} s`)
  })
  try {
    return await Promise.race([promise, timeout])
  } finally {
    timeout.catch(() => {}) // cancelled: the promise has won
    timer.abort()
  }
}

/** Each code once, in an order of its own, so that two answers can be compared. */
function codes(reasons: readonly Reason[]): string[] {
  return [...new Set(reasons.map(reason => reason.code))].sort()
}

function sentence(reasons: readonly Reason[]): string {
  return reasons.map(reason => reason.message || reason.code).join(' ')
}

/** The sum over all series of a metric, in the text format of Prometheus, that carry the label. */
function sum(text: string, metric: string, label = ''): number {
  return text
    .split('\n')
    .filter(line => (line.startsWith(`${metric} `) || line.startsWith(`${metric}{`)) && line.includes(label))
    .reduce((total, line) => total + Number(/^(?:\{.*\})? (\S+)/.exec(line.slice(metric.length))?.[1]), 0)
}
