/**
 * The small HTTP port for those who watch the service: Prometheus, load balancers, Kubernetes.
 *
 *     GET /metrics   what Prometheus scrapes
 *     GET /healthz   200 as long as the process answers; when it doesn't, restart it
 *     GET /crl       the revocation list (RFC 5280 section 5) of the authority that issues, DER; /crl/<key id>.crl that of
 *                    the authority with that key identifier: what certificates carry as distribution point
 *     GET /readyz    200 when calls can be served, 503 when not; a JSON document says which check failed
 *
 * It reads no request body, and gives slow or silent clients little time.
 */
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Log } from './log.ts'

export type Readiness = { ready: boolean; checks: Record<string, { ok: boolean; detail?: string }> }

export type TelemetryHttpOptions = {
  host: string
  /** 0 takes a free one. */
  port: number
  /** Answers a scrape. */
  metrics: (request: IncomingMessage, response: ServerResponse) => void
  ready: () => Promise<Readiness>
  /** The revocation list of an issuer, DER, by its key identifier; without one that of the issuer of today. */
  revocationList: (issuerKeyId: string | undefined) => Promise<Buffer | undefined>
  log: Log
}

export type TelemetryHttp = { port: number; stop(): Promise<void> }

const HEADER_BYTES_MAX = 8_192
const REQUEST_MS_MAX = 5_000
const KEEP_ALIVE_MS = 15_000
/** A handful of scrapers and probes; the rest is someone holding sockets open. */
const CONNECTIONS_MAX = 64
/** Kubernetes probes give up after a second unless told otherwise; nobody waits longer than this. */
const READY_MS_MAX = 3_000

export async function startTelemetryHttp(options: TelemetryHttpOptions): Promise<TelemetryHttp> {
  const { host, port, metrics, log } = options
  const limits = {
    maxHeaderSize: HEADER_BYTES_MAX,
    headersTimeout: REQUEST_MS_MAX,
    requestTimeout: REQUEST_MS_MAX,
    keepAliveTimeout: KEEP_ALIVE_MS,
    connectionsCheckingInterval: 1_000,
  }
  const server = createServer(limits, (request, response) => {
    // A body, which no route wants, is left unread, and the connection with it.
    if (request.headers['content-length'] || request.headers['transfer-encoding']) {
      response.setHeader('connection', 'close')
    }
    answer(request, response)
  })
  server.maxConnections = CONNECTIONS_MAX
  server.listen(port, host)
  await once(server, 'listening')
  server.on('error', err => log.error({ err }, 'telemetry port failed'))

  function answer(request: IncomingMessage, response: ServerResponse): void {
    const path = request.url?.split('?')[0] ?? ''
    const list = /^\/crl(?:\/([0-9a-f]{2,64})\.crl)?$/.exec(path)
    if (path !== '/metrics' && path !== '/healthz' && path !== '/readyz' && !list) {
      say(response, 404, 'not found\n')
    } else if (request.method !== 'GET' && request.method !== 'HEAD') {
      response.setHeader('allow', 'GET, HEAD')
      say(response, 405, 'method not allowed\n')
    } else if (list) {
      void sayRevocationList(response, list[1], options)
    } else if (path === '/healthz') {
      say(response, 200, 'ok\n')
    } else if (path === '/readyz') {
      void sayReadiness(response, options)
    } else {
      metrics(request, response)
    }
  }

  return {
    port: (server.address() as AddressInfo).port,
    async stop() {
      const closed = once(server, 'close')
      server.close()
      server.closeAllConnections()
      await closed
    },
  }
}

async function sayReadiness(response: ServerResponse, { ready, log }: TelemetryHttpOptions): Promise<void> {
  let readiness: Readiness
  const answered = new AbortController()
  try {
    readiness = await Promise.race([ready(), sleep(READY_MS_MAX, TOO_LATE, { signal: answered.signal })])
  } catch (err) {
    log.error({ err }, 'readiness cannot be told')
    readiness = { ready: false, checks: { readiness: { ok: false, detail: 'the check itself failed' } } }
  }
  answered.abort()
  response.setHeader('content-type', 'application/json')
  response.setHeader('cache-control', 'no-store')
  response.writeHead(readiness.ready ? 200 : 503).end(`${JSON.stringify(readiness)}\n`)
}

async function sayRevocationList(
  response: ServerResponse,
  issuerKeyId: string | undefined,
  { revocationList, log }: TelemetryHttpOptions,
): Promise<void> {
  try {
    const der = await revocationList(issuerKeyId)
    if (!der) return say(response, 404, 'no such authority is trusted\n')
    // RFC 2585 section 3. Whoever asks wants to know what is revoked now.
    response.setHeader('content-type', 'application/pkix-crl')
    response.setHeader('cache-control', 'no-cache')
    response.writeHead(200).end(der)
  } catch (err) {
    log.warn({ err }, 'the revocation list can not be signed now')
    say(response, 503, 'the revocation list can not be had now\n')
  }
}

const TOO_LATE: Readiness = {
  ready: false,
  checks: { readiness: { ok: false, detail: `no answer within ${READY_MS_MAX} ms` } },
}

function say(response: ServerResponse, status: number, text: string): void {
  response.setHeader('content-type', 'text/plain; charset=utf-8')
  response.writeHead(status).end(text)
}
