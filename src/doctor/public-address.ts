/**
 * The address where devices connect, given as `--public host:port`: whether what is there carries them to an instance, with
 * TLS unopened and HTTP/2, and leaves a stream alone that is quiet.
 */
import { type ClientHttp2Session, type ClientHttp2Stream, connect } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { checkServerIdentity } from 'node:tls'
import { CannotLook, type Check, type Finding, failed, ok, span } from './finding.ts'
import type { Subject } from './subject.ts'
import { shakeHands, type TlsPeer, whoIs } from './tls-peer.ts'

const answerMs = 5_000
/** An empty message, framed for gRPC. */
const emptyMessage = Buffer.alloc(5)
/** `status = SERVING`, framed. */
const serving = Buffer.from([0, 0, 0, 0, 2, 8, 1])

export const publicAddressCheck: Check<Subject> = {
  name: 'public-address',
  async look(subject) {
    const { host, port } = addressOf(subject)
    const where = `${host}:${port}`
    let peer: TlsPeer
    try {
      peer = await knock(subject)
    } catch (error) {
      return [unreachable(where, error as NodeJS.ErrnoException)]
    }
    try {
      const troubles = lookAtCertificate(peer, host, subject.settings().identity.trustDomain)
      if (peer.protocol !== 'h2') {
        troubles.push(
          failed({
            what: `${where} does not speak HTTP/2: ALPN gave ${peer.protocol || 'nothing'}`,
            why: 'gRPC is nothing else',
            mend: 'let the balancer pass TCP on unopened (mode tcp, stream), or offer h2: docs/load-balancing.md',
          }),
        )
      }
      if (troubles.length > 0) return troubles
      return [await askHealth(peer, where)]
    } finally {
      peer.socket.destroy()
    }
  },
}

function addressOf({ publicAddress }: Subject): { host: string; port: number } {
  if (!publicAddress) throw new CannotLook('where devices connect is not given: --public host:port')
  return publicAddress
}

async function knock(subject: Subject): Promise<TlsPeer> {
  const set = await subject.authorities().catch(() => undefined)
  return shakeHands({ ...addressOf(subject), roots: set?.trusted.map(({ rootPem }) => rootPem) })
}

function unreachable(where: string, { code, message }: NodeJS.ErrnoException): Finding {
  const speaksNoTls = code?.startsWith('ERR_SSL') || code === 'ECONNRESET' || code === 'EPROTO'
  return failed({
    what: speaksNoTls
      ? `what answers at ${where} does not speak TLS (${code})`
      : `${where} does not answer: ${message}`,
    why: 'no device connects',
    mend: speaksNoTls
      ? 'let the balancer pass TLS on unopened; if it sends the PROXY protocol, TRUSTED_PROXIES has to name it: docs/load-balancing.md'
      : 'see that the balancer runs, that its name leads there, and that a firewall lets devices through',
  })
}

/** Undefined roots: there is no database to ask whom devices trust, but every certificate of ours has our trust domain in it. */
function lookAtCertificate({ certificate, problem }: TlsPeer, host: string, trustDomain: string): Finding[] {
  const isOurs = certificate.subjectAltName?.includes(`URI:spiffe://${trustDomain}/`) ?? false
  if (!isOurs) {
    return [
      failed({
        what: `TLS is ended on the way, by somebody else: ${whoIs(certificate)}`,
        why: "who is calling is the client's certificate, which no instance sees like this; and no device trusts that server",
        mend: 'let the balancer pass TCP on unopened: mode tcp with HAProxy, stream with nginx, a network balancer in a cloud',
      }),
    ]
  }
  if (problem) {
    const what = `devices do not trust what is there (${problem}): ${whoIs(certificate)}`
    const mend = 'see that the balancer leads to instances on this database, and see the check server-certificate'
    return [failed({ what, why: 'no device connects', mend })]
  }
  const stranger = checkServerIdentity(host, certificate.toLegacyObject())
  if (!stranger) return []
  const names = certificate.subjectAltName?.replace(/, URI:\S+|URI:\S+, /g, '')
  const mend = `add ${host} to SERVER_NAMES of all instances, and start them anew`
  const what = `the certificate there is not valid for ${host}: ${names}`
  return [failed({ what, why: 'devices that dial this name do not connect', mend })]
}

