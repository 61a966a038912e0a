import test, { type ExecutionContext } from 'ava'
import { connectionIdOf, newDecisionId } from '../../src/access/connection-id.ts'
import {
  claimConnections,
  connectionEntry,
  departedConnections,
  recordFromDecisions,
} from '../../src/access/connection-records.ts'
import type { Verdict } from '../../src/access/decide.ts'
import { decisionEntry } from '../../src/access/decision-records.ts'
import type { Lease } from '../../src/access/leases.ts'
import { callEntry, type Journal, startJournal } from '../../src/audit/journal.ts'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import type { Call } from '../../src/caller.ts'
import { systemClock } from '../../src/clock.ts'
import { AuthorizeServiceService } from '../../src/gen/edgemesh/v1/authorize.ts'
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
    (await claimConnections(pool, { ids: [id], deviceId, instanceId, graceMs: 30_000 })).get(id)?.claimed
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

/** A call of the device alpha at instance a. */
const callOf = (method: string) =>
  ({
    caller: { kind: 'device', id: 'alpha', spiffeId: 'spiffe://test/device/alpha' },
    address: '192.0.2.1',
    method,
    instanceId: 'a',
    startedAt: Date.now(),
    audit: { target: 'device/alpha', detail: {}, written: false },
  }) as unknown as Call
const stream = callOf(AuthorizeServiceService.authorize.path)

/** Asked for by e-mail address, as its input knows. */
const verdictOf = (allow: boolean) => {
  const first = JSON.stringify({ ...question, user: 'ada@example.com', allow, input: { user: { id: 'ada' } } })
  return { allow, onRecord: { first }, policyRevision: '1' } as unknown as Verdict
}

/** A message, by default one that was allowed one thing and denied another. @returns the id of its decision */
async function decided(journal: Journal, call = stream, nowMs = Date.now(), allows = [true, false]): Promise<string> {
  const decisionId = newDecisionId()
  const answers = allows.map(allow => ({ verdict: verdictOf(allow) }))
  await journal.append([decisionEntry(decisionId, call, 'alpha', answers, nowMs, 0).entry])
  return decisionId
}

test('a connection that was just allowed, and whose instance has died, is claimed by its decision', async t => {
  const { pool, journal } = await start(t)
  const decisionId = await decided(journal)
  const ids = [connectionIdOf(decisionId, 0), connectionIdOf(decisionId, 1), connectionIdOf(decisionId, 2)]
  const asked = { ids, deviceId: 'beta', instanceId: 'b', graceMs: 30_000 }
  t.is((await claimConnections(pool, asked)).size, 0, 'not by another device')
  const claims = await claimConnections(pool, { ...asked, deviceId: 'alpha' })
  t.deepEqual([...claims.keys()], [ids[0]], 'what was denied is no connection')
  t.like(claims.get(ids[0] as string), {
    claimed: true,
    status: 'active',
    userId: 'ada',
    serviceId: 'payroll',
    action: 'connect',
    decisionId: `${decisionId}.0`,
  })
  t.deepEqual(await departedConnections(pool, ids, 'a'), [{ id: ids[0], status: 'active', endReasons: null }])
})

test('several who need the row of one connection make one', async t => {
  const { pool, journal } = await start(t)
  const id = connectionIdOf(await decided(journal), 0)
  const made = await Promise.all(Array.from({ length: 8 }, () => recordFromDecisions(pool, [id], 30_000)))
  t.deepEqual(
    made.filter(count => count > 0),
    [1],
  )
})

test('no connection comes of one that was closed, of a decision of long ago, or of an answer to Check', async t => {
  const { pool, journal } = await start(t)
  const closed = connectionIdOf(await decided(journal), 0)
  const event = { ...stream, audit: { ...stream.audit, detail: { closed: [closed] } } }
  await journal.append([callEntry(event, { code: 'OK' })])
  const old = connectionIdOf(await decided(journal, stream, Date.now() - 600_000), 0)
  const checked = connectionIdOf(await decided(journal, callOf(AuthorizeServiceService.check.path)), 0)
  const misspelt = connectionIdOf(await decided(journal, stream, Date.now(), [false, true]), 171).toUpperCase()
  t.is(await recordFromDecisions(pool, [closed, old, checked, misspelt], 30_000), 0)
  t.is(await recordFromDecisions(pool, [connectionIdOf(await decided(journal), 0)], 30_000), 1)
})
