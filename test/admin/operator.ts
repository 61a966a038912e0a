/** An operator before a service with an empty database: what every test here starts from. */
import type { ExecutionContext } from 'ava'
import { type AdminDeps, adminHandlers, adminStreams } from '../../src/admin/admin-service.ts'
import { AuditEvent } from '../../src/audit/entities.ts'
import { createFollower } from '../../src/audit/follower.ts'
import type { Call } from '../../src/caller.ts'
import { readPayload } from '../../src/db/change-feed.ts'
import { readAtPrimary } from '../../src/db/replicas.ts'
import { Fault, type FaultCode } from '../../src/fault.ts'
import { authoritySet, type Generation } from '../../src/identity/authorities.ts'
import { createAuthority, openAuthority } from '../../src/identity/certificate-authority.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
export const start = Date.parse('2026-03-02T10:00:00Z')
export const tokenSecret = 'a secret of tests that is long enough'

const material = await createAuthority({
  trustDomain: 'test',
  validityDays: 3_650,
  now: new Date(start),
  passphrase: 'a passphrase of the tests',
})
const issuing: Generation = {
  ...openAuthority({ ...material, passphrase: 'a passphrase of the tests' }),
  generation: 1,
  stage: 'issuing',
  keyInFile: false,
  createdAt: new Date(start),
}

/** What the policy of these tests says of any question. */
export const explanation = [{ field: 'device.status', actual: 'active', required: 'active', holds: true }]

export const authority: AdminDeps['authority'] = {
  trustDomain: 'test',
  current: () => authoritySet([issuing]),
  refresh: async () => {},
  recoveryMs: 0,
  rotation: { to: () => Promise.reject(new Error('no test of these rotates')) },
  trustBundle: async () => ({
    rootsPem: ['root'],
    intermediatesPem: ['intermediate'],
    crlDer: Buffer.of(1),
    crlsDer: [],
    id: '',
    trustDomain: 'test',
  }),
}

export async function operator(t: ExecutionContext<unknown>) {
  const db = await testDatabase(t)
  const time = { now: start }
  const admin = adminHandlers({
    db,
    reports: readAtPrimary(db),
    clock: () => time.now,
    maxAgeMs: 300_000,
    leaseGraceMs: 30_000,
    tokenSecret,
    authority,
    policy: {
      revision: () => 'revision-1',
      explain: () => explanation,
      engine: 'in-process',
      status: () => ({
        ...{ revision: 'revision-1', activatedAtMs: start, checkedAtMs: start, refused: undefined, refusals: 0 },
      }),
    },
  })
  const clock = () => time.now
  return {
    db,
    admin,
    streams: adminStreams({ db, clock, follower: createFollower({ pool: db.pool, reports: db.pool, clock, log }) }),
    /** Set `time.now` to let time pass. */
    time,
    call: newCall,
    /** What audit has of changes, the oldest first. */
    auditEvents: () => db.em().find(AuditEvent, {}, { orderBy: { at: 'asc', id: 'asc' } }),
    /** Runs `work` and gives the keys that were announced meanwhile. */
    async announcedDuring(work: () => Promise<unknown>): Promise<string[]> {
      const client = await db.pool.connect()
      const keys: string[] = []
      const hear = ({ payload = '' }: { payload?: string | undefined }) => void keys.push(...readPayload(payload).keys)
      try {
        client.on('notification', hear)
        await client.query('listen edgemesh_changes')
        await work()
        // Notifications come before the answer to the next statement.
        await client.query('unlisten edgemesh_changes')
        return keys
      } finally {
        client.off('notification', hear)
        client.release()
      }
    },
  }
}

export function newCall(): Call {
  return {
    caller: {
      kind: 'operator',
      id: 'root',
      spiffeId: 'spiffe://test/operator/root',
      issuerKeyId: issuing.issuerKeyId,
      serial: '0'.repeat(32),
      notBefore: start,
      notAfter: start + 86_400_000,
      role: 'admin',
      publicKeySha256: 'cd'.repeat(32),
    },
    address: '192.0.2.1',
    method: '/edgemesh.v1.AdminService/Test',
    startedAt: start,
    instanceId: 'instance-1',
    signal: new AbortController().signal,
    audit: { target: '', detail: {}, written: false },
  }
}

/** The call is refused with this code and this reason. */
export async function refused(
  t: ExecutionContext<unknown>,
  answer: Promise<unknown>,
  code: FaultCode,
  reason: string,
): Promise<Fault> {
  const fault = await t.throwsAsync(answer, { instanceOf: Fault })
  t.deepEqual([fault?.code, fault?.reason], [code, reason])
  return fault!
}

/** The call is refused because of exactly these fields. */
export async function invalid(t: ExecutionContext<unknown>, answer: Promise<unknown>, fields: string[]): Promise<void> {
  const fault = await refused(t, answer, 'INVALID_ARGUMENT', 'INVALID_FIELD')
  t.deepEqual(fault.violations.map(violation => violation.field).sort(), [...fields].sort())
}

/** Every item of a list, page after page. */
export async function allPages<T>(list: (pageToken: string) => Promise<{ items: T[]; next: string }>): Promise<T[]> {
  const items: T[] = []
  let pageToken = ''
  do {
    const page = await list(pageToken)
    items.push(...page.items)
    pageToken = page.next
  } while (pageToken)
  return items
}
