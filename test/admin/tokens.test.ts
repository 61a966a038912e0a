import test from 'ava'
import { Device } from '../../src/fleet/entities.ts'
import {
  CreateEnrollmentTokenRequest,
  type EnrollmentToken as EnrollmentTokenMessage,
  EnrollmentTokenStatus,
} from '../../src/gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../../src/gen/edgemesh/v1/types.ts'
import { EnrollmentToken, TokenRedemption } from '../../src/identity/entities.ts'
import { parseToken, secretMatches } from '../../src/identity/token-text.ts'
import { allPages, invalid, operator, refused, start, tokenSecret } from './operator.ts'

const create = CreateEnrollmentTokenRequest.fromPartial

test('a token is made with its defaults, and only its hash is kept', async t => {
  const { admin, call, db, auditEvents } = await operator(t)
  const { token, tokenText } = await admin.createEnrollmentToken(create({}), call())
  const parsed = parseToken(tokenText)
  t.is(parsed.id, token!.id)
  t.like(token, {
    status: EnrollmentTokenStatus.ACTIVE,
    usesMax: 1,
    uses: 0,
    expiresAt: new Date(start + 3_600_000),
    deviceType: DeviceType.UNSPECIFIED,
    createdBy: 'spiffe://test/operator/root',
  })
  const kept = await db.em().findOneOrFail(EnrollmentToken, parsed.id)
  t.true(secretMatches(parsed.secret, tokenSecret, kept.secretHash))
  const [event] = await auditEvents()
  t.is(event?.target, `token/${parsed.id}`)
  t.false(JSON.stringify(event).includes(parsed.secret.toString('base64url')))
})

test('a token may be bound to a device, a type and labels', async t => {
  const { admin, call } = await operator(t)
  const request = create({
    usesMax: 10_000,
    lifetime: { seconds: 60, nanos: 0 },
    labels: { site: 'berlin' },
    deviceType: DeviceType.IOT,
    deviceId: 'alpha',
  })
  const { token } = await admin.createEnrollmentToken(request, call())
  const { tokens } = await admin.listEnrollmentTokens({ pageSize: 0, pageToken: '' }, call())
  t.deepEqual(tokens, [token!])
  t.like(token, { labels: { site: 'berlin' }, deviceType: DeviceType.IOT, deviceId: 'alpha', usesMax: 10_000 })
})

test('a token may be reusable, for a pattern of ids, for networks, and with approval', async t => {
  const { admin, call, db, auditEvents } = await operator(t)
  const request = create({
    reusable: true,
    deviceIdPattern: 'press-*',
    sourceNetworks: ['10.7.0.0/16', '2001:db8::/32', '192.0.2.7'],
    requiresApproval: true,
  })
  const { token } = await admin.createEnrollmentToken(request, call())
  t.like(token, {
    usesMax: 0,
    reusable: true,
    deviceIdPattern: 'press-*',
    sourceNetworks: ['10.7.0.0/16', '2001:db8::/32', '192.0.2.7'],
    requiresApproval: true,
  })
  t.deepEqual((await admin.getEnrollmentToken({ id: token!.id }, call())).token, token)
  t.is((await db.em().findOneOrFail(EnrollmentToken, token!.id)).usesMax, null)
  const [event] = await auditEvents()
  t.deepEqual(event?.detail, {
    uses_max: 'any number',
    expires_at: new Date(start + 3_600_000).toISOString(),
    labels: {},
    device_id_pattern: 'press-*',
    source_networks: ['10.7.0.0/16', '2001:db8::/32', '192.0.2.7'],
    requires_approval: true,
  })
})

