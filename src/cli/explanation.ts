/** Why a decision is what it is, for people: each rule, and each fact that policy was given. */
import { Explanation } from '../gen/edgemesh/v1/admin.ts'
import { printable, renderFacts, renderTable } from './table.ts'

/** The rules that fail stand first: they are what is looked for. */
export function renderRules({ rules }: Explanation): string {
  const failing = rules.filter(rule => !rule.holds)
  return renderTable(
    {
      rule: rule => rule.field,
      holds: rule => (rule.holds ? 'yes' : 'NO'),
      actual: rule => rule.actual,
      required: rule => rule.required,
    },
    [...failing, ...rules.filter(rule => rule.holds)],
  )
}

/** A fact a line, under the names that the rules have for them: `device.health.cpu_percent`. */
export function renderInput(input: unknown): string {
  return renderFacts(Object.fromEntries(leavesOf(input, '').sort(([one], [other]) => (one < other ? -1 : 1))))
}

/** A rule that fails has an explicit `holds` too. */
export function explanationJson(explanation: Explanation | undefined): { explanation?: object } {
  if (!explanation) return {}
  const rules = explanation.rules.map(({ field, actual, required, holds }) => ({ field, actual, required, holds }))
  return { explanation: { ...(Explanation.toJSON(explanation) as object), rules } }
}

/** What has to be known to trust an explanation; undefined where there is nothing. */
export function explanationNote(explanation: Explanation | undefined, decidedBy: string): string | undefined {
  if (!explanation) return 'note: the policy explains nothing: it has no rule edgemesh.authz.explanation'
  if (explanation.policyRevision === decidedBy) return undefined
  return `note: policy ${decidedBy} decided, policy ${explanation.policyRevision} explains; they may see things differently`
}

function leavesOf(value: unknown, path: string): [string, string][] {
  if (Array.isArray(value)) return [[path, value.map(String).join(', ') || 'none']]
  if (typeof value === 'object' && value !== null) {
    return Object.entries(value).flatMap(([key, below]) =>
      leavesOf(below, path ? `${path}.${printable(key)}` : printable(key)),
    )
  }
  return [[path, value === null ? 'none' : String(value)]]
}
