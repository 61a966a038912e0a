import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { claimConnections, connectionEntry, departedConnections } from '../../src/access/connection-records.ts'
import type { Lease } from '../../src/access/leases.ts'
import { type Journal, startJournal } from '../../src/audit/journal.ts'
import { rowText } from '../../src/audit/journal-table.ts'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { systemClock } from '../../src/clock.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from '../support/postgres.ts'

const id = '00000000-0000-4000-8000-000000000001'
const question = { deviceId: 'alpha', user: 'ada', service: 'payroll', action: 'connect' }
const reason = { code: 'GONE', field: '', actual: '', required: '', message: 'Gone.' }

const lease = (state: Lease['state'], resumeBy?: Date) =>
  ({ id, state, resumeBy, question, userId: 'ada', serviceId: 'payroll', grantedAtMs: 0, decisionId: 'd' }) as Lease

/** A connection of instance a, which hands over. */
async function start(t: ExecutionContext) {
  const { pool } = await testDatabase(t)
  const sealKey = sealKeyFrom('a secret of tests that is long enough')
  const log = createLog({ level: 'silent' })
  const journal = startJournal({ pool, log, sealKey, instanceId: 'a', clock: systemClock })
  t.teardown(() => journal.stop())
  await pool.query("insert into instances (id, started_at, seen_at, hands_over) values ('a', now(), now(), true)")
  await journal.append([connectionEntry(lease('active'), 'a', 0, [])])
  const record = async () =>
    (await pool.query('select instance_id as instance, status, resume_by is not null as waits from connections'))
      .rows[0]
  const claim = async (instanceId: string, deviceId = 'alpha') =>
    (await claimConnections(pool, { ids: [id], deviceId, instanceId })).get(id)?.claimed
  return { pool, journal, record, claim }
}

const write = (journal: Journal, instance: string, ...of: Parameters<typeof lease>) =>
  journal.append([connectionEntry(lease(...of), instance, Date.now(), [reason])])

test('what an instance writes of a connection that another has claimed changes nothing', async t => {
  const { pool, journal, record, claim } = await start(t)
  t.true(await claim('b'))
  for (const state of ['suspended', 'closed', 'revoked'] as const) {
    await write(journal, 'a', state, new Date(Date.now() + 30_000))
    t.deepEqual(await record(), { instance: 'b', status: 'active', waits: false }, state)
  }
  t.deepEqual(await departedConnections(pool, [id], 'a'), [{ id, status: 'active', endReasons: null }])
  t.deepEqual(await departedConnections(pool, [id], 'b'), [])
  await write(journal, 'b', 'revoked')
  t.deepEqual(await record(), { instance: 'b', status: 'revoked', waits: false })
  t.deepEqual(await departedConnections(pool, [id], 'b'), [{ id, status: 'revoked', endReasons: [reason] }])
})

test('a connection is claimed by its device alone, until its time is over, and never once it has ended', async t => {
  const { journal, record, claim } = await start(t)
  t.is(await claim('b', 'beta'), undefined)
  await write(journal, 'a', 'suspended', new Date(Date.now() - 1))
  t.false(await claim('b'))
  t.deepEqual(await record(), { instance: 'a', status: 'active', waits: true })
  await write(journal, 'a', 'suspended', new Date(Date.now() + 30_000))
  t.true(await claim('b'))
  await write(journal, 'b', 'closed')
  t.false(await claim('a'))
})

test('of instances that claim at once all but the last have lost it', async t => {
  const { pool, record, claim } = await start(t)
  for (const name of ['b', 'c', 'd', 'e']) {
    await pool.query('insert into instances (id, started_at, seen_at, hands_over) values ($1, now(), now(), true)', [
      name,
    ])
  }
  for (let round = 0; round < 10; round++) {
    const names = ['a', 'b', 'c', 'd', 'e']
    t.deepEqual(await Promise.all(names.map(name => claim(name))), Array(5).fill(true))
    const { instance } = await record()
    for (const name of names) {
      t.is((await departedConnections(pool, [id], name)).length, name === instance ? 0 : 1)
    }
  }
})

const name = fc.oneof(fc.string({ maxLength: 8 }), fc.string({ unit: 'binary', maxLength: 8 }), fc.constant('\ud800'))
const ms = fc.integer({ min: 0, max: 4_000_000_000_000 })
const anyReason = fc.record({ code: name, field: name, actual: name, required: name, message: name })

const anyLease = fc.record({
  id: fc.uuid(),
  questionId: name,
  question: fc.record({ deviceId: name, user: name, service: name, action: name }),
  userId: name,
  serviceId: name,
  role: name,
  state: fc.constantFrom('active', 'suspended', 'revoked', 'closed'),
  grantedAtMs: ms,
  expiresAtMs: ms,
  decisionId: fc.uuid().map(id => `${id}.0`),
  resumeBy: fc.option(
    ms.map(at => new Date(at)),
    { nil: undefined },
  ),
}) as fc.Arbitrary<Lease>

test('a connection is on record as its row says, whatever its names are', t => {
  fc.assert(
    fc.property(anyLease, name, ms, fc.array(anyReason, { maxLength: 2 }), (lease, instanceId, nowMs, reasons) => {
      const { table, row, text } = connectionEntry(lease, instanceId, nowMs, reasons)
      t.is(text, rowText(table, row))
    }),
    { numRuns: 2_000 },
  )
})
