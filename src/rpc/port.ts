/**
 * The one port: TLS 1.2 and 1.3 with HTTP/2, a client certificate asked for but not demanded.
 *
 * We own the TLS layer and hand finished connections to grpc-js. So the peer is read once a connection instead of once
 * a message, calls without a certificate arrive and can be refused one by one with a reason, and the server's
 * certificate changes without a restart: new handshakes get the new one, open connections stay.
 *
 * Where there are trusted proxies, what they say of their clients is read in front of TLS. Then a connection waits for its
 * turn, which in a storm is not at once (`admission.ts`).
 *
 * The bounds are those of a process: each worker of `serve --workers` has places of its own.
 */
import { constants } from 'node:crypto'
import { type AddressInfo, createServer as createTcpServer, type Socket } from 'node:net'
import { createServer, type SecureContextOptions } from 'node:tls'
import { type Server, ServerCredentials } from '@grpc/grpc-js'
import { networkList, networkOf, plainAddress } from '../network.ts'
import type { Log } from '../telemetry/log.ts'
import { admitAtPace, type RefusedArrival } from './admission.ts'
import { type IssuerOf, type Peer, readPeer } from './peer.ts'
import { ProxyHeaderError, type ProxyHeaderFailure, takeProxyHeader } from './proxy-protocol.ts'

/** PEM. `ca` is what clients' certificates are verified against. */
export type ServerIdentity = { key: string; cert: string; ca: string[] }

export type Port = {
  port: number
  /** The peer of a call, by what `call.getPeer()` says. */
  peer(address: string): Peer | undefined
  useIdentity(identity: ServerIdentity): void
  connections(): number
  /** A connection that somebody else has accepted, for a port that does not listen itself. */
  take(socket: Socket): void
  /** Of the connections that were accepted: how many are open with their handshake over, and how many have ended. */
  load(): { secure: number; ended: number }
  /** Those that wait for their handshake to begin. */
  waiting(): number
  /** No new connections; open ones are asked to finish (GOAWAY) and cut after `graceMs`. */
  close(graceMs: number): Promise<void>
}

/**
 * `not_http2`: nothing but HTTP/2 is spoken here. `address_full`: too many without an identity from this address. The others
 * never came to their handshake.
 */
export type RefusedConnection = 'not_http2' | 'address_full' | RefusedArrival

/** A handshake that takes longer than this is not one. */
const handshakeTimeoutMs = 10_000
/** Bounds memory at about 100 kB each; beyond it a load balancer sends clients elsewhere. */
const connectionsMax = 20_000
/**
 * Of those, connections without an identity from one address (see `networkOf`), or it alone could hold them all. They are
 * for enrolling and asking after health, and a thousand devices that wait for approval may share an address.
 */
const anonymousPerAddressMax = 1_000
/** Of a connection that waits for its handshake no more is read than this and what comes at once; TLS reads by itself. */
const waitingBytesMax = 16_384
/** Whoever was told that its connection ends has so long to hang up. */
const hangUpMs = 5_000

