/** Which assertions are believed, and whom they name. */
import { createHmac, generateKeyPairSync, sign } from 'node:crypto'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { exportJWK } from 'jose'
import { createUserAssertions, UserAssertionRefused } from '../../src/access/user-assertion.ts'
import { Fault } from '../../src/fault.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from '../support/edgemesh.ts'
import { assertionBy, audience, issuer, issuerKey, keyServer, keySetOf } from '../support/user-issuer.ts'

const log = createLog({ level: 'silent' })
const start = Date.parse('2026-03-02T10:00:00Z')
const key = await issuerKey('one')

type Options = Partial<Parameters<typeof createUserAssertions>[0]['settings']>

function assertions(t: ExecutionContext, given: Options = {}, keysCooldownMs = 0) {
  const time = { now: start }
  const users = [
    { id: 'ada', email: 'ada@example.com' },
    { id: 'bob', email: 'bob@example.com' },
  ]
  const created = createUserAssertions({
    settings: {
      required: true,
      issuer,
      audience,
      claim: 'sub',
      jwks: given.jwksUrl ? undefined : JSON.stringify(keySetOf(key)),
      jwksUrl: undefined,
      ...given,
    },
    facts: {
      async user(name) {
        const found = users.find(({ id, email }) => id === name || email === name.toLowerCase())
        return found && { id: found.id, role: 'admin', status: 'active' }
      },
    },
    clock: () => time.now,
    log,
    keysCooldownMs,
  })
  t.teardown(created.stop)
  return { ...created, time }
}

async function refusal(identified: Promise<unknown>): Promise<string> {
  try {
    await identified
  } catch (error) {
    if (error instanceof UserAssertionRefused) return `${error.why.code} ${error.why.field}`
    throw error
  }
  return 'accepted'
}

const at = { at: start }
const seconds = start / 1_000

test('an assertion names the user, by each of the names that the user has, until it expires', async t => {
  const { identify, time } = assertions(t)
  const text = await assertionBy(key, {}, at)
  t.deepEqual(await identify(text, ['', 'ada', 'ADA@example.com']), { user: 'ada', expiresAtMs: start + 300_000 })
  t.is(await refusal(identify(text, ['ada', 'bob'])), 'USER_ASSERTION_WRONG_USER user')
  t.is(await refusal(identify(text, ['nobody'])), 'USER_ASSERTION_WRONG_USER user')
  time.now = start + 299_999
  t.is(await refusal(identify(text, [])), 'accepted')
  time.now = start + 300_000
  t.is(await refusal(identify(text, [])), 'USER_ASSERTION_EXPIRED user_assertion.exp')
})

for (const [what, claims, header, refused] of [
  ['of another issuer', { iss: 'https://login.example.org' }, {}, 'INVALID user_assertion.iss'],
  ['of no issuer', { iss: undefined }, {}, 'INVALID user_assertion.iss'],
  ['for another audience', { aud: 'shop' }, {}, 'INVALID user_assertion.aud'],
  ['for no audience', { aud: undefined }, {}, 'INVALID user_assertion.aud'],
  ['without an end', { exp: undefined }, {}, 'INVALID user_assertion.exp'],
  ['that has ended a moment ago', { exp: seconds - 1 }, {}, 'EXPIRED user_assertion.exp'],
  ['that has ended long ago', { exp: seconds - 3_600 }, {}, 'EXPIRED user_assertion.exp'],
  ['that begins later', { nbf: seconds + 60 }, {}, 'INVALID user_assertion.nbf'],
  ['that is issued later', { iat: seconds + 60 }, {}, 'INVALID user_assertion.iat'],
  ['that lasts for more than a day', { exp: seconds + 86_401 }, {}, 'INVALID user_assertion.exp'],
  [
    'that lasts for more than a day from now',
    { iat: undefined, exp: seconds + 86_401 },
    {},
    'INVALID user_assertion.exp',
  ],
  ['that lasts forever', { exp: 1e300 }, {}, 'INVALID user_assertion.exp'],
  ['without a user', { sub: undefined }, {}, 'INVALID user_assertion.sub'],
  ['of nobody', { sub: '' }, {}, 'INVALID user_assertion.sub'],
  ['of a user with NUL', { sub: 'ada\0' }, {}, 'INVALID user_assertion.sub'],
  ['of a user with too long a name', { sub: 'a'.repeat(255) }, {}, 'INVALID user_assertion.sub'],
  ['that is a logout token', {}, { typ: 'logout+jwt' }, 'INVALID user_assertion.typ'],
  ['that is a logout token of old', { events: {} }, {}, 'INVALID user_assertion.typ'],
  ['by a key that nobody knows', {}, { kid: 'two' }, 'INVALID user_assertion.kid'],
  ['with a demand that is not understood', {}, { crit: ['exp2'], exp2: 1 }, 'INVALID user_assertion'],
] as const) {
  test(`an assertion ${what} is refused`, async t => {
    const { identify } = assertions(t)
    const text = await assertionBy(key, claims, { at: start, header }).catch(() => unsignable(claims, header))
    t.is(await refusal(identify(text, [])), `USER_ASSERTION_${refused}`)
  })
}

