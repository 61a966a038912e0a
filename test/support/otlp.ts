/** What a collector of traces receives over OTLP, as JSON or as protobuf. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { buffer } from 'node:stream/consumers'
import { gunzipSync } from 'node:zlib'
import type { ExecutionContext } from 'ava'

export type OtlpSpan = {
  name: string
  /** Hex, as is the next. */
  traceId: string
  spanId: string
  /** The empty string for the first span of a trace. */
  parentSpanId: string
  attributes: Record<string, string>
  links: { traceId: string; spanId: string }[]
  /** 2: failed. */
  status: number
  /** What is known of the process. */
  resource: Record<string, string>
}

export type OtlpReceiver = {
  /** For OTEL_EXPORTER_OTLP_ENDPOINT. */
  url: string
  /** As they arrive, where they come as JSON. */
  spans: OtlpSpan[]
  /** As they arrive, unzipped. */
  bodies: { path: string; type: string; bytes: Buffer }[]
}

type Attributes = { key: string; value: Record<string, unknown> }[]

type ResourceSpans = {
  resource: { attributes: Attributes }
  scopeSpans: {
    spans: {
      name: string
      traceId: string
      spanId: string
      parentSpanId?: string
      attributes: Attributes
      links?: { traceId: string; spanId: string }[]
      status?: { code?: number }
    }[]
  }[]
}

export async function startOtlpReceiver(t: ExecutionContext): Promise<OtlpReceiver> {
  const spans: OtlpSpan[] = []
  const bodies: OtlpReceiver['bodies'] = []
  const server = createServer(async (request, response) => {
    const sent = await buffer(request)
    const bytes = request.headers['content-encoding'] === 'gzip' ? gunzipSync(sent) : sent
    const type = request.headers['content-type'] ?? ''
    bodies.push({ path: request.url ?? '', type, bytes })
    if (type === 'application/json') spans.push(...spansIn(JSON.parse(bytes.toString('utf8')).resourceSpans))
    response.writeHead(200, { 'content-type': type }).end(type === 'application/json' ? '{}' : '')
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, spans, bodies }
}

function spansIn(resourceSpans: ResourceSpans[]): OtlpSpan[] {
  return resourceSpans.flatMap(({ resource, scopeSpans }) =>
    scopeSpans
      .flatMap(({ spans }) => spans)
      .map(({ name, traceId, spanId, parentSpanId = '', attributes, links = [], status }) => ({
        name,
        traceId,
        spanId,
        parentSpanId,
        attributes: textOf(attributes),
        links: links.map(({ traceId, spanId }) => ({ traceId, spanId })),
        status: status?.code ?? 0,
        resource: textOf(resource.attributes),
      })),
  )
}

function textOf(attributes: Attributes): Record<string, string> {
  return Object.fromEntries(attributes.map(({ key, value }) => [key, String(Object.values(value)[0])]))
}
