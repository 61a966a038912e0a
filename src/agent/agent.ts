/**
 * The edge daemon: enrolls once, then says how its host is for as long as it runs.
 *
 *     await runAgent({ server: 'localhost:8000', stateDirectory: '/var/lib/edgemesh', token, device: { id: 'alpha' },
 *       posture: hostPosture(), log: event => console.log(event), signal: stopping.signal })
 *
 * Its states, each with what leads out of it:
 *
 *     enrolling   no identity is kept yet. The identity arrives → reporting; the token is refused → failed.
 *     reporting   a stream is open. It breaks → waiting; the server says reconnect, or the certificate was renewed →
 *                 waiting, for as long as the server said; the identity was revoked or has expired → failed.
 *     waiting     backs off. The time is over → reporting.
 *     failed      the promise rejects with the reason; only a person can help.
 *     stopped     `signal` was aborted: the stream is ended in order, and the promise resolves.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { DeviceDescription, Posture, TrustBundle } from '../gen/edgemesh/v1/types.ts'
import {
  type DescribedError,
  describeCallError,
  isCallError,
  millisecondsOf,
  openChannel,
  type Server,
} from './channel.ts'
import { type DeviceCredentials, enrollDevice, fetchTrustBundle, renewCredentials, trusting } from './enroll.ts'
import { type DirectiveKind, openHeartbeats } from './heartbeat-stream.ts'
import { keyForEnrollment, loadState, saveState } from './state.ts'

export type AgentEvent =
  | { event: 'enrolling'; server: Server }
  | { event: 'pending-approval'; deviceId: string }
  | { event: 'enrolled'; deviceId: string; spiffeId: string; notAfter: Date }
  /** An identity was kept from an earlier run. */
  | { event: 'resumed'; deviceId: string; spiffeId: string; notAfter: Date }
  | { event: 'connecting'; server: Server }
  /** The server has acknowledged a report: what it rests on, what of it fails, when the next is due. */
  | { event: 'reported'; posture: Partial<Posture>; failingPosture: string[]; nextInMs: number }
  | { event: 'renewed'; notAfter: Date }
  | { event: 'renewal-failed'; error: DescribedError; retryInMs: number }
  | { event: 'trust-bundle-changed' }
  | { event: 'policy-changed'; revision: string }
  | { event: 'quarantined'; reason: string }
  | { event: 'released' }
  | { event: 'reconnecting'; delayMs: number }
  | { event: 'disconnected'; error: DescribedError; retryInMs: number }
  | { event: 'stopped' }

export type AgentOptions = {
  server: Server
  /** Where the identity is kept; see `state.ts`. */
  stateDirectory: string
  /** Needed until the device is enrolled. */
  token?: string
  device: Partial<DeviceDescription>
  posture: () => Promise<Partial<Posture>>
  log: (event: AgentEvent) => void
  signal: AbortSignal
  clock?: Clock
  /** 0 to 1, exclusive. */
  random?: () => number
}

/** Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ */
export const backoffBaseMs = 1_000
export const backoffMaxMs = 60_000
/** A server that asks for more than this is mistaken, or wants to be rid of us. */
export const retryAfterMaxMs = 600_000

/** Between two reports, where the server says nothing or something that can't be meant. */
const intervalDefaultMs = 30_000
const intervalMinMs = 500
const intervalMaxMs = 3_600_000

/** The server acknowledges within a second; after this long it is taken to be gone. */
const acknowledgementTimeoutMs = 30_000

/** A failed renewal has a third of the certificate's life to be repeated in. */
const renewalRetryMs = 60_000
/** A clock that is far ahead would find each new certificate due for renewal again. */
const renewalPauseMs = 3_600_000

/** A root is published long before anything is issued under it, so that devices have learned of it by then. */
const trustBundleAgeMaxMs = 6 * 3_600_000

