/**
 * From a checked key to a certificate, in the order that keeps every certificate on record: its serial is reserved in
 * the transaction that allows it, then it is signed, then its fingerprint is noted. A crash in between leaves a serial
 * that nobody holds, never a certificate that nobody knows.
 */
import type { Clock } from '../clock.ts'
import type { Database, EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { AuthoritySet, Generation } from './authorities.ts'
import { type IssuedCertificate, newSerial } from './certificates.ts'
import type { CheckedCsr } from './csr.ts'
import { Certificate } from './entities.ts'
import { formatSpiffeId, type SpiffeKind } from './spiffe-id.ts'

/** Clocks of devices run behind: a certificate is valid from a little before it was made. */
const backdateMs = 5 * 60_000

export type Issuance = {
  /**
   * Resolves when it is known which authority issues now. To be awaited before a serial is prepared or reserved: an instance
   * that has lost touch might sign by one that nobody trusts any more.
   */
  ready(): Promise<void>
  /** What would be reserved, for who writes it to `certificates` in a transaction of plain statements. */
  prepare(subject: Subject, key: CheckedCsr, validityMs: number): Reservation
  /** Reserves a serial in the transaction of `em`. A request that was used before makes it fail: see `csrReplayed`. */
  reserve(em: EntityManager, subject: Subject, key: CheckedCsr, validityMs: number): Reservation
  /** Signs what has been reserved, once that transaction has committed. */
  sign(reservation: Reservation): Promise<SignedCertificate>
}

export type SignedCertificate = IssuedCertificate & {
  /** What its holder shows: the leaf, then what leads to the root, PEM. */
  chainPem: string[]
  /** When to renew. */
  renewAfter: Date
}

export type Subject = {
  kind: SpiffeKind
  id: string
  /** An operator's role. */
  role?: string
  /** Names of a server; with them the certificate is one for servers, without it is one for clients. */
  server?: { dnsNames: string[]; ipAddresses: string[] }
}

export type Reservation = {
  subject: Subject
  key: CheckedCsr
  serial: string
  notBefore: Date
  notAfter: Date
  reservedAt: Date
  /** Who will sign: the one that issued when the serial was reserved, whatever has changed since. */
  authority: Generation
}

export function createIssuance(options: {
  db: Database
  authorities: { current(): AuthoritySet }
  trustDomain: string
  crlUrl: string | undefined
  /** Resolves when memory may be used; see `ChangeFeed.caughtUp`. */
  caughtUp: () => Promise<void>
  clock: Clock
  /** 0 to 1, exclusive. */
  random?: () => number
}): Issuance {
  const { db, authorities, trustDomain, crlUrl, clock, random = Math.random } = options

  function prepare(subject: Subject, key: CheckedCsr, validityMs: number): Reservation {
    const now = clock()
    const authority = authorities.current().issuing
    return {
      authority,
      subject,
      key,
      serial: newSerial(),
      notBefore: new Date(now - backdateMs),
      // A leaf never outlives its issuer, nor the root above it.
      notAfter: new Date(
        Math.min(now + validityMs, authority.issuer.notAfter.getTime(), authority.rootNotAfter.getTime()),
      ),
      reservedAt: new Date(now),
    }
  }

  return {
    ready: options.caughtUp,
    prepare,
    reserve(em, subject, key, validityMs) {
      const reservation = prepare(subject, key, validityMs)
      em.persist(
        em.create(Certificate, {
          serial: reservation.serial,
          subjectKind: subject.kind,
          subjectId: subject.id,
          publicKeySha256: key.publicKeySha256,
          csrSha256: key.sha256 || null,
          issuerKeyId: reservation.authority.issuerKeyId,
          notBefore: reservation.notBefore,
          notAfter: reservation.notAfter,
          createdAt: reservation.reservedAt,
        }),
      )
      return reservation
    },
    async sign({ subject, key, serial, notBefore, notAfter, authority }) {
      const certificate = authority.issueLeaf({
        serial: Buffer.from(serial, 'hex'),
        spki: key.spki,
        spiffeId: formatSpiffeId({ trustDomain, kind: subject.kind, id: subject.id }),
        purpose: subject.server ? 'server' : 'client',
        commonName: subject.id,
        organizationalUnit: subject.role,
        notBefore,
        notAfter,
        dnsNames: subject.server?.dnsNames,
        ipAddresses: subject.server?.ipAddresses,
        crlUrl: crlUrl && `${crlUrl.replace(/\/$/, '')}/${authority.issuerKeyId}.crl`,
      })
      await db.pool.query('update certificates set fingerprint_sha256 = $2 where serial = $1', [
        serial,
        certificate.fingerprintSha256,
      ])
      return {
        ...certificate,
        chainPem: [certificate.pem, ...authority.intermediates, ...authority.crosses],
        renewAfter: renewAfter(certificate, random),
      }
    },
  }
}

/**
 * What the caller is told when the transaction of a reservation has failed because its request was used before; the
 * error as it was, when it failed for something else.
 */
export function csrReplayed(error: unknown): unknown {
  if ((error as { constraint?: unknown }).constraint !== 'certificates_csr') return error
  const message = 'csr: this request has been used before; sign a new one with a new challenge'
  return new Fault('FAILED_PRECONDITION', 'CSR_REPLAYED', message, { cause: error })
}

/** For how long a certificate was made out. Its life begins when it is issued, not when it is dated. */
export function validityMsOf({ notBefore, notAfter }: { notBefore: number; notAfter: number }): number {
  return notAfter - (notBefore + backdateMs)
}

/** Whether a certificate is so late in its life that its holder, who renews by itself well before, has to be reminded. */
export function isLateInLife(dates: { notBefore: number; notAfter: number }, nowMs: number): boolean {
  return nowMs >= dates.notAfter - validityMsOf(dates) * (1 - lateShare)
}

/** Share of its life after which a certificate is late. */
const lateShare = 0.75

/**
 * When to renew: around two thirds into the life of the certificate, which begins when it is issued, not when it is dated.
 * Spread over a tenth of that life, so that those who enrolled together do not come back together.
 */
function renewAfter({ notBefore, notAfter }: { notBefore: Date; notAfter: Date }, random: () => number): Date {
  const issuedAt = notBefore.getTime() + backdateMs
  const share = 2 / 3 + renewalSpread * (random() - 0.5)
  return new Date(issuedAt + (notAfter.getTime() - issuedAt) * share)
}

/** Share of a certificate's life over which renewals are spread. */
const renewalSpread = 0.1
