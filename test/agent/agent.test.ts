import { mkdirSync, rmdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ServerDuplexStream } from '@grpc/grpc-js'
import test from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import { openSession } from '../../src/client/session.ts'
import { loadState } from '../../src/client/state.ts'
import { systemClock } from '../../src/clock.ts'
import {
  type HeartbeatRequest,
  type HeartbeatResponse,
  HeartbeatServiceService,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { fleetServer, type Kind, unavailable } from './fleet-server.ts'
import { startAgent } from './running-agent.ts'
import { deviceCredentials, serve, smallAuthority } from './small-server.ts'

const authority = await smallAuthority()
const alpha = deviceCredentials(authority, 'alpha')

/** A server that answers the reports of all streams with these, one after the other. */
function asking(...directives: Kind[]) {
  const left = [...directives]
  return {
    answer: () => {
      const next = left.shift()
      return { directives: next ? [next] : [] }
    },
  }
}

test('an enrolled device reports, goes elsewhere when it is asked to, and stops when it is told to', async t => {
  const { address } = await fleetServer(t, authority, asking({ $case: 'reconnect', value: { delay: undefined } }))
  let reports = 0
  const agent = await startAgent(t, { server: address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && ++reports === 2) stop()
  })
  await agent.done
  t.deepEqual(agent.told(), ['resumed', 'connecting', 'reported', 'reconnecting', 'connecting', 'reported', 'stopped'])
})

test('the log says once that a device is quarantined, and once that it is released', async t => {
  const quarantined: Kind = { $case: 'quarantined', value: { reason: 'lost' } }
  const { address } = await fleetServer(t, authority, asking(quarantined, quarantined))
  const agent = await startAgent(t, { server: address }, alpha, ({ event }, { stop }) => {
    if (event === 'released') stop()
  })
  await agent.done
  t.deepEqual(
    agent.told().filter(event => event === 'quarantined' || event === 'released'),
    ['quarantined', 'released'],
  )
})

test('what is pushed between two reports is told at once', async t => {
  const server = await fleetServer(t, authority)
  const agent = await startAgent(t, { server: server.address, timer: unhurried() }, alpha, ({ event }, { stop }) => {
    if (event === 'reported') server.streams[0]?.send({ $case: 'quarantined', value: { reason: 'lost' } })
    if (event === 'quarantined') server.streams[0]?.send({ $case: 'released', value: {} })
    if (event === 'released') server.streams[0]?.send({ $case: 'policyChanged', value: { revision: '7' } })
    if (event === 'policy-changed') stop()
  })
  await agent.done
  t.deepEqual(agent.told(), [
    'resumed',
    'connecting',
    'reported',
    'quarantined',
    'released',
    'policy-changed',
    'stopped',
  ])
})

test('a stream that breaks between two reports is missed at once', async t => {
  const server = await fleetServer(t, authority)
  const agent = await startAgent(t, { server: server.address, timer: unhurried() }, alpha, ({ event }, { stop }) => {
    if (event === 'reported') server.streams[0]?.cut(unavailable())
    if (event === 'disconnected') stop()
  })
  await agent.done
  t.deepEqual(agent.told(), ['resumed', 'connecting', 'reported', 'disconnected', 'stopped'])
})

test('a certificate that can not be kept is used all the same, and kept as soon as that can be', async t => {
  const late = { ...alpha, renewAfter: new Date() }
  const server = await fleetServer(t, authority)
  let inTheWay = ''
  const agent = await startAgent(t, { server: server.address }, late, ({ event }, { stateDirectory, stop }) => {
    if (event === 'reported' && server.streams.length === 1) {
      inTheWay = join(stateDirectory, 'device.crt')
      rmSync(inTheWay)
      mkdirSync(inTheWay)
    }
    if (event === 'state-unsaved') rmdirSync(inTheWay)
    if (event === 'reported' && server.streams[1]?.reports.length === 2) stop()
  })
  await agent.done
  t.is(agent.told().filter(event => event === 'state-unsaved').length, 1)
  const kept = await loadState(agent.stateDirectory)
  t.true(kept?.certificateChainPem.startsWith(server.streams[1]?.shown.toString() ?? '?'))
})

test('a revoked device ends with an error that says why', async t => {
  const { address } = await fleetServer(t, authority, asking({ $case: 'revoked', value: { reason: 'stolen' } }))
  const { done } = await startAgent(t, { server: address }, alpha)
  const error = await t.throwsAsync(done, { message: /^the device has been revoked \(stolen\)$/ })
  t.like(error, { reason: 'DEVICE_REVOKED' })
})

test('a device that is not enrolled and has no token says so', async t => {
  const stateDirectory = join(tmpdir(), 'edgemesh-nothing-here')
  const { signal } = new AbortController()
  const posture = async () => ({})
  const running = runAgent({ server: 'localhost:1', stateDirectory, device: {}, posture, log: () => {}, signal })
  await t.throwsAsync(running, { message: /there is no token to enroll with/ })
})

test('a server that takes reports and acknowledges none is taken to be gone', async t => {
  const heartbeat = (call: ServerDuplexStream<HeartbeatRequest, HeartbeatResponse>) => {
    call.resume()
    call.on('end', () => call.end())
  }
  const server = await serve(t, authority, [[HeartbeatServiceService, { heartbeat }]])
  const session = openSession({
    server,
    credentials: alpha,
    trustBundleId: () => '',
    onDirective: () => {},
    wake: () => {},
    clock: systemClock,
    acknowledgementTimeoutMs: 20,
  })
  const error = await t.throwsAsync(session.report({}, new AbortController().signal))
  t.like(error, { reason: 'SERVER_SILENT', message: 'a report was not acknowledged within 0.02 s' })
  await session.close()
})

/** Waits until it is woken, and not a moment longer: nothing comes due. */
function unhurried() {
  return {
    uptime: () => 0,
    sleep: (ms: number, signal: AbortSignal) =>
      new Promise<void>(resolve => {
        if (ms === 0 || signal.aborted) resolve()
        signal.addEventListener('abort', () => resolve())
      }),
  }
}
