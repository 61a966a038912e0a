/**
 * How far a fleet is with a rotation: who has reported that it trusts the next root, who uses a certificate of the next
 * authority. That one was issued is not enough: the answer may have been lost, and who has it may still be about to
 * change over. So what counts for a device that reports is the certificate that it reports with.
 *
 * Counted is who would be left behind: devices that are not revoked, and operators, with a certificate that has
 * neither expired nor been revoked; and devices that may still come back with one that has expired.
 */
import type { EntityManager } from '../db/orm.ts'
import type { AuthoritySet, Generation } from './authorities.ts'

export type RotationProgress = {
  devices: number
  devicesTrusting: number
  devicesCertified: number
  operators: number
  operatorsCertified: number
  /** Who would be without a certificate if the next authority were forgotten: those whose newest one it has issued. */
  dependent: number
}

export type HolderProgress = {
  kind: 'device' | 'operator'
  id: string
  trusting: boolean
  certified: boolean
  lastSeenAtMs: number | null
  notAfterMs: number
}

/**
 * One row a holder. A serial without a fingerprint was reserved and never signed: nobody holds it.
 *
 * Certificates from before there were several authorities name none; they are the first one's.
 */
const holders = `
  select c.subject_kind as kind, c.subject_id as id,
    bool_or(c.issuer_key_id = ?) and coalesce(max(p.issuer_key_id) in (?, ''), true) as certified,
    coalesce(max(p.issuer_key_id) = ?, false)
      or (array_agg(c.issuer_key_id order by c.created_at desc))[1] is not distinct from ? as dependent,
    coalesce(bool_or(p.trust_bundle_id = ?), false) as trusting,
    (extract(epoch from max(p.received_at)) * 1000)::float8 as "lastSeenAtMs",
    (extract(epoch from max(c.not_after)) * 1000)::float8 as "notAfterMs"
  from certificates c
  left join devices d on c.subject_kind = 'device' and d.id = c.subject_id
  left join device_postures p on p.device_id = d.id
  where c.not_after > now() - case when c.subject_kind = 'device' then make_interval(secs => ?) else '0' end
    and c.revoked_at is null and c.fingerprint_sha256 is not null
    and (c.subject_kind = 'operator' or (c.subject_kind = 'device' and d.status <> 'revoked'))
  group by c.subject_kind, c.subject_id`

export async function rotationProgress(
  em: EntityManager,
  set: AuthoritySet,
  recoveryMs: number,
): Promise<RotationProgress> {
  const [row] = await em.execute<RotationProgress[]>(
    `select (count(*) filter (where kind = 'device'))::int as devices,
       (count(*) filter (where kind = 'device' and trusting))::int as "devicesTrusting",
       (count(*) filter (where kind = 'device' and certified))::int as "devicesCertified",
       (count(*) filter (where kind = 'operator'))::int as operators,
       (count(*) filter (where kind = 'operator' and certified))::int as "operatorsCertified",
       (count(*) filter (where dependent))::int as dependent
     from (${holders}) holder`,
    holderParameters(set, recoveryMs),
  )
  return row!
}

/**
 * Holders by kind and id, from after `after` on.
 *
 * @param page.behindOnly only those whom the next stage would leave behind: while the next root is published, devices that do
 *   not trust it yet; later, whoever has no certificate of the next authority
 */
export function holderProgress(
  em: EntityManager,
  set: AuthoritySet,
  page: { after: [string, string] | undefined; limit: number; behindOnly: boolean; recoveryMs: number },
): Promise<HolderProgress[]> {
  const { after = ['', ''], limit, behindOnly, recoveryMs } = page
  return em.execute<HolderProgress[]>(
    `select * from (${holders}) holder
     where (kind, id) > (?, ?)
       and not (? and case when ? then trusting or kind = 'operator' else certified end)
     order by kind, id limit ?`,
    [...holderParameters(set, recoveryMs), ...after, behindOnly, set.rotation === 'published', limit],
  )
}

function holderParameters(set: AuthoritySet, recoveryMs: number): (string | number)[] {
  const { issuerKeyId } = nextOf(set)
  return [issuerKeyId, issuerKeyId, issuerKeyId, issuerKeyId, set.bundleId, recoveryMs / 1_000]
}

/** The authority that a rotation goes to; without one, the one that issues. */
function nextOf({ issuing, other }: AuthoritySet): Generation {
  return other && other.generation > issuing.generation ? other : issuing
}
