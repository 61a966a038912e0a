/**
 * Operators' certificates, issued by who holds the database and the authority's passphrase: the first operator can't
 * be made over the wire, because who would be allowed to?
 */
import type { Database } from '../db/orm.ts'
import { invalidField } from '../fault.ts'
import type { AuthoritySet } from './authorities.ts'
import { checkCsr } from './csr.ts'
import type { Issuance } from './issuance.ts'
import { isSafeId, safeIdRule } from './spiffe-id.ts'

/** Longer than this no operator's certificate is made out: the 825 days that browsers allowed once, for the same reasons. */
export const operatorValidityMsMax = 825 * 86_400_000

/** @returns the certificate and what is above it, PEM, and the roots to trust */
export async function issueOperator(
  deps: { db: Database; authorities: { current(): AuthoritySet }; issuance: Issuance },
  operator: { name: string; role: string; csr: Uint8Array; validityMs: number },
): Promise<{ certificatePem: string; rootsPem: string; notAfter: Date }> {
  for (const field of ['name', 'role'] as const) {
    if (isSafeId(operator[field])) continue
    throw invalidField(field, safeIdRule)
  }
  const key = checkCsr(operator.csr)
  const subject = { kind: 'operator' as const, id: operator.name, role: operator.role }
  const reservation = await deps.db
    .em()
    .transactional(async em => deps.issuance.reserve(em, subject, key, operator.validityMs))
  const certificate = await deps.issuance.sign(reservation)
  return {
    certificatePem: certificate.chainPem.join(''),
    rootsPem: deps.authorities
      .current()
      .trusted.map(({ rootPem }) => rootPem)
      .join(''),
    notAfter: certificate.notAfter,
  }
}
