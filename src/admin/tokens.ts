/** Enrollment tokens: made, listed and revoked by operators. `identity/` redeems them. */
import { z } from 'zod'
import { type Call, callerName } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { DeviceTypeName } from '../fleet/entities.ts'
import {
  type CreateEnrollmentTokenRequest,
  type CreateEnrollmentTokenResponse,
  type EnrollmentToken as EnrollmentTokenMessage,
  EnrollmentTokenStatus,
  type ListEnrollmentTokensRequest,
  type ListEnrollmentTokensResponse,
  type RevokeEnrollmentTokenRequest,
  type RevokeEnrollmentTokenResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../gen/edgemesh/v1/types.ts'
import { EnrollmentToken, TokenRedemption } from '../identity/entities.ts'
import { hashSecret, mintToken } from '../identity/tokens.ts'
import { change } from './change.ts'
import { deviceTypeName, deviceTypes } from './devices.ts'
import { cutPage, page } from './paging.ts'
import { check, enumValue, id, labels, optionalId } from './request.ts'

const usesLimit = 10_000
const lifetimeMsMin = 60_000
const lifetimeMsMax = 365 * 86_400_000
const lifetimeMsDefault = 3_600_000
/** Newest redemptions shown with a token: 1,000 tokens a page with 10,000 uses each would fit no message. */
const redemptionsShownMax = 100

const createRequest = z.object({
  usesMax: z
    .int()
    .min(0)
    .max(usesLimit, `has to be 1 to ${usesLimit}, or 0 for 1`)
    .transform(uses => uses || 1),
  lifetime: z
    .object({ seconds: z.number(), nanos: z.number() })
    .transform(({ seconds, nanos }) => seconds * 1_000 + nanos / 1e6)
    .refine(ms => ms >= lifetimeMsMin && ms <= lifetimeMsMax, 'has to be one minute (60s) to 365 days (31536000s)')
    .default(lifetimeMsDefault),
  labels,
  deviceType: enumValue(DeviceType),
  deviceId: optionalId,
  requiresApproval: z.boolean(),
})
const listRequest = z.object(page(z.tuple([id])))
const revokeRequest = z.object({ id })

export function tokenHandlers({
  db,
  clock,
  tokenSecret,
  authority,
}: {
  db: Database
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
      if (asked.requiresApproval) throw approvalUnsupported()
      const minted = mintToken({ rootKeySha256: authority.current().issuing.rootKeySha256 })
      const now = clock()
      const token = {
        id: minted.id,
        secretHash: hashSecret(minted.secret, tokenSecret),
        usesMax: asked.usesMax,
        uses: 0,
        expiresAt: new Date(now + asked.lifetime),
        revokedAt: null,
        labels: asked.labels,
        deviceType: asked.deviceType === DeviceType.UNSPECIFIED ? null : deviceTypeName(asked.deviceType),
        deviceId: asked.deviceId || null,
        deviceIdPattern: null,
        sourceNetworks: [],
        requiresApproval: false,
        createdBy: callerName(call.caller),
        createdAt: new Date(now),
      }
      call.audit.target = `token/${token.id}`
      call.audit.detail = {
        uses_max: token.usesMax,
        expires_at: token.expiresAt.toISOString(),
        labels: token.labels,
        ...(token.deviceType && { device_type: token.deviceType }),
        ...(token.deviceId && { device_id: token.deviceId }),
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
      const found = await db
        .em()
        .find(EnrollmentToken, after ? { id: { $gt: after[0] } } : {}, { orderBy: { id: 'asc' }, limit: pageSize + 1 })
      const { rows, nextPageToken } = cutPage(found, pageSize, token => [token.id])
      const redemptions = await newestRedemptions(rows.map(token => token.id))
      const now = clock()
      return { tokens: rows.map(token => tokenMessage(token, redemptions.get(token.id) ?? [], now)), nextPageToken }
    },

    async revokeEnrollmentToken(
      request: RevokeEnrollmentTokenRequest,
      call: Call,
    ): Promise<RevokeEnrollmentTokenResponse> {
      const asked = check(revokeRequest, request)
      call.audit.target = `token/${asked.id}`
      const token = await change(db, call, async em => {
        // The lock lets a redemption under way finish first, so that the uses in the answer are the last ones.
        const token = await em.findOne(EnrollmentToken, asked.id, { lockMode: LockMode.PESSIMISTIC_WRITE })
        if (!token) throw new Fault('NOT_FOUND', 'TOKEN_NOT_FOUND', `there is no enrollment token ${asked.id}`)
        token.revokedAt ??= new Date(clock())
        return { answer: token, keys: [] }
      })
      const redemptions = await newestRedemptions([token.id])
      return { token: tokenMessage(token, redemptions.get(token.id) ?? [], clock()), devicesRevoked: 0 }
    },
  }

  /** The newest redemptions of each of these tokens, by the token's id. */
  async function newestRedemptions(tokenIds: string[]): Promise<Map<string, TokenRedemption[]>> {
    const em = db.em()
    const { rows } = await db.pool.query(
      `select newest.token_id, newest.public_key_sha256, newest.device_id, newest.source_address, newest.redeemed_at
       from unnest($1::text[]) as token (id)
       cross join lateral (
         select token_id, public_key_sha256, device_id, source_address, redeemed_at from token_redemptions
         where token_id = token.id order by redeemed_at desc, public_key_sha256 limit $2
       ) as newest`,
      [tokenIds, redemptionsShownMax],
    )
    return Map.groupBy(
      rows.map(row => em.map(TokenRedemption, row)),
      redemption => redemption.tokenId,
    )
  }
}

/** What became of a token counts more than what would have: revoked, then used up, then expired. */
function statusOf(token: EnrollmentToken, nowMs: number): EnrollmentTokenStatus {
  if (token.revokedAt) return EnrollmentTokenStatus.REVOKED
  if (token.usesMax != null && token.uses >= token.usesMax) return EnrollmentTokenStatus.USED_UP
  if (token.expiresAt.getTime() <= nowMs) return EnrollmentTokenStatus.EXPIRED
  return EnrollmentTokenStatus.ACTIVE
}

function tokenMessage(token: EnrollmentToken, redemptions: TokenRedemption[], nowMs: number): EnrollmentTokenMessage {
  return {
    id: token.id,
    status: statusOf(token, nowMs),
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

function approvalUnsupported(): Fault {
  return new Fault(
    'UNIMPLEMENTED',
    'APPROVAL_UNSUPPORTED',
    'enrollment that waits for approval is not supported; leave requires_approval unset',
  )
}
