import { X509Certificate } from 'node:crypto'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import type { DeviceDescription } from '../../src/gen/edgemesh/v1/types.ts'
import { heartbeats } from '../support/device.ts'
import {
  type EdgeMesh,
  enrollOnce,
  eventually,
  freshCsr,
  refusal,
  refused,
  sharedEdgeMesh,
  startEdgeMesh,
  startSecondInstance,
  tokenIdOf,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { openssl } from '../support/openssl.ts'

const mesh = sharedEdgeMesh(test)

const leafOf = (chain: string[]) => new X509Certificate(chain[0] as string)

async function usesOf(token: string): Promise<number> {
  const { rows } = await mesh().pool.query('select uses from enrollment_tokens where id = $1', [tokenIdOf(token)])
  return rows[0].uses
}

/** Each on a connection of its own. */
async function race(instances: EdgeMesh[], token: string, keys: string[]) {
  const outcomes = await Promise.allSettled(
    keys.map((key, at) => {
      const instance = instances[at % instances.length] as EdgeMesh
      const client = instance.clients(instance.anonymous).enroll
      return eventually('an answer that stands', () =>
        enrollOnce(client, token, key).catch(error => {
          // On a busy machine not everyone gets a database connection in time: whoever is told so calls again.
          if (refusal(error).code !== 'UNAVAILABLE') throw error
          return undefined
        }),
      )
    }),
  )
  return {
    identities: outcomes.flatMap(outcome => (outcome.status === 'fulfilled' ? [outcome.value] : [])),
    refusals: outcomes.flatMap(outcome => (outcome.status === 'rejected' ? [refusal(outcome.reason)] : [])),
  }
}

for (const [instances, count] of [
  ['one instance', 1],
  ['two instances', 2],
] as const) {
  test(`of fifty clients that race for a token of ten uses at ${instances}, ten become devices`, async t => {
    const all = [mesh()]
    if (count === 2) all.push(await startSecondInstance(t, mesh()))
    const token = await mesh().token({ usesMax: 10 })
    const { identities, refusals } = await race(all, token, Array.from({ length: 50 }, createKey))

    t.is(new Set(identities.map(identity => identity.deviceId)).size, 10)
    t.is(new Set(identities.map(identity => leafOf(identity.certificateChainPem).serialNumber)).size, 10)
    t.deepEqual(
      refusals.map(({ code, reason }) => `${code} ${reason}`),
      Array(40).fill('RESOURCE_EXHAUSTED TOKEN_USED_UP'),
    )
    t.is(await usesOf(token), 10)
    const { rows } = await mesh().pool.query(
      'select count(*)::int from token_redemptions join devices on devices.id = device_id where token_id = $1',
      [tokenIdOf(token)],
    )
    t.is(rows[0].count, 10)
  })
}

test('a client that repeats its call ten times at once, and once more, is one device by one use', async t => {
  const token = await mesh().token()
  const key = createKey()
  const { identities, refusals } = await race([mesh()], token, Array(10).fill(key))
  t.deepEqual(refusals, [])
  const again = await mesh().enroll({ token, keyPem: key })
  const ids = new Set([...identities, again.identity].map(identity => identity.deviceId))
  t.is(ids.size, 1)
  t.is(await usesOf(token), 1)
  await heartbeats(t, mesh(), again).beat(healthy)

  const other = await refused(mesh().enroll({ token }))
  t.deepEqual([other.code, other.reason], ['PERMISSION_DENIED', 'TOKEN_OTHER_KEY'])
  t.is(await usesOf(token), 1)
})

test("a token's labels, type and device id are those of the device", async t => {
  const token = await mesh().token({
    deviceId: 'press-7',
    deviceType: 3,
    labels: { site: 'north', tier: 'edge' },
    usesMax: 5,
  })
  const otherId = await refused(mesh().enroll({ token, device: { id: 'press-8', type: 3 } }))
  t.deepEqual([otherId.code, otherId.reason], ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_DEVICE'])
  const otherType = await refused(mesh().enroll({ token, device: { type: 1 } }))
  t.deepEqual([otherType.code, otherType.reason], ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_TYPE'])
  t.is(await usesOf(token), 0)

  const { identity } = await mesh().enroll({ token, device: { type: 3, labels: { site: 'south', line: '4' } } })
  t.is(identity.spiffeId, 'spiffe://edgemesh.local/device/press-7')
  const { device } = await unary(mesh().admin, 'getDevice', { id: 'press-7' })
  t.deepEqual(device?.labels, { site: 'north', tier: 'edge', line: '4' }, "what the token says beats the device's word")
  t.is(device?.type, 3)
})

test('a device has no more labels than 32, those of its token included, and none that a terminal would obey', async t => {
  const many = (prefix: string, count: number) =>
    Object.fromEntries(Array.from({ length: count }, (_, at) => [`${prefix}${at}`, '']))
  const token = await mesh().token({ labels: many('token', 20), usesMax: 3 })
  const tooMany = await refused(mesh().enroll({ token, device: { labels: many('device', 13) } }))
  t.deepEqual([tooMany.code, tooMany.fields], ['INVALID_ARGUMENT', ['device.labels']])
  const hostile = await refused(mesh().enroll({ token, device: { labels: { site: '\u001b[31mred' } } }))
  t.deepEqual([hostile.code, hostile.fields], ['INVALID_ARGUMENT', ['device.labels.site']])
  const colours = await refused(mesh().enroll({ token, device: { os: '\u001b[31mred' } }))
  t.deepEqual(colours.fields, ['device.os'])
  t.is(await usesOf(token), 0)
  await mesh().enroll({ token, device: { labels: many('device', 12) } })
})

for (const [what, prepare, code, reason] of [
  [
    'an expired',
    async (token: string) => {
      const past = "update enrollment_tokens set expires_at = now() - interval '1 second' where id = $1"
      await mesh().pool.query(past, [tokenIdOf(token)])
      return token
    },
    'UNAUTHENTICATED',
    'TOKEN_EXPIRED',
  ],
  [
    'a revoked',
    async (token: string) => {
      await unary(mesh().admin, 'revokeEnrollmentToken', { id: tokenIdOf(token) })
      return token
    },
    'UNAUTHENTICATED',
    'TOKEN_REVOKED',
  ],
  [
    'an unknown',
    async (token: string) => token.replace(tokenIdOf(token), tokenIdOf(token).split('').reverse().join('')),
    'UNAUTHENTICATED',
    'TOKEN_UNKNOWN',
  ],
  [
    "a token with another's secret, so a wrong",
    async (token: string) => {
      const [parts, others] = [token.split('.'), (await mesh().token()).split('.')]
      return [parts[0], parts[1], others[2], parts[3]].join('.')
    },
    'UNAUTHENTICATED',
    'TOKEN_SECRET_WRONG',
  ],
  ['a cut off', async (token: string) => token.slice(0, -1), 'INVALID_ARGUMENT', 'TOKEN_MALFORMED'],
] as const) {
  test(`${what} token is refused, and the attempt is on record`, async t => {
    const token = await mesh().token()
    const shown = await prepare(token)
    const seen = await refused(mesh().enroll({ token: shown }))
    t.deepEqual([seen.code, seen.reason], [code, reason])
    t.false(seen.message.includes(shown.split('.')[2] as string), 'the secret is not repeated')

    const { rows } = await mesh().pool.query(
      "select code, actor, source_address from audit_events where method like '%/Enroll' and reason = $1 and target = $2",
      [reason, reason === 'TOKEN_MALFORMED' ? '' : `token/${tokenIdOf(shown)}`],
    )
    t.deepEqual(rows, [{ code, actor: 'anonymous', source_address: '127.0.0.1' }])
    t.is(await usesOf(token), 0)
  })
}

test("an id that another key holds is refused, and the attempt doesn't use the token up", async t => {
  const first = await mesh().enroll({ device: { id: 'gate-1' } })
  const token = await mesh().token()
  const seen = await refused(mesh().enroll({ token, device: { id: 'gate-1' } }))
  t.deepEqual([seen.code, seen.reason], ['ALREADY_EXISTS', 'DEVICE_EXISTS'])
  t.is(await usesOf(token), 0)
  const other = await mesh().enroll({ token, device: { id: 'gate-2' } })
  t.is(other.identity.deviceId, 'gate-2')
  await heartbeats(t, mesh(), first).beat(healthy)
})

test("what can't be enrolled uses nothing up and leaves no device behind", async t => {
  const token = await mesh().token()
  const client = mesh().clients(mesh().anonymous).enroll
  const enroll = (csr: Buffer, id: string) =>
    new Promise((resolve, reject) => {
      const device: DeviceDescription = { id, type: 1, os: '', osVersion: '', labels: {} }
      client.enroll({ token, csr, device, sentAt: undefined }).on('data', resolve).on('error', reject)
    })
  const good = await freshCsr(client, createKey())
  const forged = Buffer.from(good)
  forged[forged.length - 1] = (forged.at(-1) as number) ^ 1
  for (const csr of [Buffer.alloc(0), Buffer.from('no request'), good.subarray(0, -1), forged]) {
    const seen = await refused(enroll(csr, 'never-1'))
    t.is(seen.code, 'INVALID_ARGUMENT')
    t.regex(seen.reason, /^CSR_/)
  }
  t.is((await refused(enroll(good, 'Not An Id'))).reason, 'INVALID_FIELD')
  t.is(await usesOf(token), 0)
  t.is((await refused(unary(mesh().admin, 'getDevice', { id: 'never-1' }))).code, 'NOT_FOUND')
  await mesh().enroll({ token, device: { id: 'at-last' } })
  t.is(await usesOf(token), 1)
})

test('renewing gives another certificate for the same name and a new key, and the old one still works', async t => {
  const before = await mesh().enroll({ device: { id: 'renewed' } })
  const keyPem = createKey()
  const { enroll } = mesh().clients(before)
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
  if (!identity) return t.fail('no identity in the answer')
  const [leaf, ...intermediates] = identity.certificateChainPem as [string, ...string[]]
  t.is(identity.spiffeId, before.identity.spiffeId)
  const [oldLeaf, newLeaf] = [leafOf(before.identity.certificateChainPem), leafOf(identity.certificateChainPem)]
  t.is(newLeaf.subjectAltName, oldLeaf.subjectAltName)
  t.not(newLeaf.serialNumber, oldLeaf.serialNumber)
  t.false(newLeaf.publicKey.equals(oldLeaf.publicKey))

  const judged = await openssl(
    t,
    ['verify', '-x509_strict', '-purpose', 'sslclient', '-CAfile', 'roots', '-untrusted', 'intermediates', 'leaf'],
    { roots: before.rootsPem, intermediates: intermediates.join(''), leaf },
  )
  t.true(judged.ok, judged.said)
  await heartbeats(t, mesh(), { ...before, keyPem, certificatePem: leaf + intermediates.join('') }).beat(healthy)
  await heartbeats(t, mesh(), before).beat(healthy)
})

test('anyone can fetch the roots and the revocation list, which names a revoked device', async t => {
  const [kept, lost] = [await mesh().enroll(), await mesh().enroll({ device: { id: 'lost' } })]
  await unary(mesh().admin, 'revokeDevice', { id: 'lost', reason: 'stolen' })
  const serials = [kept, lost].map(device => leafOf(device.identity.certificateChainPem).serialNumber) as [
    string,
    string,
  ]
  const client = mesh().clients(mesh().anonymous).enroll
  const bundle = await eventually('the list names the revoked certificate', async () => {
    const { trustBundle } = await unary(client, 'getTrustBundle', {})
    if (!trustBundle) return undefined
    const { said } = await openssl(t, ['crl', '-inform', 'DER', '-in', 'list', '-noout', '-text'], {
      list: trustBundle.crlDer,
    })
    t.false(said.includes(serials[0]), 'a good certificate is not on it')
    return said.includes(serials[1]) ? trustBundle : undefined
  })
  t.deepEqual(
    bundle.rootsPem.map(pem => new X509Certificate(pem).ca),
    [true],
  )

  const [root, intermediates] = [bundle.rootsPem.join(''), bundle.intermediatesPem.join('')]
  const signature = await openssl(t, ['crl', '-inform', 'DER', '-in', 'list', '-CAfile', 'issuer', '-noout'], {
    list: bundle.crlDer,
    issuer: intermediates,
  })
  t.true(signature.ok && signature.said.includes('verify OK'), signature.said)
  const list = `-----BEGIN X509 CRL-----\n${bundle.crlDer.toString('base64')}\n-----END X509 CRL-----\n`
  const verify = ['verify', '-crl_check', '-CAfile', 'root', '-untrusted', 'intermediates', '-CRLfile', 'list', 'leaf']
  for (const [device, ok] of [[kept, true] as const, [lost, false] as const]) {
    const leaf = device.identity.certificateChainPem[0] as string
    const judged = await openssl(t, verify, { root, intermediates, list, leaf })
    t.is(judged.ok, ok, judged.said)
    if (!ok) t.true(judged.said.includes('certificate revoked'), judged.said)
  }
  const authority = await unary(mesh().admin, 'getAuthority', {})
  t.true(authority.trustBundle?.crlDer.toString('hex').includes(serials[1].toLowerCase()), 'operators see it as well')
})

test('who enrolls more often than the limit is told when to come back', async t => {
  const limited = await startEdgeMesh(t, { RATE_LIMIT_ENROLLMENTS: '3/minute' })
  const token = await limited.token({ usesMax: 5 })
  for (let attempt = 1; attempt <= 3; attempt++) await limited.enroll({ token })
  const seen = await refused(limited.enroll({ token }))
  t.deepEqual([seen.code, seen.reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
  t.true(seen.retryAfterMs !== undefined && seen.retryAfterMs > 0 && seen.retryAfterMs <= 60_000)
  const { rows } = await limited.pool.query('select uses from enrollment_tokens where id = $1', [tokenIdOf(token)])
  t.is(rows[0].uses, 3)
})
