/**
 * What a check of `edgemesh doctor` has found.
 *
 * - `ok`: it is as it should be; `what` says what was seen.
 * - `warning`: it serves, and will be trouble.
 * - `failed`: it does not serve, loses something, or lets somebody in.
 * - `skipped`: it could not be looked at; `what` says why not.
 */
export type Severity = 'ok' | 'warning' | 'failed' | 'skipped'

/** Sentences without a full stop. No secret is in any of them. */
export type Finding = {
  severity: Severity
  what: string
  /** Why it matters. */
  why?: string
  /** The command or the setting that mends it. */
  mend?: string
}

/** How a check looks. It changes nothing; what it throws becomes a finding. */
export type Check<Subject> = {
  /** Stable: `--only`, `--skip` and programs name it. `docs/doctor.md` has a line for each. */
  name: string
  /** It may take longer than others. */
  deadlineMs?: (subject: Subject) => number
  look: (subject: Subject) => Promise<Finding[]> | Finding[]
}

export type Trouble = { what: string; why: string; mend: string }

export const ok = (what: string): Finding => ({ severity: 'ok', what })
export const warning = (trouble: Trouble): Finding => ({ severity: 'warning', ...trouble })
export const failed = (trouble: Trouble): Finding => ({ severity: 'failed', ...trouble })

/** Thrown by a check that can't look, because something that it needs is not there. It is told as `skipped`. */
export class CannotLook extends Error {
  constructor(why: string) {
    super(why)
    this.name = 'CannotLook'
  }
}

/** What was found; where that is no trouble, what was seen. */
export function orOk(troubles: Finding[], seen: string): Finding[] {
  return troubles.length > 0 ? troubles : [ok(seen)]
}

const lengths = [
  ['d', 86_400_000],
  ['h', 3_600_000],
  ['min', 60_000],
  ['s', 1_000],
] as const

/** Such as `3 d` or `40 ms`: the largest unit of which there are two. */
export function span(ms: number): string {
  const size = Math.abs(ms)
  const [unit, unitMs] = lengths.find(([, least]) => size >= 2 * least) ?? (['ms', 1] as const)
  return `${Math.floor(size / unitMs)} ${unit}`
}
