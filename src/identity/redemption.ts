/**
 * The redemption of a token: one transaction in which a token's use, a device, a certificate's serial and the audit
 * event come to be, or nothing does.
 *
 * The states of a redemption, one for each token and key:
 *
 *     none ──► waits ──► completed        `waits` only where the token requires an operator's approval
 *
 * Both arrows are `redeem`, which may be repeated at any time, on any instance: it looks at what there is, under the
 * token's lock, and does what is still to be done.
 */
import { randomBytes } from 'node:crypto'
import type pg from 'pg'
import { callEntry } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { announcing } from '../db/change-feed.ts'
import { inTransaction } from '../db/transaction.ts'
import { Fault, invalidField } from '../fault.ts'
import type { CheckedCsr } from './csr.ts'
import type { Description } from './description.ts'
import { csrReplayed, type Issuance, type Reservation } from './issuance.ts'
import { labelsMax } from './labels.ts'
import { formatSpiffeId } from './spiffe-id.ts'
import { demandSameDevice, demandUsable, type Redemption, type Token } from './token-rules.ts'

export type Redemptions = {
  token(id: string): Promise<Token | undefined>
  /** How the key has redeemed the token, if it has. */
  of(tokenId: string, publicKeySha256: string): Promise<Redemption | undefined>
  /** When a token was used for the first time, from where, and by which device. */
  firstUse(tokenId: string): Promise<FirstUse | undefined>
  /**
   * @throws Fault as `demandUsable` and `demandSameDevice` do; ALREADY_EXISTS DEVICE_EXISTS; FAILED_PRECONDITION
   *   DEVICE_REVOKED, DEVICE_DELETED, DEVICE_KEY_SUPERSEDED, DEVICE_CERTIFICATE_EXPIRED, DEVICE_QUARANTINED,
   *   CSR_REPLAYED; PERMISSION_DENIED ENROLLMENT_REJECTED; UNAVAILABLE ENROLLMENTS_BEHIND
   */
  redeem(asked: Asked): Promise<Redeemed>
}

export type FirstUse = { at: Date; address: string; deviceId: string }

/** Who asks: a token that has been found good, a key whose possession has been proved, and what the device says. */
export type Asked = { tokenId: string; key: CheckedCsr; description: Description; call: Call }

/** `waits`: the device is there and has no certificate until an operator decides. `status` is what it waits in. */
export type Redeemed =
  | { step: 'waits'; deviceId: string; status: string }
  | { step: 'completed'; reservation: Reservation }

/**
 * Calls of one token that wait for their turn in this instance. At two milliseconds a turn the last of them waits as
 * long as a turn may be waited for.
 */
const waitingMax = 2_000
const waitMsMax = 5_000

// The statements, prepared once for each connection (`name`). The entity manager spends twice the time of everything else
// in an enrollment on what these do. Moments come as numbers, because the pool hands timestamps out as text.

const tokenColumns = `
  id, secret_hash as "secretHash", uses_max as "usesMax", uses,
  (extract(epoch from expires_at) * 1000)::float8 as "expiresAtMs",
  (extract(epoch from revoked_at) * 1000)::float8 as "revokedAtMs",
  labels, device_type as "deviceType", device_id as "deviceId", device_id_pattern as "deviceIdPattern",
  source_networks as "sourceNetworks", requires_approval as "requiresApproval"`

const findToken = { name: 'find token', text: `select ${tokenColumns} from enrollment_tokens where id = $1` }

/** The lock makes racing redemptions of one token wait for each other, and for its revocation: N uses are N. */
const lockToken = { name: 'lock token', text: `${findToken.text} for update` }

/**
 * A statement of its own behind `lockToken`: what was committed while that waited for the lock has to be seen.
 *
 * A redemption without an approval is complete when it is made; versions that knew of no approval didn't say so.
 */
const findRedemption = {
  name: 'find redemption',
  text: `
    select r.device_id as "deviceId", (extract(epoch from r.redeemed_at) * 1000)::float8 as "redeemedAtMs",
      (extract(epoch from case when t.requires_approval then r.completed_at else r.redeemed_at end) * 1000)::float8
        as "completedAtMs"
    from token_redemptions r join enrollment_tokens t on t.id = r.token_id
    where r.token_id = $1 and r.public_key_sha256 = $2`,
}