/** Refusals of an enrollment that no repetition helps. */
const finalCodes: ReadonlySet<string> = new Set([
  'INVALID_ARGUMENT',
  'UNAUTHENTICATED',
  'PERMISSION_DENIED',
  'ALREADY_EXISTS',
  'FAILED_PRECONDITION',
  'UNIMPLEMENTED',
])
/** The ends of an identity. Other refusals of it may be a mistake on the server's side that somebody is mending. */
const finalReasons: ReadonlySet<string> = new Set(['DEVICE_REVOKED', 'CERTIFICATE_REVOKED', 'CERTIFICATE_EXPIRED'])

/** What the agent knows while it runs. */
type Agent = Required<AgentOptions> & {
  credentials: DeviceCredentials
  quarantined: boolean
  renewNotBeforeMs: number
  trustBundleFetchedMs: number
}

/** How a stream came to its end. */
type Ending =
  | { kind: 'stopped' }
  /** To be opened again: with a new certificate, or on another instance. */
  | { kind: 'reopen'; delayMs: number }
  /** `healthy` when a report had been acknowledged before. */
  | { kind: 'lost'; error: Error; healthy: boolean }

/**
 * Runs until `signal` is aborted.
 *
 * @throws Fault or ServiceError when the device can't be enrolled, or is no longer who it was
 */
export async function runAgent(options: AgentOptions): Promise<void> {
  const { log, signal, clock = systemClock, random = Math.random, token = '' } = options
  const settled = { ...options, token, clock, random }
  const credentials = await identify(settled)
  if (!credentials) {
    log({ event: 'stopped' })
    return
  }

  const agent: Agent = {
    ...settled,
    credentials,
    quarantined: false,
    renewNotBeforeMs: 0,
    trustBundleFetchedMs: Number.NEGATIVE_INFINITY,
  }
  let failures = 0
  while (!signal.aborted) {
    const ending = await reportUntilEnd(agent)
    if (ending.kind === 'stopped') break
    if (ending.kind === 'reopen') {
      failures = 0
      log({ event: 'reconnecting', delayMs: ending.delayMs })
      await pause(ending.delayMs, signal)
      continue
    }
    const error = describeCallError(ending.error)
    if (!isCallError(ending.error) || finalReasons.has(error.reason)) throw ending.error
    failures = ending.healthy ? 0 : failures + 1
    const retryInMs = backoffDelayMs(failures, random, error.retryAfterMs)
    log({ event: 'disconnected', error, retryInMs })
    await pause(retryInMs, signal)
  }
  log({ event: 'stopped' })
}

/**
 * How long to wait after so many failures in a row, the first being number 0: any time up to a bound that doubles, so
 * that a fleet that lost its server together does not come back together. What the server asks for comes on top.
 */
export function backoffDelayMs(failures: number, random: () => number, retryAfterMs = 0): number {
  const bound = Math.min(backoffMaxMs, backoffBaseMs * 2 ** failures)
  return Math.min(retryAfterMaxMs, Math.max(0, retryAfterMs)) + random() * bound
}

/** The identity that was kept, or a new one; nothing when the agent is stopped before. */
async function identify(options: Required<AgentOptions>): Promise<DeviceCredentials | undefined> {
  const { server, stateDirectory, token, device, log, signal, random } = options
  const kept = await loadState(stateDirectory)
  if (kept) {
    log({ event: 'resumed', deviceId: kept.deviceId, spiffeId: kept.spiffeId, notAfter: kept.notAfter })
    return kept
  }
  if (token === '') throw tokenMissing(stateDirectory)
  const keyPem = await keyForEnrollment(stateDirectory)
  const onPendingApproval = (deviceId: string) => log({ event: 'pending-approval', deviceId })
  for (let failures = 0; !signal.aborted; failures++) {
    log({ event: 'enrolling', server })
    try {
      const credentials = await enrollDevice({ server, token, device, keyPem, signal, onPendingApproval })
      await saveState(stateDirectory, credentials)
      const { deviceId, spiffeId, notAfter } = credentials
      log({ event: 'enrolled', deviceId, spiffeId, notAfter })
      return credentials
    } catch (failure) {
      if (signal.aborted) return undefined
      const error = describeCallError(failure)
      if (!isCallError(failure) || finalCodes.has(error.code) || error.reason === 'TOKEN_USED_UP') throw failure
      const retryInMs = backoffDelayMs(failures, random, error.retryAfterMs)
      log({ event: 'disconnected', error, retryInMs })
      await pause(retryInMs, signal)
    }
  }
  return undefined
}

