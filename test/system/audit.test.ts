import { Writable } from 'node:stream'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import { enrollOnce, eventually, refused, secrets, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

test('every call is on record: who, what, on what, from where, and how it ended; and no record holds a secret', async t => {
  let logged = ''
  const sink = new Writable({
    write(chunk, _encoding, done) {
      logged += chunk
      done()
    },
  })
  const mesh = await startEdgeMesh(t, {}, createLog({ level: 'trace', destination: sink }))
  const token = await mesh.token()
  const device = await mesh.enroll({ token, device: { id: 'alpha' } })
  const clients = mesh.clients(device)
  const mistaken = token.replace(/\.[^.]+\.([^.]+)$/, `.${Buffer.alloc(32, 7).toString('base64url')}.$1`)

  await refused(enrollOnce(mesh.clients(mesh.anonymous).enroll, token, createKey()))
  await refused(enrollOnce(mesh.clients(mesh.anonymous).enroll, mistaken, createKey()))
  await refused(
    unary(mesh.clients(mesh.anonymous).admin, 'listDevices', { pageSize: 0, pageToken: '', status: 0, labels: {} }),
  )
  await refused(unary(clients.admin, 'revokeDevice', { id: 'alpha', reason: '' }))
  await refused(unary(mesh.admin, 'getDevice', { id: 'nobody' }))
  await unary(mesh.admin, 'getDevice', { id: 'alpha' })
  const { answer } = await unary(clients.authorize, 'check', {
    question: { id: '1', user: 'ada', service: 'payroll', action: '' },
    deviceId: '',
  })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const streamed = await access.ask('ada', 'payroll')
  access.end()
  await access.ended

  const events = async () => {
    const { rows } = await mesh.pool.query<
      Record<'actor' | 'method' | 'target' | 'source_address' | 'code' | 'reason', string>
    >('select actor, method, target, source_address, code, reason from audit_events order by at, id')
    return rows.map(row => ({ ...row, method: row.method.split('/').pop() }))
  }
  await eventually('the end of the stream is on record', async () =>
    (await events()).some(({ method, reason }) => method === 'Authorize' && reason === 'STREAM_ENDED'),
  )
  const [operator, alpha] = ['spiffe://edgemesh.local/operator/tester', 'spiffe://edgemesh.local/device/alpha']
  const tokenId = token.split('.')[1]
  const seen = await events()
  for (const { source_address } of seen) t.is(source_address, '127.0.0.1')
  t.deepEqual(
    seen.map(({ actor, method, target, code, reason }) => [actor, method, target, code, reason]),
    [
      [operator, 'CreateEnrollmentToken', `token/${tokenId}`, 'OK', ''],
      ['anonymous', 'GetChallenge', '', 'OK', ''],
      ['anonymous', 'Enroll', 'device/alpha', 'OK', ''],
      ['anonymous', 'GetChallenge', '', 'OK', ''],
      ['anonymous', 'Enroll', `token/${tokenId}`, 'PERMISSION_DENIED', 'TOKEN_OTHER_KEY'],
      ['anonymous', 'GetChallenge', '', 'OK', ''],
      ['anonymous', 'Enroll', `token/${tokenId}`, 'UNAUTHENTICATED', 'TOKEN_SECRET_WRONG'],
      ['anonymous', 'ListDevices', '', 'UNAUTHENTICATED', 'CERTIFICATE_MISSING'],
      [alpha, 'RevokeDevice', '', 'PERMISSION_DENIED', 'WRONG_CALLER'],
      [operator, 'GetDevice', 'device/nobody', 'NOT_FOUND', 'DEVICE_NOT_FOUND'],
      [operator, 'GetDevice', 'device/alpha', 'OK', ''],
      [alpha, 'Heartbeat', 'device/alpha', 'OK', ''],
      [alpha, 'Authorize', 'device/alpha', 'OK', ''],
      [alpha, 'Authorize', 'device/alpha', 'OK', 'STREAM_ENDED'],
    ],
  )
  // Check and the messages on Authorize streams are on record as their decisions.
  const { rows: decisions } = await mesh.pool.query(
    'select id, caller, method, device_id from decisions order by at, id',
  )
  t.deepEqual(
    decisions.map(({ id, caller, device_id }) => [`${id}.0`, caller, device_id]),
    [answer, streamed].map(given => [given?.decisionId, alpha, 'alpha']),
  )

  const { rows } = await mesh.pool.query<{ kept: string }>(
    `select string_agg(kept, ' ') as kept from (
       select row_to_json(a)::text as kept from audit_events a union all select row_to_json(d)::text from decisions d
       union all select row_to_json(e)::text from enrollment_tokens e union all select row_to_json(c)::text from authorities c
     ) everything`,
  )
  t.true(logged.length > 0)
  for (const secret of [token.split('.')[2], mistaken.split('.')[2], ...Object.values(secrets), 'BEGIN PRIVATE KEY']) {
    t.false(rows[0]?.kept.includes(secret ?? ''), 'no secret in the database')
    t.false(logged.includes(secret ?? ''), 'no secret in the log')
  }
})

test('what is on record can not be changed or removed', async t => {
  const mesh = await startEdgeMesh(t)
  await mesh.token()
  for (const statement of ['update audit_events set actor = $$nobody$$', 'delete from audit_events']) {
    await t.throwsAsync(mesh.pool.query(statement), { message: /never changed or removed/ })
  }
})

test('an answer that is used again is on record with its facts once, and every decision by it shows them', async t => {
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const access = authorizations(t, mesh, device)
  const { authorize } = mesh.clients(device)
  const question = { id: '1', user: 'ada', service: 'payroll', action: '' }
  const check = async () => (await unary(authorize, 'check', { question, deviceId: '' })).answer?.decisionId ?? ''
  const ids = [await check(), await check(), (await access.ask('ada', 'payroll')).decisionId]

  const { rows } = await mesh.pool.query<{ has: boolean; of: string | null }>(
    `select questions -> 0 ? 'input' as has, questions -> 0 ->> 'inputOf' as of from decisions order by at, id`,
  )
  t.deepEqual(rows, [
    { has: true, of: null },
    { has: false, of: ids[0] ?? '' },
    { has: false, of: ids[0] ?? '' },
  ])
  const shown = await Promise.all(ids.map(id => unary(mesh.admin, 'getDecision', { id, explain: true })))
  for (const { decision, explanation } of shown) {
    t.is(decision?.input?.device.id, 'alpha')
    t.deepEqual(decision?.input, shown[0]?.decision?.input)
    t.true((explanation?.rules.length ?? 0) > 5)
  }
  const list = { pageSize: 0, pageToken: '', deviceId: 'alpha', after: undefined, before: undefined }
  const { decisions } = await unary(mesh.admin, 'listDecisions', list)
  t.deepEqual(
    decisions.map(({ input }) => input?.device.id),
    ['alpha', 'alpha', 'alpha'],
  )
  // Retention takes the first one away, as it may within the hour that an answer lasts.
  await mesh.pool.query('alter table decisions disable trigger decisions_append_only')
  await mesh.pool.query('delete from decisions where id = $1', [ids[0]?.split('.')[0]])
  const { decision, explanation } = await unary(mesh.admin, 'getDecision', { id: ids[1] ?? '', explain: true })
  t.is(decision?.allowed, false)
  t.is(decision?.input, undefined)
  t.is(explanation, undefined)
})

test('decisions on a stream are dated when they were made, not when the stream began', async t => {
  let nowMs = Date.now()
  const mesh = await startEdgeMesh(t, {}, createLog({ level: 'fatal' }), () => nowMs)
  const access = authorizations(t, mesh, await mesh.enroll())
  await access.ask('ada', 'payroll')
  nowMs += 600
  await access.ask('ada', 'payroll')
  const { rows } = await mesh.pool.query<{ apart: number }>(
    `select (extract(epoch from max(at) - min(at)) * 1000)::int as apart from decisions`,
  )
  t.is(rows[0]?.apart, 600)
})
