import { X509Certificate } from 'node:crypto'
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import type { CreateEnrollmentTokenRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { type DeviceDescription, DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { parseToken, secretMatches } from '../../src/identity/token-text.ts'
import { endOf, heartbeats } from '../support/device.ts'
import {
  clientsOf,
  type EdgeMesh,
  enrollClientOf,
  enrollOnce,
  eventually,
  freshCsr,
  refused,
  secrets,
  sharedEdgeMesh,
  startEdgeMesh,
  startSecondInstance,
  tokenIdOf,
  unary,
} from '../support/edgemesh.ts'
import { startEnroll } from '../support/enrolling.ts'
import { healthy } from '../support/healthy.ts'
import { relay } from '../support/relay.ts'

const mesh = sharedEdgeMesh(test)

/** The client of a device that calls from that address. */
async function callingFrom(t: ExecutionContext, at: EdgeMesh, address: string) {
  const port = await relay(t, at.server.apiPort, { from: address })
  return clientsOf(t, `127.0.0.1:${port}`, at.anonymous).enroll
}

async function eventOf(at: Pick<EdgeMesh, 'pool'>, target: string, reason: string) {
  const { rows } = await at.pool.query<{ code: string; source_address: string; detail: Record<string, unknown> }>(
    `select code, source_address, detail from audit_events
     where method like '%/Enroll' and target = $1 and reason = $2 order by at desc limit 1`,
    [target, reason],
  )
  return rows[0]
}

async function refusalsCounted(at: EdgeMesh, outcome: string): Promise<number> {
  const scraped = await (await fetch(`http://127.0.0.1:${at.server.metricsPort}/metrics`)).text()
  return Number(new RegExp(`edgemesh_device_enrollments_total{outcome="${outcome}"} (\\d+)`).exec(scraped)?.[1] ?? 0)
}

async function usesOf(token: string): Promise<number> {
  const { rows } = await mesh().pool.query('select uses from enrollment_tokens where id = $1', [tokenIdOf(token)])
  return rows[0].uses
}

async function change(statement: string, values: unknown[], ...keys: string[]): Promise<void> {
  await mesh().pool.query(statement, values)
  await mesh().pool.query(`select pg_notify('edgemesh_changes', $1)`, [keys.join('\n')])
}

/** What deleting a device comes down to. */
async function deleteDevice(id: string): Promise<void> {
  await mesh().pool.query(
    `update certificates set revoked_at = now(), revocation_reason = 'cessationOfOperation' where subject_id = $1`,
    [id],
  )
  await change('delete from devices where id = $1', [id], `device:${id}`, 'crl:revoked')
}

// ── What a token is for ────────────────────────────────────────────────────────────────────────────────────────────

test('a reusable token enrolls one device after another, until it expires', async t => {
  const token = await mesh().token({ reusable: true })
  const ids = []
  for (let device = 0; device < 4; device++) ids.push((await mesh().enroll({ token })).identity.deviceId)
  t.is(new Set(ids).size, 4)
  t.is(await usesOf(token), 4)
  await mesh().pool.query('update enrollment_tokens set expires_at = now() where id = $1', [tokenIdOf(token)])
  t.is((await refused(mesh().enroll({ token }))).reason, 'TOKEN_EXPIRED')
})

test('a token for a pattern of ids enrolls devices that name one that matches', async t => {
  const token = await mesh().token({ reusable: true, deviceIdPattern: 'lathe-?-*' })
  t.is((await mesh().enroll({ token, device: { id: 'lathe-3-north' } })).identity.deviceId, 'lathe-3-north')
  const other = await refused(mesh().enroll({ token, device: { id: 'lathe-33-north' } }))
  t.deepEqual([other.code, other.reason], ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_DEVICE'])
  const unnamed = await refused(mesh().enroll({ token }))
  t.deepEqual([unnamed.code, unnamed.fields], ['INVALID_ARGUMENT', ['device.id']])
  t.true(unnamed.message.includes('lathe-?-*'), 'and says what would match')
  t.is(await usesOf(token), 1)
})

test('a token for a network enrolls devices that call from there, and no others', async t => {
  const token = await mesh().token({ sourceNetworks: ['192.0.2.0/24', '127.0.0.8/31'], usesMax: 5 })
  const [inside, outside] = [await callingFrom(t, mesh(), '127.0.0.9'), await callingFrom(t, mesh(), '127.0.0.10')]
  const keyPem = createKey()
  t.truthy(await enrollOnce(inside, token, keyPem))
  const other = await refused(enrollOnce(outside, token, createKey()))
  t.deepEqual([other.code, other.reason], ['PERMISSION_DENIED', 'TOKEN_FOR_OTHER_NETWORK'])
  const moved = await refused(enrollOnce(outside, token, keyPem))
  t.is(moved.reason, 'TOKEN_FOR_OTHER_NETWORK', 'nor does who has moved away get it again')
  t.like(await eventOf(mesh(), `token/${tokenIdOf(token)}`, 'TOKEN_FOR_OTHER_NETWORK'), {
    source_address: '127.0.0.10',
  })
  t.is(await usesOf(token), 1)
})

test('a key that has redeemed a token for one device is not made another by it', async t => {
  const token = await mesh().token({ usesMax: 5 })
  const keyPem = createKey()
  await mesh().enroll({ token, keyPem, device: { id: 'saw-1' } })
  const other = await refused(mesh().enroll({ token, keyPem, device: { id: 'saw-2' } }))
  t.is(other.reason, 'TOKEN_FOR_OTHER_DEVICE')
  t.is((await mesh().enroll({ token, keyPem })).identity.deviceId, 'saw-1')
  t.is(await usesOf(token), 1)
})

test('an instance of the version before finds the secret of a token wrong that has a restriction it does not know', async t => {
  const asBefore = async (token: string) => {
    const { rows } = await mesh().pool.query('select secret_hash as hash from enrollment_tokens where id = $1', [
      tokenIdOf(token),
    ])
    return secretMatches(parseToken(token).secret, secrets.ENROLLMENT_TOKEN_SECRET, rows[0].hash)
  }
  for (const known of [{}, { usesMax: 3 }, { deviceId: 'plane-1' }, { labels: { site: 'berlin' } }]) {
    t.true(await asBefore(await mesh().token(known)), JSON.stringify(known))
  }
  for (const [unknown, device] of [
    [{ requiresApproval: true }, {}],
    [{ deviceIdPattern: 'plane-*' }, { id: 'plane-2' }],
    [{ sourceNetworks: ['127.0.0.0/8'] }, {}],
  ] as [Partial<CreateEnrollmentTokenRequest>, Partial<DeviceDescription>][]) {
    const token = await mesh().token(unknown)
    t.false(await asBefore(token), JSON.stringify(unknown))
    const call = await startEnroll(t, enrollClientOf(mesh()), { token, keyPem: createKey(), device })
    t.is((await call.first()).is, unknown.requiresApproval ? 'pending' : 'identity')
  }
})

// ── Misuse ─────────────────────────────────────────────────────────────────────────────────────────────────────────

for (const [reason, code, create, device] of [
  ['TOKEN_FOR_OTHER_DEVICE', 'PERMISSION_DENIED', { deviceId: 'mill-1' }, { id: 'mill-2' }],
  ['TOKEN_FOR_OTHER_TYPE', 'PERMISSION_DENIED', { deviceType: 3 }, { type: 2 }],
  ['TOKEN_FOR_OTHER_NETWORK', 'PERMISSION_DENIED', { sourceNetworks: ['10.0.0.0/8'] }, {}],
] as [string, string, Partial<CreateEnrollmentTokenRequest>, Partial<DeviceDescription>][]) {
  test(`${reason} is told, is on record and is counted, and uses nothing up`, async t => {
    const before = await refusalsCounted(mesh(), reason.toLowerCase())
    const token = await mesh().token(create)
    const seen = await refused(mesh().enroll({ token, device }))
    t.deepEqual([seen.code, seen.reason], [code, reason])
    t.like(await eventOf(mesh(), `token/${tokenIdOf(token)}`, reason), { code, source_address: '127.0.0.1' })
    t.true((await refusalsCounted(mesh(), reason.toLowerCase())) > before)
    t.is(await usesOf(token), 0)
  })
}

for (const [reason, code, usesMax] of [
  ['TOKEN_OTHER_KEY', 'PERMISSION_DENIED', 1],
  ['TOKEN_USED_UP', 'RESOURCE_EXHAUSTED', 2],
] as const) {
  test(`${reason}: the record says who used the token first, when and from where; who comes too late is not told`, async t => {
    const before = await refusalsCounted(mesh(), reason.toLowerCase())
    const token = await mesh().token({ usesMax })
    const first = await enrollOnce(await callingFrom(t, mesh(), '127.0.0.20'), token, createKey())
    for (let use = 1; use < usesMax; use++) await mesh().enroll({ token })
    const seen = await refused(mesh().enroll({ token }))
    t.deepEqual([seen.code, seen.reason], [code, reason])
    for (const told of [first.deviceId, '127.0.0.20']) t.false(seen.message.includes(told))

    const { rows } = await mesh().pool.query<{ at: string }>(
      `select to_json(redeemed_at at time zone 'UTC') #>> '{}' as at from token_redemptions where device_id = $1`,
      [first.deviceId],
    )
    const event = await eventOf(mesh(), `token/${tokenIdOf(token)}`, reason)
    const at = new Date(Date.parse(`${rows[0]?.at}Z`)).toISOString()
    t.deepEqual(event?.detail.first_use, { at, from: '127.0.0.20', device: first.deviceId })
    t.true((await refusalsCounted(mesh(), reason.toLowerCase())) > before)
  })
}

test('a device that was deleted does not come back by the token that it has used', async t => {
  const token = await mesh().token({ usesMax: 3 })
  const keyPem = createKey()
  await mesh().enroll({ token, keyPem, device: { id: 'drill-1' } })
  await deleteDevice('drill-1')
  const gone = await refused(mesh().enroll({ token, keyPem }))
  t.deepEqual([gone.code, gone.reason], ['FAILED_PRECONDITION', 'DEVICE_DELETED'])
  t.is((await refused(unary(mesh().admin, 'getDevice', { id: 'drill-1' }))).code, 'NOT_FOUND')

  // Another device has the name since: the first must neither become it nor change it.
  const other = await mesh().enroll({ device: { id: 'drill-1', labels: { owner: 'other' } } })
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'DEVICE_DELETED')
  // Nor when it seems to have been there before, because the clock of its instance was behind.
  await mesh().pool.query(`update devices set enrolled_at = '2020-01-01' where id = 'drill-1'`)
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'DEVICE_DELETED')
  const taken = await refused(mesh().enroll({ token: await mesh().token(), keyPem, device: { id: 'drill-1' } }))
  t.is(taken.reason, 'DEVICE_EXISTS', 'not with a new token either: certificates that were revoked prove nothing')
  await heartbeats(t, mesh(), other).beat(healthy)

  // And so it is when the same key has enrolled under its old name again, with another token.
  await deleteDevice('drill-1')
  await mesh().enroll({ keyPem, device: { id: 'drill-1', labels: { owner: 'new token' } } })
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'DEVICE_DELETED')
  t.is(await usesOf(token), 1)
})

