/**
 * Who is at the other end of a connection: its certificate, read and verified once, when the handshake is over.
 *
 * OpenSSL has verified the chain, the dates and the purpose by then; what it found is kept as the reason why calls
 * that need an identity are refused. Dates are looked at again with each call, because connections outlive certificates.
 */
import type { X509Certificate } from 'node:crypto'
import type { TLSSocket } from 'node:tls'
import type { Caller, Identified } from '../caller.ts'
import { Fault } from '../fault.ts'
import { describeCertificate } from '../identity/certificate-description.ts'
import { certificateExpired, certificateRetired } from '../identity/standing.ts'
import { plainAddress } from '../network.ts'

export type Peer = {
  /** The client's IP address, also behind a trusted proxy. */
  address: string
  /** The verified identity, or why there is none. */
  identity: Identified | PeerRefusal
}

export type PeerRefusal = {
  refused: string
  message: string
  /** Whose the certificate was, where nothing is wrong with it but that it has expired. */
  expired?: Identified
}

/** Whose signature a certificate carries, whatever its dates are: an authority's that counts, or counts no more. */
export type IssuerOf = (certificate: X509Certificate) => 'trusted' | 'retired' | undefined

/**
 * Reads the peer of a socket whose handshake has just finished: it holds the key of the certificate that it shows.
 *
 * @param address the client's own, where a proxy has told it
 */
export function readPeer(
  socket: TLSSocket,
  trustDomain: string,
  issuerOf: IssuerOf,
  address = socket.remoteAddress ?? '',
): Peer {
  return { address: plainAddress(address), identity: readIdentity(socket, trustDomain, issuerOf) }
}

/** @throws Fault UNAUTHENTICATED with the reason why the peer has no identity, or has it no longer */
export function demandIdentity(peer: Peer, nowMs: number): Identified {
  const { identity } = peer
  if ('refused' in identity) throw new Fault('UNAUTHENTICATED', identity.refused, identity.message)
  if (identity.notAfter <= nowMs) throw certificateExpired()
  return identity
}

/** The same for calls that a device may make although its certificate has expired. */
export function demandRenewable(peer: Peer, nowMs: number): Identified {
  const { identity } = peer
  const holder = 'refused' in identity ? identity.expired : identity
  return holder?.kind === 'device' && holder.notAfter <= nowMs ? holder : demandIdentity(peer, nowMs)
}

/** For calls that need no identity: the one that the peer has, if it holds. */
export function callerOf(peer: Peer, nowMs: number): Caller {
  const { identity } = peer
  return 'refused' in identity || identity.notAfter <= nowMs ? { kind: 'anonymous' } : identity
}

/** What OpenSSL says, as stable reasons. Whatever is not listed means that the chain does not lead to our root. */
const refusals: Record<string, PeerRefusal> = {
  CERT_HAS_EXPIRED: { refused: 'CERTIFICATE_EXPIRED', message: certificateExpired().message },
  CERT_NOT_YET_VALID: { refused: 'CERTIFICATE_NOT_YET_VALID', message: 'the client certificate is not valid yet' },
  INVALID_PURPOSE: {
    refused: 'CERTIFICATE_PURPOSE',
    message: 'the certificate is not one for clients: its extended key usage lacks clientAuth',
  },
}

const untrusted: PeerRefusal = {
  refused: 'CERTIFICATE_UNTRUSTED',
  message: 'the client certificate was not issued by this certificate authority',
}

const retired: PeerRefusal = { refused: 'CERTIFICATE_RETIRED', message: certificateRetired().message }

function readIdentity(socket: TLSSocket, trustDomain: string, issuerOf: IssuerOf): Identified | PeerRefusal {
  const certificate = socket.getPeerX509Certificate()
  if (!certificate) {
    return { refused: 'CERTIFICATE_MISSING', message: 'this call needs a client certificate: enroll first' }
  }
  const wrong = socket.authorized ? undefined : verificationError(socket)
  const issuer = wrong === undefined ? 'trusted' : issuerOf(certificate)
  // Its root is unknown to OpenSSL by now. The holder has to hear that it once was ours: that is the end of its identity.
  if (issuer === 'retired') return retired
  if (wrong !== undefined && wrong !== 'CERT_HAS_EXPIRED') return refusals[wrong] ?? untrusted
  // OpenSSL tells only the last of what it found. That a certificate has expired says nothing of who signed it.
  if (issuer !== 'trusted') return untrusted

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
  const identity: Identified = {
    kind: spiffeId.kind,
    id: spiffeId.id,
    spiffeId: `spiffe://${trustDomain}/${spiffeId.kind}/${spiffeId.id}`,
    issuerKeyId: described.issuerKeyId,
    serial: described.serialHex,
    notBefore: described.notBefore.getTime(),
    notAfter: described.notAfter.getTime(),
    role: spiffeId.kind === 'operator' ? (described.organizationalUnit ?? '') : '',
    publicKeySha256: described.publicKeySha256,
  }
  return wrong === undefined ? identity : { ...(refusals[wrong] as PeerRefusal), expired: identity }
}

function verificationError(socket: TLSSocket): string {
  const { authorizationError } = socket as { authorizationError: unknown }
  return String(
    authorizationError instanceof Error ? (authorizationError as { code?: string }).code : authorizationError,
  )
}