/** One stream: reports, and does what the server asks for, until either side ends it. */
async function reportUntilEnd(agent: Agent): Promise<Ending> {
  const { server, credentials, posture, log, signal, clock } = agent
  log({ event: 'connecting', server })
  const channel = openChannel(server, credentials)
  /** Aborted by what can't wait for the next report. */
  const urgent = new AbortController()
  const asked: { reopenAfterMs?: number; renew?: boolean; bundle?: TrustBundle; revoked?: string } = {}
  let quarantined: string | undefined

  function onDirective(directive: DirectiveKind): void {
    switch (directive.$case) {
      case 'renewCertificate':
        asked.renew = true
        break
      case 'trustBundle':
        asked.bundle = directive.value.trustBundle
        urgent.abort()
        break
      case 'policyChanged':
        log({ event: 'policy-changed', revision: directive.value.revision })
        break
      case 'reconnect':
        asked.reopenAfterMs = directive.value.delay ? millisecondsOf(directive.value.delay) : 0
        urgent.abort()
        break
      case 'quarantined':
        quarantined = directive.value.reason
        break
      case 'revoked':
        asked.revoked = directive.value.reason
        urgent.abort()
        break
    }
  }

  const heartbeats = openHeartbeats({
    server,
    credentials,
    channel,
    clock,
    onDirective,
    onClosed: () => urgent.abort(),
  })
  let healthy = false
  let ending: { error: Error | undefined } | undefined
  heartbeats.closed.then(error => {
    ending = { error }
  })

  try {
    for (;;) {
      // Step 1: Say how the host is, and learn how that is seen.
      quarantined = undefined
      const measured = await posture()
      const acknowledged = await withinTime(heartbeats.report(measured), signal)
      if (signal.aborted || !acknowledged) return { kind: 'stopped' }
      healthy = true
      noteQuarantine(agent, quarantined)
      const nextInMs = intervalOf(acknowledged.nextInterval)
      log({ event: 'reported', posture: measured, failingPosture: acknowledged.failingPosture, nextInMs })

      // Step 2: What keeps the identity alive, while there is a stream that works.
      if (await renewWhenDue(agent, channel, asked.renew ?? false)) return { kind: 'reopen', delayMs: 0 }
      await refreshTrustBundle(agent, channel)

      // Step 3: Wait for the next report, or for something that can't wait.
      await pause(nextInMs, AbortSignal.any([signal, urgent.signal]))
      if (asked.revoked !== undefined) throw revoked(asked.revoked)
      if (signal.aborted) return { kind: 'stopped' }
      if (asked.bundle) {
        await adopt(agent, asked.bundle)
        return { kind: 'reopen', delayMs: 0 }
      }
      if (asked.reopenAfterMs !== undefined) {
        return { kind: 'reopen', delayMs: Math.min(retryAfterMaxMs, Math.max(0, asked.reopenAfterMs)) }
      }
      if (ending) throw ending.error ?? endedInOrder()
    }
  } catch (error) {
    if (asked.revoked !== undefined) return { kind: 'lost', error: revoked(asked.revoked), healthy }
    if (signal.aborted) return { kind: 'stopped' }
    return { kind: 'lost', error: error as Error, healthy }
  } finally {
    await heartbeats.close()
    channel.close()
  }
}

