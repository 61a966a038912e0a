import { Writable } from 'node:stream'
import test from 'ava'
import { createKey } from '../../src/agent/csr.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import { enrollOnce, eventually, healthy, refused, secrets, startEdgeMesh, unary } from '../support/edgemesh.ts'

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
