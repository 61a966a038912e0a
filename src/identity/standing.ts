/**
 * Whether a certificate still stands: neither it nor its device has been revoked, and its issuer is trusted.
 *
 * Asked with every call, so kept in memory for as long as the change feed vouches for it.
 */
import type pg from 'pg'
import type { Identified } from '../caller.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { keepFacts, loadedTogether } from '../db/kept-facts.ts'
import type { EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { RevocationReason } from './crl.ts'

export type Standing = {
  /**
   * At once where the holder is in memory.
   *
   * @throws Fault UNAUTHENTICATED that says what was revoked; UNAVAILABLE when that can't be known now
   */
  demand(caller: Identified): void | Promise<void>
  /** @throws Fault UNAUTHENTICATED CERTIFICATE_RETIRED unless the authority that issued the certificate is trusted */
  demandIssuer(caller: Pick<Identified, 'issuerKeyId'>): void
  /**
   * The same for a device's certificate that a proxy has seen, which is told by the SHA-256 of it.
   *
   * @throws Fault likewise; UNAUTHENTICATED also when the certificate has expired
   */
  demandSeen(deviceId: string, fingerprintSha256: string, nowMs: number): Promise<void>
}

/** Holders kept in memory, a few hundred bytes each. */
const holdersMax = 100_000
/** Which certificates have expired is for the instance's clock to say; the database's may be ahead of it by so much. */
const clockMarginSeconds = 3_600
/** Advisory locks by operators' names. Any number will do, as long as every version of EdgeMesh uses the same. */
const operatorLocks = 7_306_473

type Holder = {
  /** `undefined` where there is no such device (any more). */
  device: DeviceOnRecord | undefined
  /** By serial. */
  certificates: Map<string, KeptCertificate>
}

type DeviceOnRecord = { status: string; statusReason: string }

/** `revoked`: why; `null` where it was not. */
type CertificateOnRecord = { revoked: string | null }

type KeptCertificate = CertificateOnRecord & {
  /** `null` until it is signed. */
  fingerprintSha256: string | null
  /** `null`: the first authority. */
  issuerKeyId: string | null
  notAfterMs: number
}

export function createStanding(options: {
  pool: pg.Pool
  feed: ChangeFeed
  /** Whether an authority's certificates count, by its key identifier; `null`: the first authority's. */
  isTrusted: (issuerKeyId: string | null) => boolean
}): Standing {
  const { pool, feed, isTrusted } = options
  const kinds = ['device', 'operator', 'service'] as const
  const holders = Object.fromEntries(
    kinds.map(kind => [kind, keepFacts({ feed, kind, max: holdersMax, load: holdersOf(kind) })]),
  )

  function holdersOf(kind: Identified['kind']): (id: string) => Promise<Holder> {
    const load = loadedTogether(ids => loadHolders(kind, ids))
    return async id => (await load(id)) ?? { device: undefined, certificates: new Map() }
  }

  async function loadHolders(kind: Identified['kind'], ids: string[]): Promise<Map<string, Holder>> {
    const { rows } = await pool.query<
      KeptCertificate & { subject_id: string; serial: string; status: string | null; status_reason: string }
    >(
      `select c.subject_id, c.serial, case when c.revoked_at is not null then coalesce(c.revocation_reason, 'unspecified') end as revoked,
         c.fingerprint_sha256 as "fingerprintSha256", c.issuer_key_id as "issuerKeyId",
         (extract(epoch from c.not_after) * 1000)::float8 as "notAfterMs", d.status, d.status_reason
       from certificates c left join devices d on c.subject_kind = 'device' and d.id = c.subject_id
       where c.subject_kind = $1 and c.subject_id = any($2) and c.not_after > now() - make_interval(secs => $3)`,
      [kind, ids, clockMarginSeconds],
    )
    const holders = new Map<string, Holder>()
    for (const { subject_id: id, serial, status, status_reason: statusReason, ...certificate } of rows) {
      const device = status ? { status, statusReason } : undefined
      const holder = holders.get(id) ?? { device, certificates: new Map() }
      holder.certificates.set(serial, certificate)
      holders.set(id, holder)
    }
    return holders
  }

  function demandIssuer({ issuerKeyId }: Pick<Identified, 'issuerKeyId'>): void {
    if (!isTrusted(issuerKeyId)) throw certificateRetired()
  }

  /** A holder as memory has it, unless a certificate that `has` looks for may be younger than that. */
  async function holderWith({ kind, id }: Pick<Identified, 'kind' | 'id'>, has: (holder: Holder) => boolean) {
    const kept = holders[kind] as NonNullable<(typeof holders)[string]>
    const { value: holder } = await kept.get(id)
    if (has(holder)) return holder
    kept.forget(id)
    return (await kept.get(id)).value
  }

  async function demandOnRecord({ kind, id, serial, issuerKeyId }: Identified): Promise<void> {
    if (!feed.isLive()) await feed.caughtUp()
    demandIssuer({ issuerKeyId })
    // Only who holds a certificate of ours gets here.
    const holder = await holderWith({ kind, id }, ({ certificates }) => certificates.has(serial))
    demandUnrevoked({ kind, id }, holder.device, holder.certificates.get(serial))
  }

  return {
    demandIssuer,
    demand(caller) {
      const { kind, id, serial } = caller
      if (!feed.isLive()) return demandOnRecord(caller)
      // Before anything is looked up: nobody would wait for that, and hear that it failed.
      demandIssuer(caller)
      const kept = holders[kind]?.get(id)
      if (!kept || kept instanceof Promise) return demandOnRecord(caller)
      const certificate = kept.value.certificates.get(serial)
      if (!certificate) return demandOnRecord(caller)
      demandUnrevoked(caller, kept.value.device, certificate)
      return undefined
    },

    async demandSeen(id, fingerprintSha256, nowMs) {
      if (!feed.isLive()) await feed.caughtUp()
      const seen = ({ certificates }: Holder) =>
        certificates.values().find(certificate => certificate.fingerprintSha256 === fingerprintSha256)
      const holder = await holderWith({ kind: 'device', id }, holder => seen(holder) !== undefined)
      const certificate = seen(holder)
      demandUnrevoked({ kind: 'device', id }, holder.device, certificate)
      if (!isTrusted(certificate.issuerKeyId)) throw certificateRetired()
      if (certificate.notAfterMs <= nowMs) throw certificateExpired()
    },
  }
}

export function certificateExpired(): Fault {
  const message = 'the client certificate has expired: renew it, or enroll again'
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_EXPIRED', message)
}

export function certificateRetired(): Fault {
  const message = 'the authority that issued the client certificate is trusted no more: enroll again'
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_RETIRED', message)
}

/**
 * The same for who is about to get another certificate, which must not come of one that was revoked a moment ago. Read in
 * the transaction of `em`, and a device is moved by nobody else until that has ended: a revocation or a deletion that is
 * under way either sees the new certificate or is seen here. Expired certificates count too. An operator has no row to
 * be locked, but its name.
 */
export async function demandStandingNow(em: EntityManager, { kind, id, serial }: Identified): Promise<void> {
  if (kind === 'operator') await lockOperators(em, [id])
  const [device] =
    kind === 'device'
      ? await em.execute<DeviceOnRecord[]>(
          'select status, status_reason as "statusReason" from devices where id = ? for update',
          [id],
        )
      : []
  const [certificate] = await em.execute<CertificateOnRecord[]>(
    `select case when revoked_at is not null then coalesce(revocation_reason, 'unspecified') end as revoked
     from certificates where serial = ? and subject_kind = ? and subject_id = ?`,
    [serial, kind, id],
  )
  demandUnrevoked({ kind, id }, device, certificate)
}

/** Nobody else renews or revokes these operators until the transaction of `em` has ended. */
export async function lockOperators(em: EntityManager, names: readonly string[]): Promise<void> {
  // In one order, whoever asks: two who lock each other's would wait for ever.
  for (const name of [...names].sort()) {
    await em.execute('select pg_advisory_xact_lock(?, hashtext(?))', [operatorLocks, name])
  }
}

/** @throws Fault UNAUTHENTICATED with the reason why a certificate, as it is on record, is worth nothing */
function demandUnrevoked(
  { kind, id }: Pick<Identified, 'kind' | 'id'>,
  device: DeviceOnRecord | undefined,
  certificate: CertificateOnRecord | undefined,
): asserts certificate {
  if (!certificate) {
    const message = 'this certificate authority has no record of the client certificate'
    throw new Fault('UNAUTHENTICATED', 'CERTIFICATE_UNKNOWN', message)
  }
  // A device that has enrolled since under the same name is another one.
  if (kind === 'device' && (!device || certificate.revoked === ofDeletedDevice)) throw deviceDeleted(id)
  if (device?.status === 'revoked') throw deviceRevoked(id, device.statusReason)
  if (certificate.revoked !== null) {
    const message = `the client certificate has been revoked (${certificate.revoked})`
    throw new Fault('UNAUTHENTICATED', 'CERTIFICATE_REVOKED', message)
  }
}

/** The reason for which certificates are revoked when their device is deleted, and never else. */
export const ofDeletedDevice: RevocationReason = 'cessationOfOperation'

/** Out for good. `because` is what the operator said, and metadata too. */
function deviceRevoked(id: string, because: string): Fault {
  const message = `device ${id} has been revoked${because && `: ${because}`}`
  return new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', message, { metadata: { because } })
}

/** Gone, and free to come again. */
function deviceDeleted(id: string): Fault {
  const message = `device ${id} has been deleted: enroll it again with a new token`
  return new Fault('UNAUTHENTICATED', 'DEVICE_DELETED', message)
}
