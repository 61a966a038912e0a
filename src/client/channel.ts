/**
 * How a client of EdgeMesh reaches a server, and how it reads what goes wrong.
 *
 *     const { address, credentials, options } = channelTo({ server: 'localhost:8000', rootsPem })
 *     const client = new AuthorizeServiceClient(address, credentials, options)
 *
 * Several clients share one connection: see `openChannel` and `clientTarget`.
 */
import { isIP } from 'node:net'
import {
  Channel,
  ChannelCredentials,
  type ClientDuplexStream,
  type ClientOptions,
  type Metadata,
  type ServiceError,
  status,
} from '@grpc/grpc-js'
import { type Clock, systemClock } from '../clock.ts'
import { Fault, type FieldViolation, invalidField } from '../fault.ts'
import type { Any } from '../gen/google/protobuf/any.ts'
import type { Duration } from '../gen/google/protobuf/duration.ts'
import { BadRequest, ErrorInfo, RetryInfo } from '../gen/google/rpc/error_details.ts'
import { Status } from '../gen/google/rpc/status.ts'

/** `host:port`, such as `edge.example.com:8000`, `127.0.0.1:8000` or `[::1]:8000`. */
export type Server = string

/** Who a client is, and whom it trusts: a device's, an operator's or a service's. All of it PEM. */
export type Credentials = {
  keyPem: string
  /** Leaf first, then intermediates. */
  certificateChainPem: string
  rootsPem: string
}

/** What a generated client is constructed with. */
export type ChannelTarget = { address: string; credentials: ChannelCredentials; options: ClientOptions }

/** Every instance's certificate carries this name beside its own. */
const nameInEveryServerCertificate = 'localhost'

/** A connection that is silent this long is asked for a sign of life: less than the idle timeouts of load balancers. */
const keepaliveTimeMs = 30_000
const keepaliveTimeoutMs = 10_000

/** gRPC's own pauses between attempts on a channel, of two minutes in the end, are for what nobody waits for. */
const reconnectBackoffMaxMs = 10_000

/** A trust bundle with the revocations of 100,000 devices is 4 MB; everything else is far smaller. */
const receivedBytesMax = 16 * 1024 * 1024
const sentBytesMax = 4 * 1024 * 1024

/** @throws Fault INVALID_ARGUMENT when `server` is not `host:port` */
export function channelTo({
  server,
  rootsPem,
  certificatePem,
  keyPem,
}: {
  server: Server
  /** The only roots that the server's certificate may lead to. */
  rootsPem: string
  /** The client's own chain and key; absent for the calls that need no certificate. */
  certificatePem?: string
  keyPem?: string
}): ChannelTarget {
  const roots = Buffer.from(rootsPem)
  const key = keyPem === undefined ? null : Buffer.from(keyPem)
  const chain = certificatePem === undefined ? null : Buffer.from(certificatePem)
  return { address: server, credentials: ChannelCredentials.createSsl(roots, key, chain), options: optionsFor(server) }
}

/** One connection for several clients and streams of the same caller: a handshake costs more than all that follows. */
export function openChannel(server: Server, credentials: Credentials): Channel {
  const target = channelTo({
    server,
    rootsPem: credentials.rootsPem,
    certificatePem: credentials.certificateChainPem,
    keyPem: credentials.keyPem,
  })
  return new Channel(target.address, target.credentials, target.options)
}

/**
 * What a client is constructed with that has a connection of its own, or that shares one.
 *
 * A client that shares gets no credentials: the connection has them, and each TLS context takes some 20 kB that the garbage
 * collector does not see.
 *
 * @param channel made by `openChannel` from the same credentials; absent: a connection of its own
 */
export function clientTarget(server: Server, credentials: Credentials, channel: Channel | undefined): ChannelTarget {
  if (channel) {
    return { address: server, credentials: ChannelCredentials.createInsecure(), options: { channelOverride: channel } }
  }
  const { rootsPem, certificateChainPem: certificatePem, keyPem } = credentials
  return channelTo({ server, rootsPem, certificatePem, keyPem })
}