const findFirstUse = {
  name: 'find first use',
  text: `
    select (extract(epoch from redeemed_at) * 1000)::float8 as "atMs", source_address as address, device_id as "deviceId"
    from token_redemptions where token_id = $1 order by redeemed_at, public_key_sha256 limit 1`,
}

/** No row comes back where the id is taken. */
const insertDevice = {
  name: 'insert device',
  text: `
    insert into devices
      (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9) on conflict (id) do nothing returning id`,
}

/**
 * The lock makes a revocation, an approval or a renewal of the device wait, or be seen. A device is known by the key with
 * which it enrolled, and by those of its certificates that were not revoked. Those of a device that was deleted were.
 *
 * Of these keys the newest certificate's is the device's now; where nothing has been signed, that with which it enrolled.
 */
const lockDevice = {
  name: 'lock device',
  text: `
    select id, status, status_reason as "statusReason", labels, (extract(epoch from enrolled_at) * 1000)::float8 as "enrolledAtMs",
      devices.public_key_sha256 = $2 or exists (
        select from certificates c where c.subject_kind = 'device' and c.subject_id = devices.id
          and c.public_key_sha256 = $2 and c.revoked_at is null) as ours,
      coalesce(newest.public_key_sha256, $2) <> $2 as superseded,
      (extract(epoch from newest.not_after) * 1000)::float8 as "notAfterMs"
    from devices left join lateral (
      select c.public_key_sha256, c.not_after from certificates c
      where c.subject_kind = 'device' and c.subject_id = devices.id and c.revoked_at is null
        and c.fingerprint_sha256 is not null
      order by c.created_at desc limit 1
    ) newest on true
    where id = $1 for update of devices`,
}

const updateDevice = {
  name: 'update device',
  text: `
    update devices set type = $2, os = $3, os_version = $4, labels = $5, updated_at = $6 where id = $1`,
}

/** With an approval a device that was there before stays as the operator saw it, but for what the token says. */
const grantToken = {
  name: 'grant token',
  text: `
    update devices set type = coalesce($2, type), labels = labels || $3::jsonb, updated_at = $4 where id = $1
    returning labels`,
}

const keepOut = { name: 'keep out', text: `update devices set status = 'pending', updated_at = $2 where id = $1` }

/**
 * All that a redemption leaves behind, but for its device: the token's use, once for each key ($2); the redemption, or
 * that it is completed now; the serial, unless it waits; the audit event; the news, which leaves with the commit.
 *
 * One statement, because it is run with the token's lock in hand, on which everybody else with that token waits. The
 * unique index over `csr_sha256` makes a request that was used before fail here.
 */
const writeRedemption = {
  name: 'write redemption',
  text: `
    with used as (
      update enrollment_tokens set uses = uses + 1 where id = $1 and $2
    ), redemption as (
      insert into token_redemptions as kept
        (token_id, public_key_sha256, device_id, source_address, redeemed_at, completed_at)
      values ($1, $3, $4, $5, $6, $7)
      on conflict (token_id, public_key_sha256) do update
        set completed_at = coalesce(kept.completed_at, excluded.completed_at)
    ), certificate as (
      insert into certificates (serial, subject_kind, subject_id, public_key_sha256, csr_sha256, issuer_key_id,
        not_before, not_after, created_at)
      select $8, 'device', $4, $3, $9, $10, $11::timestamptz, $12::timestamptz, $13::timestamptz
      where $8::text is not null
    ), event as (
      insert into audit_events
        (at, id, actor, method, target, source_address, code, reason, detail, instance_id, mac)
      values ($15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25)
    )
    select ${announcing('$14::text')}`,
}

type DeviceRow = {
  id: string
  status: string
  statusReason: string
  labels: Record<string, string>
  enrolledAtMs: number
  /** The key is, or was, the device's. */
  ours: boolean
  /** The device has a newer certificate, for another key. */
  superseded: boolean
  /** When its newest certificate ends; null where it has none. */
  notAfterMs: number | null
}

