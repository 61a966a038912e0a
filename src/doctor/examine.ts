/**
 * Runs checks: all at the same time, each with a deadline, findings in the order of the list.
 *
 *     const { findings, counts } = await examine(checks, subject)
 *
 * A check that throws, or takes too long, is a finding like any other. Whatever is in a finding is searched for the secrets of the
 * settings before it leaves: what a library says in an error is not ours.
 */
import { CannotLook, type Check, type Finding, type Severity } from './finding.ts'
import type { Subject } from './subject.ts'

export type CheckedFinding = { check: string } & Finding

export type Examination = {
  /** ISO 8601. */
  at: string
  findings: CheckedFinding[]
  /** How many findings there are of each kind. */
  counts: Record<Severity, number>
}

/** Whoever waits for a database that is silent waits for this, once: all wait at the same time. */
const deadlineMsDefault = 20_000

export async function examine(checks: readonly Check<Subject>[], subject: Subject): Promise<Examination> {
  const found = await Promise.all(
    checks.map(async check => (await findingsOf(check, subject)).map(finding => ({ check: check.name, ...finding }))),
  )
  const findings = found.flat().map(finding => withoutSecrets(finding, subject.secrets()))
  const counts: Record<Severity, number> = { ok: 0, warning: 0, failed: 0, skipped: 0 }
  for (const { severity } of findings) counts[severity]++
  return { at: new Date(subject.clock()).toISOString(), findings, counts }
}

async function findingsOf(check: Check<Subject>, subject: Subject): Promise<Finding[]> {
  const deadlineMs = check.deadlineMs?.(subject) ?? deadlineMsDefault
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<Finding[]>(resolve => {
    timer = setTimeout(() => resolve([tooLate(deadlineMs)]), deadlineMs)
  })
  try {
    return await Promise.race([Promise.resolve().then(() => check.look(subject)), late])
  } catch (error) {
    return [error instanceof CannotLook ? { severity: 'skipped', what: error.message } : broken(error)]
  } finally {
    clearTimeout(timer)
  }
}

const tooLate = (ms: number): Finding => ({
  severity: 'failed',
  what: `there was no answer within ${ms / 1_000} s`,
  why: 'what is so slow, or silent, is so for servers too',
  mend: 'see whether what this check looks at can be reached from here, and is not overloaded',
})

function broken(error: unknown): Finding {
  const { message, hint } = error as { message?: string; hint?: unknown }
  return {
    severity: 'failed',
    what: `it could not be looked at: ${message || String(error)}`,
    why: 'nobody knows whether this is as it should be',
    mend: typeof hint === 'string' ? hint : 'mend what the message names, and look again',
  }
}

function withoutSecrets(finding: CheckedFinding, secrets: readonly string[]): CheckedFinding {
  const clean = (text: string) => secrets.reduce((rest, secret) => rest.replaceAll(secret, '***'), text)
  return Object.fromEntries(Object.entries(finding).map(([key, text]) => [key, clean(text)])) as CheckedFinding
}
