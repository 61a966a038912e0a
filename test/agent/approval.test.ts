import test from 'ava'
import { describeCallError } from '../../src/client/channel.ts'
import { enrollDevice } from '../../src/client/enroll.ts'
import { loadState } from '../../src/client/state.ts'
import { backoffDelayMs } from '../../src/client/waiting.ts'
import { Fault, type FaultCode } from '../../src/fault.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { fleetServer, unavailable } from './fleet-server.ts'
import { type RunningAgent, startAgent } from './running-agent.ts'
import { smallAuthority } from './small-server.ts'

const authority = await smallAuthority()
const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text

const stopOnceReported = ({ event }: { event: string }, { stop }: RunningAgent) => {
  if (event === 'reported') stop()
}

test('a device that waits for approval goes on waiting when its stream breaks, with the same key, and says so once', async t => {
  const server = await fleetServer(t, authority, {
    async enrollment(attempt, { pending }) {
      pending()
      pending()
      if (attempt === 0) return unavailable()
      return attempt < 3 ? 'end' : undefined
    },
  })
  const agent = await startAgent(t, { server: server.address, token }, undefined, stopOnceReported)
  await agent.done
  t.deepEqual(
    agent.told().filter(event => event !== 'enrolling' && event !== 'disconnected'),
    ['pending-approval', 'enrolled', 'connecting', 'reported', 'stopped'],
  )
  t.is(server.enrollments.length, 4)
  t.is(new Set(server.enrollments.map(({ keySha256 }) => keySha256)).size, 1)
  t.is((await loadState(agent.stateDirectory))?.tokenId, token.split('.')[1])
  // Each of these streams had lived, so none counts as another failure in a row.
  const waits = agent.events.flatMap(event => (event.event === 'disconnected' ? [event.retryInMs] : []))
  t.deepEqual(waits, Array(3).fill(backoffDelayMs(0, () => 0.5)))
})

test('a server that asks for patience and breaks at once is asked less and less often', async t => {
  const server = await fleetServer(t, authority, {
    async enrollment(attempt, { pending }) {
      pending()
      return attempt < 4 ? unavailable() : undefined
    },
  })
  const agent = await startAgent(t, { server: server.address, token }, undefined, stopOnceReported)
  await agent.done
  const waits = agent.events.flatMap(event => (event.event === 'disconnected' ? [event.retryInMs] : []))
  t.deepEqual(waits, [500, 1_000, 2_000, 4_000])
})

test('a device whose instance dies while it waits does not give up', async t => {
  const server = await fleetServer(t, authority, {
    enrollment: (_attempt, { pending }) => {
      pending()
      return new Promise(() => {})
    },
  })
  let lost = 0
  const agent = await startAgent(t, { server: server.address, token }, undefined, ({ event }, { stop }) => {
    if (event === 'pending-approval') server.stop()
    if (event === 'disconnected' && ++lost === 3) stop()
  })
  await agent.done
  t.is(agent.told().filter(event => event === 'pending-approval').length, 1)
  t.is(agent.told().at(-1), 'stopped')
})

test('a server that has become silent is taken for dead, and not one that repeats itself', async t => {
  const patient = Promise.withResolvers<undefined>()
  let repeated = 0
  const server = await fleetServer(t, authority, {
    enrollment(attempt, { pending }) {
      pending()
      if (attempt === 0) return new Promise(() => {})
      // It takes longer in all than it may be silent.
      const repeating = setInterval(() => {
        pending()
        if (++repeated < 25) return
        clearInterval(repeating)
        patient.resolve(undefined)
      }, 100)
      return patient.promise
    },
  })
  const enrolling = { server: server.address, token, device: {}, silenceTimeoutMs: 2_000 }
  t.like(await t.throwsAsync(enrollDevice(enrolling)), {
    reason: 'SERVER_SILENT',
    message: 'the server has said nothing for 2 s',
  })
  t.is((await enrollDevice(enrolling)).deviceId, 'alpha')
})

const final: [FaultCode, string][] = [
  ['UNAUTHENTICATED', 'TOKEN_UNKNOWN'],
  ['UNAUTHENTICATED', 'TOKEN_SECRET_WRONG'],
  ['UNAUTHENTICATED', 'TOKEN_EXPIRED'],
  ['UNAUTHENTICATED', 'TOKEN_REVOKED'],
  ['PERMISSION_DENIED', 'TOKEN_OTHER_KEY'],
  ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_DEVICE'],
  ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_TYPE'],
  ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_NETWORK'],
  ['PERMISSION_DENIED', 'ENROLLMENT_REJECTED'],
  ['RESOURCE_EXHAUSTED', 'TOKEN_USED_UP'],
  ['ALREADY_EXISTS', 'DEVICE_EXISTS'],
  ['FAILED_PRECONDITION', 'DEVICE_DELETED'],
  ['FAILED_PRECONDITION', 'DEVICE_REVOKED'],
  ['INVALID_ARGUMENT', 'INVALID_FIELD'],
]
for (const [code, reason] of final) {
  test(`${reason} ends an enrollment that waits for approval, and is asked for no second time`, async t => {
    const server = await fleetServer(t, authority, {
      async enrollment(_attempt, { pending }) {
        pending()
        return new Fault(code, reason, 'no')
      },
    })
    const agent = await startAgent(t, { server: server.address, token }, undefined, ({ event }, { stop }) => {
      if (event === 'disconnected') stop()
    })
    t.is(describeCallError(await t.throwsAsync(agent.done)).reason, reason)
    t.is(server.enrollments.length, 1)
  })
}

const passing: [FaultCode, string][] = [
  ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'],
  ['FAILED_PRECONDITION', 'CSR_CHALLENGE_STALE'],
  ['FAILED_PRECONDITION', 'CSR_REPLAYED'],
  ['UNAVAILABLE', 'DATABASE_UNAVAILABLE'],
]
for (const [code, reason] of passing) {
  test(`${reason} passes: the device asks again, after as long as the server says`, async t => {
    const retryAfterMs = 7_000
    const server = await fleetServer(t, authority, {
      enrollment: async attempt => (attempt < 2 ? new Fault(code, reason, 'later', { retryAfterMs }) : undefined),
    })
    const agent = await startAgent(t, { server: server.address, token }, undefined, stopOnceReported)
    await agent.done
    t.is(server.enrollments.length, 3)
    t.is(agent.timer.uptime(), 2 * retryAfterMs + 500 + 1_000)
  })
}
