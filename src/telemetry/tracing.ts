/**
 * Traces: what a call waited for, as OpenTelemetry has it. On when OTEL_EXPORTER_OTLP_ENDPOINT is set; docs/tracing.md
 * is for operators.
 *
 *     const tracing = await startTracing(process.env, { instanceId, version, log })
 *     const rows = await spanned('audit commit', database, () => journal.append(entries))
 *     await tracing?.stop()
 *
 * Nothing is instrumented behind one's back: spans are those that the code makes here. While tracing is off everything
 * here does nothing but look at one variable, so the hot paths may call it.
 */
import {
  type Attributes,
  type Context,
  context,
  DiagLogLevel,
  diag,
  propagation,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  SpanStatusCode,
  type Tracer,
  trace,
} from '@opentelemetry/api'
import { SettingsError } from '../settings.ts'
import type { Log } from './log.ts'

/** What a call brings along: gRPC's metadata, of which only the headers of W3C Trace Context are read. */
export type Carrier = { get(name: string): (string | Buffer)[] }

/** The span of a call, from its begin to its end, and what runs in its context. */
export type CallTrace = {
  run<A extends unknown[], T>(work: (...given: A) => T, ...given: A): T
  /**
   * A span for one message of the call's stream. Of the trace that the caller has named when it opened the stream; else in a
   * trace of its own with a link to the stream, whose trace would grow for weeks.
   */
  message<T>(work: () => T): T
  /** @param about what is known of the call only now */
  end(outcome: { code: string; reason: string }, about: Attributes): void
}

type Environment = Readonly<Record<string, string | undefined>>

/** Undefined: tracing is off. */
let tracer: Tracer | undefined

/** What is still to be exported has so long to go when the process stops. */
const lastExportMs = 5_000
/** A collector that is away is told of once in a while, not with each batch. */
const complaintsApartMs = 60_000

/** Of the databases' conventions; for spans that end with a commit. */
export const database: Attributes = { 'db.system.name': 'postgresql' }

/**
 * Exports traces over OTLP when OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, as its other
 * OTEL_ variables say; undefined when they aren't. For the entry of the process, once: the SDK makes itself the tracer of
 * the whole process.
 *
 * @throws SettingsError when the endpoint is no URL
 */
export async function startTracing(
  env: Environment,
  { instanceId, version, log }: { instanceId: string; version: string; log: Log },
): Promise<{ stop(): Promise<void> } | undefined> {
  if (!isTracingWanted(env)) return undefined
  // Half a second of loading that whoever exports no traces need not wait for.
  const [{ NodeSDK }, { envDetector, hostDetector, resourceFromAttributes }] = await Promise.all([
    import('@opentelemetry/sdk-node'),
    import('@opentelemetry/resources'),
  ])
  const sdk = new NodeSDK({
    // Not the process's, as it is by default: command lines and owners are nobody's business.
    resourceDetectors: [hostDetector, envDetector],
    resource: resourceFromAttributes({
      'service.name': 'edgemesh',
      'service.version': version,
      'service.instance.id': instanceId,
    }),
    instrumentations: [],
    metricReaders: [],
    logRecordProcessors: [],
  })
  const complain = complaints(log)
  const silent = () => {}
  diag.setLogger(
    { error: complain, warn: complain, info: silent, debug: silent, verbose: silent },
    { logLevel: DiagLogLevel.WARN, suppressOverrideMessage: true },
  )
  sdk.start()
  tracer = trace.getTracer('edgemesh', version)
  log.info({ endpoint: withoutPassword(endpointOf(env)?.value ?? '') }, 'calls are traced')
  return {
    async stop() {
      tracer = undefined
      const tooLate = new Promise<never>((_, reject) => {
        setTimeout(() => reject(new Error(`not exported after ${lastExportMs} ms`)), lastExportMs).unref()
      })
      await Promise.race([sdk.shutdown(), tooLate]).catch(error => complain(String(error.message)))
    },
  }
}

/** @throws SettingsError when the endpoint is no URL */
export function isTracingWanted(env: Environment): boolean {
  const given = endpointOf(env)
  if (!given || env.OTEL_SDK_DISABLED?.toLowerCase() === 'true' || env.OTEL_TRACES_EXPORTER === 'none') return false
  if (!URL.canParse(given.value) || !/^https?:$/.test(new URL(given.value).protocol)) {
    const problem = 'must be a URL that begins with http:// or https://, such as http://localhost:4318'
    throw new SettingsError([{ variable: given.variable, problem }])
  }
  return true
}

function endpointOf(env: Environment): { variable: string; value: string } | undefined {
  for (const variable of ['OTEL_EXPORTER_OTLP_TRACES_ENDPOINT', 'OTEL_EXPORTER_OTLP_ENDPOINT']) {
    const value = env[variable]
    if (value) return { variable, value }
  }
  return undefined
}

function withoutPassword(url: string): string {
  const shown = new URL(url)
  if (shown.password !== '') shown.password = '***'
  return shown.href
}

