import test from 'ava'
import { loadState } from '../../src/client/state.ts'
import { durationOf } from '../../src/duration.ts'
import { Fault } from '../../src/fault.ts'
import { fleetServer, keySha256, type Reply, reportIntervalMs, unauthenticated, unavailable } from './fleet-server.ts'
import { startAgent } from './running-agent.ts'
import { deviceCredentials, smallAuthority } from './small-server.ts'

const authority = await smallAuthority()
const never = new Date('2100-01-01')
const alpha = { ...deviceCredentials(authority, 'alpha'), renewAfter: never }

const askToRenew = (delayMs?: number): Reply => {
  const delay = delayMs === undefined ? undefined : durationOf(delayMs)
  return { directives: [{ $case: 'renewCertificate', value: { delay } }] }
}
const nothing: Reply = { directives: [] }

test('a device whose certificate is late in its life is never without a stream while it changes over', async t => {
  const late = { ...alpha, renewAfter: new Date() }
  const server = await fleetServer(t, authority)
  const agent = await startAgent(t, { server: server.address }, late, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams.length === 2) stop()
  })
  await agent.done
  const [before, after] = server.streams
  t.deepEqual(agent.told(), ['resumed', 'connecting', 'reported', 'renewed', 'connecting', 'reported', 'stopped'])
  t.deepEqual([before?.ended, before?.besides], ['by the device', 1])

  // Another key, which the next stream has shown and the folder keeps.
  const kept = await loadState(agent.stateDirectory)
  t.not(kept?.keyPem, alpha.keyPem)
  t.is(server.renewals[0]?.keySha256, keySha256(kept?.keyPem ?? ''))
  t.is(server.renewals[0]?.shown.serialNumber, before?.shown.serialNumber)
  t.true(kept?.certificateChainPem.startsWith(after?.shown.toString() ?? '?'))
  t.is(kept?.tokenId, alpha.tokenId)
})

test('the stream that a device has stays while no other can be had', async t => {
  // The first stream is asked away; the next three are refused before they have begun.
  const server = await fleetServer(t, authority, {
    answer: ({ stream }) => {
      if (stream === 0) return { directives: [{ $case: 'reconnect', value: { delay: undefined } }] }
      return stream < 4 ? { refuse: unavailable() } : nothing
    },
  })
  const open: number[] = []
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reconnection-failed') open.push(server.open().length)
    if (event === 'reported' && server.streams.length === 5) stop()
  })
  await agent.done
  t.deepEqual(open, [1, 1, 1])
  t.deepEqual([server.streams[0]?.ended, server.streams[0]?.besides], ['by the device', 1])
})

test('a renewal that the server asks for waits as long as it says, from the first time that it asks', async t => {
  let renewedAtMs = -1
  const server = await fleetServer(t, authority, {
    intervalMs: 10_000,
    answer: ({ report }) => askToRenew(report === 0 ? 60_000 : 1_000),
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { timer, stop }) => {
    if (event !== 'renewed') return
    renewedAtMs = timer.uptime()
    stop()
  })
  await agent.done
  t.is(renewedAtMs, 60_000)
})

test('many that are asked to renew at no given time do not all come at once', async t => {
  const server = await fleetServer(t, authority, { answer: () => askToRenew() })
  const times: number[] = []
  for (const share of [0.1, 0.9]) {
    const random = () => share
    const agent = await startAgent(t, { server: server.address, random }, alpha, ({ event }, { timer, stop }) => {
      if (event !== 'renewed') return
      times.push(Math.round(timer.uptime()))
      stop()
    })
    await agent.done
  }
  t.deepEqual(times, [3_000, 27_000])
})

test('a server that asks for one renewal after the other does not get one after the other', async t => {
  const server = await fleetServer(t, authority, { answer: () => askToRenew(0) })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'renewed' && server.renewals.length === 4) stop()
  })
  await agent.done
  t.is(agent.timer.uptime(), 30_000)
})

test('a certificate that is due for renewal when it is new is renewed once an hour', async t => {
  const server = await fleetServer(t, authority, { intervalMs: 60_000, renewAfterMs: -1 })
  const late = { ...alpha, renewAfter: new Date(0) }
  const agent = await startAgent(t, { server: server.address }, late, ({ event }, { stop }) => {
    if (event === 'renewed' && server.renewals.length === 3) stop()
  })
  await agent.done
  t.is(agent.timer.uptime(), 2 * 3_600_000)
})

