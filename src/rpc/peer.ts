/**
 * Who is at the other end of a connection: its certificate, read and verified once, when the handshake is over.
 *
 * OpenSSL has verified the chain, the dates and the purpose by then; what it found is kept as the reason why calls
 * that need an identity are refused. Dates are looked at again with each call, because connections outlive certificates.
 */
import type { TLSSocket } from 'node:tls'
import type { Caller, Identified } from '../caller.ts'
import { Fault } from '../fault.ts'
import { describeCertificate } from '../identity/certificates.ts'
import { plainAddress } from './address.ts'

export type Peer = {
  /** The client's IP address, also behind a trusted proxy. */
  address: string
  /** The verified identity, or why there is none. */
  identity: Identified | PeerRefusal
}

export type PeerRefusal = { refused: string; message: string }

/**
 * Reads the peer of a socket whose handshake has just finished.
 *
 * @param address the client's own, where a proxy has told it
 */
export function readPeer(socket: TLSSocket, trustDomain: string, address = socket.remoteAddress ?? ''): Peer {
  return { address: plainAddress(address), identity: readIdentity(socket, trustDomain) }
}

/** @throws Fault UNAUTHENTICATED with the reason why the peer has no identity, or has it no longer */
export function demandIdentity(peer: Peer, nowMs: number): Identified {
  const { identity } = peer
  if ('refused' in identity) throw new Fault('UNAUTHENTICATED', identity.refused, identity.message)
  if (identity.notAfter <= nowMs) throw certificateExpired()
  return identity
}

/** For calls that need no identity: the one that the peer has, if it holds. */
export function callerOf(peer: Peer, nowMs: number): Caller {
  const { identity } = peer
  return 'refused' in identity || identity.notAfter <= nowMs ? { kind: 'anonymous' } : identity
}

const expired = 'the client certificate has expired: renew it, or enroll again'

export function certificateExpired(): Fault {
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_EXPIRED', expired)
}

/** What OpenSSL says, as stable reasons. Whatever is not listed means that the chain does not lead to our root. */
const refusals: Record<string, PeerRefusal> = {
  CERT_HAS_EXPIRED: { refused: 'CERTIFICATE_EXPIRED', message: expired },
  CERT_NOT_YET_VALID: { refused: 'CERTIFICATE_NOT_YET_VALID', message: 'the client certificate is not valid yet' },
  INVALID_PURPOSE: {
    refused: 'CERTIFICATE_PURPOSE',
    message: 'the certificate is not one for clients: its extended key usage lacks clientAuth',
  },
}

function readIdentity(socket: TLSSocket, trustDomain: string): Identified | PeerRefusal {
  const certificate = socket.getPeerX509Certificate()
  if (!certificate) {
    return { refused: 'CERTIFICATE_MISSING', message: 'this call needs a client certificate: enroll first' }
  }
  if (!socket.authorized) {
    const { authorizationError } = socket as { authorizationError: unknown }
    const code =
      authorizationError instanceof Error ? (authorizationError as { code?: string }).code : authorizationError
    return (
      refusals[String(code)] ?? {
        refused: 'CERTIFICATE_UNTRUSTED',
        message: 'the client certificate was not issued by this certificate authority',
      }
    )
  }
  const described = describeCertificate(certificate.raw)
  const { spiffeId } = described
  if (!spiffeId || spiffeId.trustDomain !== trustDomain) {
    return {
      refused: 'CERTIFICATE_IDENTITY',
      message: `the client certificate names nobody of spiffe://${trustDomain}`,
    }
  }
  // A certificate without extended key usage passes OpenSSL's check of the purpose; ours always have it.
  if (!described.hasClientAuth) return refusals.INVALID_PURPOSE as PeerRefusal
  return {
    kind: spiffeId.kind,
    id: spiffeId.id,
    spiffeId: `spiffe://${trustDomain}/${spiffeId.kind}/${spiffeId.id}`,
    issuerKeyId: described.issuerKeyId,
    serial: described.serialHex,
    notAfter: described.notAfter.getTime(),
    role: spiffeId.kind === 'operator' ? (described.organizationalUnit ?? '') : '',
    publicKeySha256: described.publicKeySha256,
  }
}
