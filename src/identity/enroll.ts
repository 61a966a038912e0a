/**
 * Enroll: a token and a key become a device with an identity.
 *
 * The order is the guarantee. Nothing is touched before token and CSR have been checked; token, device, serial and
 * audit event change in one transaction; only then is anything signed. A client that lost the answer repeats its call
 * and gets the same device, because a redemption is remembered by its key. So does one that lost the stream on which it
 * waited for an operator's approval.
 */
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { EnrollRequest, EnrollResponse, Identity } from '../gen/edgemesh/v1/enroll.ts'
import type { Approvals } from './approvals.ts'
import type { Challenges } from './challenge.ts'
import { type CheckedCsr, checkCsr } from './csr.ts'
import { checkDescription } from './description.ts'
import type { Issuance, SignedCertificate, Subject } from './issuance.ts'
import type { Redeemed, Redemptions } from './redemption.ts'
import { formatSpiffeId } from './spiffe-id.ts'
import { demandFitting, demandUsable, type Token, tokenState } from './token-rules.ts'
import { parseToken, secretKeyOf, secretMatches } from './token-text.ts'
import type { TrustBundleSource } from './trust-bundle.ts'

export type EnrollDeps = {
  db: Database
  issuance: Issuance
  redemptions: Redemptions
  approvals: Approvals
  trustBundle: TrustBundleSource
  challenges: Challenges
  trustDomain: string
  /** ENROLLMENT_TOKEN_SECRET. */
  tokenSecret: string
  certValidityMs: number
  clock: Clock
  /** @throws Fault RESOURCE_EXHAUSTED when the address enrolls too often */
  limit: (address: string) => Promise<void>
  /** Counts an attempt that was refused. @throws Fault RESOURCE_EXHAUSTED when there were too many with this token */
  limitToken: (tokenId: string) => Promise<void>
  onEnrollment: (outcome: string) => void
}

export function createEnroll(deps: EnrollDeps) {
  return async function* enroll(request: EnrollRequest, call: Call): AsyncGenerator<EnrollResponse> {
    let token: Token | undefined
    try {
      // Step 1: The limit of the address, before it can make us work.
      await deps.limit(call.address)

      // Step 2: The token, found by its id and good only with its secret.
      const { id, secret } = parseToken(request.token)
      call.audit.target = `token/${id}`
      token = await deps.redemptions.token(id)
      demandSecret(token, secret, deps.tokenSecret)

      // Step 3: The request, which proves that the key is held now, and what the device says of itself.
      const key = checkCsr(request.csr)
      deps.challenges.demand(key)
      const description = checkDescription(request.device)

      // Step 4: What is plain already, so that a crowd with a token that is spent does not queue for its lock.
      await refuseSpent(deps, token, key)
      demandFitting(token, description, call.address)

      // Step 5: Token, device, serial and audit event, all of it or nothing. A device that has to be approved comes to
      // be without a serial; when the operator has decided, the same is done again and finds what is still to do.
      const asked = { tokenId: id, key, description, call }
      await deps.issuance.ready()
      let redeemed = await deps.redemptions.redeem(asked)
      while (redeemed.step === 'waits') {
        yield* pendingUntilDecided(deps, id, redeemed, call)
        call.audit.detail = { token: id }
        await deps.issuance.ready()
        redeemed = await deps.redemptions.redeem(asked)
      }

      // Step 6: The certificate, for which everything has been on record since step 5.
      const certificate = await deps.issuance.sign(redeemed.reservation)
      const identity = identityOf(deps, redeemed.reservation.subject, certificate)
      deps.onEnrollment('enrolled')
      yield { step: { $case: 'identity', value: identity }, serverTime: new Date(deps.clock()) }
    } catch (error) {
      throw await afterRefusal(deps, token, error, call)
    }
  }
}