for (const [title, aheadMs] of [
  ['ahead', 300 * 86_400_000],
  ['behind', -300 * 86_400_000],
] as const) {
  test(`a device whose clock is far ${title} renews when the server's clock says so`, async t => {
    const dueInMs = 3 * reportIntervalMs
    const due = { ...alpha, renewAfter: new Date(Date.now() + dueInMs) }
    let renewedAtMs = -1
    let passed = () => 0
    const server = await fleetServer(t, authority, { clock: () => due.renewAfter.getTime() - dueInMs + passed() })
    const clock = () => Date.now() + aheadMs + passed()
    const agent = await startAgent(t, { server: server.address, clock }, due, ({ event }, { timer, stop }) => {
      passed = timer.uptime
      if (event !== 'renewed') return
      renewedAtMs = timer.uptime()
      stop()
    })
    await agent.done
    t.true(Math.abs(renewedAtMs - dueInMs) < 60_000, `${renewedAtMs}`)
    t.true(agent.told().includes('clock-wrong'))
  })
}

test('a renewal that fails is tried again with the same key, while reports go on', async t => {
  const server = await fleetServer(t, authority, {
    intervalMs: 30_000,
    answer: ({ report }) => (report === 0 ? askToRenew(0) : nothing),
    renewal: attempt => (attempt < 2 ? unavailable() : undefined),
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'renewed') stop()
  })
  await agent.done
  t.is(agent.told().filter(event => event === 'renewal-failed').length, 2)
  t.is(new Set(server.renewals.map(({ keySha256 }) => keySha256)).size, 1)
  t.true((server.streams[0]?.acknowledged ?? 0) > 4)
})

test('what a server says of a certificate that has been renewed since ends nothing', async t => {
  // Renewed on the first stream; the second can't be had; the first is cut for its certificate meanwhile.
  const server = await fleetServer(t, authority, {
    answer: ({ stream, report }) => {
      if (stream === 0) return report === 0 ? askToRenew(0) : nothing
      if (stream > 1) return nothing
      server.streams[0]?.cut(unauthenticated('CERTIFICATE_REVOKED'))
      return { refuse: unavailable() }
    },
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams.length === 3) stop()
  })
  await t.notThrowsAsync(agent.done)
  t.not(server.streams[2]?.shown.serialNumber, server.streams[0]?.shown.serialNumber)
})

test('a device that has renewed is not made to renew again by the server that still sees the old certificate', async t => {
  const server = await fleetServer(t, authority, {
    intervalMs: 1_000,
    answer: ({ stream }) => {
      if (stream === 0) return askToRenew(0)
      return stream < 7 ? { refuse: unavailable() } : nothing
    },
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams.length === 8) stop()
  })
  await agent.done
  t.true((server.streams[0]?.acknowledged ?? 0) > 10)
  t.is(server.renewals.length, 1)
})

test('a certificate that names somebody else is not taken', async t => {
  const server = await fleetServer(t, authority, { answer: () => askToRenew(0) })
  const beta = { ...deviceCredentials(authority, 'beta'), spiffeId: alpha.spiffeId, deviceId: alpha.deviceId }
  const agent = await startAgent(
    t,
    { server: server.address },
    { ...beta, renewAfter: never },
    ({ event }, { stop }) => {
      if (event === 'renewal-failed' || event === 'renewed') stop()
    },
  )
  await agent.done
  const failed = agent.events.find(event => event.event === 'renewal-failed')
  t.is(failed?.error.reason, 'CERTIFICATE_UNUSABLE')
  t.regex(failed?.error.message ?? '', /names another: .*beta/)
})

test('how long a server wants to be left alone is added to the wait for the next renewal', async t => {
  const retryAfterMs = 100_000
  const server = await fleetServer(t, authority, {
    answer: () => askToRenew(0),
    renewal: () => new Fault('RESOURCE_EXHAUSTED', 'RATE_LIMITED', 'slower', { retryAfterMs }),
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'renewal-failed' || event === 'renewed') stop()
  })
  await agent.done
  const failed = agent.events.find(event => event.event === 'renewal-failed')
  t.is(failed?.retryInMs, 90_000 + retryAfterMs)
})