/** What jose does not want to sign. */
function unsignable(claims: object, header: object): string {
  const [head, body] = [
    { alg: 'ES256', kid: 'one', ...header },
    { iss: issuer, aud: audience, sub: 'ada', exp: seconds + 60, ...claims },
  ].map(part => Buffer.from(JSON.stringify(part)).toString('base64url'))
  return `${head}.${body}.${Buffer.alloc(64).toString('base64url')}`
}

test('an assertion is accepted within the skew of clocks, by each algorithm, and as an access token', async t => {
  const { identify } = assertions(t)
  for (const claims of [{ nbf: seconds + 20, iat: seconds + 20 }, { iat: undefined }, { aud: ['shop', audience] }]) {
    t.is(await refusal(identify(await assertionBy(key, claims, at), [])), 'accepted')
  }
  t.is(await refusal(identify(await assertionBy(key, {}, { ...at, header: { typ: 'at+JWT' } }), [])), 'accepted')
  for (const alg of ['ES384', 'RS256', 'PS256', 'EdDSA']) {
    const other = await issuerKey('other', alg)
    const { identify } = assertions(t, { jwks: JSON.stringify(keySetOf(key, other)) })
    t.is(await refusal(identify(await assertionBy(other, {}, at), [])), 'accepted', alg)
  }
})

test('no algorithm is accepted that needs no key, or one that everybody has, or one that is too short', async t => {
  const { identify } = assertions(t)
  const body = Buffer.from(
    JSON.stringify({ iss: issuer, aud: audience, sub: 'ada', iat: seconds, exp: seconds + 60 }),
  ).toString('base64url')
  const head = (alg: string, kid = 'one') => Buffer.from(JSON.stringify({ alg, kid })).toString('base64url')
  for (const alg of ['none', 'NONE', 'None']) {
    t.regex(await refusal(identify(`${head(alg)}.${body}.`, [])), /^USER_ASSERTION_INVALID/)
  }
  const publicKey = JSON.stringify(key.jwk)
  for (const alg of ['HS256', 'HS384', 'HS512']) {
    const mac = createHmac(`sha${alg.slice(2)}`, publicKey)
      .update(`${head(alg)}.${body}`)
      .digest('base64url')
    t.regex(await refusal(identify(`${head(alg)}.${body}.${mac}`, [])), /^USER_ASSERTION_INVALID/)
  }
  const short = generateKeyPairSync('rsa', { modulusLength: 1_024 })
  const jwk = { ...(await exportJWK(short.publicKey)), kid: 'short', alg: 'RS256' }
  const weak = assertions(t, { jwks: JSON.stringify({ keys: [jwk] }) })
  const text = `${head('RS256', 'short')}.${body}`
  const signed = `${text}.${sign('sha256', Buffer.from(text), short.privateKey).toString('base64url')}`
  t.regex(await refusal(weak.identify(signed, [])), /^USER_ASSERTION_INVALID/)
})

test('no change of an assertion is accepted, wherever it is made', async t => {
  const { identify } = assertions(t)
  const text = await assertionBy(key, {}, at)
  t.is(await refusal(identify(text, [])), 'accepted')
  const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.= \n'
  const position = fc.nat({ max: text.length - 1 })
  const character = fc.constantFrom(...alphabet)
  const changed = fc.oneof(
    fc.tuple(position, character).map(([at, other]) => text.slice(0, at) + other + text.slice(at + 1)),
    fc.tuple(position, character).map(([at, other]) => text.slice(0, at) + other + text.slice(at)),
    position.map(at => text.slice(0, at) + text.slice(at + 1)),
    position.map(at => text.slice(0, at)),
    fc.string().map(more => text + more),
    fc.string({ maxLength: 9_000 }),
  )
  await fc.assert(
    fc.asyncProperty(changed, async other => {
      fc.pre(other !== text)
      const outcome = await refusal(identify(other, []))
      if (!/^USER_ASSERTION_(INVALID|MISSING)/.test(outcome)) throw new Error(outcome)
    }),
    { numRuns: 3_000 },
  )
  t.is(await refusal(identify(`${text}${' '.repeat(8_192)}`, [])), 'USER_ASSERTION_INVALID user_assertion')
})

