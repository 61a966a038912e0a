/** Deciding a question, and watching over what is allowed from that very moment on. */
import { Fault } from '../fault.ts'
import type { AccessQuestion, Decider, Decision, Verdict } from './decide.ts'
import type { Decided } from './decision-records.ts'
import type { Facts } from './facts.ts'
import type { Granted, Lease, Leases } from './leases.ts'

/** Changes that may fall between deciding and leasing before the caller is asked to try again. */
const attemptsMax = 5

export type DecidedAndLeased = Decided & { lease: Lease | undefined }

/**
 * Decides, and leases what is allowed, with no change unseen in between: if a fact has changed while policy was
 * evaluated, it is decided again.
 */
export function decideAndLease(
  deps: LeasingDeps,
  question: AccessQuestion,
  known: Known,
  attempt = 1,
): DecidedAndLeased | Promise<DecidedAndLeased> {
  const decision = deps.decider.decide(question)
  // What is decided at once is decided by what is so now.
  if (!(decision instanceof Promise)) return leased(deps, question, known, decision)
  return decision.then(decided => {
    const isCurrent = !decided.verdict.allow || deps.facts.isCurrent(question, decided.ground)
    if (isCurrent) return leased(deps, question, known, decided)
    if (attempt < attemptsMax) return decideAndLease(deps, question, known, attempt + 1)
    throw new Fault('ABORTED', 'FACTS_CHANGING', 'the facts change faster than they can be decided on; try again', {
      retryAfterMs: 100,
    })
  })
}

export type LeasingDeps = {
  decider: Pick<Decider, 'decide'>
  facts: Pick<Facts, 'isCurrent'>
  leases: Pick<Leases, 'grant'>
}

/** What a lease is made of, beside the answer. */
type Known = Omit<Granted, 'question' | 'userId' | 'role' | 'serviceId' | 'expiresAtMs'>

function leased(deps: LeasingDeps, question: AccessQuestion, known: Known, decision: Decision): DecidedAndLeased {
  const verdict = endingBy(decision.verdict, known.assertedUntilMs)
  if (!verdict.allow) return { question, verdict, lease: undefined }
  const { user, service } = decision.ground
  const wanted: Granted = {
    id: known.id,
    message: known.message,
    place: known.place,
    grantedAtMs: known.grantedAtMs,
    questionId: known.questionId,
    question,
    userId: user.value?.id ?? '',
    role: user.value?.role ?? '',
    serviceId: service.value?.id ?? '',
    expiresAtMs: verdict.expiresAtMs,
    assertedUntilMs: known.assertedUntilMs,
    decisionId: known.decisionId,
    push: known.push,
    moved: known.moved,
  }
  return { question, verdict, lease: deps.leases.grant(wanted, verdict.policyRevision) }
}

/** What policy says does not depend on the assertion, so the verdict that others share stays as it is. */
export function endingBy(verdict: Verdict, untilMs: number): Verdict {
  return verdict.expiresAtMs <= untilMs ? verdict : { ...verdict, expiresAtMs: untilMs }
}
