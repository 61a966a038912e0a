/**
 * RenewCertificate: the same identity, a new certificate, for the key of the request.
 *
 * Who renews is who the connection's certificate says. The old certificate stays valid until it expires, so that a device
 * can change over without a gap. A device whose certificate has expired already comes back by `recovery.ts`.
 */
import { recordCall } from '../audit/journal.ts'
import type { Call, Identified } from '../caller.ts'
import type { EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { RenewCertificateRequest, RenewCertificateResponse } from '../gen/edgemesh/v1/enroll.ts'
import type { Log } from '../telemetry/log.ts'
import { type CheckedCsr, checkCsr } from './csr.ts'
import { type EnrollDeps, identityOf } from './enroll.ts'
import { csrReplayed, type Reservation, validityMsOf } from './issuance.ts'
import { operatorValidityMsMax } from './operator.ts'
import { comeBack, needsApproval, type Recovery } from './recovery.ts'
import { demandStandingNow } from './standing.ts'

export type RenewDeps = EnrollDeps & {
  /** @throws Fault RESOURCE_EXHAUSTED when the holder renews too often */
  limitRenewals: (holder: string) => void
  /** @throws Fault UNAUTHENTICATED CERTIFICATE_RETIRED when the caller's certificate was issued by who is trusted no more */
  demandIssuer: (caller: Identified) => void
  recovery: Recovery
  log: Log
  /** A device has come back, or tried to: how, or the reason of its refusal. */
  onRecovery: (outcome: string) => void
}

export function createRenew(deps: RenewDeps) {
  return async (request: RenewCertificateRequest, call: Call): Promise<RenewCertificateResponse> => {
    const { caller } = call
    if (caller.kind !== 'device' && caller.kind !== 'operator') throw new Error('services have no certificate to renew')
    deps.limitRenewals(caller.spiffeId)
    const key = checkCsr(request.csr)
    deps.challenges.demand(key)
    await deps.issuance.ready()
    // An expired certificate has been let in without: see `recovery.ts`.
    deps.demandIssuer(caller)
    call.audit.target = `${caller.kind}/${caller.id}`
    const hasExpired = caller.notAfter <= call.startedAt
    const renew = caller.kind === 'operator' ? renewOperator : hasExpired ? recoverDevice : renewDevice
    const reservation = await renew(deps, caller, key, call)
    const certificate = await deps.issuance.sign(reservation)
    return { identity: identityOf(deps, reservation.subject, certificate), serverTime: new Date(deps.clock()) }
  }
}

function renewDevice(deps: RenewDeps, device: Identified, key: CheckedCsr, call: Call): Promise<Reservation> {
  return reserving(deps, call, async em => {
    await demandStandingNow(em, device)
    await demandFewCertificates(em, device, deps.clock())
    return recorded(em, call, deps.issuance.reserve(em, { kind: 'device', id: device.id }, key, deps.certValidityMs))
  })
}

/** For as long as the one before was made out, since that is what whoever made the operator has decided. */
function renewOperator(deps: RenewDeps, operator: Identified, key: CheckedCsr, call: Call): Promise<Reservation> {
  const { id, role } = operator
  const validityMs = Math.min(validityMsOf(operator), operatorValidityMsMax)
  return reserving(deps, call, async em => {
    await demandStandingNow(em, operator)
    await demandFewCertificates(em, operator, deps.clock())
    const subject = { kind: 'operator' as const, id, role: role || undefined }
    return recorded(em, call, deps.issuance.reserve(em, subject, key, validityMs))
  })
}

async function recoverDevice(deps: RenewDeps, device: Identified, key: CheckedCsr, call: Call): Promise<Reservation> {
  const { id, serial } = device
  const expired = { expiredSerial: serial, expiredAt: new Date(device.notAfter).toISOString() }
  const note = (outcome: string, level: 'warn' | 'debug' = 'warn') => {
    deps.onRecovery(outcome)
    deps.log[level]({ deviceId: id, ...expired, outcome }, 'a device came back with an expired certificate')
  }
  call.audit.detail = expired
  const { back, reservation } = await reserving(deps, call, async em => {
    const back = await comeBack(em, deps.recovery, device, key, new Date(deps.clock()))
    const { outcome, before, after } = back
    call.audit.detail = { ...expired, recovery: outcome, before, after }
    if (outcome === 'needs_approval') {
      // The refusal is recorded like every other; that the device has to wait from now on, with the change itself.
      if (before !== after) await recordCall(em, call, { code: 'OK', reason: 'RECOVERY_ASKED' })
      return { back, reservation: undefined }
    }
    const reservation = deps.issuance.reserve(em, { kind: 'device', id }, key, deps.certValidityMs)
    return { back, reservation: await recorded(em, call, reservation) }
  }).catch(error => {
    note(error instanceof Fault ? error.reason.toLowerCase() : 'failed')
    throw error
  })
  // One that waits asks again every minute.
  const goesOnWaiting = reservation === undefined && back.before === back.after
  note(back.outcome, goesOnWaiting ? 'debug' : 'warn')
  if (!reservation) throw needsApproval(id)
  return reservation
}

/**
 * A device needs two at a time, and a few more while authorities change. All that a holder has are read whenever one of them
 * is looked at, so whoever renews without end must come to one.
 */
const certificatesMax = 64

async function demandFewCertificates(em: EntityManager, { kind, id }: Identified, nowMs: number): Promise<void> {
  const [{ count } = { count: 0 }] = await em.execute<{ count: number }[]>(
    'select count(*)::int as count from certificates where subject_kind = ? and subject_id = ? and not_after > ?',
    [kind, id, new Date(nowMs)],
  )
  if (count < certificatesMax) return
  const message = `${kind} ${id} holds ${count} certificates that have not expired; use one of them`
  throw new Fault('RESOURCE_EXHAUSTED', 'TOO_MANY_CERTIFICATES', message)
}

/** One transaction, in which a serial is reserved. */
async function reserving<T>(deps: RenewDeps, call: Call, work: (em: EntityManager) => Promise<T>): Promise<T> {
  try {
    const done = await deps.db.transaction(em => {
      // What an attempt before has vouched for went with its transaction.
      call.audit.own?.rolledBack()
      call.audit.written = false
      return work(em)
    })
    call.audit.own?.committed()
    return done
  } catch (error) {
    call.audit.own?.rolledBack()
    throw csrReplayed(error)
  }
}

async function recorded(em: EntityManager, call: Call, reservation: Reservation): Promise<Reservation> {
  call.audit.detail = { ...call.audit.detail, serial: reservation.serial }
  await recordCall(em, call, { code: 'OK' })
  return reservation
}