/** As if the device had been away for a hundred days since its certificate expired. */
function longExpired(id: string) {
  return mesh().pool.query(
    `update certificates set not_before = now() - interval '200 days', not_after = now() - interval '100 days'
     where subject_id = $1`,
    [id],
  )
}

async function certificatesOf(id: string): Promise<number> {
  const { rows } = await mesh().pool.query('select from certificates where subject_id = $1', [id])
  return rows.length
}

test('a key that its device has replaced gets no certificate with any token, and the newest key does', async t => {
  const token = await mesh().token({ reusable: true })
  const [first, second] = [createKey(), createKey()]
  const device = await mesh().enroll({ token, keyPem: first, device: { id: 'press-k' } })
  const { enroll } = mesh().clients(device)
  await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, second) })
  const before = await certificatesOf('press-k')
  for (const tried of [token, await mesh().token()]) {
    const seen = await refused(mesh().enroll({ token: tried, keyPem: first, device: { id: 'press-k' } }))
    t.deepEqual([seen.code, seen.reason], ['FAILED_PRECONDITION', 'DEVICE_KEY_SUPERSEDED'])
    t.regex(seen.message, /renew by RenewCertificate with that certificate, or have an operator delete the device/)
  }
  t.is(await certificatesOf('press-k'), before)
  const again = await mesh().enroll({ keyPem: second, device: { id: 'press-k' } })
  t.is(again.identity.deviceId, 'press-k', 'who has lost the certificate, but not the key, within its life')
})