/** What every connection has in common, whatever its credentials. */
export function optionsFor(server: Server): ClientOptions {
  const host = hostOf(server)
  return {
    'grpc.keepalive_time_ms': keepaliveTimeMs,
    'grpc.keepalive_timeout_ms': keepaliveTimeoutMs,
    'grpc.max_reconnect_backoff_ms': reconnectBackoffMaxMs,
    'grpc.max_receive_message_length': receivedBytesMax,
    'grpc.max_send_message_length': sentBytesMax,
    // A channel has its connection to itself, so that closing the one closes the other.
    'grpc.use_local_subchannel_pool': 1,
    // Otherwise a TXT record in the DNS could set the retry policy.
    'grpc.service_config_disable_resolution': 1,
    ...(isIP(host) ? namedForTls : {}),
    // A proxy named in the environment is for what is far away.
    ...(isLoopback(host) ? { 'grpc.enable_http_proxy': 0 } : {}),
  }
}

// Node refuses an IP address as TLS server name (RFC 6066 section 3 forbids it), and gRPC derives that name from the
// address it dials. So whoever dials an address asks for the name that all instances have; the chain is verified all
// the same, and only instances hold a certificate for servers.
const namedForTls: ClientOptions = {
  'grpc.ssl_target_name_override': nameInEveryServerCertificate,
  'grpc.default_authority': nameInEveryServerCertificate,
}

function hostOf(server: Server): string {
  const [, ipv6, name, port] = /^(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+)):(\d{1,5})$/i.exec(server) ?? []
  const host = ipv6 ?? name
  const valid =
    host !== undefined && (ipv6 === undefined || isIP(ipv6) === 6) && Number(port) > 0 && Number(port) < 65536
  if (!valid) throw invalidField('server', `${JSON.stringify(server)} is not host:port, such as localhost:8000`)
  return host
}

function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'))
}

/** A unary call as a promise: `await answerOf(done => client.check(request, done))`. Rejects with a ServiceError. */
export function answerOf<T>(start: (done: (error: ServiceError | null, response: T) => void) => unknown): Promise<T> {
  return new Promise((resolve, reject) => {
    start((error, response) => (error ? reject(error) : resolve(response)))
  })
}

/** The end of a stream that both sides keep open. */
export type StreamEnd = {
  /** Resolves when the stream has ended: with the error, or with nothing when either side ended it in order. */
  closed: Promise<ServiceError | undefined>
  /** Ends the stream, and waits for the server to end its side; cancels when it does not. */
  close(): Promise<void>
}

/** How long the server is given to end its side: it may be waiting for the database. */
const closeGraceMs = 5_000

/** @param release called once, when the stream has ended */
export function endOf<In, Out>(call: ClientDuplexStream<In, Out>, release: () => void): StreamEnd {
  let closing = false
  const closed = new Promise<ServiceError | undefined>(resolve => {
    // gRPC tells the error first, if there is one, and then the status; the first to come decides.
    call.on('error', (error: ServiceError) => resolve(closing ? undefined : error))
    call.on('status', () => resolve(undefined))
  })
  closed.then(release)
  return {
    closed,
    async close() {
      closing = true
      call.end()
      const cancelling = setTimeout(() => call.cancel(), closeGraceMs)
      await closed
      clearTimeout(cancelling)
    },
  }
}

/** What went wrong with a call, as programs and people want to know it. */
export type DescribedError = {
  /** Canonical gRPC code, such as `UNAUTHENTICATED`. */
  code: string
  /**
   * Stable, such as `TOKEN_EXPIRED`. Where the server gave no reason, what can be told of a connection that did not come
   * about (`SERVER_UNTRUSTED` and the like), else the code again.
   */
  reason: string
  message: string
  violations: FieldViolation[]
  /** How long the server wants to be left alone. */
  retryAfterMs?: number
  /** How far this host's clock is ahead of the server's, negative where behind; absent where the server did not say. */
  clockOffsetMs?: number
  metadata: Record<string, string>
}

/**
 * Reads a ServiceError with its `google.rpc` details, or a Fault of our own. Anything else is a bug: its code is
 * `INTERNAL`. Details that can't be read are left out, since the code and the message are good without them.
 *
 * @param clock to be compared with the server's, so an error is described when it has just come
 */
