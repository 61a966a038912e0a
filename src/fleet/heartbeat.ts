/**
 * Heartbeat: one stream a device, on which it says how it is and hears what to do.
 *
 * A message's life: identity of the connection → limit → merge into what the stream has said before → durable, together
 * with hundreds of others → acknowledged, with the next interval and what the device should do. If what policy can see
 * of the device has changed, every instance hears of it with the commit, and its connections are decided anew.
 *
 * A device with a wrong clock is as good as any other: its clock gives the age of what it measured, and how wrong it is.
 */
import type { Call, Identified } from '../caller.ts'
import { type Clock, clockOffsetMs } from '../clock.ts'
import { isDatabaseOutage, untilAvailable } from '../db/failure.ts'
import { durationOf } from '../duration.ts'
import { invalidField } from '../fault.ts'
import type { Directive, HeartbeatRequest, HeartbeatResponse } from '../gen/edgemesh/v1/heartbeat.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import type { MessageStream } from '../message-stream.ts'
import {
  checkPosture,
  failingPosture,
  measuredAtMs,
  mergePosture,
  type PostureRequirements,
  type PostureValues,
  postureGround,
} from './posture.ts'
import type { ReportWriter } from './report-writer.ts'

export type HeartbeatDeps = {
  writer: ReportWriter
  requirements: () => Promise<PostureRequirements>
  /** `undefined`: there is no such device any more. */
  deviceStatus: (deviceId: string) => Promise<DeviceStatus | undefined>
  policyRevision: () => string
  /** Whose certificates are issued now, by key identifier, and the roots that are trusted. */
  issuerKeyId: () => string
  trustBundle: () => TrustBundle
  /** At once, or after a wait. @throws Fault RESOURCE_EXHAUSTED when the device reports too often, at all instances together */
  limit: (deviceId: string, reports: number) => void | Promise<void>
  intervalMs: number
  maxAgeMs: number
  /** Whether the certificate is so late in its life that the device has to be reminded. */
  isLateInLife: (certificate: Identified, nowMs: number) => boolean
  clock: Clock
  random: () => number
  /** The device has a stream here. @returns to be called when it has ended */
  present: (deviceId: string) => () => void
  onHeartbeat: () => void
}

export type DeviceStatus = { status: string; reason: string }

export type Heartbeats = {
  serve(stream: MessageStream<HeartbeatRequest, HeartbeatResponse>, call: Call): Promise<void>
  /** Asks every device, also those that come later, to open its stream elsewhere, spread over `spreadMs` so that they don't arrive at once. */
  askToReconnect(spreadMs: number): void
  /**
   * The authorities have changed: every device hears of the roots to trust now, and those whose certificates are another
   * authority's are asked to renew, spread so that renewals come at a pace that this instance keeps up with.
   */
  tellAuthorities(): Promise<void>
  /** Something of the device has changed: it is told now, not with its next report, if it was quarantined or released. */
  tell(deviceId: string): void
  /** The device is out, and the streams of this certificate of it are about to be cut. */
  tellRevoked(device: Identified, reason: string): void
}

const openConnectionIdsMax = 1_024
const trustBundleIdPattern = /^([0-9a-f]{64})?$/
/** Renewals that an instance takes on in a second, beside all else: each costs a millisecond or two. */
const renewalsPerSecond = 50
/** Streams told of something in one go; between two goes others get their turn. */
const toldAtOnceMax = 500

/**
 * Reports of one stream that wait to be on disk: the stream is not read beyond it, so that what waits is bounded by the
 * streams that there are, and a device whose reports take long sends fewer of them.
 */
const reportsUnderWayMax = 1
/** A report that is on disk within this time has not waited; at twice the time the interval is twice as long. */
const promptMs = 1_000
/** Of the age at which a report is stale, the longest interval: two may be lost before that. */
const longestShareOfAge = 1 / 3

/** Share of the interval by which it varies, to either side. */
const jitterShare = 0.15

type OpenStream = { stream: MessageStream<HeartbeatRequest, HeartbeatResponse>; caller: Identified; told: Told }

/**
 * What a stream has been told, so that it is told once. `changes` counts those of its device. `renewFor`: the issuer for
 * whom it has been asked to renew. `bundleId`: the newest trust bundle that it was sent.
 */
type Told = { revision: string; isQuarantined: boolean; changes: number; renewFor: string; bundleId: string }

/** What one stream has said so far. */
type Said = {
  sequence: number
  posture: PostureValues | undefined
  ground: string
  receivedAtMs: number
  trustBundleId: string
}

