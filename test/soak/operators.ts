/** What operators do all day, at whichever instance: each change is told to the oracle, and must hold from its answer on. */
import { X509Certificate } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Credentials } from '../../src/client/channel.ts'
import { enrollDevice } from '../../src/client/enroll.ts'
import {
  type CreateEnrollmentTokenResponse,
  type ListDevicesResponse,
  ServiceStatus,
  UserStatus,
} from '../../src/gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../../src/gen/edgemesh/v1/types.ts'
import { noTokenRequest } from '../support/token-request.ts'
import { type AdminCaller, createAdminCaller, judgeFailure } from './calls.ts'
import type { Findings } from './findings.ts'
import type { Instance } from './instance.ts'
import type { Ledger } from './ledger.ts'
import type { Fact } from './oracle.ts'
import type { Random } from './random.ts'
import type { Witness } from './witness.ts'

/** A thing that can be taken back and given again, with what that means. */
export type Switch = { fact: Fact; set(on: boolean): Change }

/** `same`: reasons of errors that say that it is so already, as after a call whose answer was lost. */
type Change = { method: string; request: unknown; same?: readonly string[] }

export const role = 'soaker'

export function userSwitch(id: string, fact: Fact): Switch {
  return {
    fact,
    set: on => ({
      method: 'updateUser',
      request: { id, status: on ? UserStatus.ACTIVE : UserStatus.DISABLED },
    }),
  }
}

export function serviceSwitch(id: string, fact: Fact): Switch {
  return {
    fact,
    set: on => ({
      method: 'updateService',
      request: { id, status: on ? ServiceStatus.ACTIVE : ServiceStatus.DISABLED },
    }),
  }
}

export function grantSwitch(service: string, fact: Fact): Switch {
  return {
    fact,
    set: on =>
      on
        ? { method: 'setRoleGrant', request: { grant: { role, service, actions: ['*'] } } }
        : { method: 'deleteRoleGrant', request: { role, service }, same: ['NOT_FOUND'] },
  }
}

export type Operators = {
  /** Acts until it is stopped. */
  work(signal: AbortSignal): Promise<void>
  /** Gives back all that was taken. */
  restore(): Promise<void>
  /** Devices of the fleet that were revoked. */
  revoked(): number
  call: AdminCaller['call']
  close(): void
}

export type OperatorsDeps = {
  operator: Credentials
  instances: readonly Instance[]
  switches: readonly Switch[]
  /** Fact: policy's hours do not keep anybody out. */
  hours: Fact
  witnesses: () => readonly Witness[]
  replaceWitness: (witness: Witness) => Promise<void>
  fleet: { prefix: string; devices: number; revocableMax: number }
  ledger: Ledger
  findings: Findings
  random: Random
  /** An answer that was lost may yet take effect: after this time it has, or never will. */
  settleMs: number
}

const pauseMsMin = 50
const pauseMsMax = 400
const tokenUses = 3
const racers = 6
const offForMs = 1_500
const tries = 40

