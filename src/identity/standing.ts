/**
 * Whether a certificate still stands: neither it nor its device has been revoked, and its issuer is trusted.
 *
 * Asked with every call, so kept in memory for as long as the change feed vouches for it.
 */
import type pg from 'pg'
import type { Identified } from '../caller.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { keepFacts } from '../db/kept-facts.ts'
import { Fault } from '../fault.ts'

export type Standing = {
  /** @throws Fault UNAUTHENTICATED that says what was revoked; UNAVAILABLE when that can't be known now */
  demand(caller: Identified): Promise<void>
}

/** Holders kept in memory, a few hundred bytes each. */
const holdersMax = 100_000

type Holder = {
  /** `null` where there is no such device (any more). */
  deviceStatus: string | null
  /** By serial: why it was revoked, `undefined` where it was not. */
  certificates: Map<string, string | undefined>
}

export function createStanding(options: {
  pool: pg.Pool
  feed: ChangeFeed
  /** Whether an authority's certificates count, by its key identifier. */
  isTrusted: (issuerKeyId: string) => boolean
}): Standing {
  const { pool, feed, isTrusted } = options
  const kinds = ['device', 'operator', 'service'] as const
  const holders = Object.fromEntries(
    kinds.map(kind => [kind, keepFacts<Holder>({ feed, kind, max: holdersMax, load: id => load(kind, id) })]),
  )

  async function load(kind: Identified['kind'], id: string): Promise<Holder> {
    const { rows } = await pool.query<{
      serial: string
      revoked_at: Date | null
      revocation_reason: string | null
      status: string | null
    }>(
      `select c.serial, c.revoked_at, c.revocation_reason, d.status from certificates c
       left join devices d on c.subject_kind = 'device' and d.id = c.subject_id
       where c.subject_kind = $1 and c.subject_id = $2 and c.not_after > now()`,
      [kind, id],
    )
    return {
      deviceStatus: rows[0]?.status ?? null,
      certificates: new Map(
        rows.map(row => [row.serial, row.revoked_at ? row.revocation_reason || 'unspecified' : undefined]),
      ),
    }
  }

  return {
    async demand({ kind, id, serial, issuerKeyId }) {
      if (!feed.isLive()) await feed.caughtUp()
      if (!isTrusted(issuerKeyId)) throw certificateRetired()
      const kept = holders[kind] as NonNullable<(typeof holders)[string]>
      let { value: holder } = await kept.get(id)
      if (!holder.certificates.has(serial)) {
        // It may be younger than what is in memory. Only who holds a certificate of ours gets here.
        kept.forget(id)
        holder = (await kept.get(id)).value
      }
      if (!holder.certificates.has(serial) || (kind === 'device' && holder.deviceStatus === null)) {
        const message = 'this certificate authority has no record of the client certificate'
        throw new Fault('UNAUTHENTICATED', 'CERTIFICATE_UNKNOWN', message)
      }
      if (holder.deviceStatus === 'revoked') throw deviceRevoked(id)
      const reason = holder.certificates.get(serial)
      if (reason !== undefined) {
        throw new Fault('UNAUTHENTICATED', 'CERTIFICATE_REVOKED', `the client certificate has been revoked (${reason})`)
      }
    },
  }
}

function certificateRetired(): Fault {
  const message = 'the authority that issued the client certificate is trusted no more: enroll again'
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_RETIRED', message)
}

export function deviceRevoked(id: string): Fault {
  return new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', `device ${id} has been revoked`)
}
