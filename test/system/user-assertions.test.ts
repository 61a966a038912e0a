/** Users who are named by a signed assertion, as devices, operators and Envoy see it. */
import { credentials as grpcCredentials } from '@grpc/grpc-js'
import test, { type ExecutionContext } from 'ava'
import { keepAuthorizations } from '../../src/client/authorizations.ts'
import { systemClock } from '../../src/clock.ts'
import { AuthorizationClient, CheckRequest } from '../../src/gen/envoy/service/auth/v3/external_auth.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import { type Credentials, clientsOf, eventually, refused, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { proxyIdentity } from '../support/proxy-identity.ts'
import { link } from '../support/relay.ts'
import { assertionBy, audience, issuer, issuerKey, keyServer, keySetOf } from '../support/user-issuer.ts'

const key = await issuerKey('one')

const environment = {
  USER_ASSERTION: 'required',
  USER_ASSERTION_ISSUER: issuer,
  USER_ASSERTION_AUDIENCE: audience,
  USER_ASSERTION_JWKS: JSON.stringify(keySetOf(key)),
  // A clock that is set forward is not a database that is away.
  LEASE_GRACE_SECONDS: '3600',
}

async function start(t: ExecutionContext, env: Record<string, string> = {}) {
  const time = { ahead: 0 }
  const given = env.USER_ASSERTION_JWKS_URL ? { ...environment, USER_ASSERTION_JWKS: '' } : environment
  const mesh = await startEdgeMesh(t, { ...given, ...env }, undefined, () => systemClock() + time.ahead)
  for (const [id, email] of [
    ['ada', 'ada@example.com'],
    ['bob', 'bob@example.com'],
  ]) {
    await unary(mesh.admin, 'createUser', { id, email, name: '', role: 'admin' })
  }
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const check = async (user: string, userAssertion?: string) => {
    const question = { id: 'q', user, service: 'payroll', action: '' }
    const { answer } = await unary(mesh.clients(device).authorize, 'check', { question, deviceId: '', userAssertion })
    return answer!
  }
  return { mesh, device, check, time }
}

const codes = (reasons: { code: string }[]) => reasons.map(({ code }) => code)

test('where assertions are required, a device is answered about the user whom one names, and about nobody else', async t => {
  const { mesh, device, check } = await start(t)
  const ada = await assertionBy(key)
  const answer = await check('', ada)
  t.true(answer.allowed)
  t.true((await check('ada@example.com', ada)).allowed)
  const denials = [
    [await check('ada'), 'USER_ASSERTION_MISSING'],
    [await check('ada', `${ada}x`), 'USER_ASSERTION_INVALID'],
    [await check('ada', await assertionBy(key, { exp: Math.floor(Date.now() / 1_000) - 5 })), 'USER_ASSERTION_EXPIRED'],
    [await check('bob', ada), 'USER_ASSERTION_WRONG_USER'],
    [await check('', await assertionBy(key, { sub: 'nobody' })), 'USER_UNKNOWN'],
  ] as const
  for (const [denial, code] of denials) {
    t.false(denial.allowed)
    t.true(codes(denial.reasons).includes(code), code)
    t.is(denial.questionId, 'q')
  }
  t.is(denials[0][0].reasons[0]?.field, 'user_assertion')

  const stream = authorizations(t, mesh, device)
  t.true((await stream.ask('', 'payroll', '', ada)).allowed)
  t.deepEqual(codes((await stream.ask('ada', 'payroll')).reasons), ['USER_ASSERTION_MISSING'])
  t.deepEqual(codes((await stream.ask('bob', 'payroll', '', ada)).reasons), ['USER_ASSERTION_WRONG_USER'])
  t.true((await stream.ask('ada', 'payroll', '', ada)).allowed, 'the stream goes on')

  const { rows } = await mesh.pool.query(
    "select reason, code, target, detail from audit_events where reason like 'USER_ASSERTION%' order by at, id",
  )
  t.deepEqual(
    rows.map(({ reason }) => reason),
    ['MISSING', 'INVALID', 'EXPIRED', 'WRONG_USER', 'MISSING', 'WRONG_USER'].map(end => `USER_ASSERTION_${end}`),
  )
  t.true(rows.every(({ code, target }) => code === 'PERMISSION_DENIED' && target === 'device/alpha'))
  t.deepEqual(rows[3].detail.questions, [{ user: 'bob', service: 'payroll', action: 'connect' }])
  const { rows: tables } = await mesh.pool.query(
    'select string_agg(a::text, null) || (select string_agg(d::text, null) from decisions d) as text from audit_events a',
  )
  for (const part of ada.split('.').slice(1)) t.false(tables[0].text.includes(part), 'no assertion is on record')
})

