import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ServerDuplexStream } from '@grpc/grpc-js'
import test, { type ExecutionContext } from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { saveState } from '../../src/agent/state.ts'
import {
  type HeartbeatRequest,
  HeartbeatResponse,
  HeartbeatServiceService,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { deviceCredentials, serve, smallAuthority } from './small-server.ts'

const authority = await smallAuthority()

type Kind = NonNullable<HeartbeatResponse['directives'][number]['kind']>

/** Runs an enrolled agent against a server that answers each report with the next of `directives`. */
async function run(t: ExecutionContext, directives: Kind[], onEvent: (event: AgentEvent, stop: () => void) => void) {
  const stateDirectory = await mkdtemp(join(tmpdir(), 'edgemesh-agent-'))
  t.teardown(() => rm(stateDirectory, { recursive: true }))
  await saveState(stateDirectory, deviceCredentials(authority, 'alpha'))
  const left = [...directives]
  const heartbeat = (call: ServerDuplexStream<HeartbeatRequest, HeartbeatResponse>) => {
    call.on('data', ({ sequence }) => {
      const kind = left.shift()
      const answer = { acknowledgedSequence: sequence, nextInterval: { seconds: 0, nanos: 1 } }
      call.write(HeartbeatResponse.fromPartial({ ...answer, directives: kind ? [{ kind }] : [] }))
    })
    call.on('end', () => call.end())
  }
  const server = await serve(t, authority, [[HeartbeatServiceService, { heartbeat }]])
  const stopping = new AbortController()
  const log = (event: AgentEvent) => onEvent(event, () => stopping.abort())
  const posture = async () => ({ diskEncrypted: true })
  return runAgent({ server, stateDirectory, device: {}, posture, log, signal: stopping.signal, random: () => 0 })
}

test('an enrolled device reports, goes elsewhere when it is asked to, and stops when it is told to', async t => {
  const events: string[] = []
  let reports = 0
  await run(t, [{ $case: 'reconnect', value: { delay: undefined } }], ({ event }, stop) => {
    events.push(event)
    if (event === 'reported' && ++reports === 2) stop()
  })
  t.deepEqual(events, ['resumed', 'connecting', 'reported', 'reconnecting', 'connecting', 'reported', 'stopped'])
})

test('the log says once that a device is quarantined, and once that it is released', async t => {
  const events: string[] = []
  const quarantined: Kind = { $case: 'quarantined', value: { reason: 'lost' } }
  await run(t, [quarantined, quarantined], ({ event }, stop) => {
    events.push(event)
    if (event === 'released') stop()
  })
  t.deepEqual(
    events.filter(event => event === 'quarantined' || event === 'released'),
    ['quarantined', 'released'],
  )
})

test('a revoked device ends with an error that says what to do', async t => {
  const running = run(t, [{ $case: 'revoked', value: { reason: 'stolen' } }], () => {})
  const error = await t.throwsAsync(running, { message: /has been revoked \(stolen\).*enroll it under another id/ })
  t.like(error, { reason: 'DEVICE_REVOKED' })
})

test('a device that is not enrolled and has no token says so', async t => {
  const stateDirectory = join(tmpdir(), 'edgemesh-nothing-here')
  const { signal } = new AbortController()
  const posture = async () => ({})
  const running = runAgent({ server: 'localhost:1', stateDirectory, device: {}, posture, log: () => {}, signal })
  await t.throwsAsync(running, { message: /there is no token to enroll with/ })
})
