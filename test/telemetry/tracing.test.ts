/** Traces as a collector receives them from `edgemesh serve`, and the log beside them. */
import { randomBytes } from 'node:crypto'
import { Metadata, type ServiceError } from '@grpc/grpc-js'
import test, { type ExecutionContext } from 'ava'
import type { CheckResponse } from '../../src/gen/edgemesh/v1/authorize.ts'
import { SettingsError } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { describeSpan, passOnTrace, spanned, startTracing, traceCall } from '../../src/telemetry/tracing.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  type EdgeMesh,
  eventually,
  refused,
  startEdgeMesh,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa, startOpa } from '../support/opa.ts'
import { type OtlpReceiver, type OtlpSpan, startOtlpReceiver } from '../support/otlp.ts'
import { type ServedEdgeMesh, serve } from '../support/serve.ts'

const check = 'edgemesh.v1.AuthorizeService/Check'
const authorize = 'edgemesh.v1.AuthorizeService/Authorize'

type Traced = {
  mesh: EdgeMesh
  served: ServedEdgeMesh
  collector: OtlpReceiver
  device: Credentials
  clients: Pick<EdgeMesh, 'clients'>
}

/** A healthy device, and an instance that exports its traces. */
async function startTraced(
  t: ExecutionContext,
  env: Record<string, string> = {},
  args: string[] = [],
): Promise<Traced> {
  const mesh = await startEdgeMesh(t)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const collector = await startOtlpReceiver(t)
  const settings = {
    ...testEnvironment,
    DATABASE_URL: mesh.databaseUrl,
    LOG_LEVEL: 'DEBUG',
    INSTANCE_ID: 'traced',
    OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json',
    OTEL_BSP_SCHEDULE_DELAY: '100',
    ...env,
  }
  const served = await serve(t, settings, { args })
  const clients = { clients: (who: Credentials) => clientsOf(t, served.address, who) }
  return { mesh, served, collector, device, clients }
}

type Caller = { traceId: string; spanId: string; metadata: Metadata }

/** A caller that is traced, and whether it is sampled. */
function caller(sampled = true): Caller {
  const [traceId, spanId] = [randomBytes(16).toString('hex'), randomBytes(8).toString('hex')]
  const metadata = new Metadata()
  metadata.set('traceparent', `00-${traceId}-${spanId}-${sampled ? '01' : '00'}`)
  return { traceId, spanId, metadata }
}

function askCheck({ clients, device }: Traced, { metadata }: Pick<Caller, 'metadata'>, user = 'ada') {
  const question = { id: 'q', user, service: 'payroll', action: '' }
  return new Promise<CheckResponse>((resolve, reject) => {
    clients
      .clients(device)
      .authorize.check({ question, deviceId: '' }, metadata, (error: ServiceError | null, response) =>
        error ? reject(error) : resolve(response),
      )
  })
}

function arrived({ spans }: OtlpReceiver, what: string, fits: (span: OtlpSpan) => boolean): Promise<OtlpSpan> {
  return eventually(`a span: ${what}`, () => spans.find(fits))
}

test('a call of a caller that is traced is in its trace: the handler, the policy, the commit, and the line of the log', async t => {
  const traced = await startTraced(t)
  const { collector, served } = traced
  const { traceId, spanId, metadata } = caller()
  const { answer } = await askCheck(traced, { metadata })
  t.true(answer?.allowed)

  const ofTrace = (name: string) => arrived(collector, name, span => span.traceId === traceId && span.name === name)
  const call = await ofTrace(check)
  t.is(call.parentSpanId, spanId)
  t.like(call.attributes, {
    'rpc.system': 'grpc',
    'rpc.service': 'edgemesh.v1.AuthorizeService',
    'rpc.method': 'Check',
    'rpc.response.status_code': 'OK',
    'client.address': '127.0.0.1',
    'edgemesh.caller': 'spiffe://edgemesh.local/device/alpha',
    'edgemesh.decision': answer?.decisionId.split('.')[0],
    'edgemesh.allowed': '1',
  })
  t.like(call.resource, { 'service.name': 'edgemesh', 'service.instance.id': 'traced' })
  t.false('process.command_args' in call.resource, 'command lines are not exported')
  for (const name of ['facts', 'policy authz', 'audit commit'])
    t.is((await ofTrace(name)).parentSpanId, call.spanId, name)

  const line = await eventually('the line of the log', () => served.log.find(entry => entry.trace_id === traceId))
  t.like(line, { msg: 'a call has ended', method: `/${check}`, code: 'OK', span_id: call.spanId })
  t.is(served.log.find(({ msg }) => msg === 'edgemesh is serving')?.trace_id, undefined)

  // The same question again is answered from memory: no facts to read, no policy to ask.
  const again = caller()
  await askCheck(traced, again)
  await arrived(collector, 'the second call', span => span.traceId === again.traceId && span.name === check)
  const names = collector.spans.filter(span => span.traceId === again.traceId).map(({ name }) => name)
  t.deepEqual(names.sort(), ['audit commit', check].sort())
})

