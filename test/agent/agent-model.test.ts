/**
 * The agent against servers that do anything in any order, beside a model of what it has to do. A script says what
 * each stream does with each report that comes, and what becomes of each renewal; when it is over, the next stream is
 * good and the agent is stopped. Time is virtual.
 */
import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import fc from 'fast-check'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { describeCallError } from '../../src/client/channel.ts'
import { saveState } from '../../src/client/state.ts'
import { backoffDelayMs } from '../../src/client/waiting.ts'
import { durationOf } from '../../src/duration.ts'
import { Fault } from '../../src/fault.ts'
import type { TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'
import {
  bundleOf,
  type FleetServer,
  fleetServer,
  type Kind,
  type Reply,
  reportIntervalMs,
  unauthenticated,
  unavailable,
} from './fleet-server.ts'
import { deviceCredentials, smallAuthority } from './small-server.ts'
import { virtualTime } from './virtual-time.ts'

const authority = await smallAuthority()
const other = await smallAuthority()
const credentials = { ...deviceCredentials(authority, 'alpha'), renewAfter: new Date('2100-01-01') }

/** What the server does with one report. */
type Step =
  | { does: 'acknowledge' }
  | { does: 'acknowledge and ask to reconnect'; afterMs: number }
  | { does: 'acknowledge and ask to renew'; afterMs: number }
  | { does: 'acknowledge and send a bundle' }
  | { does: 'acknowledge and quarantine' }
  | { does: 'revoke' }
  | { does: 'break' }
  | { does: 'end' }
  | { does: 'refuse'; reason: string }

type Renewal = 'granted' | 'unavailable' | 'RECOVERY_NEEDS_APPROVAL' | 'RECOVERY_WINDOW_OVER'

/** A stream that has no step left breaks, if another follows. */
type Script = { streams: Step[][]; renewals: Renewal[] }

const endings = ['DEVICE_REVOKED', 'DEVICE_DELETED', 'CERTIFICATE_REVOKED', 'CERTIFICATE_RETIRED']
const passing = ['CERTIFICATE_UNKNOWN', 'CERTIFICATE_EXPIRED']

const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 6, arbitrary: fc.constant<Step>({ does: 'acknowledge' }) },
  {
    weight: 4,
    arbitrary: fc.record({
      does: fc.constant('acknowledge and ask to reconnect' as const),
      afterMs: fc.constantFrom(0, 20_000),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      does: fc.constant('acknowledge and ask to renew' as const),
      afterMs: fc.constantFrom(0, 5_000),
    }),
  },
  { weight: 1, arbitrary: fc.constant<Step>({ does: 'acknowledge and send a bundle' }) },
  { weight: 1, arbitrary: fc.constant<Step>({ does: 'acknowledge and quarantine' }) },
  { weight: 2, arbitrary: fc.constant<Step>({ does: 'break' }) },
  { weight: 1, arbitrary: fc.constant<Step>({ does: 'end' }) },
  { weight: 3, arbitrary: fc.constantFrom(...passing).map((reason): Step => ({ does: 'refuse', reason })) },
  { weight: 1, arbitrary: fc.constantFrom(...endings).map((reason): Step => ({ does: 'refuse', reason })) },
  { weight: 1, arbitrary: fc.constant<Step>({ does: 'revoke' }) },
)
const renewal = fc.constantFrom<Renewal>(
  'granted',
  'granted',
  'unavailable',
  'RECOVERY_NEEDS_APPROVAL',
  'RECOVERY_WINDOW_OVER',
)
const script: fc.Arbitrary<Script> = fc.record({
  streams: fc.array(fc.array(step, { minLength: 1, maxLength: 4 }), { maxLength: 6 }),
  renewals: fc.array(renewal, { maxLength: 6 }),
})

const half = () => 0.5
const askAgainMs = 30_000
/** A renewal that has failed is tried again after so long, at the middle of the jitter. */
const renewalRetryMs = 90_000
/** A server that asks for one renewal after the other has to wait. */
const renewalPauseMs = 10_000

function stepAt({ streams }: Script, stream: number, report: number): Step {
  if (stream >= streams.length) return { does: 'acknowledge' }
  return streams[stream]?.[report] ?? { does: 'break' }
}

const bundles = [bundleOf(authority, 'first'), bundleOf(authority, 'second', other)] as const

function replyTo(step: Step): Reply {
  const asking = (...directives: Kind[]): Reply => ({ directives })
  const delay = 'afterMs' in step ? durationOf(step.afterMs) : undefined
  switch (step.does) {
    case 'acknowledge':
      return asking()
    case 'acknowledge and ask to reconnect':
      return asking({ $case: 'reconnect', value: { delay } })
    case 'acknowledge and ask to renew':
      return asking({ $case: 'renewCertificate', value: { delay } })
    case 'acknowledge and send a bundle':
      return asking({ $case: 'trustBundle', value: { trustBundle: bundles[1] } })
    case 'acknowledge and quarantine':
      return asking({ $case: 'quarantined', value: { reason: 'lost' } })
    case 'revoke':
      return asking({ $case: 'revoked', value: { reason: 'stolen' } })
    case 'break':
      return { refuse: unavailable() }
    case 'end':
      return 'end'
    case 'refuse':
      return { refuse: unauthenticated(step.reason) }
  }
}