test('every wrong field is named at once', async t => {
  const { admin, call } = await operator(t)
  const wrong = create({
    usesMax: 10_001,
    lifetime: { seconds: 59, nanos: 999_999_999 },
    labels: { site: '\0' },
    deviceType: 99 as DeviceType,
    deviceId: 'A',
    deviceIdPattern: 'press/*',
    sourceNetworks: ['10.0.0.0/8', '10.0.0.0/33', 'everywhere'],
  })
  const fields = [
    'uses_max',
    'lifetime',
    'labels.site',
    'device_type',
    'device_id',
    'device_id_pattern',
    'source_networks[1]',
    'source_networks[2]',
  ]
  await invalid(t, admin.createEnrollmentToken(wrong, call()), fields)
  const tooLong = create({ lifetime: { seconds: 365 * 86_400, nanos: 1_000_000 } })
  await invalid(t, admin.createEnrollmentToken(tooLong, call()), ['lifetime'])
  const tooMany = create({ sourceNetworks: Array(33).fill('10.0.0.0/8') })
  await invalid(t, admin.createEnrollmentToken(tooMany, call()), ['source_networks'])
  await invalid(t, admin.getEnrollmentToken({ id: '' }, call()), ['id'])
  const reason = 'x'.repeat(256)
  await invalid(t, admin.revokeEnrollmentToken({ id: '', revokeDevices: false, reason }, call()), ['id', 'reason'])
})

test('what contradicts itself is no token: uses of a reusable one, one device and a pattern of them', async t => {
  const { admin, call, db } = await operator(t)
  const counted = create({ reusable: true, usesMax: 3 })
  const fault = await refused(t, admin.createEnrollmentToken(counted, call()), 'INVALID_ARGUMENT', 'INVALID_FIELD')
  t.is(fault.message, 'uses_max has to be 0 where reusable is set: such a token has no number of uses')
  const both = create({ deviceId: 'press-7', deviceIdPattern: 'press-*' })
  await invalid(t, admin.createEnrollmentToken(both, call()), ['device_id_pattern'])
  t.is(await db.em().count(EnrollmentToken), 0)
})

test('revoked counts more than used up, used up more than expired', async t => {
  const { admin, call, db, time } = await operator(t)
  const { token } = await admin.createEnrollmentToken(create({}), call())
  const id = token!.id
  const status = async () => {
    const { tokens } = await admin.listEnrollmentTokens({ pageSize: 1, pageToken: '' }, call())
    return (tokens[0] as EnrollmentTokenMessage).status
  }
  t.is(await status(), EnrollmentTokenStatus.ACTIVE)
  time.now += 3_600_000
  t.is(await status(), EnrollmentTokenStatus.EXPIRED)
  await db.em().nativeUpdate(EnrollmentToken, { id }, { uses: 1 })
  t.is(await status(), EnrollmentTokenStatus.USED_UP)
  await admin.revokeEnrollmentToken({ id, revokeDevices: false, reason: '' }, call())
  t.is(await status(), EnrollmentTokenStatus.REVOKED)
})

test('revoking twice is revoking, and a token that is not there is not found', async t => {
  const { admin, call, db, time } = await operator(t)
  const { token } = await admin.createEnrollmentToken(create({}), call())
  await admin.revokeEnrollmentToken({ id: token!.id, revokeDevices: false, reason: '' }, call())
  time.now += 1_000
  const again = await admin.revokeEnrollmentToken({ id: token!.id, revokeDevices: false, reason: '' }, call())
  t.is(again.token?.status, EnrollmentTokenStatus.REVOKED)
  t.deepEqual((await db.em().findOneOrFail(EnrollmentToken, token!.id)).revokedAt, new Date(start))
  await refused(
    t,
    admin.revokeEnrollmentToken({ id: '0123456789ab', revokeDevices: false, reason: '' }, call()),
    'NOT_FOUND',
    'TOKEN_NOT_FOUND',
  )
})