async function askHealth(peer: TlsPeer, where: string): Promise<Finding> {
  const session = connect(`https://${where}`, { createConnection: () => peer.socket })
  try {
    const startedAt = performance.now()
    const { status, message, body } = await answered(callHealth(session, 'Check'))
    const tookMs = performance.now() - startedAt
    if (status === '0' && body.equals(serving)) {
      return ok(`h2, TLS of an instance, which is serving: ${tookMs.toFixed(1)} ms`)
    }
    const what = `the instance behind ${where} is not serving (${status === '0' ? 'NOT_SERVING' : message || status})`
    return failed({
      what,
      why: 'devices are sent away',
      mend: 'see the check instance there, and take it out of the balancer',
    })
  } catch (error) {
    const what = `a call through ${where} fails: ${(error as Error).message}`
    return failed({ what, why: 'devices are cut off', mend: 'see the log of the balancer, and of the instances' })
  } finally {
    session.destroy()
  }
}

/** Anyone may ask, and nothing goes on record. */
function callHealth(session: ClientHttp2Session, method: 'Check' | 'Watch'): ClientHttp2Stream {
  const stream = session.request({
    ':method': 'POST',
    ':path': `/grpc.health.v1.Health/${method}`,
    'content-type': 'application/grpc',
    te: 'trailers',
  })
  stream.end(emptyMessage)
  return stream
}

function answered(stream: ClientHttp2Stream): Promise<{ status: string; message: string; body: Buffer }> {
  const { promise, resolve, reject } = Promise.withResolvers<{ status: string; message: string; body: Buffer }>()
  const chunks: Buffer[] = []
  let status = ''
  let message = ''
  const note = (headers: Record<string, unknown>) => {
    status = String(headers['grpc-status'] ?? status)
    message = String(headers['grpc-message'] ?? message)
  }
  stream.setTimeout(answerMs, () => stream.destroy(new Error(`no answer within ${answerMs / 1_000} s`)))
  stream.on('response', note).on('trailers', note)
  stream.on('data', (chunk: Buffer) => chunks.push(chunk))
  stream.on('error', reject).on('close', () => resolve({ status, message, body: Buffer.concat(chunks) }))
  stream.session?.on('error', reject)
  return promise
}

// ── Quiet streams ──────────────────────────────────────────────────────────────────────────────────────────────────

export const idleCheck: Check<Subject> = {
  name: 'idle',
  deadlineMs: ({ idleMs = 0 }) => idleMs + 20_000,
  async look(subject) {
    const { idleMs } = subject
    if (idleMs === undefined) throw new CannotLook('nobody has asked how long a stream may be quiet: --idle SECONDS')
    const { host, port } = addressOf(subject)
    const peer = await knock(subject).catch(() => {
      throw new CannotLook('the public address does not answer: see the check public-address')
    })
    const session = connect(`https://${host}:${port}`, { createConnection: () => peer.socket })
    session.on('error', () => {})
    try {
      const stream = callHealth(session, 'Watch')
      stream.on('error', () => {})
      const startedAt = performance.now()
      // Whatever is said is read, or its end would not be seen.
      stream.resume()
      const over = new AbortController()
      const cut = new Promise<'cut'>(resolve => stream.once('close', () => resolve('cut')))
      const isCut = await Promise.race([cut, sleep(idleMs, 'quiet' as const, { signal: over.signal })])
      over.abort()
      if (isCut === 'quiet') return [ok(`a stream that was quiet for ${span(idleMs)} is still there`)]
      return [
        failed({
          what: `a quiet stream was cut after ${span(performance.now() - startedAt)}`,
          why: 'devices come back again and again, and those that were allowed something have to resume it',
          mend: 'raise the idle limits of the balancer above a minute, as instances ping every 30 s: docs/load-balancing.md',
        }),
      ]
    } finally {
      session.destroy()
    }
  },
}
