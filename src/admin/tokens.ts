/** Enrollment tokens: made, looked at and revoked by operators. `identity/` redeems them. */
import { z } from 'zod'
import { type Call, callerName } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, type EntityManager, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import type { DeviceTypeName } from '../fleet/entities.ts'
import {
  type CreateEnrollmentTokenRequest,
  type CreateEnrollmentTokenResponse,
  type EnrollmentToken as EnrollmentTokenMessage,
  EnrollmentTokenStatus,
  type GetEnrollmentTokenRequest,
  type GetEnrollmentTokenResponse,
  type ListEnrollmentTokensRequest,
  type ListEnrollmentTokensResponse,
  type RevokeEnrollmentTokenRequest,
  type RevokeEnrollmentTokenResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../gen/edgemesh/v1/types.ts'
import type { RevocationReason } from '../identity/crl.ts'
import { EnrollmentToken, TokenRedemption } from '../identity/entities.ts'
import { isIdPattern } from '../identity/id-pattern.ts'
import { type TokenState, tokenState } from '../identity/token-rules.ts'
import { hashSecret, mintToken, secretKeyOf } from '../identity/token-text.ts'
import { isNetwork } from '../network.ts'
import { change } from './change.ts'
import { deviceTypeName, deviceTypes } from './devices.ts'
import { cutPage, page } from './paging.ts'
import { check, enumValue, id, labels, optionalId, reason } from './request.ts'

const usesLimit = 10_000
const lifetimeMsMin = 60_000
const lifetimeMsMax = 365 * 86_400_000
const lifetimeMsDefault = 3_600_000
const networksMax = 32
/** Newest redemptions shown with one token. */
const redemptionsShownMax = 100
/** And with each token of a list: a thousand tokens a page with more would fit no message. */
const redemptionsListedMax = 10
/** Devices named in the audit event of a token that is revoked with what it has enrolled. */
const devicesNamedMax = 100

const createRequest = z
  .object({
    usesMax: z.int().min(0).max(usesLimit, `has to be 1 to ${usesLimit}, or 0 for 1`),
    lifetime: z
      .object({ seconds: z.number(), nanos: z.number() })
      .transform(({ seconds, nanos }) => seconds * 1_000 + nanos / 1e6)
      .refine(ms => ms >= lifetimeMsMin && ms <= lifetimeMsMax, 'has to be one minute (60s) to 365 days (31536000s)')
      .default(lifetimeMsDefault),
    labels,
    deviceType: enumValue(DeviceType),
    deviceId: optionalId,
    requiresApproval: z.boolean(),
    reusable: z.boolean(),
    deviceIdPattern: z
      .string()
      .refine(
        pattern => pattern === '' || isIdPattern(pattern),
        'has to be empty or 1 to 64 characters of a-z, 0-9, ".", "_", "-", "*" and "?", such as press-*',
      ),
    sourceNetworks: z
      .array(z.string().refine(isNetwork, 'has to be a network such as 10.0.0.0/8 or fd00::/8, or an address'))
      .max(networksMax, `has to have at most ${networksMax} entries`),
  })
  .superRefine(({ reusable, usesMax, deviceId, deviceIdPattern }, context) => {
    if (reusable && usesMax > 0) {
      const message = 'has to be 0 where reusable is set: such a token has no number of uses'
      context.addIssue({ code: 'custom', path: ['usesMax'], message })
    }
    if (deviceId && deviceIdPattern) {
      const message = 'must not be given together with device_id: a token is for one device or for a pattern'
      context.addIssue({ code: 'custom', path: ['deviceIdPattern'], message })
    }
  })
  .transform(asked => ({ ...asked, usesMax: asked.reusable ? null : asked.usesMax || 1 }))
const listRequest = z.object(page(z.tuple([id])))
const getRequest = z.object({ id })
const revokeRequest = z.object({ id, revokeDevices: z.boolean(), reason })

export function tokenHandlers({
  db,
  reports,
  clock,
  tokenSecret,
  authority,
}: {
  db: Database
  reports: Reports
  clock: Clock
  tokenSecret: string
  /** What the text of a token made now has to pin: the root under which the servers' certificates are issued. */
  authority: { current(): { issuing: { rootKeySha256: string } } }
}) {
  return {
    async createEnrollmentToken(
      request: CreateEnrollmentTokenRequest,
      call: Call,
    ): Promise<CreateEnrollmentTokenResponse> {
      const asked = check(createRequest, request)
      const minted = mintToken({ rootKeySha256: authority.current().issuing.rootKeySha256 })
      const now = clock()
      const restrictions = {
        requiresApproval: asked.requiresApproval,
        deviceIdPattern: asked.deviceIdPattern || null,
        sourceNetworks: asked.sourceNetworks,
      }
      const token = {
        id: minted.id,
        secretHash: hashSecret(minted.secret, secretKeyOf(restrictions, tokenSecret)),
        usesMax: asked.usesMax,
        uses: 0,
        expiresAt: new Date(now + asked.lifetime),
        revokedAt: null,
        labels: asked.labels,
        deviceType: asked.deviceType === DeviceType.UNSPECIFIED ? null : deviceTypeName(asked.deviceType),
        deviceId: asked.deviceId || null,
        ...restrictions,
        createdBy: callerName(call.caller),
        createdAt: new Date(now),
      }
      call.audit.target = `token/${token.id}`
      call.audit.detail = {
        uses_max: token.usesMax ?? 'any number',
        expires_at: token.expiresAt.toISOString(),
        labels: token.labels,
        ...(token.deviceType && { device_type: token.deviceType }),
        ...(token.deviceId && { device_id: token.deviceId }),
        ...(token.deviceIdPattern && { device_id_pattern: token.deviceIdPattern }),
        ...(token.sourceNetworks.length > 0 && { source_networks: token.sourceNetworks }),
        ...(token.requiresApproval && { requires_approval: true }),
      }
      await change(db, call, async em => {
        await em.insert(EnrollmentToken, token)
        // Nobody remembers tokens, so nobody has to be told.
        return { answer: undefined, keys: [] }
      })
      return { token: tokenMessage(token, [], now), tokenText: minted.text }
    },

    async listEnrollmentTokens(
      request: ListEnrollmentTokensRequest,
      call: Call,
    ): Promise<ListEnrollmentTokensResponse> {
      const { pageSize, pageToken: after } = check(listRequest, request)
      call.audit.target = 'tokens'
      const found = await reports.read(em =>
        em.find(EnrollmentToken, after ? { id: { $gt: after[0] } } : {}, {
          orderBy: { id: 'asc' },
          limit: pageSize + 1,
        }),
      )
      const { rows, nextPageToken } = cutPage(found, pageSize, token => [token.id])
      const redemptions = await newestRedemptions(
        reports,
        rows.map(token => token.id),
        redemptionsListedMax,
      )
      const now = clock()
      return { tokens: rows.map(token => tokenMessage(token, redemptions.get(token.id) ?? [], now)), nextPageToken }
    },

    async getEnrollmentToken(request: GetEnrollmentTokenRequest, call: Call): Promise<GetEnrollmentTokenResponse> {
      const asked = check(getRequest, request)
      call.audit.target = `token/${asked.id}`
      const token = await db.em().findOne(EnrollmentToken, asked.id)
      if (!token) throw tokenNotFound(asked.id)
      return { token: await shown(token) }
    },

    async revokeEnrollmentToken(
      request: RevokeEnrollmentTokenRequest,
      call: Call,
    ): Promise<RevokeEnrollmentTokenResponse> {
      const asked = check(revokeRequest, request)
      call.audit.target = `token/${asked.id}`
      const { token, devices } = await change(db, call, async em => {
        // Step 1. The lock lets a redemption under way finish first, with its device; none begins behind it.
        const token = await em.findOne(EnrollmentToken, asked.id, { lockMode: LockMode.PESSIMISTIC_WRITE })
        if (!token) throw tokenNotFound(asked.id)
        const now = new Date(clock())
        token.revokedAt ??= now

        // Step 2. What it has enrolled goes with it, if that is asked for; also when the token itself went before.
        const because = asked.reason || `its enrollment token ${asked.id} was revoked`
        const devices = asked.revokeDevices ? await revokeEnrolled(em, asked.id, because, now) : []

        call.audit.detail = {
          reason: asked.reason,
          ...(asked.revokeDevices && { devices_revoked: devices.length, devices: devices.slice(0, devicesNamedMax) }),
        }
        // Devices that wait for approval with this token are told at once, wherever they wait.
        const keys = [`token:${asked.id}`, ...devices.map(device => `device:${device}`)]
        if (devices.length > 0) keys.push('crl:revoked')
        return { answer: { token, devices }, keys }
      })
      return { token: await shown(token), devicesRevoked: devices.length }
    },
  }

  async function shown(token: EnrollmentToken): Promise<EnrollmentTokenMessage> {
    const redemptions = await newestRedemptions(db.pool, [token.id], redemptionsShownMax)
    return tokenMessage(token, redemptions.get(token.id) ?? [], clock())
  }

  /** The newest redemptions of each of these tokens, by the token's id. */
  async function newestRedemptions(
    from: Pick<Reports, 'query'>,
    tokenIds: string[],
    max: number,
  ): Promise<Map<string, TokenRedemption[]>> {
    const em = db.em()
    const { rows } = await from.query(
      `select newest.token_id, newest.public_key_sha256, newest.device_id, newest.source_address, newest.redeemed_at
       from unnest($1::text[]) as token (id)
       cross join lateral (
         select token_id, public_key_sha256, device_id, source_address, redeemed_at from token_redemptions
         where token_id = token.id order by redeemed_at desc, public_key_sha256 limit $2
       ) as newest`,
      [tokenIds, max],
    )
    return Map.groupBy(
      rows.map(row => em.map(TokenRedemption, row)),
      redemption => redemption.tokenId,
    )
  }
}

/** A device that was enrolled after the redemption is another one, which has the name since the first was deleted. */
const enrolledByToken = `exists (
  select from token_redemptions where token_id = ? and device_id = devices.id and redeemed_at >= devices.enrolled_at)`

/**
 * Revokes all devices that a token has enrolled, whatever they have become since, with all of their certificates.
 *
 * @returns the ids of those that were not revoked before
 */
async function revokeEnrolled(em: EntityManager, tokenId: string, because: string, now: Date): Promise<string[]> {
  // In the order of their ids, so that two tokens with devices in common do not wait for each other for ever.
  await em.execute(`select id from devices where ${enrolledByToken} order by id for update`, [tokenId])
  const revoked = await em.execute<{ id: string }[]>(
    `update devices set status = 'revoked', status_reason = ?, updated_at = ?
     where ${enrolledByToken} and status <> 'revoked' returning id`,
    [because, now, tokenId],
  )
  // Behind the devices' locks, so that it sees the certificate of a renewal that was under way.
  await em.execute(
    `update certificates set revoked_at = ?, revocation_reason = ?
     where subject_kind = 'device' and subject_id in (select id from devices where ${enrolledByToken}) and revoked_at is null`,
    [now, 'privilegeWithdrawn' satisfies RevocationReason, tokenId],
  )
  return revoked.map(({ id }) => id).sort()
}

const statuses: Record<TokenState, EnrollmentTokenStatus> = {
  active: EnrollmentTokenStatus.ACTIVE,
  'used-up': EnrollmentTokenStatus.USED_UP,
  expired: EnrollmentTokenStatus.EXPIRED,
  revoked: EnrollmentTokenStatus.REVOKED,
}

function tokenMessage(token: EnrollmentToken, redemptions: TokenRedemption[], nowMs: number): EnrollmentTokenMessage {
  return {
    id: token.id,
    status: statuses[tokenState(token, nowMs)],
    usesMax: token.usesMax ?? 0,
    uses: token.uses,
    expiresAt: token.expiresAt,
    labels: token.labels,
    deviceType: deviceTypes[(token.deviceType ?? 'unspecified') as DeviceTypeName],
    deviceId: token.deviceId ?? '',
    requiresApproval: token.requiresApproval,
    reusable: token.usesMax == null,
    deviceIdPattern: token.deviceIdPattern ?? '',
    sourceNetworks: token.sourceNetworks,
    createdBy: token.createdBy,
    createdAt: token.createdAt,
    redemptions: redemptions.map(({ deviceId, redeemedAt, sourceAddress, publicKeySha256 }) => ({
      deviceId,
      redeemedAt,
      sourceAddress,
      publicKeySha256,
    })),
  }
}

function tokenNotFound(id: string): Fault {
  return new Fault('NOT_FOUND', 'TOKEN_NOT_FOUND', `there is no enrollment token ${id}`)
}
