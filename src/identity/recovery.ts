/**
 * Recovery: a device that was away until after its certificate had expired comes back.
 *
 * It shows the expired certificate, whose key TLS has just seen it use, and sends a request that carries a fresh
 * challenge. So it is the device; but nobody knows what has happened to it meanwhile, and it has missed what it was told.
 * Therefore it never comes back as if nothing had been:
 *
 *     revoked, deleted, not on record           refused like any certificate of that kind
 *     away for longer than CERT_RECOVERY_DAYS   refused, unless it had asked in time: a new device
 *     away for longer than twice that           refused, whether it had asked or been approved: nobody knows it any more
 *     has renewed since                         refused: an older certificate may be in other hands by now
 *     quarantined before                        gets its certificate, and stays quarantined
 *     active, CERT_RECOVERY=quarantine          gets its certificate, quarantined until an operator releases it
 *     active, CERT_RECOVERY=approval            pending: refused until an operator approves it
 *     pending                                   stays pending: refused until an operator approves it
 *     approved since it asked                   gets its certificate
 *     answered before, for the same key         gets another one: the answer was lost, and nothing changes by that
 */
import type { Identified } from '../caller.ts'
import { announce } from '../db/change-feed.ts'
import type { EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { CheckedCsr } from './csr.ts'
import { demandStandingNow } from './standing.ts'

export type Recovery = {
  /** How long after the end of its certificate a device may come back; 0: never. */
  windowMs: number
  into: 'quarantine' | 'approval'
}

/** How a device has come back. `needs_approval`: it has not yet. `repeated`: it had been let in, and did not hear of it. */
export type Return = {
  outcome: 'quarantined' | 'approved' | 'repeated' | 'needs_approval'
  before: DeviceStatus
  after: DeviceStatus
}

type DeviceStatus = 'pending' | 'active' | 'quarantined' | 'revoked'

type ReturningDevice = { status: DeviceStatus; statusReason: string; recoverySerial: string | null }

/** A person decides; minutes are soon enough, and a fleet that waits costs nothing. */
const approvalRetryMs = 60_000
const dayMs = 86_400_000

/**
 * Lets the device in or not, in the transaction of `em`, with the announcement to every instance.
 *
 * @param caller whose certificate has expired
 * @param wanted the key that the new certificate is for
 * @throws Fault as the table above has it; only a refusal for want of approval is returned, since it changes the device
 */
export async function comeBack(
  em: EntityManager,
  { windowMs, into }: Recovery,
  caller: Identified,
  wanted: Pick<CheckedCsr, 'publicKeySha256'>,
  now: Date,
): Promise<Return> {
  const { id, serial } = caller
  // Step 1. The certificate must stand in every respect but its date. From here on nobody else moves the device.
  await demandStandingNow(em, caller)
  const [device] = await em.execute<ReturningDevice[]>(
    'select status, status_reason as "statusReason", recovery_serial as "recoverySerial" from devices where id = ?',
    [id],
  )
  if (!device) throw new Error('a device that stands is on record')

  // Step 2. The device must not have been away for too long, nor be here already.
  const hasAsked = device.recoverySerial === serial
  // Who has asked in time has as long again, for an operator to decide and for the device to come and hear of it.
  const inTimeMs = hasAsked ? 2 * windowMs : windowMs
  const isInTime = windowMs > 0 && now.getTime() - caller.notAfter < inTimeMs
  if (!isInTime) throw windowOver(caller, windowMs)
  const { isSuperseded, isAnswered } = await newerCertificates(em, caller, wanted.publicKeySha256, now)
  if (isSuperseded) throw superseded(id)

  // Step 3. Where it goes from here.
  const before = device.status
  const outcome = outcomeOf({ status: before, hasAsked, isAnswered }, into)
  const after = statusAfter[outcome]
  const recoverySerial = outcome === 'needs_approval' ? serial : null
  if (after !== before || recoverySerial !== device.recoverySerial) {
    const expired = `its certificate expired at ${new Date(caller.notAfter).toISOString()}`
    const statusReason = after === before ? device.statusReason : `${expired}, and it came back later`
    await em.execute(
      'update devices set status = ?, status_reason = ?, recovery_serial = ?, updated_at = ? where id = ?',
      [after, statusReason, recoverySerial, now, id],
    )
    await announce(em, [`device:${id}`])
  }
  return { outcome, before, after }
}

function outcomeOf(
  device: { status: DeviceStatus; hasAsked: boolean; isAnswered: boolean },
  into: Recovery['into'],
): Return['outcome'] {
  if (device.status === 'pending') return 'needs_approval'
  if (device.status === 'quarantined') return 'quarantined'
  if (device.hasAsked) return 'approved'
  if (device.isAnswered) return 'repeated'
  return into === 'quarantine' ? 'quarantined' : 'needs_approval'
}

const statusAfter: Record<Return['outcome'], DeviceStatus> = {
  needs_approval: 'pending',
  quarantined: 'quarantined',
  approved: 'active',
  repeated: 'active',
}

/**
 * What the device has been given since. That makes the certificate which it shows superseded; unless it was for the very
 * key that is wanted now, and so the answer to this same call.
 */
async function newerCertificates(
  em: EntityManager,
  { id, serial }: Identified,
  wantedKeySha256: string,
  now: Date,
): Promise<{ isSuperseded: boolean; isAnswered: boolean }> {
  const [found] = await em.execute<{ isSuperseded: boolean; isAnswered: boolean }[]>(
    `select coalesce(bool_or(newer.public_key_sha256 <> ? or newer.revoked_at is not null), false) as "isSuperseded",
       coalesce(bool_or(newer.not_after > ?), false) as "isAnswered"
     from certificates shown join certificates newer on newer.subject_kind = 'device'
       and newer.subject_id = shown.subject_id and newer.created_at > shown.created_at
     where shown.serial = ? and shown.subject_kind = 'device' and shown.subject_id = ?`,
    [wantedKeySha256, now, serial, id],
  )
  return found!
}

export function needsApproval(id: string): Fault {
  const message = `device ${id} was away until after its certificate had expired: an operator has to approve it first`
  return new Fault('FAILED_PRECONDITION', 'RECOVERY_NEEDS_APPROVAL', message, { retryAfterMs: approvalRetryMs })
}

function windowOver({ id, notAfter }: Identified, windowMs: number): Fault {
  const expired = `the certificate of device ${id} expired at ${new Date(notAfter).toISOString()}`
  const why = windowMs > 0 ? `more than ${windowMs / dayMs} days ago` : 'and this service takes none back that has'
  return new Fault(
    'FAILED_PRECONDITION',
    'RECOVERY_WINDOW_OVER',
    `${expired}, ${why}: have an operator delete the device, then enroll it with a new token`,
  )
}

function superseded(id: string): Fault {
  const message = `device ${id} has a newer certificate than this one: show that one, or have an operator delete the device and enroll it with a new token`
  return new Fault('FAILED_PRECONDITION', 'RECOVERY_SUPERSEDED', message)
}
