/** Traces, for whoever collects them. */

/**
 * Exports traces over OTLP when OTEL_EXPORTER_OTLP_ENDPOINT is set, as its other OTEL_ variables say; undefined when it
 * isn't. For the entry of the process, once: the SDK makes itself the tracer of the whole process. Nothing is
 * instrumented behind one's back; spans are those that the code makes through `@opentelemetry/api`.
 */
export async function startTracing(
  env: Readonly<Record<string, string | undefined>>,
): Promise<{ stop(): Promise<void> } | undefined> {
  if (!env.OTEL_EXPORTER_OTLP_ENDPOINT) return undefined
  // Half a second of loading that whoever exports no traces need not wait for.
  const { NodeSDK } = await import('@opentelemetry/sdk-node')
  const tracing = new NodeSDK({
    serviceName: env.OTEL_SERVICE_NAME ?? 'edgemesh',
    instrumentations: [],
    metricReaders: [],
    logRecordProcessors: [],
  })
  tracing.start()
  return { stop: () => tracing.shutdown() }
}