test('a device whose certificate has expired does not come back by a token, be it new or its own', async t => {
  const token = await mesh().token({ reusable: true, lifetime: { seconds: 365 * 86_400, nanos: 0 } })
  const keyPem = createKey()
  await mesh().enroll({ token, keyPem, device: { id: 'press-x' } })
  await longExpired('press-x')
  for (const tried of [token, await mesh().token()]) {
    const seen = await refused(mesh().enroll({ token: tried, keyPem, device: { id: 'press-x' } }))
    t.deepEqual([seen.code, seen.reason], ['FAILED_PRECONDITION', 'DEVICE_CERTIFICATE_EXPIRED'])
    t.regex(seen.message, /come back by RenewCertificate with it, or have an operator delete the device/)
  }
  t.is(await certificatesOf('press-x'), 1)
  await unary(mesh().admin, 'deleteDevice', { id: 'press-x' })
  t.is((await mesh().enroll({ keyPem, device: { id: 'press-x' } })).identity.deviceId, 'press-x')
})

test('who was let in by a serial that was never signed repeats the call', async t => {
  const token = await mesh().token()
  const keyPem = createKey()
  await mesh().enroll({ token, keyPem, device: { id: 'press-u' } })
  await longExpired('press-u')
  // The instance died between the commit and the signature.
  await mesh().pool.query(`update certificates set fingerprint_sha256 = null where subject_id = 'press-u'`)
  t.is((await mesh().enroll({ token, keyPem })).identity.deviceId, 'press-u')
})

