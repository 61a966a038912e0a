/** A migrated database of as many devices as are wanted, filled by the database itself: what a year of a fleet leaves behind. */

import { accessEntities } from '../../src/access/entities.ts'
import { auditEntities } from '../../src/audit/entities.ts'
import type { Database } from '../../src/db/orm.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { fleetEntities } from '../../src/fleet/entities.ts'
import { identityEntities } from '../../src/identity/entities.ts'
import { administer, databaseUrl } from '../support/postgres-server.ts'

export type FilledDatabase = Database & { devices: number; drop(): Promise<void> }

const entities = [...identityEntities, ...fleetEntities, ...accessEntities, ...auditEntities]
const statementTimeoutMs = 600_000

/** The device of that number, as the SQL below names it. */
export const deviceOf = (number: number) => `device-${String(number).padStart(8, '0')}`
export const connectionOf = (number: number) => `00000000-0000-7000-8000-${number.toString(16).padStart(12, '0')}`

/** Of one that is given: instances alive, the devices that each holds, connections active, users, services. */
export const instanceIds = ['one', 'two', 'three']
export const usersMax = 10_000
export const servicesMax = 1_000

/**
 * `$1`: how many devices. Of a hundred devices one is revoked and one quarantined, ninety are here and
 * report. Each has a certificate in use and one before that, and two connections, of which one is open
 * where the device is. History is that of a few minutes: of a year it is more partitions, of which a statement looks at few.
 */
