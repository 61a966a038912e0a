/** The certificate authority that all instances share: made by the first one to start, opened by the rest. */
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import { type Authority, createAuthority, openAuthority } from './certificate-authority.ts'
import { StoredAuthority } from './entities.ts'

/** Opens the database's authority; makes one if there is none yet, exactly once however many instances start. */
export async function openStoredAuthority(options: {
  db: Database
  trustDomain: string
  validityDays: number
  passphrase: string
  clock: Clock
}): Promise<{ authority: Authority; created: boolean }> {
  const { db, trustDomain, validityDays, passphrase, clock } = options
  const em = db.em()
  let stored = await em.findOne(StoredAuthority, { id: 1 })
  let created = false
  if (!stored) {
    const now = new Date(clock())
    const material = await createAuthority({ trustDomain, validityDays, now, passphrase })
    const inserted = await db.pool.query(
      `insert into authorities
         (id, trust_domain, root_pem, root_key_pem, intermediate_pem, intermediate_key_pem, created_at)
       values (1, $1, $2, $3, $4, $5, $6) on conflict (id) do nothing`,
      [trustDomain, material.rootPem, material.rootKeyPem, material.intermediatePem, material.intermediateKeyPem, now],
    )
    created = inserted.rowCount === 1
    stored = await em.findOneOrFail(StoredAuthority, { id: 1 })
  }
  if (stored.trustDomain !== trustDomain) {
    throw new Error(
      `TRUST_DOMAIN is ${trustDomain}, but the authority in this database is that of ${stored.trustDomain}: ` +
        `set TRUST_DOMAIN=${stored.trustDomain}, or use another database`,
    )
  }
  return {
    authority: openAuthority({ ...stored, intermediateKeyPem: stored.intermediateKeyPem ?? '', passphrase }),
    created,
  }
}