test('a call that nobody traces begins a trace; a refusal has its reason, and is no failure of the server', async t => {
  const traced = await startTraced(t)
  const { collector, mesh, clients } = traced
  await askCheck(traced, { metadata: new Metadata() })
  const call = await arrived(collector, 'the call', ({ name }) => name === check)
  t.is(call.parentSpanId, '')

  await refused(unary(clients.clients(mesh.anonymous).admin, 'getDevice', { id: 'alpha' }))
  const refusal = await arrived(collector, 'the refusal', ({ name }) => name.endsWith('/GetDevice'))
  t.like(refusal.attributes, {
    'rpc.response.status_code': 'UNAUTHENTICATED',
    'edgemesh.reason': 'CERTIFICATE_MISSING',
    'edgemesh.caller': 'anonymous',
  })
  t.is(refusal.status, 0)
})

test('who shows no certificate has no say in traces: neither in which trace a call is, nor in whether it is sampled', async t => {
  const traced = await startTraced(t, {
    OTEL_TRACES_SAMPLER: 'parentbased_traceidratio',
    OTEL_TRACES_SAMPLER_ARG: '0',
  })
  const { collector, mesh, clients } = traced
  const [anonymous, known] = [caller(), caller()]
  await new Promise<void>((resolve, reject) => {
    const client = clients.clients(mesh.anonymous).enroll
    client.getChallenge({}, anonymous.metadata, error => (error ? reject(error) : resolve()))
  })
  await askCheck(traced, known)
  await arrived(collector, 'the call of who is known', ({ name }) => name === check)
  await traced.served.stop()
  t.deepEqual([...new Set(collector.spans.map(({ traceId }) => traceId))], [known.traceId])
})

test('each message of a stream is traced by itself, with a link to its stream; or in the trace that the stream was opened in', async t => {
  const traced = await startTraced(t)
  const { collector, clients, device } = traced
  const heart = heartbeats(t, clients, device)
  await heart.beat(healthy)
  const report = await arrived(collector, 'the report', ({ name }) => name.endsWith('/Heartbeat message'))
  t.is(report.parentSpanId, '')
  t.is(report.links.length, 1)
  t.not(report.links[0]?.traceId, report.traceId)
  await arrived(collector, 'its commit', span => span.name === 'report commit' && span.parentSpanId === report.spanId)

  const access = authorizations(t, clients, device)
  const { allowed, decisionId, connectionId } = await access.ask('ada', 'payroll')
  t.true(allowed)
  const decision = await arrived(collector, 'the decision', ({ name }) => name === `${authorize} message`)
  t.is(decision.attributes['edgemesh.decision'], decisionId.split('.')[0])
  await arrived(collector, 'its commit', span => span.name === 'audit commit' && span.parentSpanId === decision.spanId)

  // Taken back by the server of its own accord: a trace of its own.
  await heart.beat({ diskEncrypted: false })
  await access.revocationOf(connectionId)
  const anew = await arrived(
    collector,
    'the revocation',
    span => span.attributes['edgemesh.connection'] === connectionId,
  )
  t.deepEqual([anew.name, anew.parentSpanId], ['connection decided anew', ''])
  t.not(anew.traceId, report.traceId)

  const { traceId, spanId, metadata } = caller()
  const stream = clients.clients(device).authorize.authorize(metadata)
  t.teardown(() => stream.cancel())
  stream.on('error', () => {})
  stream.resume()
  const questions = [{ id: 'q', user: 'nobody', service: 'payroll', action: '' }]
  stream.write({ kind: { $case: 'questions', value: { questions } } })
  const denied = await arrived(
    collector,
    'the denial',
    span => span.traceId === traceId && span.name.endsWith('message'),
  )
  t.deepEqual([denied.parentSpanId, denied.links], [spanId, []])
  t.like(denied.attributes, { 'edgemesh.allowed': '0', 'edgemesh.denied': '1' })
  stream.end()
  const whole = await arrived(collector, 'the stream', span => span.traceId === traceId && span.name === authorize)
  t.is(whole.parentSpanId, spanId)
})

