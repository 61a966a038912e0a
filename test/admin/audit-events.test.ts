import { randomUUID } from 'node:crypto'
import test from 'ava'
import { AuditEvent } from '../../src/audit/entities.ts'
import { CreateUserRequest, SearchAuditEventsRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, invalid, operator, start } from './operator.ts'

const search = SearchAuditEventsRequest.fromPartial

function eventRow(at: number, changes: Partial<AuditEvent> = {}) {
  return {
    at: new Date(at),
    id: randomUUID(),
    actor: 'spiffe://test/operator/root',
    method: '/edgemesh.v1.AdminService/GetUser',
    target: 'user/alice',
    sourceAddress: '192.0.2.1',
    code: 'OK',
    reason: '',
    detail: { some: ['detail'] },
    instanceId: 'instance-1',
    ...changes,
  }
}

test('a change and its event are one', async t => {
  const { admin, call, auditEvents, db } = await operator(t)
  const request = CreateUserRequest.fromPartial({ id: 'alice', email: 'a@b.de', role: 'dev' })
  const failing = call()
  // Text that PostgreSQL can't keep makes writing the event fail, after the change itself has gone well.
  failing.instanceId = 'not\0text'
  await t.throwsAsync(admin.createUser(request, failing))
  t.false(failing.audit.written)
  t.is((await auditEvents()).length, 0)
  t.is((await db.pool.query('select 1 from users')).rowCount, 0)
  const succeeding = call()
  await admin.createUser(request, succeeding)
  t.true(succeeding.audit.written)
  const { events } = await admin.searchAuditEvents(search({}), call())
  t.is(events.length, 1)
  t.like(events[0], {
    actor: 'spiffe://test/operator/root',
    target: 'user/alice',
    code: 'OK',
    sourceAddress: '192.0.2.1',
    detail: { email: 'a@b.de', role: 'dev' },
  })
})

test('events can be neither changed nor removed', async t => {
  const { db } = await operator(t)
  await db.em().insert(AuditEvent, eventRow(start))
  await t.throwsAsync(db.pool.query(`update audit_events set actor = 'nobody'`), { code: '42501' })
  await t.throwsAsync(db.pool.query('delete from audit_events'), { code: '42501' })
})

test('events are filtered by each field and by time', async t => {
  const { admin, call, db } = await operator(t)
  await db
    .em()
    .insertMany(AuditEvent, [
      eventRow(start, { target: 'first' }),
      eventRow(start + 1, { target: 'second', code: 'PERMISSION_DENIED', reason: 'ROLE' }),
      eventRow(start + 2, { target: 'third', actor: 'anonymous', method: '/other' }),
    ])
  const targets = async (filter: Partial<SearchAuditEventsRequest>) => {
    const { events } = await admin.searchAuditEvents(search(filter), call())
    return events.map(event => event.target)
  }
  t.deepEqual(await targets({}), ['third', 'second', 'first'])
  t.deepEqual(await targets({ actor: 'anonymous' }), ['third'])
  t.deepEqual(await targets({ method: '/other' }), ['third'])
  t.deepEqual(await targets({ target: 'first' }), ['first'])
  t.deepEqual(await targets({ code: 'PERMISSION_DENIED' }), ['second'])
  t.deepEqual(await targets({ after: new Date(start + 1) }), ['third', 'second'])
  t.deepEqual(await targets({ after: new Date(start), before: new Date(start + 1) }), ['first'])
  t.deepEqual(await targets({ actor: "' or true --" }), [])
})

test('wrong fields are named', async t => {
  const { admin, call } = await operator(t)
  const wrong = search({ actor: '\0', method: 'x'.repeat(3_000), pageSize: 5_000, pageToken: '!' })
  await invalid(t, admin.searchAuditEvents(wrong, call()), ['actor', 'method', 'page_size', 'page_token'])
  const times = { ...search({}), after: new Date(Number.NaN), before: new Date(8.64e15) }
  await invalid(t, admin.searchAuditEvents(times, call()), ['after', 'before'])
})

test('pages show each of 250 events once, even those of one millisecond', async t => {
  const { admin, call, db } = await operator(t)
  await db.pool.query(
    `insert into audit_events
     select $1::timestamptz + n % 20 * interval '130 microseconds', gen_random_uuid(), 'a', 'm', n, '', 'OK', '', '{}',
       'i'
     from generate_series(1, 250) n`,
    [new Date(start)],
  )
  const events = await allPages(async pageToken => {
    const { events, nextPageToken } = await admin.searchAuditEvents(search({ pageSize: 7, pageToken }), call())
    return { items: events, next: nextPageToken }
  })
  t.is(events.length, 250)
  t.is(new Set(events.map(event => event.id)).size, 250)
})
