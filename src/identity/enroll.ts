/**
 * Enroll: a token and a key become a device with an identity.
 *
 * The order is the guarantee. Nothing is touched before token and CSR have been checked; token, device, serial and
 * audit event change in one transaction; only then is anything signed. A client that lost the answer repeats its call
 * and gets the same device, because a redemption is remembered by its key.
 */
import { randomBytes } from 'node:crypto'
import { recordCall } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { announce } from '../db/change-feed.ts'
import { type Database, type EntityManager, LockMode } from '../db/orm.ts'
import { Fault, type FieldViolation } from '../fault.ts'
import type { EnrollRequest, EnrollResponse, Identity } from '../gen/edgemesh/v1/enroll.ts'
import { type DeviceDescription, DeviceType } from '../gen/edgemesh/v1/types.ts'
import type { Challenges } from './challenge.ts'
import { type CheckedCsr, checkCsr } from './csr.ts'
import { EnrollmentToken, TokenRedemption } from './entities.ts'
import { csrReplayed, type Issuance, type Reservation, type SignedCertificate, type Subject } from './issuance.ts'
import { formatSpiffeId, isSafeId } from './spiffe-id.ts'
import { parseToken, secretMatches } from './tokens.ts'
import type { TrustBundleSource } from './trust-bundle.ts'

export type EnrollDeps = {
  db: Database
  issuance: Issuance
  trustBundle: TrustBundleSource
  challenges: Challenges
  trustDomain: string
  /** ENROLLMENT_TOKEN_SECRET. */
  tokenSecret: string
  certValidityMs: number
  clock: Clock
  /** @throws Fault RESOURCE_EXHAUSTED when the address enrolls too often */
  limit: (address: string) => Promise<void>
  onEnrollment: (outcome: string) => void
}

export function createEnroll(deps: EnrollDeps) {
  return async function* enroll(request: EnrollRequest, call: Call): AsyncGenerator<EnrollResponse> {
    try {
      await deps.limit(call.address)
      const token = await findToken(deps, request.token, call)
      const key = checkCsr(request.csr)
      deps.challenges.demand(key)
      await refuseSpent(deps, token, key)
      const description = checkDescription(request.device)
      const reservation = await redeem(deps, token, key, description, call).catch(error => {
        throw csrReplayed(error)
      })
      const certificate = await deps.issuance.sign(reservation)
      const identity = await identityOf(deps, reservation.subject, certificate)
      deps.onEnrollment('enrolled')
      yield { step: { $case: 'identity', value: identity }, serverTime: new Date(deps.clock()) }
    } catch (error) {
      deps.onEnrollment(error instanceof Fault ? error.reason.toLowerCase() : 'failed')
      throw error
    }
  }
}

/** What a device, or an operator, receives when a certificate was issued to it. */
export async function identityOf(
  deps: Pick<EnrollDeps, 'trustBundle' | 'trustDomain'>,
  { kind, id }: Subject,
  certificate: SignedCertificate,
): Promise<Identity> {
  return {
    deviceId: kind === 'device' ? id : '',
    spiffeId: formatSpiffeId({ trustDomain: deps.trustDomain, kind, id }),
    certificateChainPem: certificate.chainPem,
    trustBundle: await deps.trustBundle.current(),
    notAfter: certificate.notAfter,
    renewAfter: certificate.renewAfter,
  }
}

/** @throws Fault that does not tell an unknown id from a wrong secret */
async function findToken(deps: EnrollDeps, text: string, call: Call): Promise<EnrollmentToken> {
  const { id, secret } = parseToken(text)
  call.audit.target = `token/${id}`
  const stored = await deps.db.em().findOne(EnrollmentToken, { id })
  // The secret is compared even where there is no token, so that time does not tell which ids exist.
  const matches = secretMatches(secret, deps.tokenSecret, stored?.secretHash ?? Buffer.alloc(32))
  if (!stored || !matches) throw new Fault('UNAUTHENTICATED', 'TOKEN_UNKNOWN', 'there is no such enrollment token')
  return stored
}

