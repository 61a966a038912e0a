/** What devices trust: roots, intermediates and the revocation lists, which are signed anew when something was revoked. */
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import type { AuthoritySet, Generation } from './authorities.ts'
import type { RevocationReason } from './crl.ts'

export type TrustBundleSource = {
  current(): Promise<TrustBundle>
  /** The same without its revocation lists, which with many revocations are megabytes: what every device is given. */
  roots(): TrustBundle
  /**
   * The revocation list of one authority that is trusted, in DER.
   *
   * @param issuerKeyId lower-case hex; absent: the one that issues now
   */
  revocationList(issuerKeyId?: string): Promise<Buffer | undefined>
  /** Certificates have been revoked: the next lists are new. */
  invalidate(): void
}

/** How long a list says that it is good for, and how long we hand out the same one. */
const listValidMs = 24 * 3_600_000
const listReusedMs = 3_600_000

const noList = Buffer.alloc(0)

export function createTrustBundleSource(options: {
  db: Database
  authorities: { current(): AuthoritySet }
  trustDomain: string
  clock: Clock
}): TrustBundleSource {
  const { db, authorities, trustDomain, clock } = options
  /** By the key identifier of their issuer; two during a rotation. */
  const lists = new Map<string, { der: Promise<Buffer>; until: number }>()

  async function signList(authority: Generation, now: number): Promise<Buffer> {
    // As a number: MikroORM has the pool hand out timestamps as text. Certificates from before there were several
    // authorities name none; they are the first one's.
    const { rows } = await db.pool.query<{ serial: string; revokedAtMs: number; reason: RevocationReason | null }>(
      `select serial, (extract(epoch from revoked_at) * 1000)::float8 as "revokedAtMs", revocation_reason as reason
       from certificates
       where revoked_at is not null and not_after > $1 and (issuer_key_id = $2 or (issuer_key_id is null and $3))`,
      [new Date(now), authority.issuerKeyId, authority.generation === 1],
    )
    return authority.issueCrl({
      // The clock numbers the lists: it grows on all instances alike.
      number: now,
      thisUpdate: new Date(now),
      nextUpdate: new Date(now + listValidMs),
      revoked: rows.map(({ serial, revokedAtMs, reason }) => ({
        serialHex: serial,
        revokedAt: new Date(revokedAtMs),
        ...(reason && { reason }),
      })),
    })
  }

  function listOf(authority: Generation): Promise<Buffer> {
    const now = clock()
    const kept = lists.get(authority.issuerKeyId)
    if (kept && kept.until > now) return kept.der
    const fresh = { der: signList(authority, now), until: now + listReusedMs }
    lists.set(authority.issuerKeyId, fresh)
    fresh.der.catch(() => {
      if (lists.get(authority.issuerKeyId) === fresh) lists.delete(authority.issuerKeyId)
    })
    return fresh.der
  }

  function rootsOf({ trusted, bundleId }: AuthoritySet): TrustBundle {
    return {
      rootsPem: trusted.map(({ rootPem }) => rootPem),
      intermediatesPem: trusted.flatMap(({ intermediates, crosses }) => [...intermediates, ...crosses]),
      crlDer: noList,
      crlsDer: [],
      trustDomain,
      id: bundleId,
    }
  }

  return {
    roots: () => rootsOf(authorities.current()),
    async current() {
      const set = authorities.current()
      // Who lacks the key of an authority can't sign its list; those who have it hand it out.
      const able = set.trusted.filter(({ issuer }) => issuer.privateKey !== undefined)
      const lists = new Map(await Promise.all(able.map(async one => [one, await listOf(one)] as const)))
      const crlDer = lists.get(set.issuing) ?? noList
      lists.delete(set.issuing)
      return { ...rootsOf(set), crlDer, crlsDer: [...lists.values()] }
    },
    async revocationList(issuerKeyId) {
      const { trusted, issuing } = authorities.current()
      const authority = issuerKeyId === undefined ? issuing : trusted.find(one => one.issuerKeyId === issuerKeyId)
      return authority && listOf(authority)
    },
    invalidate: () => lists.clear(),
  }
}
