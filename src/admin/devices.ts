/** Devices: looked at, approved, quarantined, released, revoked and deleted by operators. They come into being by enrolling. */
import { z } from 'zod'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, type EntityManager, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { durationOf } from '../duration.ts'
import { Fault } from '../fault.ts'
import { Device, DevicePosture, type DeviceStatusName, type DeviceTypeName } from '../fleet/entities.ts'
import { isPresent, type PresenceName, presenceOf } from '../fleet/presence.ts'
import type {
  ApproveDeviceRequest,
  ApproveDeviceResponse,
  Certificate as CertificateMessage,
  DeleteDeviceRequest,
  DeleteDeviceResponse,
  Device as DeviceMessage,
  GetDeviceRequest,
  GetDeviceResponse,
  ListDevicesRequest,
  ListDevicesResponse,
  QuarantineDeviceRequest,
  QuarantineDeviceResponse,
  ReleaseDeviceRequest,
  ReleaseDeviceResponse,
  RevokeDeviceRequest,
  RevokeDeviceResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { DevicePresence, DeviceStatus, DeviceType } from '../gen/edgemesh/v1/types.ts'
import type { RevocationReason } from '../identity/crl.ts'
import { Certificate } from '../identity/entities.ts'
import { ofDeletedDevice } from '../identity/standing.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, enumValue, id, labels, reason } from './request.ts'

/** The types as the database spells them. */
export const deviceTypes: Record<DeviceTypeName, DeviceType> = {
  unspecified: DeviceType.UNSPECIFIED,
  laptop: DeviceType.LAPTOP,
  server: DeviceType.SERVER,
  iot: DeviceType.IOT,
  gateway: DeviceType.GATEWAY,
}

/** The statuses as the database spells them. */
const deviceStatuses: Record<DeviceStatusName, DeviceStatus> = {
  pending: DeviceStatus.PENDING,
  active: DeviceStatus.ACTIVE,
  quarantined: DeviceStatus.QUARANTINED,
  revoked: DeviceStatus.REVOKED,
}

export function deviceTypeName(type: DeviceType): DeviceTypeName {
  const names = Object.keys(deviceTypes) as DeviceTypeName[]
  return names.find(name => deviceTypes[name] === type) ?? 'unspecified'
}

/** `undefined` for UNSPECIFIED. */
function deviceStatusName(status: DeviceStatus): DeviceStatusName | undefined {
  const names = Object.keys(deviceStatuses) as DeviceStatusName[]
  return names.find(name => deviceStatuses[name] === status)
}

/** The presences as they are spelled in SQL. */
const presences: Record<PresenceName, DevicePresence> = {
  online: DevicePresence.ONLINE,
  stale: DevicePresence.STALE,
  offline: DevicePresence.OFFLINE,
}

/** `undefined` for UNSPECIFIED. */
function presenceNameOf(presence: DevicePresence | undefined): PresenceName | undefined {
  const names = Object.keys(presences) as PresenceName[]
  return names.find(name => presences[name] === presence)
}

type Step = 'approve' | 'quarantine' | 'release' | 'revoke' | 'delete'

/**
 * A device's life: what an operator may do to it, and where that leads from each status. What is not here is refused.
 * Steps that lead to where they start are for whoever repeats a call whose answer was lost: it must not seem to fail.
 */
const transitions: Record<Step, Partial<Record<DeviceStatusName, DeviceStatusName | 'deleted'>>> = {
  approve: { pending: 'active', active: 'active' },
  quarantine: { pending: 'quarantined', active: 'quarantined' },
  release: { quarantined: 'active' },
  revoke: { pending: 'revoked', active: 'revoked', quarantined: 'revoked', revoked: 'revoked' },
  delete: { pending: 'deleted', active: 'deleted', quarantined: 'deleted', revoked: 'deleted' },
}

/** Where a device is out, and its certificates with it: what the revocation list says of them. */
const revocationReasons: Partial<Record<DeviceStatusName | 'deleted', RevocationReason>> = {
  revoked: 'privilegeWithdrawn',
  deleted: ofDeletedDevice,
}

const listRequest = z.object({
  ...page(z.tuple([id])),
  status: enumValue(DeviceStatus),
  labels,
  presence: enumValue(DevicePresence).optional(),
})
const idRequest = z.object({ id })
const reasonRequest = z.object({ id, reason })

export function deviceHandlers({
  db,
  reports,
  clock,
  maxAgeMs,
}: {
  db: Database
  reports: Reports
  clock: Clock
  maxAgeMs: number
}) {
  const steps = deviceSteps({ db, clock })

  /** @returns the device, if it is still there */
  async function take(step: Step, id: string, reason: string, call: Call): Promise<DeviceMessage | undefined> {
    await steps.take(step, id, reason, call)
    const em = db.em()
    const device = await em.findOne(Device, id)
    return device ? deviceMessage(em, device, maxAgeMs) : undefined
  }

  return {
    async listDevices(request: ListDevicesRequest, call: Call): Promise<ListDevicesResponse> {
      const { pageSize, pageToken: after, status, labels, presence } = check(listRequest, request)
      call.audit.target = 'devices'
      return reports.read(async em => {
        const query = em
          .createQueryBuilder(Device)
          .orderBy({ id: 'asc' })
          .limit(pageSize + 1)
        const statusName = deviceStatusName(status)
        if (after) query.andWhere({ id: { $gt: after[0] } })
        if (statusName) query.andWhere({ status: statusName })
        const presenceName = presenceNameOf(presence)
        if (presenceName) query.andWhere(isPresent(presenceName, 'd0.id', maxAgeMs))
        if (Object.keys(labels).length > 0) query.andWhere('labels @> ?::jsonb', [JSON.stringify(labels)])
        const { rows, nextPageToken } = cutPage(await query.getResultList(), pageSize, device => [device.id])
        return { devices: await deviceMessages(em, rows, maxAgeMs), nextPageToken }
      })
    },

    async getDevice(request: GetDeviceRequest, call: Call): Promise<GetDeviceResponse> {
      const asked = check(idRequest, request)
      call.audit.target = `device/${asked.id}`
      const em = db.em()
      const device = await em.findOne(Device, asked.id)
      if (!device) throw deviceNotFound(asked.id)
      return { device: await deviceMessage(em, device, maxAgeMs) }
    },

    async approveDevice(request: ApproveDeviceRequest, call: Call): Promise<ApproveDeviceResponse> {
      const asked = check(idRequest, request)
      return { device: await take('approve', asked.id, '', call) }
    },

    async quarantineDevice(request: QuarantineDeviceRequest, call: Call): Promise<QuarantineDeviceResponse> {
      const asked = check(reasonRequest, request)
      return { device: await take('quarantine', asked.id, asked.reason, call) }
    },

    async releaseDevice(request: ReleaseDeviceRequest, call: Call): Promise<ReleaseDeviceResponse> {
      const asked = check(idRequest, request)
      return { device: await take('release', asked.id, '', call) }
    },

    async revokeDevice(request: RevokeDeviceRequest, call: Call): Promise<RevokeDeviceResponse> {
      const asked = check(reasonRequest, request)
      return { device: await take('revoke', asked.id, asked.reason, call) }
    },

    async deleteDevice(request: DeleteDeviceRequest, call: Call): Promise<DeleteDeviceResponse> {
      const asked = check(idRequest, request)
      await take('delete', asked.id, '', call)
      return {}
    },
  }
}

export type DeviceSteps = {
  /**
   * Takes the device one step through its life and tells every instance.
   *
   * @param demand throws where it is not to be taken after all; by then nobody else moves the device
   * @throws Fault NOT_FOUND, or FAILED_PRECONDITION when no step leads there from where it is
   */
  take(step: Step, id: string, reason: string, call: Call, demand?: (em: EntityManager) => Promise<void>): Promise<void>
}

export function deviceSteps({ db, clock }: { db: Database; clock: Clock }): DeviceSteps {
  const take: DeviceSteps['take'] = (step, id, reason, call, demand) => {
    call.audit.target = `device/${id}`
    return change(db, call, async em => {
      // Step 1. Nobody else moves the device until this transaction has ended.
      const device = await em.findOne(Device, id, { lockMode: LockMode.PESSIMISTIC_WRITE })
      if (!device) throw deviceNotFound(id)
      await demand?.(em)

      // Step 2. Move it, if the table has a way from here.
      const before = device.status
      const after = transitions[step][before]
      if (after === undefined) throw stepRefused(step, id, before)
      const now = new Date(clock())
      if (after === 'deleted') {
        em.remove(device)
      } else if (after !== before) {
        device.status = after
        device.statusReason = reason
        device.updatedAt = now
      }

      // Step 3. A device that is out takes its certificates with it. Also when it was out before: none that slipped in
      // between must live.
      const revocationReason = revocationReasons[after]
      if (revocationReason) {
        await em.nativeUpdate(
          Certificate,
          { subjectKind: 'device', subjectId: id, revokedAt: null },
          { revokedAt: now, revocationReason },
        )
      }

      const { type, labels, enrolledAt } = device
      // Of a device that is deleted this is all that stays.
      call.audit.detail = { before, after, reason, ...(after === 'deleted' && { type, labels, enrolledAt }) }
      const keys = [`device:${id}`]
      // The revocation list is signed anew when certificates are revoked, not with every change of a device.
      if (revocationReason) keys.push('crl:revoked')
      return { answer: undefined, keys }
    })
  }
  return { take }
}

async function deviceMessage(em: EntityManager, device: Device, maxAgeMs: number): Promise<DeviceMessage> {
  const [message] = await deviceMessages(em, [device], maxAgeMs)
  return message!
}

/** The devices with their posture and their certificates, in four statements however many there are. */
async function deviceMessages(em: EntityManager, devices: Device[], maxAgeMs: number): Promise<DeviceMessage[]> {
  const ids = devices.map(device => device.id)
  const postures = await em.find(DevicePosture, { deviceId: { $in: ids } })
  const certificates = await em.find(
    Certificate,
    { subjectKind: 'device', subjectId: { $in: ids } },
    { orderBy: { notBefore: 'desc', serial: 'asc' } },
  )
  const present = await em.execute<
    { id: string; presence: PresenceName; since: Date | null; instance: string | null }[]
  >(
    `select d.id, ${presenceOf('d.id', maxAgeMs)} as presence, p.since, p.instance_id as instance
     from devices d left join device_presence p on p.device_id = d.id where d.id in (select jsonb_array_elements_text(?::jsonb))`,
    [JSON.stringify(ids)],
  )
  const presentOf = new Map(present.map(row => [row.id, row]))
  const postureOf = new Map(postures.map(posture => [posture.deviceId, posture]))
  const certificatesOf = Map.groupBy(certificates, certificate => certificate.subjectId)
  return devices.map(device => {
    const latest = postureOf.get(device.id)
    return {
      id: device.id,
      type: deviceTypes[device.type],
      os: device.os,
      osVersion: device.osVersion,
      labels: device.labels,
      status: deviceStatuses[device.status],
      statusReason: device.statusReason,
      spiffeId: device.spiffeId,
      enrolledAt: device.enrolledAt,
      lastSeenAt: latest?.receivedAt,
      posture: latest && { ...latest.posture, measuredAt: latest.measuredAt },
      failingPosture: latest?.failing ?? [],
      certificates: (certificatesOf.get(device.id) ?? []).map(certificateMessage),
      clockOffset: latest?.clockOffsetMs == null ? undefined : durationOf(latest.clockOffsetMs),
      trustBundleId: latest?.trustBundleId ?? '',
      ...presenceMessage(presentOf.get(device.id)),
    }
  })
}

function presenceMessage(row: { presence: PresenceName; since: Date | null; instance: string | null } | undefined) {
  if (!row || row.presence === 'offline') {
    return { presence: DevicePresence.OFFLINE, presentSince: undefined, instanceId: '' }
  }
  const { presence, since, instance } = row
  return {
    presence: presences[presence],
    presentSince: since ? new Date(since) : undefined,
    instanceId: instance ?? '',
  }
}

function certificateMessage(certificate: Certificate): CertificateMessage {
  return {
    serial: certificate.serial,
    fingerprintSha256: certificate.fingerprintSha256 ?? '',
    notBefore: certificate.notBefore,
    notAfter: certificate.notAfter,
    revokedAt: certificate.revokedAt ?? undefined,
    revocationReason: certificate.revocationReason ?? '',
    issuerKeyId: certificate.issuerKeyId ?? '',
  }
}

function deviceNotFound(id: string): Fault {
  return new Fault('NOT_FOUND', 'DEVICE_NOT_FOUND', `there is no device ${id}`)
}

function stepRefused(step: Step, id: string, status: DeviceStatusName): Fault {
  const from = Object.entries(transitions[step]).flatMap(([before, after]) => (after === before ? [] : [before]))
  const reason = step === 'release' ? 'DEVICE_NOT_QUARANTINED' : `DEVICE_${status.toUpperCase()}`
  return new Fault(
    'FAILED_PRECONDITION',
    reason,
    `can't ${step} device ${id}: it is ${status}, not ${from.join(' or ')}`,
    {
      metadata: { status },
    },
  )
}