test('no refusal repeats a word of the assertion', async t => {
  const { identify } = assertions(t)
  const good = await assertionBy(key, {}, at)
  for (const text of [
    `${good}x`,
    await assertionBy(key, { aud: 'shop' }, at),
    await assertionBy(key, { exp: 1 }, at),
  ]) {
    const error = await t.throwsAsync(identify(text, []), { instanceOf: UserAssertionRefused })
    const told = JSON.stringify(error?.why) + error?.message
    for (const part of text.split('.')) t.false(told.includes(part))
  }
})

test('an assertion that is shown again and again is verified once, also when it is shown many times at once', async t => {
  const { identify, verifications } = assertions(t)
  const text = await assertionBy(key, {}, at)
  await Promise.all(Array.from({ length: 100 }, () => identify(text, [])))
  for (let again = 0; again < 100; again++) await identify(text, ['ada'])
  t.is(verifications(), 1)
  await identify(await assertionBy(key, { jti: 'another' }, at), [])
  t.is(verifications(), 2)
})

test('an e-mail address names the user where that is configured, unless the issuer says that it is not verified', async t => {
  const { identify } = assertions(t, { claim: 'email' })
  const by = (claims: Record<string, unknown>) => assertionBy(key, { email: 'ada@example.com', ...claims }, at)
  t.is((await identify(await by({}), ['ada'])).user, 'ada@example.com')
  t.is(await refusal(identify(await by({ email_verified: true }), [])), 'accepted')
  for (const unverified of [false, 'false']) {
    const outcome = await refusal(identify(await by({ email_verified: unverified }), []))
    t.is(outcome, 'USER_ASSERTION_INVALID user_assertion.email_verified')
  }
})

// ── Keys that are fetched ──────────────────────────────────────────────────────────────────────────────────────────

test('the issuer changes its key: the new one is found, and the old one is believed no more', async t => {
  const [first, second] = [await issuerKey('first'), await issuerKey('second')]
  const served = await keyServer(t, [first])
  const { identify, verifications } = assertions(t, { jwksUrl: served.url })
  const old = await assertionBy(first, {}, at)
  t.is(await refusal(identify(old, [])), 'accepted')
  served.keys = [second]
  t.is(await refusal(identify(await assertionBy(second, {}, at), [])), 'accepted')
  t.is(await refusal(identify(old, [])), 'USER_ASSERTION_INVALID user_assertion.kid')
  t.is(verifications(), 3)
})

test('whoever shows made-up keys does not make us ask the issuer each time', async t => {
  const served = await keyServer(t, [key])
  const { identify } = assertions(t, { jwksUrl: served.url }, 60_000)
  t.is(await refusal(identify(await assertionBy(key, {}, at), [])), 'accepted')
  for (let made = 0; made < 20; made++) {
    const text = await assertionBy({ ...key, kid: `made-up-${made}` }, {}, at)
    t.is(await refusal(identify(text, [])), 'USER_ASSERTION_INVALID user_assertion.kid')
  }
  t.is(served.requests, 1)
})

for (const [what, spoil] of [
  ['answers with an error', { status: 503 }],
  ['answers with something else', { body: '<html>' }],
  ['answers with keys that are none', { body: '{"keys": 1}' }],
  ['answers without end', { body: ' '.repeat(300_000) }],
] as const) {
  test(`while the issuer ${what} it is an outage, and keys that are known go on being used`, async t => {
    const served = await keyServer(t, [key])
    const { identify } = assertions(t, { jwksUrl: served.url })
    t.is(await refusal(identify(await assertionBy(key, {}, at), [])), 'accepted')
    Object.assign(served, spoil)
    const unknown = await assertionBy({ ...key, kid: 'unknown' }, {}, at)
    const outage = await t.throwsAsync(identify(unknown, []), { instanceOf: Fault })
    t.deepEqual([outage?.code, outage?.reason], ['UNAVAILABLE', 'USER_ASSERTION_KEYS_UNAVAILABLE'])
    t.is(await refusal(identify(await assertionBy(key, { jti: '2' }, at), [])), 'accepted')

    const other = assertions(t, { jwksUrl: served.url })
    await t.throwsAsync(other.identify(await assertionBy(key, {}, at), []), { code: 'UNAVAILABLE' as never })
    Object.assign(served, { status: 200, body: undefined })
    const text = await assertionBy(key, {}, at)
    await eventually('the keys are had again', () =>
      other.identify(text, []).then(
        () => true,
        () => false,
      ),
    )
  })
}
