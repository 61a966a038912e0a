/** Certificate revocation lists, version 2 (RFC 5280 section 5), for those who can't ask EdgeMesh itself. */
import { extension, type Issuer, signed } from './certificates.ts'
import { contextConstructed, enumerated, integer, sequence, time } from './der.ts'

/** CRLReason (RFC 5280 section 5.3.1) without removeFromCRL, which only delta lists have. */
const reasonCodes = {
  unspecified: 0,
  keyCompromise: 1,
  caCompromise: 2,
  affiliationChanged: 3,
  superseded: 4,
  cessationOfOperation: 5,
  certificateHold: 6,
  privilegeWithdrawn: 9,
  aaCompromise: 10,
}

export type RevocationReason = keyof typeof reasonCodes

export type RevokedCertificate = { serialHex: string; revokedAt: Date; reason?: RevocationReason }

export type CrlTemplate = {
  /** Greater than that of every list before it (RFC 5280 section 5.2.3). */
  number: number
  thisUpdate: Date
  nextUpdate: Date
  revoked: RevokedCertificate[]
}

const crlNumberOid = '2.5.29.20'
const reasonCodeOid = '2.5.29.21'

const version2 = integer(1)

/** The signed list in DER. */
export function issueCrl(issuer: Issuer, { number, thisUpdate, nextUpdate, revoked }: CrlTemplate): Buffer {
  if (!(thisUpdate < nextUpdate)) throw new RangeError('nextUpdate of a revocation list is not after thisUpdate')
  const extensions = sequence(
    issuer.authorityKeyIdentifier,
    extension(crlNumberOid, { critical: false }, integer(number)),
  )
  return signed(
    issuer,
    sequence(
      version2,
      issuer.signature.algorithm,
      issuer.subject,
      time(thisUpdate),
      time(nextUpdate),
      // RFC 5280 section 5.1.2.6: where nothing is revoked, the list of it is absent, not empty.
      ...(revoked.length > 0 ? [sequence(...revoked.map(revokedEntry))] : []),
      contextConstructed(0, extensions),
    ),
  )
}

function revokedEntry({ serialHex, revokedAt, reason = 'unspecified' }: RevokedCertificate): Buffer {
  if (!/^([0-9a-f]{2}){1,20}$/.test(serialHex))
    throw new RangeError(`not a serial number: ${JSON.stringify(serialHex)}`)
  const entry = [integer(Buffer.from(serialHex, 'hex')), time(revokedAt)]
  // RFC 5280 section 5.3.1: a reason that says nothing is left out.
  const code = reasonCodes[reason] ?? reasonCodes.unspecified
  if (code !== reasonCodes.unspecified) {
    entry.push(sequence(extension(reasonCodeOid, { critical: false }, enumerated(code))))
  }
  return sequence(...entry)
}
