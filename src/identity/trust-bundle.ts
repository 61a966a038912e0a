/** What devices trust: roots, intermediates and the revocation list, which is signed anew when something was revoked. */
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import type { Authority } from './certificate-authority.ts'

export type TrustBundleSource = {
  current(): Promise<TrustBundle>
  /** Certificates have been revoked: the next bundle carries a new list. */
  invalidate(): void
}

/** How long a list says that it is good for, and how long we hand out the same one. */
const listValidMs = 24 * 3_600_000
const listReusedMs = 3_600_000

export function createTrustBundleSource(options: {
  db: Database
  authority: Authority
  trustDomain: string
  clock: Clock
}): TrustBundleSource {
  const { db, authority, trustDomain, clock } = options
  let list: { der: Promise<Buffer>; until: number } | undefined

  async function signList(now: number): Promise<Buffer> {
    // As a number: MikroORM has the pool hand out timestamps as text.
    const { rows } = await db.pool.query<{ serial: string; revokedAtMs: number }>(
      `select serial, (extract(epoch from revoked_at) * 1000)::float8 as "revokedAtMs" from certificates
       where revoked_at is not null and not_after > $1`,
      [new Date(now)],
    )
    return authority.issueCrl({
      // The clock numbers the lists: it grows on all instances alike.
      number: now,
      thisUpdate: new Date(now),
      nextUpdate: new Date(now + listValidMs),
      revoked: rows.map(row => ({ serialHex: row.serial, revokedAt: new Date(row.revokedAtMs) })),
    })
  }

  return {
    async current() {
      const now = clock()
      if (!list || list.until <= now) {
        const der = signList(now)
        const fresh = { der, until: now + listReusedMs }
        list = fresh
        der.catch(() => {
          if (list === fresh) list = undefined
        })
      }
      return {
        rootsPem: authority.roots,
        intermediatesPem: authority.intermediates,
        crlDer: await list.der,
        crlsDer: [await list.der],
        trustDomain,
        id: '',
      }
    },
    invalidate() {
      list = undefined
    },
  }
}
