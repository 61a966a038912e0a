/** A TLS handshake with whoever listens: which certificate it shows, and whether devices would trust it. */
import type { X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { connect as connectTcp, isIP, type Socket } from 'node:net'
import { connect, type TLSSocket } from 'node:tls'
import { networkList, plainAddress } from '../network.ts'

export type TlsPeer = {
  socket: TLSSocket
  certificate: X509Certificate
  /** Such as `h2`; empty: none. */
  protocol: string
  /** Why the certificate is not trusted, dates included; names are left to who knows them. */
  problem: string | undefined
}

const connectMs = 5_000

/**
 * @param target.roots PEM; undefined: whom to trust is not known, so nothing is said about it
 * @param target.trustedProxies where this host is one of them, its connections have to begin with a header
 * @throws where nobody listens, or no TLS is spoken
 */
export async function shakeHands(target: {
  host: string
  port: number
  roots: string[] | undefined
  trustedProxies?: readonly string[]
}): Promise<TlsPeer> {
  const { host, port, roots, trustedProxies = [] } = target
  const tcp = connectTcp({ host, port })
  const timer = setTimeout(() => tcp.destroy(new Error(`no answer within ${connectMs / 1_000} s`)), connectMs)
  try {
    await once(tcp, 'connect')
    if (networkList(trustedProxies)(plainAddress(tcp.localAddress ?? ''))) tcp.write('PROXY UNKNOWN\r\n')
    const socket = secured(tcp, host, roots)
    await once(socket, 'secureConnect')
    const certificate = socket.getPeerX509Certificate()
    if (!certificate) throw new Error('it shows no certificate')
    const error = socket.authorizationError as Error | string | null | undefined
    const problem = roots === undefined || !error ? undefined : typeof error === 'string' ? error : error.message
    socket.on('error', () => {})
    return { socket, certificate, protocol: socket.alpnProtocol || '', problem }
  } catch (error) {
    tcp.destroy()
    throw error
  } finally {
    clearTimeout(timer)
  }
}

function secured(tcp: Socket, host: string, roots: string[] | undefined): TLSSocket {
  return connect({
    socket: tcp,
    // One that does not know h2 refuses who offers nothing else, and then nobody hears whose certificate it has.
    ALPNProtocols: ['h2', 'http/1.1'],
    rejectUnauthorized: false,
    ...(roots && { ca: roots }),
    ...(isIP(host) === 0 && { servername: host }),
    checkServerIdentity: () => undefined,
  })
}

/** For people: whose it is and who says so. */
export function whoIs({ subject, issuer }: X509Certificate): string {
  const line = (name: string) => name?.replaceAll('\n', ', ') || 'nobody'
  return `the certificate of ${line(subject)}, issued by ${line(issuer)}`
}