test('an answer is good until the assertion expires at most, and one that is over does not spoil the next', async t => {
  const { mesh, check } = await start(t)
  const exp = Math.floor(Date.now() / 1_000) + 20
  const first = await check('', await assertionBy(key, { exp }))
  t.is(first.expiresAt?.getTime(), exp * 1_000)
  const later = await check('', await assertionBy(key))
  t.true(Number(later.expiresAt) > exp * 1_000)

  const third = await check('', await assertionBy(key, { exp: exp + 5 }))
  for (const { decisionId, expiresAt } of [first, later, third]) {
    const { decision } = await unary(mesh.admin, 'getDecision', { id: decisionId, explain: false })
    t.deepEqual(decision?.expiresAt, expiresAt, 'what is on record is what was answered')
    t.truthy(decision?.input)
  }
})

test('a connection ends with the assertion of its user, unless it is renewed with a fresh one before', async t => {
  const { mesh, device, time } = await start(t)
  const stream = authorizations(t, mesh, device)
  const inSeconds = (seconds: number, claims = {}) =>
    assertionBy(key, { exp: Math.floor((Date.now() + time.ahead) / 1_000) + seconds, ...claims })
  const first = await inSeconds(60)
  const [lost, kept, foreign] = [
    await stream.ask('', 'payroll', '', first),
    await stream.ask('ada', 'payroll', '', first),
    await stream.ask('ada', 'payroll', '', await inSeconds(200)),
  ]
  const renewal = async (id: string, userAssertion: string | undefined) => {
    stream.responses.length = 0
    stream.send({ $case: 'renew', value: { connectionIds: [id], userAssertion } })
    return eventually('the renewal', () => {
      for (const { kind } of stream.responses) {
        if (kind?.$case === 'answers') return kind.value.answers.find(({ connectionId }) => connectionId === id)
      }
      return undefined
    })
  }
  const fresh = await inSeconds(120)
  const renewed = await renewal(kept.connectionId, fresh)
  t.true(renewed.allowed)
  t.true(Number(renewed.expiresAt) > Number(kept.expiresAt))
  t.is(Number((await renewal(lost.connectionId, undefined)).expiresAt), Number(lost.expiresAt), 'it ends when it would')
  const others = await renewal(foreign.connectionId, await inSeconds(100, { sub: 'bob' }))
  t.deepEqual(codes(others.reasons), ['USER_ASSERTION_WRONG_USER'])
  t.deepEqual(codes((await stream.revocationOf(foreign.connectionId)).reasons), ['USER_ASSERTION_WRONG_USER'])

  time.ahead = 61_000
  t.deepEqual(codes((await stream.revocationOf(lost.connectionId)).reasons), ['USER_ASSERTION_EXPIRED'])
  t.false(stream.revoked.some(({ connectionId }) => connectionId === kept.connectionId))
  time.ahead = 121_000
  t.deepEqual(codes((await stream.revocationOf(kept.connectionId)).reasons), ['USER_ASSERTION_EXPIRED'])
  await eventually('the end is on record', async () => {
    const { rows } = await mesh.pool.query('select status, end_reasons from connections where id = $1', [
      kept.connectionId,
    ])
    return rows[0]?.status === 'revoked' && rows[0].end_reasons[0].code === 'USER_ASSERTION_EXPIRED'
  })
})

