/**
 * What an enrollment token allows, and to whom. Pure: `redemption.ts` asks, under the token's lock.
 *
 * A token is in one of four states, and never comes back to `active`. Each key that has redeemed it has a redemption,
 * which outlives the token's own end: whoever lost an answer, or waits for an operator, has had his use already.
 */
import { Fault, invalidField } from '../fault.ts'
import { networkList } from '../network.ts'
import type { Description } from './description.ts'
import type { EnrollmentToken, TokenRedemption } from './entities.ts'
import { matchesIdPattern } from './id-pattern.ts'

/**
 * - `active`: may be redeemed
 * - `used-up`: has been redeemed as often as it may be
 * - `expired`: its time was over before that
 * - `revoked`: ended by an operator, with all redemptions that still wait
 *
 * What became of a token counts more than what would have: revoked, then used up, then expired.
 */
export type TokenState = 'active' | 'used-up' | 'expired' | 'revoked'

export function tokenState(
  { revokedAt, usesMax, uses, expiresAt }: Pick<EnrollmentToken, 'revokedAt' | 'usesMax' | 'uses' | 'expiresAt'>,
  nowMs: number,
): TokenState {
  if (revokedAt) return 'revoked'
  if (usesMax != null && uses >= usesMax) return 'used-up'
  return expiresAt.getTime() <= nowMs ? 'expired' : 'active'
}

/** What of a token is needed to redeem it. */
export type Token = Pick<
  EnrollmentToken,
  | 'id'
  | 'secretHash'
  | 'usesMax'
  | 'uses'
  | 'expiresAt'
  | 'revokedAt'
  | 'labels'
  | 'deviceType'
  | 'deviceId'
  | 'deviceIdPattern'
  | 'sourceNetworks'
  | 'requiresApproval'
>

/** How one key has redeemed a token. */
export type Redemption = Pick<TokenRedemption, 'deviceId' | 'redeemedAt'> & {
  /** When the device was first given a certificate; undefined while it waits for approval. */
  completedAt: Date | undefined
}

/** How long the same call may be repeated by who lost the answer, even if the token expires meanwhile. */
const repeatableMs = 3_600_000

/**
 * Whether the key may redeem the token now, for the first time or again.
 *
 * @throws Fault TOKEN_REVOKED, TOKEN_EXPIRED, TOKEN_USED_UP, TOKEN_OTHER_KEY
 */
export function demandUsable(token: Token, redemption: Redemption | undefined, nowMs: number): void {
  const state = tokenState(token, nowMs)
  if (state === 'revoked') {
    const revokedAt = token.revokedAt?.toISOString() ?? ''
    throw new Fault('UNAUTHENTICATED', 'TOKEN_REVOKED', 'the enrollment token has been revoked', {
      metadata: { revoked_at: revokedAt },
    })
  }
  if (redemption) {
    // A decision that takes an operator days must not come too late for the token.
    if (!redemption.completedAt) return
    const until = Math.max(token.expiresAt.getTime(), redemption.completedAt.getTime() + repeatableMs)
    if (until <= nowMs) throw tokenExpired(token)
    return
  }
  if (state === 'used-up' && token.usesMax === 1) {
    const message = 'the enrollment token has been redeemed with another key'
    throw new Fault('PERMISSION_DENIED', 'TOKEN_OTHER_KEY', message)
  }
  if (state === 'used-up') {
    const message = `the enrollment token is used up (${token.uses} of ${token.usesMax} uses)`
    throw new Fault('RESOURCE_EXHAUSTED', 'TOKEN_USED_UP', message)
  }
  if (state === 'expired') throw tokenExpired(token)
}

function tokenExpired({ expiresAt }: Token): Fault {
  const at = expiresAt.toISOString()
  return new Fault('UNAUTHENTICATED', 'TOKEN_EXPIRED', `the enrollment token expired at ${at}`, {
    metadata: { expired_at: at },
  })
}

/**
 * Whether the token is for this device, at this address. Asked of every call, the first and those that repeat it.
 *
 * @throws Fault PERMISSION_DENIED TOKEN_FOR_OTHER_NETWORK, TOKEN_FOR_OTHER_TYPE, TOKEN_FOR_OTHER_DEVICE;
 *   INVALID_ARGUMENT for `device.id`, when the token wants it named
 */
export function demandFitting(token: Token, { id, type }: Description, address: string): void {
  const { sourceNetworks, deviceType, deviceId, deviceIdPattern } = token
  if (sourceNetworks.length > 0 && !networkList(sourceNetworks)(address)) {
    const message = `the enrollment token is not for devices that call from ${address}`
    throw new Fault('PERMISSION_DENIED', 'TOKEN_FOR_OTHER_NETWORK', message)
  }
  if (deviceType && deviceType !== type) {
    const message = `the enrollment token is for devices of type ${deviceType}, not ${type}`
    throw new Fault('PERMISSION_DENIED', 'TOKEN_FOR_OTHER_TYPE', message, { metadata: { device_type: type } })
  }
  if (deviceIdPattern && !id) {
    // Whatever the server chose would be random, and so match by luck at best.
    const description = `has to be given: the enrollment token is for devices whose id matches ${deviceIdPattern}`
    throw invalidField('device.id', description)
  }
  if ((deviceId && id && deviceId !== id) || (deviceIdPattern && !matchesIdPattern(deviceIdPattern, id))) {
    const whom = deviceId ? 'another device id' : `devices whose id matches ${deviceIdPattern}`
    throw tokenForOtherDevice(`the enrollment token is for ${whom}, not for ${id}`, id)
  }
}

/** A key has one device for each token: that of its first call. @throws Fault TOKEN_FOR_OTHER_DEVICE */
export function demandSameDevice({ deviceId }: Redemption, { id }: Description): void {
  if (!id || id === deviceId) return
  throw tokenForOtherDevice(`this key has redeemed the enrollment token for device ${deviceId} already`, id)
}

function tokenForOtherDevice(message: string, deviceId: string): Fault {
  return new Fault('PERMISSION_DENIED', 'TOKEN_FOR_OTHER_DEVICE', message, { metadata: { device_id: deviceId } })
}