/** Says early what is plain already, so that a crowd with a token that is spent does not queue for its lock. */
async function refuseSpent(deps: EnrollDeps, token: EnrollmentToken, { publicKeySha256 }: CheckedCsr): Promise<void> {
  const before = await deps.db.em().findOne(TokenRedemption, { tokenId: token.id, publicKeySha256 })
  demandUsable(token, before !== null, deps.clock())
}

/** One transaction: the token's use, the device, the certificate's serial, the audit event. All of it, or nothing. */
async function redeem(
  deps: EnrollDeps,
  { id: tokenId }: { id: string },
  key: CheckedCsr,
  description: DeviceDescription,
  call: Call,
): Promise<Reservation> {
  return deps.db.em().transactional(async em => {
    // The lock makes racing redemptions of one token wait for each other: N uses are N, never N + 1.
    const token = await em.findOneOrFail(EnrollmentToken, { id: tokenId }, { lockMode: LockMode.PESSIMISTIC_WRITE })
    const before = await em.findOne(TokenRedemption, { tokenId, publicKeySha256: key.publicKeySha256 })
    demandUsable(token, before !== null, deps.clock())
    demandFitting(token, description)

    const deviceId = await upsertDevice(deps, em, token, before?.deviceId, key, description)
    if (!before) {
      token.uses += 1
      em.persist(
        em.create(TokenRedemption, {
          tokenId,
          publicKeySha256: key.publicKeySha256,
          deviceId,
          sourceAddress: call.address,
          redeemedAt: new Date(deps.clock()),
        }),
      )
    }
    const reservation = deps.issuance.reserve(em, { kind: 'device', id: deviceId }, key, deps.certValidityMs)
    call.audit.target = `device/${deviceId}`
    call.audit.detail = { token: tokenId, serial: reservation.serial, repeated: before !== null }
    await recordCall(em, call, { code: 'OK' })
    await announce(em, [`device:${deviceId}`])
    return reservation
  })
}

/** A token's states: active → used up, expired or revoked; there is no way back. */
function demandUsable(token: EnrollmentToken, repeated: boolean, nowMs: number): void {
  if (token.revokedAt) throw new Fault('UNAUTHENTICATED', 'TOKEN_REVOKED', 'the enrollment token has been revoked')
  if (token.expiresAt.getTime() <= nowMs) {
    throw new Fault(
      'UNAUTHENTICATED',
      'TOKEN_EXPIRED',
      `the enrollment token expired at ${token.expiresAt.toISOString()}`,
    )
  }
  if (!repeated && token.usesMax != null && token.uses >= token.usesMax) {
    const message = `the enrollment token is used up (${token.uses} of ${token.usesMax} uses)`
    throw new Fault('RESOURCE_EXHAUSTED', 'TOKEN_USED_UP', message)
  }
}

function demandFitting(token: EnrollmentToken, description: DeviceDescription): void {
  if (token.deviceId && description.id && token.deviceId !== description.id) {
    const message = 'the enrollment token is for another device id'
    throw new Fault('PERMISSION_DENIED', 'TOKEN_FOR_OTHER_DEVICE', message)
  }
  if (token.deviceType && token.deviceType !== deviceTypeNames[description.type]) {
    const message = `the enrollment token is for devices of type ${token.deviceType}`
    throw new Fault('PERMISSION_DENIED', 'TOKEN_FOR_OTHER_TYPE', message)
  }
}