/** What the SDK complains of: mostly a collector that is away. The code and the message, not what was sent along. */
function complaints(log: Log): (message: string) => void {
  let saidAt = Number.NEGATIVE_INFINITY
  let unsaid = 0
  return message => {
    unsaid++
    if (performance.now() - saidAt < complaintsApartMs) return
    log.warn({ problem: problemIn(message), times: unsaid }, 'traces are lost')
    saidAt = performance.now()
    unsaid = 0
  }
}

function problemIn(message: string): string {
  try {
    const { name, message: problem, code } = JSON.parse(message)
    return [name, code, problem].filter(Boolean).join(': ')
  } catch {
    return message
  }
}

/** A new span for what `work` does, until its promise settles if it returns one. Errors end it as failed. */
export function spanned<T>(name: string, attributes: Attributes, work: () => T, kind = SpanKind.INTERNAL): T {
  if (!tracer) return work()
  return within(tracer.startSpan(name, { kind, attributes }), context.active(), work)
}

/** The same in a trace of its own: for what is done later, or for several. */
export function spannedApart<T>(name: string, attributes: Attributes, work: () => T): T {
  if (!tracer) return work()
  return within(tracer.startSpan(name, { attributes, root: true }, ROOT_CONTEXT), ROOT_CONTEXT, work)
}

/** Runs what is done for several callers, or goes on when the caller has its answer, in nobody's trace. */
export function apart<T>(work: () => T): T {
  return tracer ? context.with(ROOT_CONTEXT, work) : work()
}

/** Adds to the span that is under way. What it says is made only if somebody will see it. */
export function describeSpan<Given extends unknown[]>(about: (...given: Given) => Attributes, ...given: Given): void {
  if (!tracer) return
  const span = trace.getActiveSpan()
  if (span?.isRecording()) span.setAttributes(about(...given))
}

/** Headers by which whoever is asked next continues the trace. */
export function passOnTrace(headers: Record<string, string>): void {
  if (tracer) propagation.inject(context.active(), headers)
}

/** What each line of the log says while a span is under way. */
export function traceFields(): { trace_id: string; span_id: string } | undefined {
  const span = tracer && trace.getActiveSpan()
  if (!span) return undefined
  const { traceId, spanId } = span.spanContext()
  return { trace_id: traceId, span_id: spanId }
}

/**
 * Continues the trace that the caller has named in its metadata, or begins one. Undefined while tracing is off.
 *
 * @param carrier undefined for callers who have no say in what is sampled
 */
export function traceCall(method: string, carrier: Carrier | undefined): CallTrace | undefined {
  if (!tracer) return undefined
  const name = method.slice(1)
  const at = name.lastIndexOf('/')
  const attributes = { 'rpc.system': 'grpc', 'rpc.service': name.slice(0, at), 'rpc.method': name.slice(at + 1) }
  const parent = carrier ? propagation.extract(ROOT_CONTEXT, carrier, metadataGetter) : ROOT_CONTEXT
  const isContinued = trace.getSpanContext(parent) !== undefined
  const span = tracer.startSpan(name, { kind: SpanKind.SERVER, attributes }, parent)
  const inSpan = trace.setSpan(parent, span)
  return {
    run: (work, ...given) => context.with(inSpan, work, undefined, ...given),
    message(work) {
      if (!tracer) return work()
      const links = isContinued ? [] : [{ context: span.spanContext() }]
      const message = tracer.startSpan(
        `${name} message`,
        { kind: SpanKind.SERVER, attributes, links },
        isContinued ? parent : ROOT_CONTEXT,
      )
      return within(message, isContinued ? parent : ROOT_CONTEXT, work)
    },
    end({ code, reason }, about) {
      span.setAttributes({ ...about, 'rpc.response.status_code': code })
      if (reason !== '') span.setAttribute('edgemesh.reason', reason)
      if (serversFault.has(code)) span.setStatus({ code: SpanStatusCode.ERROR, message: reason })
      span.end()
    },
  }
}

/** By the conventions for gRPC: others are the caller's mistake, and no error of the server. */
const serversFault = new Set(['UNKNOWN', 'DEADLINE_EXCEEDED', 'UNIMPLEMENTED', 'INTERNAL', 'UNAVAILABLE', 'DATA_LOSS'])

/** Not baggage: what callers put there would go on to OPA in our name. */
const metadataGetter = {
  keys: () => ['traceparent', 'tracestate'],
  get: (carrier: Carrier, name: string) =>
    name === 'baggage' ? undefined : carrier.get(name).filter(value => typeof value === 'string'),
}

function within<T>(span: Span, parent: Context, work: () => T): T {
  let result: T
  try {
    result = context.with(trace.setSpan(parent, span), work)
  } catch (error) {
    throw endFailed(span, error)
  }
  if (!(result instanceof Promise)) {
    span.end()
    return result
  }
  return result.then(
    value => {
      span.end()
      return value
    },
    error => {
      throw endFailed(span, error)
    },
  ) as T
}

/** A fault names its reason; of others no more than the kind leaves the process: what they say may be anything. */
function endFailed(span: Span, error: unknown): unknown {
  const { reason, name } = error as { reason?: unknown; name?: unknown }
  span.setStatus({ code: SpanStatusCode.ERROR, message: String(reason ?? name ?? 'error') })
  span.end()
  return error
}
