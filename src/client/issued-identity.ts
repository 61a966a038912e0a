/**
 * What a server answers to a certificate request, checked before anything relies on it: what is wrong with it would
 * only fail later, and less clearly.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { Fault } from '../fault.ts'
import type { Identity } from '../gen/edgemesh/v1/enroll.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import { decodePem, encodePem } from '../identity/pem.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import type { Credentials } from './channel.ts'

/** A holder's credentials and what is known of them. */
export type IssuedIdentity = Credentials & {
  /** Such as `spiffe://edgemesh.local/device/alpha`. */
  spiffeId: string
  notAfter: Date
  renewAfter: Date
  /** Names the roots in `rootsPem` as the server does; empty where it did not. */
  trustBundleId: string
}

/** Leaf, issuing authority, and during a rotation the new root as the old one certifies it; and as many to spare. */
const chainCertificatesMax = 8

/** Where the server does not say when to renew: this share of the certificate's life, and up to so much more. */
const renewAfterShare = 0.6
const renewJitterShare = 0.1

/** @throws Fault UNAUTHENTICATED CERTIFICATE_UNUSABLE */
export function checkedIdentity(identity: Identity | undefined, keyPem: string, random = Math.random): IssuedIdentity {
  if (identity === undefined) throw unusable('the server answered without a certificate')
  const { spiffeId, trustBundle, notAfter, renewAfter } = identity
  const { rootsPem, trustBundleId } = trustOf(trustBundle)
  const chain = identity.certificateChainPem.map(readCertificate)
  const [leaf] = chain
  if (leaf === undefined || !notAfter) throw unusable('the answer is not complete')
  if (chain.length > chainCertificatesMax)
    throw unusable(`the chain has more than ${chainCertificatesMax} certificates`)
  if (!leaf.checkPrivateKey(createPrivateKey(keyPem))) throw unusable('the certificate is for another key')
  if (!parseSpiffeId(spiffeId) || !leaf.subjectAltName?.split(', ').includes(`URI:${spiffeId}`)) {
    throw unusable('the certificate does not carry the SPIFFE ID that the server names')
  }
  // The bundle came from a server that was verified by a root that we trusted already, so its roots are trusted too:
  // during a rotation the new certificate may lead to the newer one.
  if (!leadsToRoot(chain, decodePem('CERTIFICATE', rootsPem).map(readCertificate))) {
    throw unusable('the certificate does not lead to a trusted root')
  }
  return {
    spiffeId,
    keyPem,
    certificateChainPem: pemOf(chain),
    rootsPem,
    trustBundleId,
    notAfter,
    renewAfter: renewAfter ?? lateInLife(leaf, random),
  }
}

/**
 * Whom a bundle makes one trust, as text without anything around it.
 *
 * @throws Fault UNAUTHENTICATED CERTIFICATE_UNUSABLE when a root can't be read, or when there is none: whoever trusted
 *   nobody could never be told of others
 */
export function trustOf(bundle: TrustBundle | undefined): Pick<IssuedIdentity, 'rootsPem' | 'trustBundleId'> {
  const roots = (bundle?.rootsPem ?? []).flatMap(pem => decodePem('CERTIFICATE', pem)).map(readCertificate)
  if (roots.length === 0) throw unusable('the trust bundle has no root')
  return { rootsPem: pemOf(roots), trustBundleId: bundle?.id ?? '' }
}

/**
 * Whether a chain, leaf first, leads to one of the roots as OpenSSL finds its way: each certificate is issued by the
 * next, and the first that a root has issued ends the search. So a chain may go on beyond a root that is trusted, as it
 * does for those who trust a new root already while the chain leads on to the old one.
 *
 * Dates are left to those who know the right time.
 */
export function leadsToRoot(chain: readonly X509Certificate[], roots: readonly X509Certificate[]): boolean {
  for (const [index, certificate] of chain.entries()) {
    if (roots.some(root => hasIssued(root, certificate))) return true
    const next = chain[index + 1]
    if (!next || !hasIssued(next, certificate)) return false
  }
  return false
}

function hasIssued(issuer: X509Certificate, certificate: X509Certificate): boolean {
  return issuer.ca && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey)
}

export function lateInLife({ validFromDate, validToDate }: X509Certificate, random: () => number): Date {
  const share = renewAfterShare + renewJitterShare * random()
  return new Date(validFromDate.getTime() + share * (validToDate.getTime() - validFromDate.getTime()))
}

function pemOf(certificates: X509Certificate[]): string {
  return certificates.map(({ raw }) => encodePem('CERTIFICATE', raw)).join('')
}

function readCertificate(encoded: string | Buffer): X509Certificate {
  try {
    return new X509Certificate(encoded)
  } catch (cause) {
    throw unusable('a certificate in the answer can not be read', cause)
  }
}

export function unusable(what: string, cause?: unknown): Fault {
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_UNUSABLE', `${what}; nothing was changed`, { cause })
}