const fill = [
  `insert into instances (id, started_at, seen_at, hands_over) select unnest($2::text[]), now(), now() + interval '1 day', true`,
  `insert into users (id, email, name, role, status, created_at)
   select 'user-' || n, 'user-' || n || '@example.com', '', 'role-' || n % 50, 'active', now()
   from generate_series(1, least($1::int, ${usersMax})) n`,
  `insert into services (id, name, labels, owner, status, created_at)
   select 'service-' || n, '', '{}', '', 'active', now() from generate_series(1, least($1::int, ${servicesMax})) n`,
  `insert into role_grants (role, service, actions, created_at)
   select 'role-' || r, 'service-' || s, '["*"]', now() from generate_series(0, 49) r, generate_series(1, 20) s`,
  `insert into devices (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
   select 'device-' || lpad(n::text, 8, '0'), 'server', 'linux', '6.12',
     jsonb_build_object('site', 'site-' || n % 500, 'ring', 'ring-' || n % 10),
     case n % 100 when 98 then 'revoked' when 99 then 'quarantined' else 'active' end,
     'spiffe://edgemesh.local/device/device-' || lpad(n::text, 8, '0'), md5(n::text) || md5('key' || n),
     now() - make_interval(days => n % 365), now() - make_interval(days => n % 365)
   from generate_series(1, $1::int) n`,
  `insert into device_postures (device_id, posture, failing, measured_at, received_at, trust_bundle_id, issuer_key_id, clock_offset_ms)
   select 'device-' || lpad(n::text, 8, '0'),
     '{"cpuPercent": 12, "memoryPercent": 40, "diskPercent": 50, "patchesCurrent": true, "antivirusEnabled": true,
       "diskEncrypted": true, "firewallEnabled": true, "attributes": {}}',
     case n % 20 when 0 then '["disk_encrypted"]'::jsonb else '[]' end,
     now() - make_interval(secs => case when n % 10 = 0 then 86400 * (n % 60) else n % 60 - 86400 end),
     now() - make_interval(secs => case when n % 10 = 0 then 86400 * (n % 60) else n % 60 - 86400 end), md5('bundle'), md5('issuer'), n % 100
   from generate_series(1, $1::int) n`,
  `insert into certificates (serial, subject_kind, subject_id, public_key_sha256, fingerprint_sha256, not_before, not_after,
     revoked_at, revocation_reason, created_at, issuer_key_id, csr_sha256)
   select md5(n::text || of), 'device', 'device-' || lpad(n::text, 8, '0'), md5(n::text) || md5('key' || n),
     md5('f' || n || of) || md5('g' || n || of), now() - make_interval(days => 80 * of), now() + make_interval(days => 90 - 80 * of),
     case when n % 100 = 98 then now() end, case when n % 100 = 98 then 'privilegeWithdrawn' end,
     now() - make_interval(days => 80 * of), md5('issuer'), md5('c' || n || of) || md5('d' || n || of)
   from generate_series(1, $1::int) n, generate_series(0, 1) of`,
  `insert into device_presence (device_id, instance_id, since)
   select 'device-' || lpad(n::text, 8, '0'), ($2::text[])[1 + n % 3], now() - interval '1 hour'
   from generate_series(1, $1::int) n where n % 10 <> 0`,
  `insert into enrollment_tokens (id, secret_hash, uses_max, uses, expires_at, labels, created_by, created_at)
   select 'token-' || n, 'x', null, 100, now() + interval '1 day', '{}', 'bench', now()
   from generate_series(1, $1::int / 100) n`,
  `insert into token_redemptions (token_id, public_key_sha256, device_id, source_address, redeemed_at, completed_at)
   select 'token-' || 1 + n % ($1::int / 100), md5(n::text) || md5('key' || n), 'device-' || lpad(n::text, 8, '0'), '192.0.2.1',
     now() - make_interval(days => n % 365), now()
   from generate_series(1, $1::int) n`,
  `insert into connections (id, device_id, user_id, service_id, action, instance_id, status, granted_at, ended_at, end_reasons,
     decision_id)
   select ('00000000-0000-7000-8000-' || lpad(to_hex(2 * n + of), 12, '0'))::uuid, 'device-' || lpad(n::text, 8, '0'),
     'user-' || 1 + n % 1000, 'service-' || 1 + n % 100, 'connect', ($2::text[])[1 + n % 3],
     case when of = 0 and n % 10 <> 0 then 'active' else 'closed' end, now() - make_interval(secs => n % 86400 + of * 86400),
     case when of = 0 and n % 10 <> 0 then null else now() - make_interval(secs => n % 86400) end,
     case when of = 0 and n % 10 <> 0 then null else '[]'::jsonb end, 'decision'
   from generate_series(1, $1::int) n, generate_series(0, 1) of`,
  `insert into audit_events (at, id, actor, method, target, source_address, code, reason, detail, instance_id)
   select now() - make_interval(secs => n % 3600), gen_random_uuid(),
     'spiffe://edgemesh.local/device/device-' || lpad(n::text, 8, '0'), '/edgemesh.v1.HeartbeatService/Heartbeat',
     'device/device-' || lpad(n::text, 8, '0'), '192.0.2.1', 'OK', '', '{}', ($2::text[])[1 + n % 3]
   from generate_series(1, $1::int, 5) n`,
  `insert into decisions (at, id, device_id, caller, method, source_address, instance_id, policy_revision, latency_us, questions)
   select now() - make_interval(secs => n % 3600), gen_random_uuid(), 'device-' || lpad(n::text, 8, '0'),
     'spiffe://edgemesh.local/device/device-' || lpad(n::text, 8, '0'), '/edgemesh.v1.AuthorizeService/Authorize', '192.0.2.1',
     ($2::text[])[1 + n % 3], 'bench', 500,
     jsonb_build_array(jsonb_build_object('user', 'user-1', 'service', 'service-1', 'action', 'connect', 'allow', true, 'reasons', '[]'::jsonb))
   from generate_series(1, $1::int, 5) n`,
]

/** @param serverUrl where to make it */
export async function fillDatabase(serverUrl: string, devices: number): Promise<FilledDatabase> {
  const name = `edgemesh_rows_${process.pid}_${devices}`
  await administer(serverUrl, `create database ${name}`)
  const drop = () => administer(serverUrl, `drop database ${name} with (force)`)
  try {
    const database = await openDatabase({ url: databaseUrl(serverUrl, name), poolMax: 4, entities })
    await database.migrate()
    const client = await database.pool.connect()
    try {
      await client.query(`set statement_timeout = ${statementTimeoutMs}; set synchronous_commit = off`)
      for (const text of fill) {
        const values = [devices, instanceIds].slice(0, text.includes('$2') ? 2 : text.includes('$1') ? 1 : 0)
        const patient = { text: text.includes('$1') || !text.includes('$2') ? text : text.replaceAll('$2', '$1') }
        const given = text.includes('$1') ? values : text.includes('$2') ? [instanceIds] : []
        await client.query({ ...patient, values: given, ...{ query_timeout: statementTimeoutMs } })
      }
      await client.query({ text: 'vacuum analyze', ...{ query_timeout: statementTimeoutMs } })
    } finally {
      client.release(true)
    }
    return {
      ...database,
      devices,
      async drop() {
        await database.close()
        await drop()
      },
    }
  } catch (error) {
    await drop()
    throw error
  }
}