export function createOperators(deps: OperatorsDeps): Operators {
  const { instances, ledger, findings, random, switches } = deps
  const admin = createAdminCaller(deps.operator)
  /** Changed by a call whose answer was lost: until when nobody touches it. */
  const unsettled = new Map<Fact, number>()
  const busy = new Set<Fact>()
  let users = 0
  let revoked = 0

  /** @returns the answer, or the error that was expected; nothing where it may have been done or not */
  async function attempt<Response>(
    method: string,
    request: unknown,
    expected: readonly string[] = [],
  ): Promise<{ answer?: Response } | undefined> {
    const instance = random.one(instances.filter(one => one.isRunning()))
    const startedAtMs = Date.now()
    try {
      return { answer: await admin.call<Response>(instance, method, request) }
    } catch (failure) {
      const judged = { what: method, instance, sinceMs: startedAtMs - 2_000, findings, expected }
      const { reason, code } = judgeFailure(failure, judged)
      return expected.includes(reason) || expected.includes(code) ? {} : undefined
    }
  }

  /** Until it is done: repeating leads to the same. */
  async function insist({ method, request, same }: Change): Promise<boolean> {
    for (let tried = 0; tried < tries; tried++) {
      if (await attempt(method, request, same)) return true
      await sleep(500)
    }
    findings.broken('an operator gets through in the end', `${method} ${JSON.stringify(request)}`)
    return false
  }

  async function turn({ fact, set }: Switch, on: boolean): Promise<void> {
    const { method, request, same } = set(on)
    const acknowledged = fact.change(on)
    if (await attempt(method, request, same)) acknowledged()
    else unsettled.set(fact, Date.now() + deps.settleMs)
  }

  const isUnsettled = (fact: Fact) => (unsettled.get(fact) ?? 0) > Date.now()

  /** One at a time, and not while a call whose answer was lost may yet take effect. */
  async function takeAndGive(taken: Switch): Promise<void> {
    const { fact } = taken
    if (busy.has(fact) || isUnsettled(fact)) return
    busy.add(fact)
    try {
      if (fact.at(Date.now()) === 'true') {
        await turn(taken, false)
        if (!isUnsettled(fact)) await sleep(random.between(0, offForMs))
      }
      if (!isUnsettled(fact)) await turn(taken, true)
    } finally {
      busy.delete(fact)
    }
  }

  const quarantineOf = ({ id, active }: Witness): Switch => ({
    fact: active,
    set: on =>
      on
        ? { method: 'releaseDevice', request: { id }, same: ['DEVICE_NOT_QUARANTINED'] }
        : { method: 'quarantineDevice', request: { id, reason: 'soak' }, same: ['DEVICE_QUARANTINED'] },
  })

  async function revokeWitness(): Promise<void> {
    const witness = random.one(deps.witnesses())
    const { id, active } = witness
    if (busy.has(active) || isUnsettled(active)) return
    // For good: nobody gives it back.
    busy.add(active)
    const acknowledged = active.change(false)
    if (await insist({ method: 'revokeDevice', request: { id, reason: 'soak' } })) acknowledged()
    await deps.replaceWitness(witness)
  }

  async function changePosture(): Promise<void> {
    const witness = random.one(deps.witnesses())
    witness.setHealthy(false)
    await sleep(random.between(1_500, 3_000))
    witness.setHealthy(true)
  }

  async function revokeFleetDevice(): Promise<void> {
    if (revoked >= deps.fleet.revocableMax) return
    revoked += 1
    const id = `${deps.fleet.prefix}-${String(revoked - 1).padStart(5, '0')}`
    await insist({ method: 'revokeDevice', request: { id, reason: 'soak' }, same: ['DEVICE_NOT_FOUND'] })
  }

  async function createAndRenameUser(): Promise<void> {
    const id = `ledger-${++users}`
    const email = `${id}@example.com`
    const name = `first of ${id}`
    const created = ledger.named(id, name)
    if (!(await attempt('createUser', { id, email, name, role }))) return
    created()
    const next = `second of ${id}`
    const renamed = ledger.named(id, next)
    if (await attempt('updateUser', { id, name: next })) renamed()
  }

  /** More devices than the token lets in, at all instances at once. */
  async function race(): Promise<void> {
    const startedAtMs = Date.now()
    const created = await attempt<CreateEnrollmentTokenResponse>('createEnrollmentToken', {
      ...noTokenRequest,
      usesMax: tokenUses,
    })
    const answer = created?.answer
    if (!answer) return
    const token = ledger.token(answer.token?.id ?? '', tokenUses)
    const running = instances.filter(instance => instance.isRunning())
    const outcomes = await Promise.all(
      Array.from({ length: racers }, async (_, at) => {
        const instance = running[at % running.length]!
        try {
          const device = { type: DeviceType.IOT, os: 'soak', osVersion: '1' }
          const signal = AbortSignal.timeout(20_000)
          const enrolled = await enrollDevice({ server: instance.address, token: answer.tokenText, device, signal })
          const { serialNumber } = new X509Certificate(enrolled.certificateChainPem)
          ledger.enrolled(enrolled.deviceId, serialNumber.toLowerCase())
          token.redeemed()
          return 'enrolled'
        } catch (failure) {
          const sinceMs = startedAtMs - 2_000
          const expected = ['TOKEN_USED_UP']
          return judgeFailure(failure, { what: 'an enrollment', instance, sinceMs, findings, expected }).reason
        }
      }),
    )
    const isCalm = running.every(instance => instance.wasCalm(startedAtMs - 2_000, Date.now()))
    if (isCalm && outcomes.filter(outcome => outcome === 'enrolled').length !== tokenUses) {
      findings.broken('a token is redeemed as often as it allows', `in peace: ${outcomes.join(', ')}`)
    }
  }

  async function look(): Promise<void> {
    const all = { pageSize: 50, pageToken: '', status: 0, labels: {} }
    const listed = await attempt<ListDevicesResponse>('listDevices', all)
    const next = listed?.answer?.nextPageToken
    if (next) await attempt('listDevices', { ...all, pageToken: next })
    await attempt('listConnections', { pageSize: 50, pageToken: '', deviceId: '', status: 1 })
    await attempt('listDecisions', { pageSize: 20, pageToken: '', deviceId: '' })
    await attempt('searchAuditEvents', { pageSize: 50, pageToken: '', actor: '', method: '', target: '', code: '' })
  }

  /** Business hours end with the minute, and are lifted a while later. */
  async function closingTime(): Promise<void> {
    const { hours } = deps
    const at = new Date(Date.now() + 5_000)
    const endMinute = at.getUTCHours() * 60 + at.getUTCMinutes() + 1
    const endMs = Math.ceil(at.getTime() / 60_000) * 60_000
    if (endMinute >= 1_440) return
    const state = await attempt<{ data?: { requirements?: unknown } }>('getPolicyState', {})
    const requirements = state?.answer?.data?.requirements
    if (!requirements) return
    const days = ['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun']
    const limited = { timezone: 'UTC', days, startMinute: 0, endMinute, exemptRoles: ['admin'] }
    hours.plan({ fromMs: endMs, can: 'either' })
    if (await attempt('updatePolicyData', { data: { requirements, hours: limited } })) {
      hours.plan({ fromMs: Math.max(Date.now(), endMs), can: 'false' })
      await sleep(Math.max(0, endMs - Date.now()) + 3_000)
    } else {
      await sleep(deps.settleMs)
    }
    const acknowledged = hours.change(true)
    if (await insist({ method: 'updatePolicyData', request: { data: { requirements, hours: undefined } } }))
      acknowledged()
  }

  const takeOne = () => takeAndGive(random.one(switches))
  const quarantine = () => takeAndGive(quarantineOf(random.one(deps.witnesses())))
  const usual = [takeOne, takeOne, takeOne, quarantine, changePosture, createAndRenameUser, look]
  const rare = [revokeWitness, race, revokeFleetDevice]

  async function repeat(signal: AbortSignal, of: readonly (() => Promise<void>)[], least: number, most: number) {
    while (!signal.aborted) {
      await random.one(of)()
      await sleep(random.between(least, most), undefined, { signal }).catch(() => {})
    }
  }

  return {
    call: admin.call,
    revoked: () => revoked,
    async work(signal) {
      await Promise.all([
        repeat(signal, usual, pauseMsMin, pauseMsMax),
        repeat(signal, usual, pauseMsMin, pauseMsMax),
        repeat(signal, rare, 2_000, 6_000),
        repeat(signal, [closingTime], 20_000, 60_000),
      ])
    },
    async restore() {
      for (const witness of deps.witnesses()) {
        witness.setHealthy(true)
        witness.setSilent(false)
      }
      const latestMs = Math.max(0, ...unsettled.values())
      await sleep(Math.max(0, latestMs - Date.now()))
      for (const { fact, set } of [...switches, ...deps.witnesses().map(quarantineOf)]) {
        if (fact.at(Date.now()) === 'true') continue
        const acknowledged = fact.change(true)
        if (await insist(set(true))) acknowledged()
      }
    },
    close: admin.close,
  }
}