/** What a device, or an operator, receives when a certificate was issued to it. */
export function identityOf(
  deps: Pick<EnrollDeps, 'trustBundle' | 'trustDomain'>,
  { kind, id }: Subject,
  certificate: SignedCertificate,
): Identity {
  return {
    deviceId: kind === 'device' ? id : '',
    spiffeId: formatSpiffeId({ trustDomain: deps.trustDomain, kind, id }),
    certificateChainPem: certificate.chainPem,
    trustBundle: deps.trustBundle.roots(),
    notAfter: certificate.notAfter,
    renewAfter: certificate.renewAfter,
  }
}

const noHash = Buffer.alloc(32)

/** @throws Fault UNAUTHENTICATED TOKEN_UNKNOWN, TOKEN_SECRET_WRONG */
function demandSecret(token: Token | undefined, secret: Buffer, tokenSecret: string): asserts token is Token {
  // The secret is compared even where there is no token: an id costs everyone the same time, known or not.
  const key = token ? secretKeyOf(token, tokenSecret) : tokenSecret
  const matches = secretMatches(secret, key, token?.secretHash ?? noHash)
  if (!token) throw new Fault('UNAUTHENTICATED', 'TOKEN_UNKNOWN', 'there is no such enrollment token')
  if (!matches) {
    const message = 'the secret of the enrollment token is wrong; give its text whole, as it was made'
    throw new Fault('UNAUTHENTICATED', 'TOKEN_SECRET_WRONG', message)
  }
}

/** How the key has redeemed the token matters only where others may not redeem it any more. */
async function refuseSpent(deps: EnrollDeps, token: Token, { publicKeySha256 }: CheckedCsr): Promise<void> {
  const now = deps.clock()
  if (tokenState(token, now) === 'active') return
  demandUsable(token, await deps.redemptions.of(token.id, publicKeySha256), now)
}

/** Tells the device that it waits, and again every now and then, until there is a decision. */
async function* pendingUntilDecided(
  deps: EnrollDeps,
  tokenId: string,
  { deviceId, status }: Extract<Redeemed, { step: 'waits' }>,
  call: Call,
): AsyncGenerator<EnrollResponse> {
  deps.onEnrollment('pending')
  do {
    yield { step: { $case: 'pendingApproval', value: { deviceId } }, serverTime: new Date(deps.clock()) }
  } while (!(await deps.approvals.decided({ tokenId, deviceId, status }, call.signal)))
}

/**
 * What a refused attempt leaves behind: a count, what the audit should know of it, and a mark against its token.
 *
 * RATE_LIMIT_ENROLLMENTS by token counts refused attempts alone, and holds up nobody whom the token would let in. A token
 * of ten thousand uses is rolled out from thousands of addresses within minutes, and has to be; and whoever has seen no
 * more than the id of a token must not be able to lock out those who hold it. What is left to limit is what thieves and
 * guessers do: with one token from many addresses.
 *
 * @returns what the caller is told
 */
async function afterRefusal(
  deps: EnrollDeps,
  token: Token | undefined,
  error: unknown,
  { audit }: Call,
): Promise<unknown> {
  deps.onEnrollment(error instanceof Fault ? error.reason.toLowerCase() : 'failed')
  if (!(error instanceof Fault) || error.code === 'UNAVAILABLE' || error.code === 'ABORTED') return error
  audit.detail = { ...audit.detail, ...error.metadata }
  if (!token) return error
  if (error.reason === 'TOKEN_USED_UP' || error.reason === 'TOKEN_OTHER_KEY') {
    // Whose key it was is for operators to know, not for whoever comes second.
    const first = await deps.redemptions.firstUse(token.id).catch(() => undefined)
    if (first) {
      audit.detail.first_use = { at: first.at.toISOString(), from: first.address, device: first.deviceId }
    }
  }
  try {
    await deps.limitToken(token.id)
    return error
  } catch (limited) {
    // A limit that can't be counted now must not hide why the attempt was refused.
    if (!(limited instanceof Fault) || limited.code === 'UNAVAILABLE') return error
    audit.detail.refused = error.reason
    return limited
  }
}