test('OTEL_TRACES_SAMPLER has its say: a caller that is sampled is traced, others are not', async t => {
  const traced = await startTraced(t, {
    OTEL_TRACES_SAMPLER: 'parentbased_traceidratio',
    OTEL_TRACES_SAMPLER_ARG: '0',
  })
  const [sampled, unsampled] = [caller(), caller(false)]
  await askCheck(traced, { metadata: new Metadata() })
  await askCheck(traced, unsampled)
  await askCheck(traced, sampled)
  await arrived(traced.collector, 'the sampled call', ({ name }) => name === check)
  await traced.served.stop()
  t.deepEqual([...new Set(traced.collector.spans.map(({ traceId }) => traceId))], [sampled.traceId])
  // The log names the trace also where this instance keeps nothing of it: others may.
  t.truthy(traced.served.log.find(entry => entry.trace_id === unsampled.traceId))
})

const withOpa = findOpa() === undefined ? test.skip : test

withOpa(
  'OPA is asked in the trace of the call, and continues it; as protobuf, which is the default (needs opa)',
  async t => {
    const collector = await startOtlpReceiver(t)
    const config = ['distributed_tracing.type=http', `distributed_tracing.address=${new URL(collector.url).host}`]
    const opa = await startOpa(t, { config })
    const traced = await startTraced(t, {
      OPA_URL: opa.url,
      OTEL_EXPORTER_OTLP_PROTOCOL: '',
      OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    })
    const { traceId, metadata } = caller()
    await askCheck(traced, { metadata })
    const id = Buffer.from(traceId, 'hex')
    const from = (service: string) =>
      eventually(`the spans of ${service}`, () =>
        collector.bodies.find(({ bytes }) => bytes.includes(id) && bytes.includes(service)),
      )
    t.like(await from('ask OPA'), { path: '/v1/traces', type: 'application/x-protobuf' })
    t.like(await from('net/http/otelhttp'), { path: '/v1/traces', type: 'application/x-protobuf' })
  },
)

test('workers trace by names of their own', async t => {
  const traced = await startTraced(t, {}, ['--workers', '2'])
  const { traceId, metadata } = caller()
  await askCheck(traced, { metadata })
  const call = await arrived(traced.collector, 'the call', span => span.traceId === traceId && span.name === check)
  t.regex(call.resource['service.instance.id'] ?? '', /^traced-\d+-/)
  const line = await eventually('the line', () => traced.served.log.find(entry => entry.trace_id === traceId))
  t.truthy(line.worker)
})

test('what was traced is exported before the process ends', async t => {
  const traced = await startTraced(t, { OTEL_BSP_SCHEDULE_DELAY: '600000' })
  const { traceId, metadata } = caller()
  await askCheck(traced, { metadata })
  t.is(await traced.served.stop(), 0)
  t.truthy(traced.collector.spans.find(span => span.traceId === traceId && span.name === check))
})

test('a collector that is away costs no call, and is told of in the log; the process still ends in good order', async t => {
  const traced = await startTraced(t, { OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${await freePort()}` })
  const { answer } = await askCheck(traced, caller())
  t.true(answer?.allowed)
  const line = await eventually('the line of the log', () =>
    traced.served.log.find(({ msg }) => msg === 'traces are lost'),
  )
  t.like(line, { level: 'warn' })
  t.regex(String(line.problem), /ECONNREFUSED/)
  t.is(await traced.served.stop(), 0)
})

const log = createLog({ level: 'silent' })
const about = { instanceId: 'a', version: '1', log }

test.serial(
  'traces are off unless there is a place to send them to, and then cost nothing and change nothing',
  async t => {
    const OTEL_EXPORTER_OTLP_ENDPOINT = 'http://localhost:4318'
    t.is(await startTracing({}, about), undefined)
    t.is(await startTracing({ OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SDK_DISABLED: 'true' }, about), undefined)
    t.is(await startTracing({ OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER: 'none' }, about), undefined)
    const headers = {}
    passOnTrace(headers)
    t.deepEqual(headers, {})
    const promise = Promise.resolve(1)
    t.is(
      spanned('nothing', {}, () => promise),
      promise,
      'not even a promise of its own',
    )
    describeSpan(() => t.fail() as never)
    t.is(traceCall('/a/b', new Metadata()), undefined)
  },
)

test('an endpoint that is no URL is told by name', async t => {
  for (const variable of ['OTEL_EXPORTER_OTLP_ENDPOINT', 'OTEL_EXPORTER_OTLP_TRACES_ENDPOINT']) {
    const error = await t.throwsAsync(startTracing({ [variable]: 'collector:4318' }, about), {
      instanceOf: SettingsError,
    })
    t.regex(error.message, new RegExp(`${variable}: must be a URL`))
  }
})
