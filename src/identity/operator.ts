/**
 * Certificates of operators, and of services such as proxies, issued by who holds the database and the authority's
 * passphrase: the first operator can't be made over the wire, because who would be allowed to?
 */
import type { Database } from '../db/orm.ts'
import { invalidField } from '../fault.ts'
import type { AuthoritySet } from './authorities.ts'
import { checkCsr } from './csr.ts'
import type { Issuance, Subject } from './issuance.ts'
import { instancesName } from './server-certificate.ts'
import { isSafeId, safeIdRule } from './spiffe-id.ts'

/** Longer than this no operator's certificate is made out: the 825 days that browsers allowed once, for the same reasons. */
export const operatorValidityMsMax = 825 * 86_400_000

/** PEM: the certificate and what is above it, and the roots to trust. */
export type CertifiedName = { certificatePem: string; rootsPem: string; notAfter: Date }

type OfflineDeps = { db: Database; authorities: { current(): AuthoritySet }; issuance: Issuance }

export async function issueOperator(
  deps: OfflineDeps,
  operator: { name: string; role: string; csr: Uint8Array; validityMs: number },
): Promise<CertifiedName> {
  demandSafe('name', operator.name)
  demandSafe('role', operator.role)
  return certify(deps, { kind: 'operator', id: operator.name, role: operator.role }, operator)
}

/** For a program that asks about devices, such as a proxy: it may call what services may, and is no server. */
export async function issueServiceIdentity(
  deps: OfflineDeps,
  service: { name: string; csr: Uint8Array; validityMs: number },
): Promise<CertifiedName> {
  demandSafe('name', service.name)
  if (service.name === instancesName) throw invalidField('name', `${instancesName} is the name of the server itself`)
  return certify(deps, { kind: 'service', id: service.name }, service)
}

function demandSafe(field: string, name: string): void {
  if (!isSafeId(name)) throw invalidField(field, safeIdRule)
}

async function certify(
  { db, authorities, issuance }: OfflineDeps,
  subject: Subject,
  { csr, validityMs }: { csr: Uint8Array; validityMs: number },
): Promise<CertifiedName> {
  const key = checkCsr(csr)
  const reservation = await db.transaction(async em => issuance.reserve(em, subject, key, validityMs))
  const certificate = await issuance.sign(reservation)
  return {
    certificatePem: certificate.chainPem.join(''),
    rootsPem: authorities
      .current()
      .trusted.map(({ rootPem }) => rootPem)
      .join(''),
    notAfter: certificate.notAfter,
  }
}