test('a connection is resumed by an assertion of its user, ends with that one, and waits for whoever has none', async t => {
  const { mesh, device, time } = await start(t)
  const way = await link(t, mesh.server.apiPort)
  const clients = (who: Credentials) => clientsOf(t, `127.0.0.1:${way.port}`, who)
  const lost = authorizations(t, { clients }, device)
  const { connectionId: id } = await lost.ask('', 'payroll', '', await assertionBy(key))
  way.cut()
  const waits = async () =>
    (await mesh.pool.query('select status, resume_by is not null as waits from connections where id = $1', [id]))
      .rows[0]
  await eventually('it waits', async () => (await waits()).waits)

  const stream = authorizations(t, mesh, device)
  for (const [assertion, code] of [
    [undefined, 'USER_ASSERTION_MISSING'],
    ['nonsense', 'USER_ASSERTION_INVALID'],
    [await assertionBy(key, { sub: 'bob' }), 'USER_ASSERTION_WRONG_USER'],
  ] as const) {
    const [answer] = await stream.resume([id], assertion)
    t.false(answer?.allowed)
    t.deepEqual(codes(answer?.reasons ?? []), [code])
    await eventually(`it goes on waiting after ${code}`, async () => (await waits()).waits)
  }
  const exp = Math.floor(Date.now() / 1_000) + 60
  const [answer] = await stream.resume([id], await assertionBy(key, { exp, sub: 'ada' }))
  t.true(answer?.allowed)
  t.is(answer?.expiresAt?.getTime(), exp * 1_000)
  time.ahead = 61_000
  t.deepEqual(codes((await stream.revocationOf(id)).reasons), ['USER_ASSERTION_EXPIRED'])
})

test('a client that holds connections by an assertion takes them along to its next stream by it', async t => {
  const { mesh, device } = await start(t)
  const way = await link(t, mesh.server.apiPort)
  const ended: string[] = []
  const { rootsPem, keyPem, identity } = device
  const held = keepAuthorizations({
    server: `127.0.0.1:${way.port}`,
    credentials: { rootsPem, keyPem, certificateChainPem: identity.certificateChainPem.join('') },
    onEnded: ({ connectionId }) => void ended.push(connectionId),
  })
  t.teardown(() => held.close())
  const [first, second] = [await assertionBy(key), await assertionBy(key, { jti: 'another' })]
  const answers = [
    ...(await held.ask([{ user: '', service: 'payroll' }], first)),
    ...(await held.ask([{ user: 'ada', service: 'payroll' }], first)),
  ]
  t.deepEqual(
    (await held.renew([answers[1]?.connectionId ?? ''], second)).map(({ allowed }) => allowed),
    [true],
  )
  way.cut()
  await eventually('another stream holds them', async () => {
    const { rows: now } = await mesh.pool.query(
      `select (select count(*)::int from connections where status = 'active' and resume_by is null) as held,
         (select count(*)::int from audit_events where method like '%/Authorize' and detail ->> 'stream' = 'opened') as streams`,
    )
    return now[0].held === 2 && now[0].streams === 2
  })
  t.deepEqual(ended, [])
  t.deepEqual(held.held().sort(), answers.map(({ connectionId }) => connectionId).sort())
})

test('an operator asks about a named user without an assertion of theirs', async t => {
  const { mesh } = await start(t)
  const question = { id: '', user: 'ada', service: 'payroll', action: '' }
  const { answer } = await unary(mesh.clients(mesh.operator).authorize, 'check', {
    question,
    deviceId: 'alpha',
  })
  t.true(answer?.allowed)
})

test('where assertions are optional, the user is as named without one, and as asserted with one', async t => {
  const { check } = await start(t, { USER_ASSERTION: 'optional' })
  t.true((await check('bob')).allowed)
  const ada = await assertionBy(key)
  t.true((await check('', ada)).allowed)
  t.deepEqual(codes((await check('bob', ada)).reasons), ['USER_ASSERTION_WRONG_USER'])
  t.deepEqual(codes((await check('bob', 'nonsense')).reasons), ['USER_ASSERTION_INVALID'])
})

test('where assertions are off, none is looked at', async t => {
  const off = { USER_ASSERTION: 'off', USER_ASSERTION_ISSUER: '', USER_ASSERTION_AUDIENCE: '', USER_ASSERTION_JWKS: '' }
  const { check } = await start(t, off)
  t.true((await check('bob', 'nonsense')).allowed)
  t.deepEqual((await refused(check('', 'nonsense'))).fields, ['question.user'])
})