export function createRedemptions(options: {
  pool: pg.Pool
  issuance: Pick<Issuance, 'prepare'>
  trustDomain: string
  certValidityMs: number
  clock: Clock
}): Redemptions {
  const { pool, issuance, trustDomain, certValidityMs, clock } = options
  const inTurn = createTurns(clock)

  async function redeemLocked(client: pg.ClientBase, { tokenId, key, description, call }: Asked): Promise<Redeemed> {
    // Step 1: The token and what this key has made of it so far. Nobody else redeems or revokes it meanwhile.
    const token = await tokenIn(client, lockToken, tokenId)
    if (!token) throw new Error(`token ${tokenId} is gone: tokens are never deleted`)
    const before = await redemptionIn(client, tokenId, key.publicKeySha256)
    const now = new Date(clock())
    demandUsable(token, before, now.getTime())

    // Step 2: The device: the one of this redemption, or one that comes to be with it.
    const device = before
      ? await deviceOf(client, before, key, description, now)
      : await newDevice(client, token, key, description, now)
    const waits = isWaiting(device.status, token.requiresApproval && !before?.completedAt)

    // Step 3: Who waits goes on waiting. That it has begun is on record with the token's use.
    call.audit.target = `device/${device.id}`
    call.audit.detail = { token: tokenId }
    if (waits) {
      call.audit.detail.step = 'waits for approval'
      if (!before) await write({ reservation: undefined })
      return { step: 'waits', deviceId: device.id, status: device.status }
    }

    // Step 4: What the token says of the device, where an operator has approved that now.
    if (before && !before.completedAt) {
      const labels = JSON.stringify(token.labels)
      const granted = await client.query<Pick<DeviceRow, 'labels'>>({
        ...grantToken,
        values: [device.id, token.deviceType, labels, now],
      })
      demandFewLabels(granted.rows[0]?.labels ?? {})
    }

    // Step 5: The serial, before anything is signed.
    const reservation = issuance.prepare({ kind: 'device', id: device.id }, key, certValidityMs)
    call.audit.detail.serial = reservation.serial
    call.audit.detail.repeated = before?.completedAt !== undefined
    await write({ reservation })
    return { step: 'completed', reservation }

    async function write({ reservation }: { reservation: Reservation | undefined }): Promise<void> {
      // Never before its device: one that was enrolled after a redemption is another, and clocks of instances differ.
      const redeemedAt = new Date(Math.max(now.getTime(), device.enrolledAtMs))
      // The second event of one call, after an operator has decided, is of the time when it ends.
      const { row } = callEntry(call.audit.written ? { ...call, startedAt: now.getTime() } : call, { code: 'OK' })
      await client.query({
        ...writeRedemption,
        values: [
          tokenId,
          before === undefined,
          key.publicKeySha256,
          device.id,
          call.address,
          redeemedAt,
          reservation ? now : null,
          reservation?.serial ?? null,
          reservation?.key.sha256 ?? null,
          reservation?.authority.issuerKeyId ?? null,
          reservation?.notBefore ?? null,
          reservation?.notAfter ?? null,
          reservation?.reservedAt ?? null,
          `device:${device.id}`,
          ...row,
          call.audit.own?.vouch(row) ?? null,
        ],
      })
      call.audit.written = true
    }
  }

  /** The device of a redemption that is there already, as the call found it. */
  async function deviceOf(
    client: pg.ClientBase,
    redemption: Redemption,
    key: CheckedCsr,
    description: Description,
    now: Date,
  ): Promise<DeviceRow> {
    demandSameDevice(redemption, description)
    const { deviceId, redeemedAt, completedAt } = redemption
    const device = await deviceIn(client, deviceId, key)
    // One that was enrolled after this redemption is another that has the name now.
    const remains = device?.ours && device.enrolledAtMs <= redeemedAt.getTime()
    if (!remains) throw completedAt ? deviceDeleted(deviceId) : rejected(deviceId, '')
    if (device.status === 'revoked')
      throw completedAt ? deviceRevoked(deviceId) : rejected(deviceId, device.statusReason)
    demandNewestKey(device)
    // Who waits for an operator may wait for longer than the certificate of before lasts.
    if (completedAt) demandUnexpired(device, now)
    return device
  }

  /** Makes the device; or finds one that is this key's already, which is then described anew. */
  async function newDevice(
    client: pg.ClientBase,
    token: Token,
    key: CheckedCsr,
    description: Description,
    now: Date,
  ): Promise<Pick<DeviceRow, 'id' | 'status' | 'enrolledAtMs'>> {
    const { type, os, osVersion } = description
    const id = token.deviceId || description.id || randomId(type)
    // What the token says beats the device's own word.
    const merged = { ...description.labels, ...token.labels }
    demandFewLabels(merged)
    const labels = JSON.stringify(merged)
    const status = token.requiresApproval ? 'pending' : 'active'
    const spiffeId = formatSpiffeId({ trustDomain, kind: 'device', id })
    const inserted = await client.query({
      ...insertDevice,
      values: [id, type, os, osVersion, labels, status, spiffeId, key.publicKeySha256, now],
    })
    if (inserted.rowCount === 1) return { id, status, enrolledAtMs: now.getTime() }

    const there = await deviceIn(client, id, key)
    if (!there?.ours) {
      const message = `device ${id} is enrolled with another key: choose another id, or have an operator delete it`
      throw new Fault('ALREADY_EXISTS', 'DEVICE_EXISTS', message, { metadata: { device_id: id } })
    }
    if (there.status === 'revoked') throw deviceRevoked(id)
    demandNewestKey(there)
    demandUnexpired(there, now)
    if (!token.requiresApproval) {
      await client.query({ ...updateDevice, values: [id, type, os, osVersion, labels, now] })
      return there
    }
    // What it may do changes with its labels, so it gets those of the token when an operator has approved, and no sooner.
    // The release from a quarantine would pass for that approval.
    if (there.status === 'quarantined') throw deviceQuarantined(id)
    demandFewLabels({ ...there.labels, ...token.labels })
    await client.query({ ...keepOut, values: [id, now] })
    return { ...there, status: 'pending' }
  }

  return {
    token: id => tokenIn(pool, findToken, id),
    of: (tokenId, publicKeySha256) => redemptionIn(pool, tokenId, publicKeySha256),
    async firstUse(tokenId) {
      const { rows } = await pool.query<{ atMs: number; address: string; deviceId: string }>({
        ...findFirstUse,
        values: [tokenId],
      })
      const [row] = rows
      return row && { at: new Date(row.atMs), address: row.address, deviceId: row.deviceId }
    },
    redeem(asked) {
      const { audit } = asked.call
      return inTurn(asked.tokenId, async () => {
        const before = { ...audit }
        try {
          const redeemed = await inTransaction(pool, client => {
            // What an attempt before has vouched for went with its transaction.
            Object.assign(audit, before)
            audit.own?.rolledBack()
            return redeemLocked(client, asked)
          })
          audit.own?.committed()
          return redeemed
        } catch (error) {
          // The event went with the transaction; whoever answers the call writes how it ended.
          Object.assign(audit, before)
          audit.own?.rolledBack()
          throw csrReplayed(error)
        }
      })
    },
  }
}

