/**
 * Says how a device is for as long as it runs, and keeps its identity alive meanwhile.
 *
 *     const reporting = startReporting({ server, credentials, posture, keeper, log, signal: stopping.signal })
 *     const answer = await reporting.report()
 *     await reporting.ended
 *
 * Its states, each with what leads out of it:
 *
 *     connecting  a session is being opened, beside the one before it if that is still there. Its first report is
 *                 acknowledged → reporting, and only now the session before it is closed; it fails → waiting.
 *     reporting   a session is open. It breaks → waiting. The certificate is renewed → connecting, at once; the server
 *                 says reconnect → connecting, after so long as it says. All the while reports go on.
 *     waiting     backs off. The time is over → connecting, or recovering where the certificate has expired.
 *     recovering  asks for a new certificate with the one that has expired. It is given → connecting; an operator has to
 *                 approve it → waiting; the server will not → lost.
 *     lost        the server has ended this identity. `reentry` gives another → connecting; else → failed.
 *     failed      `ended` rejects with the reason; only a person can help.
 *     stopped     `signal` was aborted: the session is ended in order, and `ended` resolves.
 */
import { type Clock, clockOffsetMsTolerated, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { HeartbeatResponse } from '../gen/edgemesh/v1/heartbeat.ts'
import type { Posture, TrustBundle } from '../gen/edgemesh/v1/types.ts'
import type { Target } from './authorizations.ts'
import { describeCallError, isCallError, millisecondsOf, type Server } from './channel.ts'
import { type DeviceCredentials, fetchTrustBundle, isFinal, renewCredentials } from './enroll.ts'
import type { ReportingEvent } from './events.ts'
import type { DirectiveKind } from './heartbeat-stream.ts'
import { trustOf } from './issued-identity.ts'
import { withClocksCompared } from './server-clock.ts'
import { openSession, type Session } from './session.ts'
import { backoffDelayMs, systemTimer, type Timer, withinReason } from './waiting.ts'

/** Where an identity outlives the process; in a folder (`state.ts`), or with whoever uses the client. */
export type Keeper = {
  /** The key to renew with: the same until it is certified, for a device that comes back with an expired certificate is let in once. */
  keyForRenewal(): Promise<string>
  /** Whom the device trusts has changed; rejects where that can't be kept, and then it is not used. */
  saveTrust(credentials: DeviceCredentials): Promise<void>
  /** The key and the certificate have changed; where it rejects, it is called again. */
  save(credentials: DeviceCredentials): Promise<void>
}

/** How a device whose identity the server has ended may come by another. */
export type Reentry = {
  isOpenTo(lost: DeviceCredentials): boolean
  /** Whether it is open, and for this very server, though one side does not know the other's authority any more. */
  vouchesForServer(lost: DeviceCredentials): Promise<boolean>
  /** @returns nothing when it was stopped before */
  enter(lost: DeviceCredentials): Promise<DeviceCredentials | undefined>
}

export type ReportingOptions = {
  server: Server
  credentials: DeviceCredentials
  posture: () => Promise<Partial<Posture>>
  /** What the device holds open, told with each report. */
  openConnectionIds?: () => string[]
  keeper: Keeper
  reentry?: Reentry
  log: (event: ReportingEvent) => void
  signal: AbortSignal
  /**
   * A session has proved itself, on a connection that others may share until the next has. The one before is closed when this
   * has resolved: `connected: authorizations.moveTo` takes along what is held.
   */
  connected?: (target: Target) => Promise<void>
  /** That connection is gone, and there is no other yet. */
  disconnected?: () => void
  clock?: Clock
  timer?: Timer
  /** 0 to 1, exclusive. */
  random?: () => number
}

export type Reporting = {
  /**
   * Measures and reports now. Resolves with what the server says to it, or to a later report, however often the session has to be
   * opened anew before; rejects when there will be none.
   */
  report(): Promise<HeartbeatResponse>
  /** Shows these from the next session on, which is opened at once. They were kept by whoever has them. */
  use(credentials: DeviceCredentials): void
  /** Resolves when it was stopped. Rejects with the Fault or ServiceError that ends the identity. */
  ended: Promise<void>
}

/** Between two reports, where the server says nothing or something that can't be meant. */
const intervalDefaultMs = 30_000
const intervalMinMs = 500
const intervalMaxMs = 3_600_000

/** A session that has had so many reports acknowledged was no accident: what failed before it is forgotten. */
const reportsSettled = 2

/** A failed renewal has a third of the certificate's life to be repeated in. */
const renewalRetryMs = 60_000
/** A server that asks for one renewal after the other, and one whose certificates are due when they are new. */
const renewalAskedPauseMs = 10_000
const renewalPauseMs = 3_600_000
/** A renewal that is asked for without a delay is asked for from many. */
const renewalSpreadMs = 30_000
/** The renewals of a large fleet are spread over hours. */
const renewalDelayMaxMs = 24 * 3_600_000

/** A root is published long before anything is issued under it, so that devices have learned of it by then. */
const trustBundleAgeMaxMs = 6 * 3_600_000

const saveRetryMs = 60_000

/** The ends of an identity. Other refusals of it may be a mistake on the server's side that somebody is mending. */
const identityEnds: ReadonlySet<string> = new Set([
  'DEVICE_REVOKED',
  'DEVICE_DELETED',
  'CERTIFICATE_REVOKED',
  'CERTIFICATE_RETIRED',
])

/**
 * One of the two knows nothing of the other: the authority was replaced while the device was away, the server's database was
 * brought back from a backup that is older than the certificate, or this is another server. A new token that is for this
 * server tells which.
 */
const estranged: ReadonlySet<string> = new Set(['SERVER_UNTRUSTED', 'CERTIFICATE_UNTRUSTED', 'CERTIFICATE_UNKNOWN'])

type Optional = 'connected' | 'disconnected' | 'reentry'
type Settled = Required<Omit<ReportingOptions, Optional>> & Pick<ReportingOptions, Optional>

type Waiting = PromiseWithResolvers<HeartbeatResponse>

/** What is known while it runs. Moments are by `timer.uptime()`; what is not due has none. */
type Agent = Settled & {
  /** The certificate in `credentials` has expired, so the server says. */
  expired: boolean
  /** None while the server can't be reached. */
  session: Session | undefined
  /** When to open the next. Always there where there is no session. */
  connectAtMs: number | undefined
  reportAtMs: number
  /** When to do what the server has asked for. */
  renewAtMs: number | undefined
  renewNotBeforeMs: number
  renewAskedNotBeforeMs: number
  fetchTrustBundleAtMs: number
  /** `credentials` are not on the disk. */
  saveAtMs: number | undefined
  /** Sessions in a row that could not be opened, or ended before they had settled. */
  failures: number
  clockOffsetMs: number
  /** What the log has last said of it. */
  told: { quarantined: boolean; clockWrong: boolean; recoveryPending: boolean }
  /** Ends the wait for what is due next. */
  wake: AbortController
  /** What others take along from the session before. */
  moves: Set<Promise<void>>
  /** Who waits for a report that has not been measured yet. */
  waiting: Set<Waiting>
}

/** Reports until `signal` is aborted, or the identity is lost. */
export function startReporting(options: ReportingOptions): Reporting {
  const { clock = systemClock, timer = systemTimer, random = Math.random, openConnectionIds = () => [] } = options
  const agent: Agent = {
    ...options,
    openConnectionIds,
    clock,
    timer,
    random,
    expired: false,
    session: undefined,
    connectAtMs: timer.uptime(),
    reportAtMs: 0,
    renewAtMs: undefined,
    renewNotBeforeMs: 0,
    renewAskedNotBeforeMs: 0,
    fetchTrustBundleAtMs: 0,
    saveAtMs: undefined,
    failures: 0,
    clockOffsetMs: 0,
    told: { quarantined: false, clockWrong: false, recoveryPending: false },
    wake: new AbortController(),
    moves: new Set(),
    waiting: new Set(),
  }
  let over: { failure: unknown } | undefined
  const ended = keepReporting(agent).then(
    () => endWaiting(stopped()),
    failure => {
      endWaiting(failure)
      throw failure
    },
  )
  // Whoever does not wait for the end hears of it elsewhere.
  ended.catch(() => {})

  function endWaiting(failure: unknown): void {
    over = { failure }
    for (const { reject } of agent.waiting) reject(failure)
    agent.waiting.clear()
  }

  return {
    ended,
    async report() {
      if (over) throw over.failure
      const waiting = Promise.withResolvers<HeartbeatResponse>()
      agent.waiting.add(waiting)
      agent.reportAtMs = timer.uptime()
      agent.wake.abort()
      return waiting.promise
    },
    use(credentials) {
      takeUp(agent, credentials)
      agent.wake.abort()
    },
  }
}

/** Does what is due, waits for what is due next, until the agent is stopped. */
async function keepReporting(agent: Agent): Promise<void> {
  const { signal, timer } = agent
  try {
    while (!signal.aborted) {
      agent.wake = new AbortController()
      await doWhatIsDue(agent)
      await timer.sleep(msUntilDue(agent), AbortSignal.any([signal, agent.wake.signal]))
    }
  } finally {
    await Promise.allSettled(agent.moves)
    if (agent.session) agent.disconnected?.()
    await agent.session?.close()
  }
}

async function doWhatIsDue(agent: Agent): Promise<void> {
  // Step 1: What has become of the stream, and what the server has asked for on it.
  if (agent.session) await heed(agent, agent.session)

  // Step 2: Another session, or the next report on this one.
  if (isDue(agent, agent.connectAtMs)) await connect(agent)
  else if (agent.session && isDue(agent, agent.reportAtMs)) await report(agent, agent.session)

  // Step 3: What keeps the identity alive, while there is a session that works.
  if (agent.session) await renewWhenDue(agent, agent.session)
  if (agent.session) await refreshTrustBundle(agent, agent.session)
  if (isDue(agent, agent.saveAtMs)) await keep(agent, agent.credentials)
}

function msUntilDue(agent: Agent): number {
  const now = agent.timer.uptime()
  const moments = [agent.connectAtMs, agent.saveAtMs]
  if (agent.session) moments.push(agent.reportAtMs, now + msUntilRenewal(agent))
  return Math.max(0, Math.min(...moments.map(moment => (moment ?? Number.POSITIVE_INFINITY) - now)))
}

function isDue({ timer }: Agent, momentMs: number | undefined): boolean {
  return momentMs !== undefined && momentMs <= timer.uptime()
}

async function heed(agent: Agent, session: Session): Promise<void> {
  const { asked } = session
  session.asked = {}
  if (asked.revoked !== undefined) throw revoked(asked.revoked)
  if (session.ended) return lose(agent, session, session.ended)
  if (asked.trustBundle) await adopt(agent, asked.trustBundle)
  if (asked.renew && isCurrent(agent, session)) askForRenewal(agent, asked.renew.inMs)
  if (asked.reconnectInMs !== undefined) leave(agent, session, asked.reconnectInMs)
}

/** Whether it shows the certificate that the agent has now; after a renewal it shows the one before for a moment. */
function isCurrent(agent: Agent, { credentials }: Session): boolean {
  return credentials.certificateChainPem === agent.credentials.certificateChainPem
}

function hasSettled({ reports }: Session): boolean {
  return reports >= reportsSettled
}

/** The first of several that ask counts: each draws its delay anew, and the shortest would win in the end. */
function askForRenewal(agent: Agent, delayMs = agent.random() * renewalSpreadMs): void {
  agent.renewAtMs ??= agent.timer.uptime() + Math.min(renewalDelayMaxMs, Math.max(0, delayMs))
}

/** The server wants the device elsewhere. One that wants every session elsewhere as soon as it is open has to wait. */
function leave(agent: Agent, session: Session, askedMs: number): void {
  if (agent.connectAtMs !== undefined) return
  const settled = hasSettled(session)
  if (!settled) agent.failures += 1
  const delayMs = Math.max(withinReason(askedMs), settled ? 0 : backoffDelayMs(agent.failures, agent.random))
  agent.connectAtMs = agent.timer.uptime() + delayMs
  agent.log({ event: 'reconnecting', delayMs })
}

/** Opens the next session. The one before it is closed when the next has proved itself. */
async function connect(agent: Agent): Promise<void> {
  const { server, log, clock } = agent
  agent.connectAtMs = undefined
  if (agent.expired && !(await recover(agent))) return
  let next: Session | undefined
  try {
    log({ event: 'connecting', server })
    next = openSession({
      server,
      credentials: agent.credentials,
      trustBundleId: () => agent.credentials.trustBundleId,
      onDirective: directive => note(agent, directive),
      wake: () => agent.wake.abort(),
      clock,
    })
    await reportOn(agent, next)
  } catch (failure) {
    await next?.close()
    return afterFailure(agent, failure)
  }
  const before = agent.session
  agent.session = next
  if (!agent.connected) {
    await before?.close()
    return
  }
  // Reports go on meanwhile.
  const moved = agent
    .connected({ server, credentials: next.credentials, channel: next.channel })
    .finally(() => before?.close())
    .finally(() => agent.moves.delete(moved))
  agent.moves.add(moved)
}

async function report(agent: Agent, session: Session): Promise<void> {
  try {
    await reportOn(agent, session)
  } catch (failure) {
    await lose(agent, session, failure)
  }
}

/** Says how the host is, and learns how that is seen. */
async function reportOn(agent: Agent, session: Session): Promise<void> {
  const { posture, openConnectionIds, log, signal, timer } = agent
  const waiting = [...agent.waiting]
  const measured = await posture()
  const answer = await session.report(measured, signal, openConnectionIds())
  if (!answer) return
  for (const who of waiting) {
    agent.waiting.delete(who)
    who.resolve(answer)
  }
  // Once: reports on a session that is about to be replaced say nothing of those that can't be opened.
  if (session.reports === reportsSettled) agent.failures = 0
  const nextInMs = intervalOf(answer)
  // Whoever has come meanwhile wants to have it measured anew.
  agent.reportAtMs = timer.uptime() + (agent.waiting.size > 0 ? 0 : nextInMs)
  // The server repeats itself with each acknowledgement.
  if (!answer.directives.some(({ kind }) => kind?.$case === 'quarantined')) noteQuarantine(agent, undefined)
  if (answer.serverTime) noteClock(agent, agent.clock() - answer.serverTime.getTime())
  log({ event: 'reported', posture: measured, failingPosture: answer.failingPosture, nextInMs })
}

function intervalOf({ nextInterval }: HeartbeatResponse): number {
  if (!nextInterval) return intervalDefaultMs
  return Math.min(intervalMaxMs, Math.max(intervalMinMs, millisecondsOf(nextInterval)))
}

/** The stream has broken. */
async function lose(agent: Agent, session: Session, failure: unknown): Promise<void> {
  agent.session = undefined
  agent.disconnected?.()
  await session.close()
  await afterFailure(agent, failure, { broken: session })
}

/**
 * A session could not be opened, or has broken, or a certificate that has expired was not replaced.
 *
 * @param of the session that there was; whether it was the recovery that has failed
 * @throws what ends the agent
 */
async function afterFailure(
  agent: Agent,
  failure: unknown,
  of: { broken?: Session; recovering?: boolean } = {},
): Promise<void> {
  const { server, log, clock, random, timer } = agent
  const { broken, recovering = false } = of
  if (agent.signal.aborted) return
  const explained = await withClocksCompared(failure, server, clock)
  if (!isCallError(explained)) throw explained
  const error = describeCallError(explained, clock)
  // What could not be verified is good for a sentence, and not to go by.
  if (error.clockOffsetMs !== undefined && error.reason !== 'CLOCK_WRONG') noteClock(agent, error.clockOffsetMs)

  // Step 1: What ends the certificate, or the identity. Of a certificate that has been renewed since it does not.
  const aboutOlder = broken !== undefined && !isCurrent(agent, broken)
  if (!aboutOlder && !recovering && error.reason === 'CERTIFICATE_EXPIRED') {
    if (agent.expired) return // the other stream has said so, and it is being seen to
    agent.expired = true
    agent.connectAtMs = timer.uptime()
    log({ event: 'certificate-expired', error })
    return
  }
  const ended = identityEnds.has(error.reason) || (recovering && isFinal(error))
  if (!aboutOlder && ended) return enrollAgain(agent, explained)
  const isStranded = estranged.has(error.reason) && !aboutOlder && !agent.session
  if (isStranded && (await agent.reentry?.vouchesForServer(agent.credentials))) return enrollAgain(agent, explained)

  // Step 2: Everything else passes.
  agent.failures = broken && hasSettled(broken) ? 0 : agent.failures + 1
  const retryInMs = backoffDelayMs(agent.failures, random, error.retryAfterMs)
  agent.connectAtMs = timer.uptime() + retryInMs
  if (error.reason === 'RECOVERY_NEEDS_APPROVAL') {
    if (!agent.told.recoveryPending) log({ event: 'recovery-pending', error, retryInMs })
    agent.told.recoveryPending = true
  } else {
    log({ event: agent.session ? 'reconnection-failed' : 'disconnected', error, retryInMs })
  }
}

/** Asks for a new certificate on a connection that shows the one that has expired. @returns whether there is one */
async function recover(agent: Agent): Promise<boolean> {
  const { server, keeper, credentials, clock, log } = agent
  try {
    const keyPem = await keeper.keyForRenewal()
    const renewed = await renewCredentials(server, credentials, { keyPem, clock })
    agent.expired = false
    agent.told.recoveryPending = false
    await keep(agent, renewed)
    log({ event: 'recovered', notAfter: renewed.notAfter })
    return true
  } catch (failure) {
    await afterFailure(agent, failure, { recovering: true })
    return false
  }
}

/** The identity is lost. @throws failure where there is no other */
async function enrollAgain(agent: Agent, failure: Fault | Error): Promise<void> {
  const { reentry, log, clock, timer } = agent
  const error = describeCallError(failure, clock)
  if (error.reason === 'DEVICE_REVOKED' || !reentry?.isOpenTo(agent.credentials)) throw failure
  log({ event: 'identity-lost', error })
  if (agent.session) agent.disconnected?.()
  await agent.session?.close()
  agent.session = undefined
  const credentials = await reentry.enter(agent.credentials)
  agent.connectAtMs = timer.uptime()
  if (!credentials) return
  Object.assign(agent, { credentials, expired: false, failures: 0, renewAtMs: undefined, saveAtMs: undefined })
}

async function renewWhenDue(agent: Agent, session: Session): Promise<void> {
  const { server, keeper, credentials, log, clock, random, timer } = agent
  if (msUntilRenewal(agent) > 0) return
  try {
    const keyPem = await keeper.keyForRenewal()
    const renewed = await renewCredentials(server, credentials, { channel: session.channel, keyPem, clock })
    await keep(agent, renewed)
    takeUp(agent, renewed)
    log({ event: 'renewed', notAfter: renewed.notAfter })
  } catch (failure) {
    // The old certificate is still good: there is time to try again.
    const error = describeCallError(failure, clock)
    const retryInMs = renewalRetryMs * (1 + random()) + withinReason(error.retryAfterMs ?? 0)
    agent.renewNotBeforeMs = timer.uptime() + retryInMs
    agent.renewAskedNotBeforeMs = agent.renewNotBeforeMs
    log({ event: 'renewal-failed', error, retryInMs })
  }
}

/** A certificate that is new: the next session shows it, and there is no hurry to renew it. */
function takeUp(agent: Agent, credentials: DeviceCredentials): void {
  const now = agent.timer.uptime()
  agent.credentials = credentials
  agent.expired = false
  agent.renewAtMs = undefined
  agent.renewNotBeforeMs = now + renewalPauseMs
  agent.renewAskedNotBeforeMs = now + renewalAskedPauseMs
  agent.connectAtMs = now
}

/** By the server's clock, which has dated the certificate, or because the server has asked. */
function msUntilRenewal(agent: Agent): number {
  const { credentials, clock, timer } = agent
  const now = timer.uptime()
  const late = credentials.renewAfter.getTime() - (clock() - agent.clockOffsetMs)
  const byDate = Math.max(late, agent.renewNotBeforeMs - now)
  if (agent.renewAtMs === undefined) return byDate
  return Math.min(byDate, Math.max(agent.renewAtMs, agent.renewAskedNotBeforeMs) - now)
}

async function refreshTrustBundle(agent: Agent, session: Session): Promise<void> {
  if (!isDue(agent, agent.fetchTrustBundleAtMs)) return
  agent.fetchTrustBundleAtMs = agent.timer.uptime() + trustBundleAgeMaxMs
  let bundle: TrustBundle
  try {
    bundle = await fetchTrustBundle(agent.server, agent.credentials, session.channel)
  } catch (failure) {
    // What is trusted now is good until the next rotation; a stream that has broken is noticed elsewhere.
    if (!isCallError(failure)) throw failure
    return
  }
  await adopt(agent, bundle)
}

/**
 * Trusts the roots of `bundle` from the next connection on; the one that is open stays. It is believed because it came
 * over a connection that roots trusted before have verified. The server is told at once, since others may wait for it.
 */
async function adopt(agent: Agent, bundle: TrustBundle): Promise<void> {
  const { keeper, log, clock, timer } = agent
  try {
    const trust = trustOf(bundle)
    const { rootsPem, trustBundleId } = agent.credentials
    const known = trust.trustBundleId === '' ? trust.rootsPem === rootsPem : trust.trustBundleId === trustBundleId
    if (known) return
    const credentials = { ...agent.credentials, ...trust }
    await keeper.saveTrust(credentials)
    agent.credentials = credentials
  } catch (failure) {
    log({ event: 'trust-bundle-refused', error: describeCallError(failure, clock) })
    return
  }
  agent.reportAtMs = timer.uptime()
  log({ event: 'trust-bundle-changed', trustBundleId: agent.credentials.trustBundleId })
}

/** Uses these from now on, and keeps them: later, where the disk is full now. */
async function keep(agent: Agent, credentials: DeviceCredentials): Promise<void> {
  const { keeper, log, timer, clock } = agent
  agent.credentials = credentials
  const told = agent.saveAtMs !== undefined
  try {
    await keeper.save(credentials)
    agent.saveAtMs = undefined
  } catch (failure) {
    agent.saveAtMs = timer.uptime() + saveRetryMs
    if (!told) log({ event: 'state-unsaved', error: describeCallError(failure, clock), retryInMs: saveRetryMs })
  }
}

function note(agent: Agent, directive: DirectiveKind): void {
  if (directive.$case === 'policyChanged') {
    agent.log({ event: 'policy-changed', revision: directive.value.revision })
  }
  if (directive.$case === 'quarantined') noteQuarantine(agent, directive.value.reason)
  if (directive.$case === 'released') noteQuarantine(agent, undefined)
}

function noteQuarantine({ told, log }: Agent, reason: string | undefined): void {
  const quarantined = reason !== undefined
  if (quarantined === told.quarantined) return
  told.quarantined = quarantined
  log(quarantined ? { event: 'quarantined', reason } : { event: 'released' })
}

function noteClock(agent: Agent, offsetMs: number): void {
  const { told, log } = agent
  agent.clockOffsetMs = offsetMs
  const wrong = Math.abs(offsetMs) > clockOffsetMsTolerated
  if (wrong === told.clockWrong) return
  told.clockWrong = wrong
  log(wrong ? { event: 'clock-wrong', offsetMs } : { event: 'clock-right' })
}

function stopped(): Fault {
  return new Fault('FAILED_PRECONDITION', 'CLIENT_CLOSED', 'the reports have been stopped')
}

function revoked(reason: string): Fault {
  const why = reason === '' ? '' : ` (${reason})`
  const message = `the device has been revoked${why}`
  return new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', message)
}