function answerTo(renewal: Renewal | undefined): Fault | undefined {
  if (renewal === undefined || renewal === 'granted') return undefined
  if (renewal === 'unavailable') return unavailable()
  const retryAfterMs = renewal === 'RECOVERY_NEEDS_APPROVAL' ? askAgainMs : undefined
  return new Fault('FAILED_PRECONDITION', renewal, 'not like that', retryAfterMs ? { retryAfterMs } : {})
}

/** How a run goes. */
type Course = {
  /** How often a stream and a new certificate were asked for. */
  streams: number
  renewals: number
  /** How long it took, which tells whether the agent has waited as long as it has to each time. */
  passedMs: number
  end: string
}

/** What the head of agent.ts says, once more. */
function expected(script: Script): Course {
  let [streams, renewals, passedMs] = [0, 0, 0]
  let failures = 0
  let expired = false
  let renewNotBeforeMs = 0
  let bundle = 'first'
  const course = (end: string): Course => ({ streams, renewals, passedMs: Math.round(passedMs), end })
  const renew = () => {
    renewals += 1
    return script.renewals[renewals - 1] ?? 'granted'
  }

  for (;;) {
    if (expired) {
      const answer = renew()
      if (answer === 'RECOVERY_WINDOW_OVER') return course(answer)
      if (answer !== 'granted') {
        failures += 1
        passedMs += backoffDelayMs(failures, half, answer === 'RECOVERY_NEEDS_APPROVAL' ? askAgainMs : 0)
        continue
      }
      expired = false
    }

    streams += 1
    let reports = 0
    for (let leaving = false; !leaving; ) {
      const step = stepAt(script, streams - 1, reports)
      if (step.does === 'break' || step.does === 'end' || step.does === 'refuse') {
        const reason = step.does === 'refuse' ? step.reason : ''
        if (endings.includes(reason)) return course(reason)
        leaving = true
        if (reason === 'CERTIFICATE_EXPIRED') {
          expired = true
        } else {
          failures = reports >= 2 ? 0 : failures + 1
          passedMs += backoffDelayMs(failures, half)
        }
        continue
      }
      reports += 1
      if (reports >= 2) failures = 0
      if (step.does === 'revoke') return course('DEVICE_REVOKED')
      if (streams > script.streams.length) return course('stopped')
      if (step.does === 'acknowledge and ask to reconnect') {
        if (reports < 2) failures += 1
        passedMs += Math.max(step.afterMs, reports < 2 ? backoffDelayMs(failures, half) : 0)
        leaving = true
      } else if (step.does === 'acknowledge and ask to renew') {
        passedMs = Math.max(passedMs + step.afterMs, renewNotBeforeMs)
        for (let answer = renew(); answer !== 'granted'; answer = renew()) {
          passedMs += renewalRetryMs + (answer === 'RECOVERY_NEEDS_APPROVAL' ? askAgainMs : 0)
        }
        renewNotBeforeMs = passedMs + renewalPauseMs
        leaving = true
      } else if (step.does === 'acknowledge and send a bundle' && bundle === 'first') {
        bundle = 'second' // told at once
      } else {
        passedMs += reportIntervalMs
      }
    }
  }
}

/** What the agent does. */
async function actual(script: Script): Promise<Course & { server: FleetServer }> {
  const teardowns: (() => unknown)[] = []
  const stateDirectory = await mkdtemp(join(tmpdir(), 'edgemesh-model-'))
  try {
    await saveState(stateDirectory, credentials)
    const { clock, timer } = virtualTime()
    const stopping = new AbortController()
    let bundle: TrustBundle = bundles[0]
    const server = await fleetServer({ teardown: end => void teardowns.push(end) }, authority, {
      clock,
      answer({ stream, report }) {
        const step = stepAt(script, stream, report)
        if (step.does === 'acknowledge and send a bundle') bundle = bundles[1]
        return replyTo(step)
      },
      renewal: attempt => answerTo(script.renewals[attempt]),
      bundle: () => bundle,
    })
    const log = ({ event }: AgentEvent) => {
      if (event === 'reported' && server.streams.length > script.streams.length) stopping.abort()
    }
    const end = await runAgent({
      server: server.address,
      stateDirectory,
      device: {},
      posture: async () => ({}),
      log,
      signal: stopping.signal,
      clock,
      timer,
      random: half,
    }).then(
      () => 'stopped',
      failure => describeCallError(failure).reason,
    )
    const { streams, renewals } = server
    return { streams: streams.length, renewals: renewals.length, passedMs: Math.round(timer.uptime()), end, server }
  } finally {
    for (const end of teardowns) end()
    await rm(stateDirectory, { recursive: true })
  }
}

test('whatever servers do, a device waits before it tries again, gives up when it has to, and only then', async t => {
  await fc.assert(
    fc.asyncProperty(script, async script => {
      const { server, ...course } = await actual(script)
      assert.deepEqual(course, expected(script), JSON.stringify([course, expected(script)]))
      // The device ends a stream for the sake of another that works, or because all is over.
      for (const { ended, besides } of server.streams.slice(0, -1)) {
        if (ended === 'by the device' && course.end === 'stopped') assert.ok(besides > 0)
      }
    }),
    { numRuns: Number(process.env.AGENT_MODEL_RUNS ?? 60) },
  )
  t.pass()
})