test('while the keys can not be had nobody is allowed, and it is told as an outage', async t => {
  const served = await keyServer(t, [key])
  served.status = 500
  const { mesh, device, check } = await start(t, { USER_ASSERTION_JWKS_URL: served.url })
  const ada = await assertionBy(key)
  const outage = await refused(check('', ada))
  t.deepEqual([outage.code, outage.reason], ['UNAVAILABLE', 'USER_ASSERTION_KEYS_UNAVAILABLE'])
  const stream = authorizations(t, mesh, device)
  const answer = await stream.ask('', 'payroll', '', ada)
  t.false(answer.allowed)
  t.deepEqual(codes(answer.reasons), ['USER_ASSERTION_KEYS_UNAVAILABLE'])
  t.truthy(answer.retryAfter)
  served.status = 200
  await eventually('the keys are had', async () => (await stream.ask('', 'payroll', '', ada)).allowed)
})

test('Envoy passes a request on with the user whom the assertion names, and without the assertion', async t => {
  const { mesh, device } = await start(t)
  const proxy = await proxyIdentity(mesh)
  const pem = (text: string | undefined) => Buffer.from(text ?? '')
  const channel = grpcCredentials.createSsl(pem(proxy.rootsPem), pem(proxy.keyPem), pem(proxy.certificatePem))
  const envoy = new AuthorizationClient(`127.0.0.1:${mesh.server.apiPort}`, channel, {
    'grpc.ssl_target_name_override': 'localhost',
    'grpc.default_authority': 'localhost',
  })
  t.teardown(() => envoy.close())
  const ask = async (headers: Record<string, string>, extensions: Record<string, string> = {}) => {
    const request = CheckRequest.fromPartial({
      attributes: {
        source: {
          principal: 'spiffe://edgemesh.local/device/alpha',
          certificate: encodeURIComponent(device.identity.certificateChainPem[0] ?? ''),
        },
        request: { http: { headers } },
        contextExtensions: { 'edgemesh.service': 'payroll', ...extensions },
      },
    })
    const { httpResponse } = await unary(envoy, 'check', request)
    if (httpResponse?.$case === 'deniedResponse') {
      return { denied: codes(JSON.parse(httpResponse.value.body).reasons), status: httpResponse.value.status?.code }
    }
    if (httpResponse?.$case !== 'okResponse') throw new Error('neither passed on nor denied')
    const set = Object.fromEntries(httpResponse.value.headers.map(({ header }) => [header?.key, header?.value]))
    return { user: set['x-edgemesh-user'], removed: httpResponse.value.headersToRemove }
  }
  const ada = await assertionBy(key)
  const passed = { user: 'ada', removed: ['x-edgemesh-user-assertion'] }
  t.deepEqual(await ask({ 'x-edgemesh-user-assertion': ada }), passed)
  t.deepEqual(await ask({ 'x-edgemesh-user-assertion': ada, 'x-edgemesh-user': 'ada@example.com' }), passed)
  const bearer = { 'edgemesh.user-assertion-header': 'authorization' }
  t.deepEqual(await ask({ authorization: `Bearer ${ada}` }, bearer), { user: 'ada', removed: ['authorization'] })

  const denied = (code: string) => ({ denied: [`USER_ASSERTION_${code}`], status: 403 })
  t.deepEqual(await ask({ 'x-edgemesh-user': 'ada' }), denied('MISSING'))
  t.deepEqual(await ask({ authorization: `Bearer ${ada}`, 'x-edgemesh-user': 'ada' }), denied('MISSING'))
  t.deepEqual(await ask({ authorization: 'Basic YWRhOg==' }, bearer), denied('MISSING'))
  t.deepEqual(await ask({ 'x-edgemesh-user-assertion': `${ada},${ada}` }), denied('INVALID'))
  t.deepEqual(await ask({ 'x-edgemesh-user-assertion': ada, 'x-edgemesh-user': 'bob' }), denied('WRONG_USER'))
})
