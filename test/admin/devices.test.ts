import test, { type ExecutionContext } from 'ava'
import type { Database } from '../../src/db/orm.ts'
import { Fault } from '../../src/fault.ts'
import { Device, DevicePosture, type DeviceStatusName, HealthReport } from '../../src/fleet/entities.ts'
import { ListDevicesRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { DeviceStatus, DeviceType } from '../../src/gen/edgemesh/v1/types.ts'
import { Certificate } from '../../src/identity/entities.ts'
import { allPages, invalid, operator, refused, start } from './operator.ts'

function deviceRow(id: string, status: DeviceStatusName = 'active', labels: Record<string, string> = {}) {
  return {
    id,
    type: 'laptop' as const,
    os: 'linux',
    osVersion: '6.1',
    labels,
    status,
    statusReason: '',
    spiffeId: `spiffe://test/device/${id}`,
    publicKeySha256: 'ef'.repeat(32),
    enrolledAt: new Date(start),
    updatedAt: new Date(start),
  }
}

function certificateRow(serial: string, subjectId: string) {
  return {
    serial,
    subjectKind: 'device' as const,
    subjectId,
    publicKeySha256: 'ef'.repeat(32),
    fingerprintSha256: serial.repeat(2),
    notBefore: new Date(start),
    notAfter: new Date(start + 86_400_000),
    createdAt: new Date(start),
  }
}

async function withDevice(t: ExecutionContext, status: DeviceStatusName = 'active') {
  const context = await operator(t)
  await addDevice(context.db, status)
  return context
}

async function addDevice(db: Database, status: DeviceStatusName) {
  await db.em().insert(Device, deviceRow('alpha', status))
  await db.em().insertMany(Certificate, [certificateRow('0a', 'alpha'), certificateRow('0b', 'alpha')])
  await db.em().insert(Certificate, certificateRow('0c', 'beta'))
}

test('a device is shown with its posture and its certificates', async t => {
  const { admin, call, db } = await withDevice(t)
  await db.em().insert(DevicePosture, {
    deviceId: 'alpha',
    posture: { cpuPercent: 12.5, diskEncrypted: false, attributes: { edition: 'pro' } },
    failing: ['disk_encrypted'],
    measuredAt: new Date(start + 1),
    receivedAt: new Date(start + 2),
  })
  const { device } = await admin.getDevice({ id: 'alpha' }, call())
  t.like(device, {
    id: 'alpha',
    type: DeviceType.LAPTOP,
    status: DeviceStatus.ACTIVE,
    spiffeId: 'spiffe://test/device/alpha',
    lastSeenAt: new Date(start + 2),
    failingPosture: ['disk_encrypted'],
  })
  t.deepEqual(device?.posture, {
    cpuPercent: 12.5,
    diskEncrypted: false,
    attributes: { edition: 'pro' },
    measuredAt: new Date(start + 1),
  })
  t.deepEqual(
    device?.certificates.map(({ serial, revokedAt }) => [serial, revokedAt]),
    [
      ['0a', undefined],
      ['0b', undefined],
    ],
  )
})

test('devices are filtered by status and by labels', async t => {
  const { admin, call, db } = await operator(t)
  await db
    .em()
    .insertMany(Device, [
      deviceRow('a', 'active', { site: 'berlin', tier: '1' }),
      deviceRow('b', 'revoked', { site: 'berlin' }),
      deviceRow('c', 'active', { site: "o'hare" }),
    ])
  const ids = async (filter: Partial<ListDevicesRequest>) => {
    const { devices } = await admin.listDevices(ListDevicesRequest.fromPartial(filter), call())
    return devices.map(device => device.id)
  }
  t.deepEqual(await ids({}), ['a', 'b', 'c'])
  t.deepEqual(await ids({ status: DeviceStatus.ACTIVE }), ['a', 'c'])
  t.deepEqual(await ids({ labels: { site: 'berlin' } }), ['a', 'b'])
  t.deepEqual(await ids({ labels: { site: 'berlin', tier: '1' } }), ['a'])
  t.deepEqual(await ids({ labels: { site: "o'hare" }, status: DeviceStatus.ACTIVE }), ['c'])
  t.deepEqual(await ids({ labels: { "'; drop table devices; --": '?' } }), [])
})

test('wrong fields are named', async t => {
  const { admin, call } = await operator(t)
  const filter = ListDevicesRequest.fromPartial({ pageSize: -1, status: 99 as DeviceStatus, labels: { '': 'x' } })
  await invalid(t, admin.listDevices(filter, call()), ['page_size', 'status', 'labels'])
  await invalid(t, admin.getDevice({ id: 'A' }, call()), ['id'])
  await invalid(t, admin.quarantineDevice({ id: '', reason: 'x'.repeat(256) }, call()), ['id', 'reason'])
  await invalid(t, admin.releaseDevice({ id: ' ' }, call()), ['id'])
  await invalid(t, admin.revokeDevice({ id: 'alpha', reason: '\x1b[2J' }, call()), ['reason'])
  await invalid(t, admin.approveDevice({ id: '-' }, call()), ['id'])
  await invalid(t, admin.deleteDevice({ id: '../alpha' }, call()), ['id'])
})

test('a device that is not there is not found', async t => {
  const { admin, call } = await operator(t)
  const id = 'nobody'
  await refused(t, admin.getDevice({ id }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
  await refused(t, admin.quarantineDevice({ id, reason: '' }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
  await refused(t, admin.releaseDevice({ id }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
  await refused(t, admin.revokeDevice({ id, reason: '' }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
  await refused(t, admin.approveDevice({ id }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
  await refused(t, admin.deleteDevice({ id }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
})

test('a device that waits is approved, and approving it again changes nothing', async t => {
  const { admin, call, announcedDuring, auditEvents, db, time } = await withDevice(t, 'pending')
  const keys = await announcedDuring(async () => {
    const { device } = await admin.approveDevice({ id: 'alpha' }, call())
    t.like(device, { status: DeviceStatus.ACTIVE, statusReason: '' })
  })
  t.deepEqual(keys, ['device:alpha'])
  time.now += 1_000
  const { device } = await admin.approveDevice({ id: 'alpha' }, call())
  t.is(device?.status, DeviceStatus.ACTIVE)
  t.deepEqual((await db.em().findOneOrFail(Device, 'alpha')).updatedAt, new Date(start))
  t.deepEqual(
    (await auditEvents()).map(({ detail }) => detail),
    [
      { before: 'pending', after: 'active', reason: '' },
      { before: 'active', after: 'active', reason: '' },
    ],
  )
})

test('a device that is deleted is gone, its certificates are revoked, and its past stays', async t => {
  const { admin, call, announcedDuring, auditEvents, db } = await withDevice(t)
  const at = { measuredAt: new Date(start), receivedAt: new Date(start) }
  await db.em().insert(DevicePosture, { deviceId: 'alpha', posture: { attributes: {} }, failing: [], ...at })
  await db.em().insert(HealthReport, { deviceId: 'alpha', sequence: 1, posture: { attributes: {} }, ...at })
  await db.em().nativeUpdate(Certificate, '0b', { revokedAt: new Date(start - 1), revocationReason: 'keyCompromise' })

  const keys = await announcedDuring(async () => {
    t.deepEqual(await admin.deleteDevice({ id: 'alpha' }, call()), {})
  })
  t.deepEqual(keys, ['device:alpha', 'crl:revoked'])
  t.is(await db.em().count(Device), 0)
  t.is(await db.em().count(DevicePosture), 0)
  t.is(await db.em().count(HealthReport), 1)
  const certificates = await db.em().find(Certificate, {}, { orderBy: { serial: 'asc' } })
  t.deepEqual(
    certificates.map(({ serial, revokedAt, revocationReason }) => [serial, revokedAt, revocationReason]),
    [
      ['0a', new Date(start), 'cessationOfOperation'],
      ['0b', new Date(start - 1), 'keyCompromise'],
      ['0c', null, null],
    ],
  )
  const [event] = await auditEvents()
  t.like(event, { target: 'device/alpha', code: 'OK' })
  t.deepEqual(event?.detail, {
    before: 'active',
    after: 'deleted',
    reason: '',
    type: 'laptop',
    labels: {},
    enrolledAt: new Date(start).toISOString(),
  })
  await refused(t, admin.deleteDevice({ id: 'alpha' }, call()), 'NOT_FOUND', 'DEVICE_NOT_FOUND')
})

test('a device is quarantined and released, and every instance hears of it', async t => {
  const { admin, call, announcedDuring, auditEvents } = await withDevice(t)
  const keys = await announcedDuring(async () => {
    const { device } = await admin.quarantineDevice({ id: 'alpha', reason: 'lost' }, call())
    t.like(device, { status: DeviceStatus.QUARANTINED, statusReason: 'lost' })
    const released = await admin.releaseDevice({ id: 'alpha' }, call())
    t.like(released.device, { status: DeviceStatus.ACTIVE, statusReason: '' })
  })
  t.deepEqual(keys, ['device:alpha', 'device:alpha'])
  const [quarantined] = await auditEvents()
  t.like(quarantined, { target: 'device/alpha', code: 'OK', actor: 'spiffe://test/operator/root' })
  t.deepEqual(quarantined?.detail, { before: 'active', after: 'quarantined', reason: 'lost' })
})

test('a device that is revoked takes all of its certificates with it', async t => {
  const { admin, call, db } = await withDevice(t, 'quarantined')
  const { device } = await admin.revokeDevice({ id: 'alpha', reason: 'stolen' }, call())
  t.like(device, { status: DeviceStatus.REVOKED, statusReason: 'stolen' })
  t.deepEqual(
    device?.certificates.map(({ serial, revokedAt, revocationReason }) => [serial, revokedAt, revocationReason]),
    [
      ['0a', new Date(start), 'privilegeWithdrawn'],
      ['0b', new Date(start), 'privilegeWithdrawn'],
    ],
  )
  const other = await db.em().findOneOrFail(Certificate, '0c')
  t.is(other.revokedAt, null)
})

test('revoking twice is revoking: the first time and reason stay', async t => {
  const { admin, call, time } = await withDevice(t)
  await admin.revokeDevice({ id: 'alpha', reason: 'stolen' }, call())
  time.now += 1_000
  const { device } = await admin.revokeDevice({ id: 'alpha', reason: 'again' }, call())
  t.like(device, { status: DeviceStatus.REVOKED, statusReason: 'stolen' })
  t.deepEqual(device?.certificates[0]?.revokedAt, new Date(start))
})

const refusals = [
  ['release', 'active', 'DEVICE_NOT_QUARANTINED'],
  ['release', 'pending', 'DEVICE_NOT_QUARANTINED'],
  ['release', 'revoked', 'DEVICE_NOT_QUARANTINED'],
  ['quarantine', 'quarantined', 'DEVICE_QUARANTINED'],
  ['quarantine', 'revoked', 'DEVICE_REVOKED'],
  ['approve', 'quarantined', 'DEVICE_QUARANTINED'],
  ['approve', 'revoked', 'DEVICE_REVOKED'],
] as const

for (const [step, status, reason] of refusals) {
  test(`${step} of a device that is ${status} is refused and leaves no trace`, async t => {
    const { admin, call, db, announcedDuring, auditEvents } = await withDevice(t, status)
    const keys = await announcedDuring(async () => {
      const fault = await refused(
        t,
        admin[`${step}Device`]({ id: 'alpha', reason: 'x' }, call()),
        'FAILED_PRECONDITION',
        reason,
      )
      t.is(fault.metadata.status, status)
    })
    t.deepEqual(keys, [])
    t.is((await auditEvents()).length, 0)
    t.is((await db.em().findOneOrFail(Device, 'alpha')).status, status)
  })
}

test('a device that is revoked while others move it stays revoked', async t => {
  const { admin, call, db } = await withDevice(t, 'pending')
  const outcomes = await Promise.allSettled([
    ...Array.from({ length: 10 }, () => admin.quarantineDevice({ id: 'alpha', reason: '' }, call())),
    admin.revokeDevice({ id: 'alpha', reason: 'stolen' }, call()),
    ...Array.from({ length: 10 }, () => admin.releaseDevice({ id: 'alpha' }, call())),
    ...Array.from({ length: 10 }, () => admin.approveDevice({ id: 'alpha' }, call())),
  ])
  for (const outcome of outcomes) {
    if (outcome.status === 'rejected') t.true(outcome.reason instanceof Fault)
  }
  t.is((await db.em().findOneOrFail(Device, 'alpha')).status, 'revoked')
})

test('pages show each of 250 devices once', async t => {
  const { admin, call, db } = await operator(t)
  const ids = Array.from({ length: 250 }, (_, index) => `device-${String(index).padStart(3, '0')}`)
  await db.em().insertMany(
    Device,
    ids.map(id => deviceRow(id)),
  )
  const devices = await allPages(async pageToken => {
    const request = ListDevicesRequest.fromPartial({ pageToken, status: DeviceStatus.ACTIVE })
    const { devices, nextPageToken } = await admin.listDevices(request, call())
    return { items: devices, next: nextPageToken }
  })
  t.deepEqual(
    devices.map(device => device.id),
    ids,
  )
})