test('a device that was revoked is told so when it repeats its call, and stays revoked', async t => {
  const token = await mesh().token({ usesMax: 3 })
  const keyPem = createKey()
  await mesh().enroll({ token, keyPem, device: { id: 'drill-2' } })
  await unary(mesh().admin, 'revokeDevice', { id: 'drill-2', reason: '' })
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'DEVICE_REVOKED')
  t.is(
    (await refused(mesh().enroll({ token: await mesh().token(), keyPem, device: { id: 'drill-2' } }))).reason,
    'DEVICE_REVOKED',
  )
})

test('a call is good for an hour after the device has come in, though its token lasts a minute', async t => {
  const token = await mesh().token({ lifetime: { seconds: 60, nanos: 0 } })
  const keyPem = createKey()
  const { identity } = await mesh().enroll({ token, keyPem })
  await mesh().pool.query(`update enrollment_tokens set expires_at = now() - interval '1 second' where id = $1`, [
    tokenIdOf(token),
  ])
  t.is((await mesh().enroll({ token, keyPem })).identity.deviceId, identity.deviceId)
  await mesh().pool.query(
    `update token_redemptions set redeemed_at = redeemed_at - interval '1 hour', completed_at = completed_at - interval '1 hour'
     where token_id = $1`,
    [tokenIdOf(token)],
  )
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'TOKEN_EXPIRED')
})

