/** What a question is answered with: by policy, by a denial that policy has no part in, or by asking to come back. */
import { databaseUnavailable, isDatabaseOutage } from '../db/failure.ts'
import { durationOf } from '../duration.ts'
import { Fault } from '../fault.ts'
import type { Answer } from '../gen/edgemesh/v1/authorize.ts'
import type { Verdict } from './decide.ts'
import type { PolicyReason } from './policy-engine.ts'

/** When to ask again after an outage that does not say. */
const retryMs = 1_000

/** Codes of faults that pass by themselves. */
export const passing = new Set(['UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'ABORTED'])

export function answerOf(questionId: string, verdict: Verdict, decisionId: string, connectionId: string): Answer {
  return {
    questionId,
    allowed: verdict.allow,
    reasons: verdict.reasons,
    policyRevision: verdict.policyRevision,
    expiresAt: new Date(verdict.expiresAtMs),
    decisionId,
    connectionId,
    retryAfter: undefined,
  }
}

/**
 * The denial of a question that can't be decided now: an outage must not cost a device the connections that it holds.
 *
 * @throws what is not an outage but the caller's mistake, or a bug
 */
export function undecided(questionId: string, error: unknown): Answer {
  const fault = isDatabaseOutage(error) ? databaseUnavailable(error) : error
  if (!(fault instanceof Fault) || !passing.has(fault.code)) throw error
  const { reason: code, message } = fault
  return {
    ...denial(questionId, { code, field: 'server', actual: 'unavailable', required: 'available', message }),
    retryAfter: durationOf(fault.retryAfterMs ?? retryMs),
  }
}

/** A denial that policy has no part in. */
export function denial(questionId: string, reason: PolicyReason): Answer {
  return {
    questionId,
    allowed: false,
    reasons: [reason],
    policyRevision: '',
    expiresAt: undefined,
    decisionId: '',
    connectionId: '',
    retryAfter: undefined,
  }
}