export function createHeartbeats(deps: HeartbeatDeps): Heartbeats {
  const streams = new Set<OpenStream>()
  /** Once devices have been asked to go: who comes yet is asked too. */
  let leavingMs: number | undefined
  const byDevice = new Map<string, Set<OpenStream>>()

  async function serve(stream: MessageStream<HeartbeatRequest, HeartbeatResponse>, call: Call): Promise<void> {
    const { caller } = call
    if (caller.kind !== 'device') throw new Error('the method is for devices only')
    const said: Said = { sequence: 0, posture: undefined, ground: '', receivedAtMs: 0, trustBundleId: '' }
    const told: Told = { revision: deps.policyRevision(), isQuarantined: false, changes: 0, renewFor: '', bundleId: '' }
    const open = { stream, caller, told }
    call.audit.target = `device/${caller.id}`
    streams.add(open)
    const ofDevice = byDevice.get(caller.id) ?? new Set()
    byDevice.set(caller.id, ofDevice.add(open))
    if (leavingMs !== undefined) askToLeave(open, leavingMs)
    const gone = deps.present(caller.id)
    try {
      await stream.receive(async request => {
        const wait = deps.limit(caller.id, 1)
        if (wait) await wait
        const receivedAtMs = deps.clock()
        let requirements: PostureRequirements
        try {
          requirements = await deps.requirements()
        } catch (error) {
          // As with reports that can't be written yet: the device waits, and its stream stays.
          if (!isDatabaseOutage(error)) throw error
          requirements = await untilAvailable(deps.requirements, call.signal)
        }
        const { posture, failing, announce } = merge(said, request, requirements, receivedAtMs)
        call.clockOffsetMs = clockOffsetMs(request.sentAt, receivedAtMs) ?? call.clockOffsetMs
        await deps.writer.write({
          deviceId: caller.id,
          sequence: request.sequence,
          posture,
          failing,
          measuredAtMs: request.posture ? measuredAtMs(request.posture, request.sentAt, receivedAtMs) : receivedAtMs,
          receivedAtMs,
          clockOffsetMs: call.clockOffsetMs,
          trustBundleId: said.trustBundleId,
          issuerKeyId: caller.issuerKeyId,
          announce,
        })
        deps.onHeartbeat()
        stream.send(await acknowledge(request, failing, open, receivedAtMs))
      }, reportsUnderWayMax)
    } finally {
      gone()
      streams.delete(open)
      ofDevice.delete(open)
      if (ofDevice.size === 0 && byDevice.get(caller.id) === ofDevice) byDevice.delete(caller.id)
    }
  }

  function askToLeave(open: OpenStream, spreadMs: number): void {
    const delay = durationOf(deps.random() * spreadMs)
    push(open, [{ kind: { $case: 'reconnect', value: { delay } } }])
  }

  /** Takes a message into what the stream has said. @throws Fault INVALID_ARGUMENT that names the field */
  function merge(said: Said, request: HeartbeatRequest, requirements: PostureRequirements, receivedAtMs: number) {
    if (request.sequence <= said.sequence) {
      throw invalidField('sequence', `has to be greater than the one before, ${said.sequence}`)
    }
    if (request.openConnectionIds.length > openConnectionIdsMax) {
      throw invalidField('open_connection_ids', `has to have at most ${openConnectionIdsMax} entries`)
    }
    if (!trustBundleIdPattern.test(request.trustBundleId)) {
      throw invalidField('trust_bundle_id', 'has to be the id of a trust bundle, 64 lower-case hex digits, or empty')
    }
    if (!request.posture && !said.posture) {
      throw invalidField('posture', "is missing: a stream's first message carries the whole posture")
    }
    if (request.posture) checkPosture(request.posture)
    const posture = request.posture ? mergePosture(said.posture, request.posture) : (said.posture as PostureValues)
    const failing = failingPosture(posture, requirements)
    const ground = postureGround(posture, failing)
    const wasStale = receivedAtMs - said.receivedAtMs >= deps.maxAgeMs
    const announce = wasStale || ground !== said.ground
    said.sequence = request.sequence
    said.posture = posture
    said.ground = ground
    said.receivedAtMs = receivedAtMs
    said.trustBundleId = request.trustBundleId || said.trustBundleId
    return { posture, failing, announce }
  }

  async function acknowledge(
    { sequence, trustBundleId }: HeartbeatRequest,
    failing: string[],
    open: OpenStream,
    receivedAtMs: number,
  ): Promise<HeartbeatResponse> {
    const { caller, told } = open
    const directives: Directive[] = []
    const now = deps.clock()
    if (deps.isLateInLife(caller, now)) {
      directives.push({ kind: { $case: 'renewCertificate', value: { delay: undefined } } })
    }
    directives.push(...bundleUnknown(trustBundleId, told), ...renewalForIssuer(caller, told))
    const revision = deps.policyRevision()
    if (revision !== told.revision) {
      told.revision = revision
      directives.push({ kind: { $case: 'policyChanged', value: { revision } } })
    }
    try {
      directives.push(...statusNews(told, await currentStatus(open), 'again'))
    } catch (error) {
      // The report is on disk all the same, and the next acknowledgement says it.
      if (!isDatabaseOutage(error)) throw error
    }
    const jittered = intervalMs(now - receivedAtMs) * (1 + jitterShare * (2 * deps.random() - 1))
    return {
      acknowledgedSequence: sequence,
      nextInterval: durationOf(jittered),
      directives,
      serverTime: new Date(now),
      failingPosture: failing,
    }
  }

  /**
   * When the next report is due: later, where the last one took long to be on disk. A fleet that keeps beating at a database
   * that is slow makes it slower. But no device turns stale for being told to wait.
   */
  function intervalMs(tookMs: number): number {
    const longest = Math.max(deps.intervalMs, deps.maxAgeMs * longestShareOfAge)
    return Math.min(longest, deps.intervalMs * Math.max(1, tookMs / promptMs))
  }

  /** The bundle, for a device that goes by another: it was away when that was pushed. */
  function bundleUnknown(reportedId: string, told: Told): Directive[] {
    if (reportedId === '') return []
    const trustBundle = deps.trustBundle()
    if (reportedId === trustBundle.id || told.bundleId === trustBundle.id) return []
    told.bundleId = trustBundle.id
    return [{ kind: { $case: 'trustBundle', value: { trustBundle } } }]
  }

  /** What a device is asked whose certificate was issued by an authority that is being replaced. */
  function renewalForIssuer(caller: Identified, told: Told): Directive[] {
    const issuer = deps.issuerKeyId()
    if (caller.issuerKeyId === issuer || told.renewFor === issuer) return []
    told.renewFor = issuer
    const delay = durationOf((deps.random() * streams.size * 1_000) / renewalsPerSecond)
    return [{ kind: { $case: 'renewCertificate', value: { delay } } }]
  }

  /** How the device stands, with no change of it overtaking the answer. */
  async function currentStatus({ caller, told }: OpenStream): Promise<DeviceStatus | undefined> {
    for (;;) {
      const { changes } = told
      const status = await deps.deviceStatus(caller.id)
      if (told.changes === changes) return status
    }
  }

  /** Directives that do not wait for the next report. They acknowledge nothing. */
  function push({ stream }: OpenStream, directives: Directive[]): void {
    stream.send({
      acknowledgedSequence: 0,
      nextInterval: undefined,
      directives,
      serverTime: new Date(deps.clock()),
      failingPosture: [],
    })
  }

  return {
    serve,
    askToReconnect(spreadMs) {
      leavingMs = spreadMs
      for (const open of streams) askToLeave(open, spreadMs)
    },
    async tellAuthorities() {
      const trustBundle = deps.trustBundle()
      let told = 0
      for (const open of [...streams]) {
        if (++told % toldAtOnceMax === 0) await new Promise(resolve => setImmediate(resolve))
        if (!streams.has(open)) continue
        const directives = renewalForIssuer(open.caller, open.told)
        if (open.told.bundleId !== trustBundle.id) {
          open.told.bundleId = trustBundle.id
          directives.unshift({ kind: { $case: 'trustBundle', value: { trustBundle } } })
        }
        if (directives.length > 0) push(open, directives)
      }
    },
    tell(deviceId) {
      for (const open of byDevice.get(deviceId) ?? []) {
        open.told.changes++
        currentStatus(open).then(
          status => {
            const news = statusNews(open.told, status, 'once')
            if (news.length > 0) push(open, news)
          },
          // The next acknowledgement says it.
          () => {},
        )
      }
    },
    tellRevoked({ id, serial }, reason) {
      for (const open of byDevice.get(id) ?? []) {
        if (open.caller.serial === serial) push(open, [{ kind: { $case: 'revoked', value: { reason } } }])
      }
    },
  }
}

/**
 * What a stream has not been told of how its device stands.
 *
 * @param quarantine whether one that goes on is told once, or again
 */
function statusNews(told: Told, device: DeviceStatus | undefined, quarantine: 'once' | 'again'): Directive[] {
  const wasQuarantined = told.isQuarantined
  told.isQuarantined = device?.status === 'quarantined'
  if (device?.status === 'quarantined' && (!wasQuarantined || quarantine === 'again')) {
    return [{ kind: { $case: 'quarantined', value: { reason: device.reason } } }]
  }
  return wasQuarantined && device?.status === 'active' ? [{ kind: { $case: 'released', value: {} } }] : []
}