test('redemptions are shown with their token: the newest hundred alone, the newest ten in a list', async t => {
  const { admin, call, db } = await operator(t)
  const { token } = await admin.createEnrollmentToken(create({ usesMax: 200 }), call())
  await admin.createEnrollmentToken(create({}), call())
  const redemptions = Array.from({ length: 120 }, (_, index) => ({
    tokenId: token!.id,
    publicKeySha256: String(index),
    deviceId: `device-${index}`,
    sourceAddress: '192.0.2.7',
    redeemedAt: new Date(start + index),
  }))
  await db.em().insertMany(TokenRedemption, redemptions)
  const newest = {
    deviceId: 'device-119',
    redeemedAt: new Date(start + 119),
    sourceAddress: '192.0.2.7',
    publicKeySha256: '119',
  }
  const asking = call()
  const { token: shown } = await admin.getEnrollmentToken({ id: token!.id }, asking)
  t.is(shown?.redemptions.length, 100)
  t.deepEqual(shown?.redemptions[0], newest)
  t.is(asking.audit.target, `token/${token!.id}`)

  const { tokens } = await admin.listEnrollmentTokens({ pageSize: 0, pageToken: '' }, call())
  const listed = tokens.find(({ id }) => id === token!.id)?.redemptions ?? []
  t.deepEqual(listed, shown?.redemptions.slice(0, 10))
  t.deepEqual(tokens.find(({ id }) => id !== token!.id)?.redemptions, [])
  await refused(t, admin.getEnrollmentToken({ id: '0123456789ab' }, call()), 'NOT_FOUND', 'TOKEN_NOT_FOUND')
})

test('revoking a token with its devices announces each of them, the token and the revocation list', async t => {
  const { admin, call, db, announcedDuring, auditEvents } = await operator(t)
  const { token } = await admin.createEnrollmentToken(create({ usesMax: 3 }), call())
  const id = token!.id
  for (const device of ['b', 'a']) {
    const at = new Date(start)
    const row = { type: 'iot' as const, os: '', osVersion: '', labels: {}, publicKeySha256: device, spiffeId: device }
    const times = { enrolledAt: at, updatedAt: at }
    await db.em().insert(Device, { id: device, status: device === 'a' ? 'pending' : 'active', ...row, ...times })
    const use = { tokenId: id, publicKeySha256: device, deviceId: device, sourceAddress: '', redeemedAt: at }
    await db.em().insert(TokenRedemption, use)
  }
  const revoke = (revokeDevices: boolean) =>
    admin.revokeEnrollmentToken({ id, revokeDevices, reason: 'posted in a chat' }, call())
  t.deepEqual(await announcedDuring(() => revoke(false)), [`token:${id}`])
  t.deepEqual(await announcedDuring(() => revoke(true)), [`token:${id}`, 'device:a', 'device:b', 'crl:revoked'])
  const events = (await auditEvents()).slice(-2)
  t.deepEqual(
    events.map(({ target, detail }) => [target, detail]),
    [
      [`token/${id}`, { reason: 'posted in a chat' }],
      [`token/${id}`, { reason: 'posted in a chat', devices_revoked: 2, devices: ['a', 'b'] }],
    ],
  )
  t.is(await db.em().count(Device, { status: 'revoked', statusReason: 'posted in a chat' }), 2)
})

test('pages show each of 250 tokens once', async t => {
  const { admin, call, db } = await operator(t)
  const ids = Array.from({ length: 250 }, (_, index) => index.toString(16).padStart(12, '0'))
  const row = { secretHash: Buffer.alloc(32), usesMax: 1, uses: 0, labels: {}, createdBy: '' }
  const times = { expiresAt: new Date(), createdAt: new Date() }
  await db.em().insertMany(
    EnrollmentToken,
    ids.map(id => ({ ...row, ...times, id })),
  )
  const tokens = await allPages(async pageToken => {
    const { tokens, nextPageToken } = await admin.listEnrollmentTokens({ pageSize: 60, pageToken }, call())
    return { items: tokens, next: nextPageToken }
  })
  t.deepEqual(
    tokens.map(token => token.id),
    ids,
  )
})