/** Whoever was let in before may be quarantined and have a certificate; who was not, is not let in by a quarantine. */
function isWaiting(status: string, undecided: boolean): boolean {
  return status === 'pending' || (undecided && status !== 'active')
}

/** A pool or one of its connections: where a statement goes. */
type Queryable = Pick<pg.ClientBase, 'query'>

async function tokenIn(client: Queryable, statement: typeof findToken, id: string): Promise<Token | undefined> {
  type Row = Omit<Token, 'expiresAt' | 'revokedAt'> & { expiresAtMs: number; revokedAtMs: number | null }
  const { rows } = await client.query<Row>({ ...statement, values: [id] })
  const [row] = rows
  if (!row) return undefined
  const { expiresAtMs, revokedAtMs, ...token } = row
  return { ...token, expiresAt: new Date(expiresAtMs), revokedAt: revokedAtMs === null ? null : new Date(revokedAtMs) }
}

async function redemptionIn(
  client: Queryable,
  tokenId: string,
  publicKeySha256: string,
): Promise<Redemption | undefined> {
  type Row = { deviceId: string; redeemedAtMs: number; completedAtMs: number | null }
  const { rows } = await client.query<Row>({ ...findRedemption, values: [tokenId, publicKeySha256] })
  const [row] = rows
  if (!row) return undefined
  const { deviceId, redeemedAtMs, completedAtMs } = row
  const completedAt = completedAtMs === null ? undefined : new Date(completedAtMs)
  return { deviceId, redeemedAt: new Date(redeemedAtMs), completedAt }
}