/** Makes the device, or finds the one that this key already is. @returns its id */
async function upsertDevice(
  deps: EnrollDeps,
  em: EntityManager,
  token: EnrollmentToken,
  enrolledBefore: string | undefined,
  key: CheckedCsr,
  description: DeviceDescription,
): Promise<string> {
  const type = deviceTypeNames[description.type] ?? 'unspecified'
  const wanted = enrolledBefore ?? token.deviceId ?? description.id
  const id = wanted || `${type === 'unspecified' ? 'device' : type}-${randomBytes(6).toString('hex')}`
  const now = new Date(deps.clock())
  const labels = { ...description.labels, ...token.labels }
  const inserted = await em.execute(
    `insert into devices
       (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
     values (?, ?, ?, ?, ?::jsonb, 'active', ?, ?, ?, ?) on conflict (id) do nothing returning id`,
    [
      id,
      type,
      description.os,
      description.osVersion,
      JSON.stringify(labels),
      formatSpiffeId({ trustDomain: deps.trustDomain, kind: 'device', id }),
      key.publicKeySha256,
      now,
      now,
    ],
  )
  if (inserted.length === 1) return id

  const [device] = await em.execute<{ status: string; ours: boolean }[]>(
    `select status, exists (select from certificates c where c.subject_kind = 'device' and c.subject_id = devices.id
       and c.public_key_sha256 = ? and (c.revoked_at is null or devices.status = 'revoked')) as ours from devices where id = ? for update`,
    [key.publicKeySha256, id],
  )
  if (!device?.ours) {
    const message = `device ${id} is enrolled with another key: choose another id, or have an operator delete it`
    throw new Fault('ALREADY_EXISTS', 'DEVICE_EXISTS', message)
  }
  if (device.status === 'revoked') {
    throw new Fault(
      'FAILED_PRECONDITION',
      'DEVICE_REVOKED',
      `device ${id} has been revoked; enroll it under another id`,
    )
  }
  await em.execute(
    'update devices set type = ?, os = ?, os_version = ?, labels = ?::jsonb, updated_at = ? where id = ?',
    [type, description.os, description.osVersion, JSON.stringify(labels), now, id],
  )
  return id
}

const deviceTypeNames: Record<number, 'laptop' | 'server' | 'iot' | 'gateway'> = {
  [DeviceType.LAPTOP]: 'laptop',
  [DeviceType.SERVER]: 'server',
  [DeviceType.IOT]: 'iot',
  [DeviceType.GATEWAY]: 'gateway',
}

const textCharactersMax = 64
const labelsMax = 32
const labelKeyCharactersMax = 63
const labelValueCharactersMax = 255

/** @throws Fault INVALID_ARGUMENT that names every field out of bounds */
function checkDescription(device: DeviceDescription | undefined): DeviceDescription {
  const description = device ?? { id: '', type: DeviceType.UNSPECIFIED, os: '', osVersion: '', labels: {} }
  const violations: FieldViolation[] = []
  const wrong = (field: string, text: string) => violations.push({ field: `device.${field}`, description: text })
  if (description.id && !isSafeId(description.id)) {
    wrong('id', 'has to be 1 to 64 lower-case letters, digits, ".", "_" or "-", with a letter or digit at both ends')
  }
  if (!Object.values<number>(DeviceType).includes(description.type)) wrong('type', 'is none of the known device types')
  for (const [field, text] of [['os', description.os] as const, ['os_version', description.osVersion] as const]) {
    if (text.length > textCharactersMax) wrong(field, `has to be of at most ${textCharactersMax} characters`)
    if (text.includes('\0')) wrong(field, 'must not contain NUL characters')
  }
  const labels = Object.entries(description.labels)
  if (labels.length > labelsMax) wrong('labels', `has to have at most ${labelsMax} entries`)
  for (const [key, value] of labels.slice(0, labelsMax)) {
    if (key.length === 0 || key.length > labelKeyCharactersMax) wrong('labels', 'keys have to be of 1 to 63 characters')
    if (value.length > labelValueCharactersMax) wrong('labels', 'values have to be of at most 255 characters')
    if (key.includes('\0') || value.includes('\0')) wrong('labels', 'must not contain NUL characters')
  }
  if (violations.length > 0) {
    const what = violations.map(({ field, description }) => `${field} ${description}`).join('; ')
    throw new Fault('INVALID_ARGUMENT', 'INVALID_FIELD', what, { violations })
  }
  return description
}
