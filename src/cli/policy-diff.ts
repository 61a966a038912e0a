/**
 * What would change if another policy decided: its answers to the questions on record, beside those that were given.
 *
 * A flip is a question that the other policy answers the other way round. What was recorded is the whole input, limits and
 * hours of then included, so nothing but the policy differs. Memory stays bounded however many decisions there are: equal
 * flips (same question, same way, same reasons) are one line with a count, and lines beyond the most are only counted.
 */
import type { AuthzInput } from '../access/policy-engine.ts'
import type { CompiledPolicy } from '../access/policy-wasm.ts'
import { type Decision, Decision as DecisionMessage } from '../gen/edgemesh/v1/admin.ts'

/** What the other policy makes of one decision. */
export type Compared =
  | { kind: 'same' }
  | {
      kind: 'flip'
      /** Whether it would be allowed now. */
      allowed: boolean
      /** Codes of what stands against it: under the other policy when it would be denied, under the old one otherwise. */
      because: string[]
    }
  | { kind: 'undecided'; why: string }

export function compare(candidate: CompiledPolicy, decision: Decision): Compared {
  if (!decision.input) return { kind: 'undecided', why: 'its facts are older than what is kept' }
  try {
    const { allow, reasons } = candidate.evaluate('authz', decision.input as unknown as AuthzInput)
    if (allow === decision.allowed) return { kind: 'same' }
    const because = (allow ? decision.reasons : reasons).map(reason => reason.code)
    return { kind: 'flip', allowed: allow, because }
  } catch (error) {
    return { kind: 'undecided', why: causeOf(error) }
  }
}

/** Equal flips. */
export type FlipLine = { newest: Decision; allowed: boolean; because: string[]; times: number }

export type Tally = {
  add(decision: Decision, compared: Compared): void
  decisions: number
  same: number
  denied: number
  allowed: number
  undecided: number
  /** Why the first that could not be decided could not be. */
  whyUndecided: string | undefined
  /** How often each reason stood behind a flip. */
  reasons: { denied: Map<string, number>; allowed: Map<string, number> }
  lines: Map<string, FlipLine>
  /** Flips that no line shows. */
  unlisted: number
}

/** Reasons that are counted apart; a policy has some twenty. */
const reasonsMax = 100

export function tallyOf(linesMax: number): Tally {
  const tally: Tally = {
    decisions: 0,
    same: 0,
    denied: 0,
    allowed: 0,
    undecided: 0,
    whyUndecided: undefined,
    reasons: { denied: new Map(), allowed: new Map() },
    lines: new Map(),
    unlisted: 0,
    add(decision, compared) {
      tally.decisions++
      if (compared.kind === 'same') tally.same++
      else if (compared.kind === 'undecided') {
        tally.undecided++
        tally.whyUndecided ??= compared.why
      } else {
        const way = compared.allowed ? 'allowed' : 'denied'
        tally[way]++
        for (const code of compared.because) count(tally.reasons[way], code)
        addLine(decision, compared)
      }
    },
  }

  function addLine(decision: Decision, { allowed, because }: Compared & { kind: 'flip' }): void {
    const { deviceId, user, service, action } = decision
    const key = JSON.stringify([deviceId, user, service, action, allowed, because])
    const line = tally.lines.get(key)
    if (line) line.times++
    else if (tally.lines.size < linesMax) tally.lines.set(key, { newest: decision, allowed, because, times: 1 })
    else tally.unlisted++
  }

  return tally
}

export function flipJson(decision: Decision, { allowed, because }: Compared & { kind: 'flip' }): object {
  const { id, decidedAt, deviceId, user, service, action, policyRevision, reasons } = DecisionMessage.toJSON(
    decision,
  ) as Record<string, unknown>
  const question = { id, decidedAt, deviceId, user, service, action }
  return { ...question, was: decision.allowed, would: allowed, because, policyRevision, reasons: reasons ?? [] }
}

function count(counts: Map<string, number>, code: string): void {
  const key = counts.has(code) || counts.size < reasonsMax ? code : 'others'
  counts.set(key, (counts.get(key) ?? 0) + 1)
}

function causeOf(error: unknown): string {
  const { message, cause } = error as Error
  return cause instanceof Error ? `${message}: ${cause.message}` : message
}