async function deviceIn(client: Queryable, id: string, key: CheckedCsr): Promise<DeviceRow | undefined> {
  const { rows } = await client.query<DeviceRow>({ ...lockDevice, values: [id, key.publicKeySha256] })
  return rows[0]
}

/** @throws Fault INVALID_ARGUMENT */
function demandFewLabels(labels: Record<string, string>): void {
  if (Object.keys(labels).length <= labelsMax) return
  throw invalidField('device.labels', `has to have at most ${labelsMax} entries, those of the token included`)
}

function deviceQuarantined(deviceId: string): Fault {
  const message = `device ${deviceId} is quarantined: have an operator release it before it redeems a token that asks for approval`
  return new Fault('FAILED_PRECONDITION', 'DEVICE_QUARANTINED', message, { metadata: { device_id: deviceId } })
}

/**
 * No token undoes the rules of `recovery.ts`: a key that the device has replaced may be in other hands by now.
 *
 * @throws Fault DEVICE_KEY_SUPERSEDED
 */
function demandNewestKey({ id, superseded }: DeviceRow): void {
  if (!superseded) return
  const message = `device ${id} has a newer certificate, for another key than this one`
  const fix =
    'renew by RenewCertificate with that certificate, or have an operator delete the device and enroll it anew'
  const metadata = { device_id: id }
  throw new Fault('FAILED_PRECONDITION', 'DEVICE_KEY_SUPERSEDED', `${message}: ${fix}`, { metadata })
}

/**
 * And whoever was away until after its certificate had expired comes back by recovery, which is never silent.
 *
 * @throws Fault DEVICE_CERTIFICATE_EXPIRED
 */
function demandUnexpired({ id, notAfterMs }: DeviceRow, now: Date): void {
  if (notAfterMs === null || now.getTime() < notAfterMs) return
  const message = `the certificate of device ${id} expired at ${new Date(notAfterMs).toISOString()}`
  const fix = 'come back by RenewCertificate with it, or have an operator delete the device and enroll it anew'
  const metadata = { device_id: id }
  throw new Fault('FAILED_PRECONDITION', 'DEVICE_CERTIFICATE_EXPIRED', `${message}: ${fix}`, { metadata })
}

function randomId(type: string): string {
  return `${type === 'unspecified' ? 'device' : type}-${randomBytes(6).toString('hex')}`
}

function rejected(deviceId: string, reason: string): Fault {
  const message = `an operator has rejected device ${deviceId}${reason && `: ${reason}`}`
  return new Fault('PERMISSION_DENIED', 'ENROLLMENT_REJECTED', message, { metadata: { device_id: deviceId } })
}

function deviceDeleted(deviceId: string): Fault {
  const message = `device ${deviceId} has been deleted since it enrolled; enroll it with another token`
  return new Fault('FAILED_PRECONDITION', 'DEVICE_DELETED', message, { metadata: { device_id: deviceId } })
}

function deviceRevoked(deviceId: string): Fault {
  const message = `device ${deviceId} has been revoked; enroll it under another id`
  return new Fault('FAILED_PRECONDITION', 'DEVICE_REVOKED', message, { metadata: { device_id: deviceId } })
}

/**
 * Calls with one token take turns here. In the database they would wait for the token's lock each with a connection in
 * hand, and a crowd with one token would leave none for heartbeats and decisions.
 */
function createTurns(clock: Clock) {
  const queues = new Map<string, { last: Promise<unknown>; length: number }>()

  return async <T>(tokenId: string, work: () => Promise<T>): Promise<T> => {
    const queue = queues.get(tokenId) ?? { last: Promise.resolve(), length: 0 }
    if (queue.length >= waitingMax) throw behind()
    queues.set(tokenId, queue)
    queue.length++
    const since = clock()
    const mine = queue.last.then(() => {
      // A database that is away costs each turn seconds: whoever comes after is told so at once.
      if (clock() - since > waitMsMax) throw behind()
      return work()
    })
    queue.last = mine.catch(() => {})
    try {
      return await mine
    } finally {
      queue.length--
      if (queue.length === 0) queues.delete(tokenId)
    }
  }
}

function behind(): Fault {
  const message = 'more devices enroll with this token than can be taken in at once; try again'
  return new Fault('UNAVAILABLE', 'ENROLLMENTS_BEHIND', message, { retryAfterMs: waitMsMax })
}