export function describeCallError(error: unknown, clock: Clock = systemClock): DescribedError {
  if (error instanceof Fault) {
    const { code, reason, message, violations, retryAfterMs, metadata } = error
    const { clockOffsetMs } = metadata
    return {
      code,
      reason,
      message,
      violations,
      ...(retryAfterMs === undefined ? {} : { retryAfterMs }),
      ...(clockOffsetMs === undefined ? {} : { clockOffsetMs: Number(clockOffsetMs) }),
      metadata,
    }
  }
  if (!isServiceError(error)) {
    const message = error instanceof Error ? error.message : String(error)
    return { code: 'INTERNAL', reason: 'INTERNAL', message, violations: [], metadata: {} }
  }
  const code = status[error.code] ?? 'UNKNOWN'
  const described: DescribedError = { code, reason: code, message: error.details, violations: [], metadata: {} }
  if (code === 'UNAVAILABLE') Object.assign(described, unconnected(error.details))
  const serverTime = serverTimeIn(error.metadata)
  if (serverTime) described.clockOffsetMs = clock() - serverTime.getTime()
  try {
    for (const { typeUrl, value } of packedDetails(error)) readDetail(described, typeUrl.replace(/^.*\//, ''), value)
  } catch {
    // Somebody else's details, or broken ones: what was read so far is good.
  }
  return described
}

/** What every answer and every error carries in its trailing metadata: the server's clock, ISO 8601. */
function serverTimeIn(metadata: Metadata): Date | undefined {
  const time = new Date(String(metadata.get('edgemesh-server-time')[0]))
  return Number.isNaN(time.getTime()) ? undefined : time
}

/** What OpenSSL says of a server's certificate. gRPC hands on its words only, as the last error before it gave up. */
const verificationFailures: { words: RegExp; reason: string; message: string }[] = [
  {
    words: /certificate has expired/,
    reason: 'SERVER_CERTIFICATE_EXPIRED',
    message: "the server's certificate has expired by the clock of this host",
  },
  {
    words: /certificate is not yet valid/,
    reason: 'SERVER_CERTIFICATE_NOT_YET_VALID',
    message: "the server's certificate is not valid yet by the clock of this host",
  },
  {
    words:
      /unable to get (local )?issuer certificate|unable to verify the first certificate|self[- ]signed certificate/,
    reason: 'SERVER_UNTRUSTED',
    message: "the server's certificate does not lead to a root that is trusted here",
  },
  {
    words: /ERR_TLS_CERT_ALTNAME_INVALID/,
    reason: 'SERVER_NAME_WRONG',
    message: "the server's certificate is not for the name by which it was called",
  },
]

function unconnected(details: string): { reason: string; message: string } | undefined {
  const lastError = /^No connection established\. Last error: (?:Error: )?(.*?)\.? Resolution note:/s.exec(details)?.[1]
  if (lastError === undefined) return undefined
  const known = verificationFailures.find(({ words }) => words.test(lastError))
  if (known) return { reason: known.reason, message: known.message }
  return { reason: 'UNAVAILABLE', message: `no connection to the server: ${lastError}` }
}

export function millisecondsOf({ seconds, nanos }: Duration): number {
  return seconds * 1_000 + nanos / 1e6
}

/** Whether a call failed, as against a bug or a full disk on this side. */
export function isCallError(error: unknown): error is Fault | ServiceError {
  return error instanceof Fault || isServiceError(error)
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'details' in error && 'metadata' in error && 'code' in error
}

function packedDetails(error: ServiceError): Any[] {
  const [packed] = error.metadata.get('grpc-status-details-bin')
  return Buffer.isBuffer(packed) ? Status.decode(packed).details : []
}

function readDetail(described: DescribedError, type: string, value: Buffer): void {
  if (type === 'google.rpc.ErrorInfo') {
    const { reason, metadata } = ErrorInfo.decode(value)
    Object.assign(described, { reason, metadata })
  } else if (type === 'google.rpc.BadRequest') {
    const { fieldViolations } = BadRequest.decode(value)
    described.violations = fieldViolations.map(({ field, description }) => ({ field, description }))
  } else if (type === 'google.rpc.RetryInfo') {
    const { retryDelay } = RetryInfo.decode(value)
    if (retryDelay) described.retryAfterMs = millisecondsOf(retryDelay)
  }
}
