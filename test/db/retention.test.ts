import { randomUUID } from 'node:crypto'
import test from 'ava'
import pg from 'pg'
import { maintainPartitions } from '../../src/db/partitions.ts'
import { applyRetention } from '../../src/db/retention.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const dayMs = 86_400_000
const now = Date.now()
const old = new Date(now - 100 * dayMs)
const young = new Date(now - 10 * dayMs)

test('rows that have no partition of their day go with the retention too, although nobody else may remove them', async t => {
  const { pool } = await testDatabase(t)
  const insert = (at: Date, count: number) =>
    pool.query(
      `insert into audit_events select $1, gen_random_uuid(), 'a', 'm', 't', '', 'OK', '', '{}', 'i' from generate_series(1, $2)`,
      [at, count],
    )
  await insert(old, 2_500)
  await insert(young, 3)
  await pool.query(
    `insert into health_reports (received_at, device_id, sequence, posture, measured_at) values ($1, 'a', 1, '{}', $1)`,
    [old],
  )
  await applyRetention(pool, 90, now, log)
  const { rows } = await pool.query('select at from audit_events')
  t.is(rows.length, 3)
  t.is((await pool.query('select 1 from health_reports')).rowCount, 0)
  await t.throwsAsync(pool.query('delete from audit_events'), { code: '42501' }, 'what guards them is back')
  await t.throwsAsync(pool.query('delete from audit_events_default'), { code: '42501' })
})

test('who reads the whole log does not hold up its writers: what is to be dropped waits for the next time', async t => {
  const { pool, url } = await testDatabase(t)
  const today = Date.UTC(2030, 0, 30)
  await maintainPartitions(pool, 90, today)
  const reader = new pg.Client({ connectionString: url })
  await reader.connect()
  t.teardown(() => reader.end())
  await reader.query('begin isolation level repeatable read')
  await reader.query('select count(*) from audit_events')

  const maintaining = maintainPartitions(pool, 1, today + 3 * dayMs)
  let written = 0
  let busy = true
  const writing = (async () => {
    while (busy) {
      await pool.query(
        `insert into audit_events values (now(), gen_random_uuid(), 'a', 'm', 't', '', 'OK', '', '{}', 'i')`,
      )
      written++
    }
  })()
  t.true((await maintaining) > 0)
  busy = false
  await writing
  t.true(written > 0)
  const first = `select to_regclass('audit_events_20300130') is not null as there`
  t.true((await pool.query(first)).rows[0].there)
  await reader.query('rollback')
  t.is(await maintainPartitions(pool, 1, today + 3 * dayMs), 0)
  t.false((await pool.query(first)).rows[0].there)
})

test('connections that ended before the retention go, those that are open or ended later stay', async t => {
  const { pool } = await testDatabase(t)
  const insert = (device: string, status: string, grantedAt: Date, endedAt: Date | null, count = 1) =>
    pool.query(
      `insert into connections (id, device_id, user_id, service_id, action, instance_id, status, granted_at, ended_at,
         decision_id)
       select gen_random_uuid(), $1, 'u', 's', 'connect', 'i', $2, $3, $4, '' from generate_series(1, $5)`,
      [device, status, grantedAt, endedAt, count],
    )
  await insert('gone', 'closed', old, old, 2_200)
  await insert('taken back', 'revoked', old, old)
  await insert('still open', 'active', old, null)
  await insert('long', 'closed', old, young)
  await insert('young', 'closed', young, young)
  await Promise.all([1, 2].map(() => applyRetention(pool, 90, now, log)))
  const { rows } = await pool.query('select device_id as device from connections order by 1')
  t.deepEqual(
    rows.map(({ device }) => device),
    ['long', 'still open', 'young'],
  )
})

test('tokens that ended before the retention go with their redemptions, unless a device still waits for its approval', async t => {
  const { pool } = await testDatabase(t)
  const later = new Date(now + dayMs)
  const token = async (id: string, expiresAt: Date, revokedAt: Date | null, redeemedAt?: Date, status = 'active') => {
    await pool.query(
      `insert into enrollment_tokens (id, secret_hash, uses_max, expires_at, revoked_at, labels, created_by, created_at)
       values ($1, '', 5, $2, $3, '{}', '', $4)`,
      [id, expiresAt, revokedAt, old],
    )
    if (!redeemedAt) return
    await pool.query(
      `insert into devices (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
       values ($1, 'laptop', '', '', '{}', $2, $1, '', $3, $3)`,
      [id, status, redeemedAt],
    )
    await pool.query(
      `insert into token_redemptions (token_id, public_key_sha256, device_id, source_address, redeemed_at, completed_at)
       values ($1, $2, $1, '', $3, $4)`,
      [id, randomUUID(), redeemedAt, status === 'pending' ? null : redeemedAt],
    )
  }
  await token('expired', old, null)
  await token('expired, used', old, null, old)
  await token('revoked, used', later, old, old)
  await token('alive', later, null)
  await token('alive, used', later, null, old)
  await token('expired lately', young, null, old)
  await token('expired, waited for', old, null, old, 'pending')
  await applyRetention(pool, 90, now, log)
  const ids = async (sql: string) => (await pool.query<{ id: string }>(sql)).rows.map(({ id }) => id)
  const kept = ['alive', 'alive, used', 'expired lately', 'expired, waited for']
  t.deepEqual(await ids('select id from enrollment_tokens order by 1'), kept)
  t.deepEqual(await ids('select token_id as id from token_redemptions order by 1'), kept.slice(1))
})