/** @returns whether the certificate was renewed, which takes a new connection to be of use */
async function renewWhenDue(agent: Agent, channel: ReturnType<typeof openChannel>, asked: boolean): Promise<boolean> {
  const { server, stateDirectory, credentials, log, clock, random } = agent
  const nowMs = clock()
  if ((!asked && nowMs < credentials.renewAfter.getTime()) || nowMs < agent.renewNotBeforeMs) return false
  try {
    const renewed = await renewCredentials(server, credentials, channel)
    await saveState(stateDirectory, renewed)
    agent.credentials = renewed
    agent.renewNotBeforeMs = nowMs + renewalPauseMs
    log({ event: 'renewed', notAfter: renewed.notAfter })
    return true
  } catch (error) {
    // The old certificate is still good, whether the server failed or our disk: there is time to try again.
    const described = describeCallError(error)
    const retryInMs = renewalRetryMs * (1 + random()) + Math.min(retryAfterMaxMs, described.retryAfterMs ?? 0)
    agent.renewNotBeforeMs = nowMs + retryInMs
    log({ event: 'renewal-failed', error: described, retryInMs })
    return false
  }
}

async function refreshTrustBundle(agent: Agent, channel: ReturnType<typeof openChannel>): Promise<void> {
  const nowMs = agent.clock()
  if (nowMs - agent.trustBundleFetchedMs < trustBundleAgeMaxMs) return
  agent.trustBundleFetchedMs = nowMs
  try {
    await adopt(agent, await fetchTrustBundle(agent.server, agent.credentials, channel))
  } catch (error) {
    // What is trusted now is good until the next rotation; a stream that has broken is noticed elsewhere.
    if (!isCallError(error)) throw error
  }
}

/** Trusts the roots of `bundle` from the next connection on. */
async function adopt(agent: Agent, bundle: TrustBundle): Promise<void> {
  const credentials = trusting(agent.credentials, bundle)
  if (credentials.rootsPem === agent.credentials.rootsPem) return
  await saveState(agent.stateDirectory, credentials)
  agent.credentials = credentials
  agent.log({ event: 'trust-bundle-changed' })
}

/** The server repeats itself with each acknowledgement; the log has it when it changes. */
function noteQuarantine(agent: Agent, reason: string | undefined): void {
  const quarantined = reason !== undefined
  if (quarantined === agent.quarantined) return
  agent.quarantined = quarantined
  agent.log(quarantined ? { event: 'quarantined', reason } : { event: 'released' })
}

/** What `report` resolves to, or nothing when the agent is stopped before. */
async function withinTime<T>(report: Promise<T>, signal: AbortSignal): Promise<T | undefined> {
  const over = new AbortController()
  const waited = sleep(acknowledgementTimeoutMs, 'timeout', { signal: AbortSignal.any([signal, over.signal]) })
  const ended = waited.then(
    () => Promise.reject(unacknowledged()),
    () => undefined,
  )
  try {
    return await Promise.race([report, ended])
  } finally {
    over.abort()
  }
}

function intervalOf(interval: { seconds: number; nanos: number } | undefined): number {
  if (!interval) return intervalDefaultMs
  return Math.min(intervalMaxMs, Math.max(intervalMinMs, millisecondsOf(interval)))
}

/** Sleeps for so long, or until `signal` is aborted. */
async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined)
}

function tokenMissing(directory: string): Fault {
  const message = `${directory} holds no identity, and there is no token to enroll with: have an operator make one`
  return new Fault('FAILED_PRECONDITION', 'TOKEN_MISSING', message)
}

function revoked(reason: string): Fault {
  const why = reason === '' ? '' : ` (${reason})`
  const message = `the device has been revoked${why}: empty its state folder and enroll it under another id`
  return new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', message)
}

function endedInOrder(): Fault {
  return new Fault('UNAVAILABLE', 'STREAM_ENDED', 'the server ended the heartbeat stream')
}

function unacknowledged(): Fault {
  const message = `a report was not acknowledged within ${acknowledgementTimeoutMs / 1_000} s`
  return new Fault('UNAVAILABLE', 'SERVER_SILENT', message)
}
