/**
 * The one port: TLS 1.2 and 1.3 with HTTP/2, a client certificate asked for but not demanded.
 *
 * We own the TLS layer and hand finished connections to grpc-js. So the peer is read once a connection instead of once
 * a message, calls without a certificate arrive and can be refused one by one with a reason, and the server's
 * certificate changes without a restart: new handshakes get the new one, open connections stay.
 */
import { constants } from 'node:crypto'
import type { AddressInfo, Socket } from 'node:net'
import { createServer, type SecureContextOptions } from 'node:tls'
import { type Server, ServerCredentials } from '@grpc/grpc-js'
import type { Log } from '../telemetry/log.ts'
import { type Peer, readPeer } from './peer.ts'

/** PEM. `ca` is what clients' certificates are verified against. */
export type ServerIdentity = { key: string; cert: string; ca: string[] }

export type Port = {
  port: number
  /** The peer of a call, by what `call.getPeer()` says. */
  peer(address: string): Peer | undefined
  useIdentity(identity: ServerIdentity): void
  connections(): number
  /** No new connections; open ones are asked to finish (GOAWAY) and cut after `graceMs`. */
  close(graceMs: number): Promise<void>
}

/** A handshake that takes longer than this is not one. */
const handshakeTimeoutMs = 10_000
/** Bounds memory at about 100 kB each; beyond it a load balancer sends clients elsewhere. */
const connectionsMax = 20_000

export async function openPort(options: {
  server: Server
  host: string
  port: number
  trustDomain: string
  identity: ServerIdentity
  log: Log
}): Promise<Port> {
  const { server, trustDomain, log } = options
  const peers = new Map<string, Peer>()
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure())
  const tls = createServer({
    ...contextOf(options.identity),
    requestCert: true,
    rejectUnauthorized: false,
    ALPNProtocols: ['h2'],
    handshakeTimeout: handshakeTimeoutMs,
  })
  tls.maxConnections = connectionsMax
  /** All of them, also those whose handshake is not over: nobody else would end these. */
  const sockets = new Set<Socket>()
  tls.on('connection', (socket: Socket) => {
    sockets.add(socket)
    socket.on('close', () => sockets.delete(socket))
  })

  tls.on('secureConnection', socket => {
    const key = `${socket.remoteAddress}:${socket.remotePort}`
    let peer: Peer
    try {
      peer = readPeer(socket, trustDomain)
    } catch (error) {
      log.warn({ err: error, address: key }, 'a client certificate could not be read')
      socket.destroy()
      return
    }
    peers.set(key, peer)
    socket.on('close', () => peers.delete(key))
    socket.on('error', error => log.debug({ err: error, address: key }, 'connection failed'))
    socket.setNoDelay(true)
    injector.injectConnection(socket)
  })
  tls.on('tlsClientError', (error, socket) => {
    log.debug({ err: error, address: socket.remoteAddress }, 'TLS handshake failed')
  })

  await new Promise<void>((resolve, reject) => {
    tls.once('error', reject)
    tls.listen(options.port, options.host, () => {
      tls.off('error', reject)
      resolve()
    })
  })
  tls.on('error', error => log.error({ err: error }, 'the port failed'))

  return {
    port: (tls.address() as AddressInfo).port,
    peer: address => peers.get(address),
    useIdentity: identity => tls.setSecureContext(contextOf(identity)),
    connections: () => peers.size,
    async close(graceMs) {
      const closed = new Promise<void>(resolve => tls.close(() => resolve()))
      injector.drain(graceMs)
      await Promise.race([closed, new Promise(resolve => setTimeout(resolve, graceMs + 500).unref())])
      injector.destroy()
      for (const socket of sockets) socket.destroy()
    },
  }
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
