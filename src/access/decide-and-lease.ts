/** Deciding a question, and watching over what is allowed from that very moment on. */
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { Decider, Decision, Verdict } from './decide.ts'
import type { Decided } from './decision-records.ts'
import type { Facts } from './facts.ts'
import type { Lease, Leases } from './leases.ts'

/** Changes that may fall between deciding and leasing before the caller is asked to try again. */
const attemptsMax = 5

export type DecidedAndLeased = Decided & { lease: Lease | undefined }

/**
 * Decides, and leases what is allowed, with no change unseen in between: if a fact has changed while policy was
 * evaluated, it is decided again.
 *
 * @param wanted the lease, if it is allowed; what it rests on is filled in
 * @param nowMs the clock's time, read once for all questions of a message
 */
export function decideAndLease(
  deps: LeasingDeps,
  wanted: Lease,
  nowMs: number,
  attempt = 1,
): DecidedAndLeased | Promise<DecidedAndLeased> {
  const decision = deps.decider.decide(wanted.question, nowMs)
  // What is decided at once is decided by what is so now.
  if (!(decision instanceof Promise)) return leased(deps, wanted, decision)
  return leasedLater(deps, wanted, decision, attempt)
}

async function leasedLater(
  deps: LeasingDeps,
  wanted: Lease,
  deciding: Promise<Decision>,
  attempt: number,
): Promise<DecidedAndLeased> {
  const decided = await deciding
  const isCurrent = !decided.verdict.allow || deps.facts.isCurrent(wanted.question, decided.ground)
  if (isCurrent) return leased(deps, wanted, decided)
  if (attempt < attemptsMax) return decideAndLease(deps, wanted, deps.clock(), attempt + 1)
  throw new Fault('ABORTED', 'FACTS_CHANGING', 'the facts change faster than they can be decided on; try again', {
    retryAfterMs: 100,
  })
}

export type LeasingDeps = {
  decider: Pick<Decider, 'decide'>
  facts: Pick<Facts, 'isCurrent'>
  leases: Pick<Leases, 'grant'>
  clock: Clock
}

function leased(deps: LeasingDeps, wanted: Lease, decision: Decision): DecidedAndLeased {
  const verdict = endingBy(decision.verdict, wanted.assertedUntilMs)
  if (!verdict.allow) return { verdict, lease: undefined }
  const { user, service } = decision.ground
  // All leases of the same question share the one that the verdict has anyway.
  wanted.question = verdict.question
  wanted.userId = user.value?.id ?? ''
  wanted.role = user.value?.role ?? ''
  wanted.serviceId = service.value?.id ?? ''
  wanted.expiresAtMs = verdict.expiresAtMs
  return { verdict, lease: deps.leases.grant(wanted, verdict.policyRevision) }
}

/** What policy says does not depend on the assertion, so the verdict that others share stays as it is. */
export function endingBy(verdict: Verdict, untilMs: number): Verdict {
  return verdict.expiresAtMs <= untilMs ? verdict : { ...verdict, expiresAtMs: untilMs }
}