export async function openPort(options: {
  server: Server
  /** Undefined: it does not listen, and is given its connections by `take`. */
  listen: { host: string; port: number } | undefined
  /** Fewer than `connectionsMax`, where there is memory for fewer. */
  connectionsMost?: number
  trustDomain: string
  identity: ServerIdentity
  /** Networks from which connections begin with a PROXY protocol header. */
  trustedProxies: readonly string[]
  onProxyHeader: (outcome: 'read' | ProxyHeaderFailure) => void
  issuerOf: IssuerOf
  /** A handshake begins, for which the connection has waited so long. */
  onAdmitted: (waitedMs: number) => void
  /** A connection is not wanted. */
  onRefused: (why: RefusedConnection) => void
  /** A handshake is over, and the connection has been handed on. */
  onConnection: (peer: Peer, socket: Socket) => void
  log: Log
}): Promise<Port> {
  const { server, trustDomain, log } = options
  const connectionsMost = Math.min(options.connectionsMost ?? connectionsMax, connectionsMax)
  const peers = new Map<string, Peer>()
  /** What proxies have said of their clients, by the connection's own address as in `peers`. */
  const clientAddresses = new Map<string, string>()
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure())
  const tls = createServer({
    ...contextOf(options.identity),
    requestCert: true,
    rejectUnauthorized: false,
    ALPNProtocols: ['h2'],
    handshakeTimeout: handshakeTimeoutMs,
  })
  const admission = admitAtPace({
    admit: socket => void tls.emit('connection', socket),
    onAdmitted: options.onAdmitted,
    onRefused: (why, socket) => noteRefused(socket, why),
  })
  const listener = createTcpServer(
    { highWaterMark: waitingBytesMax },
    options.trustedProxies.length === 0 ? admission.arrive : acceptBehindProxies,
  )
  listener.maxConnections = connectionsMost
  /** Open connections without an identity, by address. */
  const anonymous = new Map<string, number>()
  /** All of them, also those whose header or handshake is not over: nobody else would end these. */
  const sockets = new Set<Socket>()
  let secure = 0
  let ended = 0
  let onEmpty = () => {}
  listener.on('connection', (socket: Socket) => {
    sockets.add(socket)
    socket.on('close', () => {
      sockets.delete(socket)
      ended++
      if (sockets.size === 0) onEmpty()
    })
  })
  let closing = false

  const isTrustedProxy = networkList(options.trustedProxies)
  function acceptBehindProxies(socket: Socket): void {
    // A header of anybody else is the garbage that TLS takes it for.
    if (!isTrustedProxy(plainAddress(socket.remoteAddress ?? ''))) admission.arrive(socket)
    else void acceptFromProxy(socket)
  }

  async function acceptFromProxy(socket: Socket): Promise<void> {
    const key = keyOf(socket)
    try {
      const header = await takeProxyHeader(socket)
      if (!header) return
      options.onProxyHeader('read')
      if (clientAddresses.has(key) || peers.has(key)) {
        socket.destroy()
        return
      }
      if (header.clientAddress) {
        clientAddresses.set(key, header.clientAddress)
        socket.on('close', () => clientAddresses.delete(key))
      }
      admission.arrive(socket)
    } catch (error) {
      socket.destroy()
      if (error instanceof ProxyHeaderError) {
        options.onProxyHeader(error.failure)
        log.debug({ err: error, address: key }, 'a trusted proxy sent no PROXY protocol header')
      } else {
        log.error({ err: error, address: key }, 'a connection of a trusted proxy could not be accepted')
      }
    }
  }

  function noteRefused(socket: Socket, why: RefusedConnection): void {
    options.onRefused(why)
    log.debug({ address: keyOf(socket), why }, 'a connection was refused')
  }

  function refuse(socket: Socket, why: RefusedConnection): void {
    noteRefused(socket, why)
    socket.destroy()
  }

  /** @returns whether there is room for one more without an identity */
  function takesAnonymous(socket: Socket, address: string): boolean {
    const network = networkOf(address)
    const open = anonymous.get(network) ?? 0
    if (open >= anonymousPerAddressMax) return false
    anonymous.set(network, open + 1)
    socket.once('close', () => {
      const left = (anonymous.get(network) ?? 1) - 1
      if (left > 0) anonymous.set(network, left)
      else anonymous.delete(network)
    })
    return true
  }

  tls.on('secureConnection', socket => {
    secure++
    socket.once('close', () => secure--)
    const key = keyOf(socket)
    if (peers.has(key)) {
      // Two of our addresses may be called from the same address and port. A call names its connection by these alone,
      // so the second would have the first one's identity.
      log.warn({ address: key }, 'a second connection from the same address and port is refused')
      socket.destroy()
      return
    }
    // Who names no protocol in the handshake could go on to say nothing for ever.
    if (socket.alpnProtocol !== 'h2') return refuse(socket, 'not_http2')
    let peer: Peer
    try {
      peer = readPeer(socket, trustDomain, options.issuerOf, clientAddresses.get(key))
    } catch (error) {
      log.warn({ err: error, address: key }, 'a client certificate could not be read')
      socket.destroy()
      return
    }
    // One whose certificate has expired was ours, and comes back.
    const { identity } = peer
    const isAnonymous = 'refused' in identity && !identity.expired
    if (isAnonymous && !takesAnonymous(socket, peer.address)) return refuse(socket, 'address_full')
    // A session that ends closes our half alone, and whoever never closes the other would keep its place.
    socket.once('finish', () => {
      const hangUp = setTimeout(() => socket.destroy(), hangUpMs).unref()
      socket.once('close', () => clearTimeout(hangUp))
    })
    peers.set(key, peer)
    socket.on('close', () => peers.delete(key))
    socket.on('error', error => log.debug({ err: error, address: key }, 'connection failed'))
    socket.setNoDelay(true)
    injector.injectConnection(socket)
    options.onConnection(peer, socket)
  })
  tls.on('tlsClientError', (error, socket) => {
    log.debug({ err: error, address: keyOf(socket) }, 'TLS handshake failed')
  })

  const { listen } = options
  if (listen) {
    await new Promise<void>((resolve, reject) => {
      listener.once('error', reject)
      listener.listen(listen.port, listen.host, () => {
        listener.off('error', reject)
        resolve()
      })
    })
  }
  listener.on('error', error => log.error({ err: error }, 'the port failed'))

  return {
    port: listen ? (listener.address() as AddressInfo).port : 0,
    peer: address => peers.get(address),
    useIdentity: identity => tls.setSecureContext(contextOf(identity)),
    connections: () => peers.size,
    take(socket) {
      if (!closing && sockets.size < connectionsMost) {
        listener.emit('connection', socket)
      } else {
        socket.destroy()
        ended++
      }
    },
    load: () => ({ secure, ended }),
    waiting: admission.waiting,
    async close(graceMs) {
      closing = true
      const closed = new Promise<void>(resolve => {
        onEmpty = resolve
        if (sockets.size === 0) resolve()
      })
      if (listen) listener.close()
      injector.drain(graceMs)
      await Promise.race([closed, new Promise(resolve => setTimeout(resolve, graceMs + 500).unref())])
      injector.destroy()
      for (const socket of sockets) socket.destroy()
    },
  }
}

/** Names a connection, in the words of `call.getPeer()`. */
function keyOf(socket: Socket): string {
  return `${socket.remoteAddress}:${socket.remotePort}`
}

function contextOf({ key, cert, ca }: ServerIdentity): SecureContextOptions {
  return {
    key,
    cert,
    ca,
    minVersion: 'TLSv1.2',
    // No tickets: a resumed session would skip the verification of the client's certificate.
    secureOptions: constants.SSL_OP_NO_TICKET | constants.SSL_OP_NO_RENEGOTIATION,
  }
}
