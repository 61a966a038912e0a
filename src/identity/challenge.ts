/**
 * Challenges: what makes a certificate request fresh.
 *
 * The signature on a PKCS#10 request proves that its signer held the key, at some time. So that a request which somebody
 * has captured or kept is worth nothing, it has to carry, under that signature, a text that we gave out minutes ago: as
 * its challengePassword (RFC 2985 section 5.4.1), the attribute that every tool can set. Together with the rule that
 * each request is good once (the unique index `certificates_csr`) nobody gets a certificate without holding its key now.
 *
 * A binding to the token instead would save a call, but a token may be good for a year, and renewals have none. A
 * challenge is the time at which it ends, a nonce, and a MAC over both: nothing is kept, and any instance knows those of the others.
 */
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { GetChallengeResponse } from '../gen/edgemesh/v1/enroll.ts'
import type { CheckedCsr } from './csr.ts'

export type Challenges = {
  give(): GetChallengeResponse
  /**
   * @throws Fault INVALID_ARGUMENT CSR_CHALLENGE_MISSING, CSR_CHALLENGE_UNKNOWN; FAILED_PRECONDITION
   *   CSR_CHALLENGE_STALE
   */
  demand(csr: Pick<CheckedCsr, 'challenge'>): void
}

/** Long enough for a slow device that makes an RSA key, short enough to count as now. */
const validMs = 10 * 60_000
const macBytes = 16
/** Enough that no two challenges are the same: a key that asks twice must not sign the same request twice. */
const nonceBytes = 8
/** What is told of it: when it ends, and what sets it apart; and a MAC over that. */
const pattern = /^c1\.((\d{10,11})\.[0-9a-f]{16})\.([0-9a-f]{32})$/

/** @param secret ENROLLMENT_TOKEN_SECRET, which all instances share */
export function createChallenges({ secret, clock }: { secret: string; clock: Clock }): Challenges {
  // A key of its own, so that no MAC of a token can pass for one of a challenge.
  const key = createHmac('sha256', secret).update('edgemesh certificate request challenge').digest()
  const macOf = (told: string) => createHmac('sha256', key).update(told).digest().subarray(0, macBytes)

  return {
    give() {
      const now = clock()
      const expirySeconds = Math.floor((now + validMs) / 1_000)
      const told = `${expirySeconds}.${randomBytes(nonceBytes).toString('hex')}`
      return {
        challenge: `c1.${told}.${macOf(told).toString('hex')}`,
        expiresAt: new Date(expirySeconds * 1_000),
        serverTime: new Date(now),
      }
    },
    demand({ challenge }) {
      if (challenge === undefined) {
        throw refusal('CSR_CHALLENGE_MISSING', 'has no challengePassword: put a challenge of GetChallenge into it')
      }
      const [, told = '', expirySeconds = '', mac = ''] = pattern.exec(challenge) ?? []
      if (!told || !timingSafeEqual(Buffer.from(mac, 'hex'), macOf(told))) {
        throw refusal('CSR_CHALLENGE_UNKNOWN', 'has a challengePassword that is no challenge of this service')
      }
      if (Number(expirySeconds) * 1_000 <= clock()) {
        throw new Fault(
          'FAILED_PRECONDITION',
          'CSR_CHALLENGE_STALE',
          'csr: its challenge has expired; get another and sign a new request',
        )
      }
    },
  }
}

function refusal(reason: string, description: string): Fault {
  return new Fault('INVALID_ARGUMENT', reason, `csr ${description}`, { violations: [{ field: 'csr', description }] })
}
