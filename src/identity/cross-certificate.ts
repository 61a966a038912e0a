/**
 * Cross certificates: the root of one authority, certified by the root of another (RFC 5280 section 3.2).
 *
 * While a fleet changes from one authority to the next there are always devices that know only the old root, and after a
 * step back some that know only the new one. A server that sends the cross certificate above its own chain is believed by
 * both: who trusts the newer root stops there (OpenSSL and Go prefer the shorter way to a root they trust), who trusts
 * only the other goes one certificate further.
 */
import type { KeyObject } from 'node:crypto'
import { type CaDescription, describeCa } from './certificate-description.ts'
import { extension, newSerial, openIssuer, signed } from './certificates.ts'
import { bitString, boolean, contextConstructed, integer, octetString, sequence, time } from './der.ts'

const basicConstraints = '2.5.29.19'
const keyUsage = '2.5.29.15'
const subjectKeyIdentifier = '2.5.29.14'
const keyCertSignAndCrlSign = bitString(Buffer.of(0x06), 1)

/**
 * Certifies `rootDer` by another root, for the time that both are valid.
 *
 * @param below CAs between that root and its leaves
 * @returns DER; `undefined` where the path length of the other root does not let one more CA stand below it, or the two
 *   have no time in common
 */
export function crossCertify(
  rootDer: Uint8Array,
  below: number,
  by: { certificateDer: Uint8Array; privateKey: KeyObject },
): Buffer | undefined {
  const root = describeCa(rootDer)
  const other = describeCa(by.certificateDer)
  if (!roomFor(below + 1, other)) return undefined
  const notBefore = new Date(Math.max(root.notBefore.getTime(), other.notBefore.getTime()))
  const notAfter = new Date(Math.min(root.notAfter.getTime(), other.notAfter.getTime()))
  if (!(notBefore < notAfter) || root.keyId === '') return undefined
  const issuer = openIssuer(by.certificateDer, by.privateKey)
  const extensions = sequence(
    extension(basicConstraints, { critical: true }, sequence(boolean(true), integer(below))),
    extension(keyUsage, { critical: true }, keyCertSignAndCrlSign),
    extension(subjectKeyIdentifier, { critical: false }, octetString(Buffer.from(root.keyId, 'hex'))),
    issuer.authorityKeyIdentifier,
  )
  return signed(
    issuer,
    sequence(
      contextConstructed(0, integer(2)),
      integer(Buffer.from(newSerial(), 'hex')),
      issuer.signature.algorithm,
      issuer.subject,
      sequence(time(notBefore), time(notAfter)),
      root.subject,
      root.spki,
      contextConstructed(3, extensions),
    ),
  )
}

function roomFor(cas: number, { pathLength }: CaDescription): boolean {
  return pathLength === undefined || pathLength >= cas
}