test('a redemption that an instance of the version before has made is complete', async t => {
  const asBefore = (token: string, set: string) =>
    mesh().pool.query(`update token_redemptions set completed_at = null ${set} where token_id = $1`, [tokenIdOf(token)])
  const token = await mesh().token({ lifetime: { seconds: 60, nanos: 0 } })
  const keyPem = createKey()
  const { identity } = await mesh().enroll({ token, keyPem })
  await asBefore(token, '')
  t.is((await mesh().enroll({ token, keyPem })).identity.deviceId, identity.deviceId)

  const gone = await mesh().token()
  await mesh().enroll({ token: gone, keyPem, device: { id: 'drill-3' } })
  await asBefore(gone, '')
  await deleteDevice('drill-3')
  t.is((await refused(mesh().enroll({ token: gone, keyPem }))).reason, 'DEVICE_DELETED')

  await asBefore(token, `, redeemed_at = now() - interval '2 hours'`)
  await mesh().pool.query('update enrollment_tokens set expires_at = now() where id = $1', [tokenIdOf(token)])
  t.is((await refused(mesh().enroll({ token, keyPem }))).reason, 'TOKEN_EXPIRED')
})

test('refused attempts with a token are limited, wherever they come from; who may redeem it is not held up', async t => {
  const limited = await startEdgeMesh(t, { RATE_LIMIT_ENROLLMENTS: '3/minute' })
  const token = await limited.token({ usesMax: 3 })
  const [version, id, secret, pin] = token.split('.')
  const guessed = [version, id, Buffer.alloc(32, 7).toString('base64url'), pin].join('.')
  const from = (host: number) => callingFrom(t, limited, `127.0.0.${host}`)
  for (const host of [31, 32, 33]) {
    t.is((await refused(enrollOnce(await from(host), guessed, createKey()))).reason, 'TOKEN_SECRET_WRONG')
  }
  const fourth = await refused(enrollOnce(await from(34), guessed, createKey()))
  t.deepEqual([fourth.code, fourth.reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
  t.true((fourth.retryAfterMs ?? 0) > 0)
  t.like((await eventOf(limited, `token/${id}`, 'RATE_LIMITED'))?.detail, { refused: 'TOKEN_SECRET_WRONG' })

  for (const host of [35, 36, 37]) t.truthy(await enrollOnce(await from(host), token, createKey()))
  t.is((await refused(enrollOnce(await from(38), token, createKey()))).reason, 'RATE_LIMITED')
  t.false(JSON.stringify(await eventOf(limited, `token/${id}`, 'RATE_LIMITED')).includes(secret as string))
})

test('a crowd with one token, stuck at its lock, leaves the database to everybody else', async t => {
  const small = await startEdgeMesh(t, { DATABASE_POOL_SIZE: '2', DATABASE_MAX_OVERFLOW: '0' })
  const token = await small.token({ usesMax: 10 })
  const holder = await small.pool.connect()
  const crowd = []
  try {
    await holder.query('begin')
    await holder.query('select from enrollment_tokens where id = $1 for update', [tokenIdOf(token)])
    for (let at = 0; at < 10; at++)
      crowd.push(await startEnroll(t, enrollClientOf(small), { token, keyPem: createKey() }))
    await eventually('one waits for the lock', async () => {
      const { rows } = await small.pool.query(
        `select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
      )
      return rows.length === 1
    })
    for (let round = 0; round < 20; round++) {
      const { token: shown } = await unary(small.admin, 'getEnrollmentToken', { id: tokenIdOf(token) })
      t.is(shown?.uses, 0)
    }
  } finally {
    await holder.query('rollback')
    holder.release()
  }
  for (const call of crowd) t.is(await call.outcome(), 'identity')
})

// ── Requests that were captured ────────────────────────────────────────────────────────────────────────────────────

test('a captured request is worth nothing: with its token, with another, at another instance, ten times at once', async t => {
  const other = await startSecondInstance(t, mesh())
  const token = await mesh().token({ usesMax: 20 })
  const keyPem = createKey()
  const csr = await freshCsr(enrollClientOf(mesh()), keyPem)
  const certificates = async () => {
    const { rows } = await mesh().pool.query(
      `select count(*)::int from certificates c join token_redemptions r on r.public_key_sha256 = c.public_key_sha256
       where r.token_id = $1`,
      [tokenIdOf(token)],
    )
    return rows[0].count
  }
  const outcomeOf = async (at: EdgeMesh, token: string) => {
    const call = await startEnroll(t, enrollClientOf(at), { token, keyPem, csr })
    return call.outcome()
  }
  const racing = await Promise.all(Array.from({ length: 10 }, (_, at) => outcomeOf(at % 2 ? mesh() : other, token)))
  t.is(racing.filter(outcome => outcome === 'CSR_REPLAYED').length, 9)
  t.is(await certificates(), 1)

  for (const at of [mesh(), other]) {
    t.is(await outcomeOf(at, token), 'CSR_REPLAYED')
    t.is(await outcomeOf(at, await mesh().token()), 'CSR_REPLAYED')
  }
  t.is(await certificates(), 1)
  t.is(await usesOf(token), 1)
  const event = await eventOf(mesh(), `token/${tokenIdOf(token)}`, 'CSR_REPLAYED')
  t.deepEqual(event?.detail, {}, 'on record with its token, and with nothing that did not come to be')
  const { rows } = await mesh().pool.query(
    `select count(*)::int from devices where public_key_sha256 =
       (select public_key_sha256 from token_redemptions where token_id = $1)`,
    [tokenIdOf(token)],
  )
  t.is(rows[0].count, 1, 'nor did it make a device')
})

test('a request that was captured while its device waits for approval becomes one certificate at most', async t => {
  const token = await mesh().token({ requiresApproval: true })
  const keyPem = createKey()
  const csr = await freshCsr(enrollClientOf(mesh()), keyPem)
  const device = { id: 'bench-1' }
  const [owner, thief] = [
    await startEnroll(t, enrollClientOf(mesh()), { token, keyPem, csr, device }),
    await startEnroll(t, enrollClientOf(mesh()), { token, keyPem, csr, device }),
  ]
  await Promise.all([owner.pending(), thief.pending()])
  await change(`update devices set status = 'active' where id = $1`, ['bench-1'], 'device:bench-1')
  const ends = await Promise.all([owner.outcome(), thief.outcome()])
  t.deepEqual(ends.sort(), ['CSR_REPLAYED', 'identity'])
  t.truthy(await enrollOnce(enrollClientOf(mesh()), token, keyPem), 'the owner asks again, with a request signed anew')
})

// ── Revoked with all that it has enrolled ──────────────────────────────────────────────────────────────────────────

test('a token is revoked with its devices: out at every instance, their streams cut, their certificates on the list', async t => {
  const other = await startSecondInstance(t, mesh())
  const token = await mesh().token({ usesMax: 5, labels: { batch: 'stolen' } })
  const devices = [
    await mesh().enroll({ token, device: { id: 'van-1' } }),
    await mesh().enroll({ token, device: { id: 'van-2' } }),
  ]
  const kept = await mesh().enroll({ device: { id: 'van-3' } })
  const streams = devices.map((device, at) => heartbeats(t, at ? mesh() : other, device))
  for (const stream of streams) await stream.beat(healthy)
  await unary(mesh().admin, 'revokeDevice', { id: 'van-2', reason: 'sold' })

  const answer = await unary(mesh().admin, 'revokeEnrollmentToken', {
    id: tokenIdOf(token),
    revokeDevices: true,
    reason: 'posted in a chat',
  })
  t.is(answer.devicesRevoked, 1, 'van-2 was revoked before')
  t.is(answer.token?.status, 4)
  for (const stream of streams) t.is((await endOf(stream))?.reason, 'DEVICE_REVOKED')
  t.is((await refused(mesh().enroll({ token }))).reason, 'TOKEN_REVOKED')
  await heartbeats(t, mesh(), kept).beat(healthy)

  const shown = await Promise.all(['van-1', 'van-2'].map(id => unary(mesh().admin, 'getDevice', { id })))
  t.deepEqual(
    shown.map(({ device }) => [device?.status, device?.statusReason, device?.certificates[0]?.revocationReason]),
    [
      [4, 'posted in a chat', 'privilegeWithdrawn'],
      [4, 'sold', 'privilegeWithdrawn'],
    ],
  )
  const serial = new X509Certificate(devices[0]?.certificatePem ?? '').serialNumber.toLowerCase()
  await eventually('the revocation list of the other instance names it', async () => {
    const { trustBundle } = await unary(enrollClientOf(other), 'getTrustBundle', {})
    return trustBundle?.crlDer.toString('hex').includes(serial)
  })
  const { rows } = await mesh().pool.query(
    `select detail from audit_events where method like '%/RevokeEnrollmentToken' and target = $1`,
    [`token/${tokenIdOf(token)}`],
  )
  t.deepEqual(rows, [{ detail: { reason: 'posted in a chat', devices: ['van-1'], devices_revoked: 1 } }])

  const again = await unary(mesh().admin, 'revokeEnrollmentToken', {
    id: tokenIdOf(token),
    revokeDevices: true,
    reason: '',
  })
  t.is(again.devicesRevoked, 0, 'once is enough')
})

test('devices are revoked with a token that was revoked before; a device of the same name that came later is not', async t => {
  const token = await mesh().token({ usesMax: 5 })
  for (const id of ['cart-1', 'cart-2']) await mesh().enroll({ token, device: { id } })
  await unary(mesh().admin, 'revokeEnrollmentToken', { id: tokenIdOf(token) })
  await deleteDevice('cart-2')
  const later = await mesh().enroll({ device: { id: 'cart-2' } })
  const { devicesRevoked } = await unary(mesh().admin, 'revokeEnrollmentToken', {
    id: tokenIdOf(token),
    revokeDevices: true,
    reason: 'late',
  })
  t.is(devicesRevoked, 1)
  await heartbeats(t, mesh(), later).beat(healthy)
})

test('a device of an instance whose clock is ahead repeats its call elsewhere, and is revoked with that token', async t => {
  const ahead = await startEdgeMesh(t, { DATABASE_URL: mesh().databaseUrl }, undefined, () => Date.now() + 3_000)
  const keyPem = createKey()
  await ahead.enroll({ token: await mesh().token(), keyPem, device: { id: 'early-bird' } })
  const token = await mesh().token({ usesMax: 3 })
  await mesh().enroll({ token, keyPem, device: { id: 'early-bird' } })
  t.is((await mesh().enroll({ token, keyPem })).identity.deviceId, 'early-bird')
  const { devicesRevoked } = await unary(mesh().admin, 'revokeEnrollmentToken', {
    id: tokenIdOf(token),
    revokeDevices: true,
    reason: '',
  })
  t.is(devicesRevoked, 1)
  t.is((await unary(mesh().admin, 'getDevice', { id: 'early-bird' })).device?.status, DeviceStatus.REVOKED)
})

test('however many devices redeem a token at two instances while it is revoked with its devices, none slips through', async t => {
  const other = await startSecondInstance(t, mesh())
  for (let round = 0; round < 5; round++) {
    const token = await mesh().token({ usesMax: 100 })
    const racers = Array.from({ length: 16 }, (_, at) =>
      enrollOnce(enrollClientOf(at % 2 ? mesh() : other), token, createKey()).then(
        identity => identity.deviceId,
        () => undefined,
      ),
    )
    // Not before the first are in, and while the others are on their way.
    await eventually('the first redemption', async () => (await usesOf(token)) > 0)
    const revocations = await Promise.all(
      [mesh(), other].map(at =>
        unary(at.admin, 'revokeEnrollmentToken', { id: tokenIdOf(token), revokeDevices: true, reason: 'stolen' }),
      ),
    )
    const enrolled = (await Promise.all(racers)).filter(id => id !== undefined)

    const { rows } = await mesh().pool.query<{ id: string; status: string; standing: number }>(
      `select d.id, d.status, (select count(*)::int from certificates c where c.subject_id = d.id and c.revoked_at is null)
         as standing
       from devices d join token_redemptions r on r.device_id = d.id where r.token_id = $1`,
      [tokenIdOf(token)],
    )
    t.true(rows.length > 0 && rows.length === (await usesOf(token)))
    t.true(enrolled.every(id => rows.some(row => row.id === id)))
    t.deepEqual(
      rows.filter(row => row.status !== 'revoked' || row.standing > 0),
      [],
    )
    t.is(
      revocations.reduce((sum, { devicesRevoked }) => sum + devicesRevoked, 0),
      rows.length,
      'each was revoked once',
    )
  }
})
