/**
 * One simulated device: the agent's own streams, with an identity that is kept in memory only.
 *
 * enrolling → connecting → reporting; a session that breaks, or that the script ends, → waiting → connecting. What is
 * refused for good → failed. Stopping ends the session in order.
 */
import { type AuthorizationStream, openAuthorizations } from '../client/authorize-stream.ts'
import { type DescribedError, describeCallError, millisecondsOf, type Server } from '../client/channel.ts'
import { createKey } from '../client/csr.ts'
import { type DeviceCredentials, enrollDevice, isFinal, renewCredentials } from '../client/enroll.ts'
import { trustOf } from '../client/issued-identity.ts'
import { openSession, type Session } from '../client/session.ts'
import { backoffDelayMs, systemTimer, withinReason } from '../client/waiting.ts'
import { systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { DeviceType } from '../gen/edgemesh/v1/types.ts'
import { type Health, postureOf } from './mix.ts'
import type { Action } from './script.ts'
import { bucketOf, count, type DeviceState, type Tally } from './tally.ts'

/** What a device asks again and again: whether this user may reach this service. It holds one lease. */
export type Asking = { user: string; service: string; everyMs: number }

export type SimulatedDevice = {
  /** Until there is an identity, a refusal that no repetition helps, or an end. */
  enroll(token: string): Promise<void>
  /** Until it is stopped or refused for good. */
  live(): Promise<void>
  act(action: Action): void
}

const intervalDefaultMs = 30_000
const intervalMinMs = 500
/** As the agent has it where the server leaves the pace to the device. */
const renewalSpreadMs = 30_000
/** Timers reach no further. */
const waitMsMax = 2 ** 31 - 1

/** Refusals of an identity, on top of those that no repetition helps while it is asked for. */
const identityEnds: ReadonlySet<string> = new Set([
  'DEVICE_REVOKED',
  'DEVICE_DELETED',
  'CERTIFICATE_REVOKED',
  'CERTIFICATE_RETIRED',
])

export function simulatedDevice({
  server,
  id,
  health: healthAtFirst,
  asking,
  tally,
  signal,
}: {
  server: Server
  id: string
  health: Health
  asking: Asking | undefined
  /** Counted in as it happens. */
  tally: Tally
  signal: AbortSignal
}): SimulatedDevice {
  let state: DeviceState = 'enrolling'
  let health = healthAtFirst
  let credentials: DeviceCredentials | undefined
  let session: Session | undefined
  let silent = false
  let cut = false
  /** The script has changed how it is, and it has not said so yet. */
  let changed = false
  /** It has lost its session, or did not get one, and the script is not why. */
  let broken = false
  /** Failures in a row. */
  let failures = 0
  let wake = new AbortController()
  tally.states.enrolling += 1

  function become(next: DeviceState): void {
    tally.states[state] -= 1
    tally.states[next] += 1
    state = next
  }

  function setBroken(is: boolean): void {
    if (is !== broken) tally.broken += is ? 1 : -1
    broken = is
  }

  function sleep(ms: number): Promise<void> {
    return systemTimer.sleep(ms, AbortSignal.any([signal, wake.signal]))
  }

  function noted(failure: unknown): DescribedError {
    const error = describeCallError(failure)
    count(tally.errors, error.reason)
    return error
  }

  async function backOff(error?: DescribedError): Promise<void> {
    const delayMs = backoffDelayMs(failures, Math.random, error?.retryAfterMs)
    failures += 1
    await systemTimer.sleep(delayMs, signal)
  }

  /** Speaks on one session until it ends. @throws what has broken it */
  async function converse(shown: DeviceCredentials): Promise<void> {
    become(silent ? 'silent' : 'connecting')
    let identity = shown
    let authorizations: AuthorizationStream | undefined
    let askTimer: NodeJS.Timeout | undefined
    wake = new AbortController()
    const opened = openSession({
      server,
      credentials: identity,
      trustBundleId: () => identity.trustBundleId,
      onDirective: () => {},
      wake: () => wake.abort(),
      clock: systemClock,
    })
    session = opened
    try {
      let reportAtMs = 0
      let renewAtMs = Number.POSITIVE_INFINITY
      for (;;) {
        // Step 1: Say how it is, when that is due: the server repeats what it asks for with each acknowledgement.
        if (!silent && (reportAtMs <= performance.now() || changed)) reportAtMs = await report(opened)
        if (opened.reports === 1 && asking && !authorizations) {
          authorizations = openAuthorizations({
            server,
            credentials: identity,
            channel: opened.channel,
            onRevoked: () => {
              tally.revocations += 1
            },
          })
          askTimer = keepAsking(authorizations, asking)
        }

        // Step 2: Heed what has come up.
        if (signal.aborted || cut) return
        const { asked } = opened
        opened.asked = {}
        if (asked.revoked !== undefined) throw new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', 'revoked')
        if (opened.ended) throw opened.ended
        if (asked.trustBundle) {
          identity = { ...identity, ...trustOf(asked.trustBundle) }
          credentials = identity
          reportAtMs = 0
        }
        // The first of several that ask counts: each draws its delay anew.
        if (asked.renew && renewAtMs === Number.POSITIVE_INFINITY) {
          const delayMs = asked.renew.inMs ?? Math.random() * renewalSpreadMs
          renewAtMs = performance.now() + delayMs
        }
        if (renewAtMs <= performance.now()) {
          credentials = await renewCredentials(server, identity, { channel: opened.channel })
          return
        }
        if (asked.reconnectInMs !== undefined) {
          await systemTimer.sleep(withinReason(asked.reconnectInMs), signal)
          return
        }

        // Step 3: Wait for what is due next.
        const dueAtMs = Math.min(renewAtMs, silent ? Number.POSITIVE_INFINITY : reportAtMs)
        await sleep(Math.min(waitMsMax, Math.max(0, dueAtMs - performance.now())))
        wake = new AbortController()
      }
    } finally {
      clearInterval(askTimer)
      session = undefined
      await authorizations?.close()
      await opened.close()
    }
  }

  /** @returns when the next is due, by `performance.now()` */
  async function report(opened: Session): Promise<number> {
    const sentAtMs = performance.now()
    changed = false
    const answer = await opened.report(postureOf(health, Date.now()), signal)
    if (!answer) return 0
    tally.heartbeats += 1
    tally.acknowledgements[bucketOf(performance.now() - sentAtMs)]! += 1
    // As the agent has it: one report may be an accident.
    if (opened.reports === 2) failures = 0
    setBroken(false)
    become(silent ? 'silent' : 'reporting')
    const nextInMs = answer.nextInterval ? millisecondsOf(answer.nextInterval) : intervalDefaultMs
    return performance.now() + Math.max(intervalMinMs, nextInMs)
  }

  function keepAsking(authorizations: AuthorizationStream, { user, service, everyMs }: Asking): NodeJS.Timeout {
    let held: string | undefined
    const ask = async () => {
      try {
        if (held) await authorizations.closeConnections([held])
        const [answer] = await authorizations.ask([{ user, service }])
        held = answer?.allowed ? answer.connectionId : undefined
        if (answer?.allowed) tally.allowed += 1
        else tally.denied += 1
      } catch (failure) {
        if (session && !cut && !signal.aborted) noted(failure)
      }
    }
    void ask()
    return setInterval(ask, everyMs)
  }

  return {
    async enroll(token) {
      // The same key each time: an answer that was lost is given again.
      const keyPem = createKey()
      const description = { id, type: DeviceType.SERVER, os: 'simulated', osVersion: '1' }
      while (!signal.aborted) {
        try {
          credentials = await enrollDevice({ server, token, device: description, keyPem, signal })
          tally.enrolled += 1
          failures = 0
          return
        } catch (failure) {
          if (signal.aborted) break
          const error = noted(failure)
          if (isFinal(error)) {
            setBroken(true)
            return become('failed')
          }
          await backOff(error)
        }
      }
      become('stopped')
    },

    async live() {
      while (credentials && !signal.aborted) {
        try {
          await converse(credentials)
        } catch (failure) {
          if (signal.aborted) break
          if (!cut) {
            const error = noted(failure)
            // The server may be done with one that the script has silenced.
            setBroken(!silent)
            if (identityEnds.has(error.reason)) return become('failed')
            become('waiting')
            await backOff(error)
          }
        }
        if (signal.aborted) break
        if (cut) {
          cut = false
          become('waiting')
          await backOff()
        }
        tally.reconnects += 1
      }
      if (state !== 'failed') become('stopped')
    },

    act(step) {
      if (!session || state === 'failed') return
      count(tally.scripted, step.action)
      if (step.action === 'posture') {
        health = step.posture
        changed = true
      }
      if (step.action === 'disconnect') cut = true
      if (step.action === 'stop-heartbeats') {
        silent = true
        if (state === 'reporting') become('silent')
        return
      }
      wake.abort()
    },
  }
}
