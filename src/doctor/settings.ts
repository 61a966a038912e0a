/** The settings: whether `edgemesh serve` would start with them, and what was meant to be one and is none. */
import { SETTINGS_REFERENCE } from '../settings.ts'
import { type Check, type Finding, failed, orOk, warning } from './finding.ts'
import type { Subject } from './subject.ts'

/** Of letters that differ between what was written and what may have been meant. */
const slipsMax = 2

const names = SETTINGS_REFERENCE.flatMap(({ name }) => [name, `${name}_FILE`])

export const settingsCheck: Check<Subject> = {
  name: 'settings',
  look(subject) {
    const wrong = (subject.problems()?.problems ?? []).map(({ variable, problem, hint }) =>
      failed({
        what: `${variable}: ${problem}`,
        why: 'a server that is started with it ends with exit code 2',
        mend: hint ?? `set ${variable} right`,
      }),
    )
    const source = subject.envFile ?? 'the environment'
    return orOk([...wrong, ...slips(subject)], `${source} has what edgemesh serve needs`)
  },
}

/** A variable that nobody reads leaves its setting at the default, and nobody says so. */
function slips({ env }: Subject): Finding[] {
  return Object.keys(env).flatMap(given => {
    if (names.includes(given) || given.length < 6) return []
    const meant = names.find(name => distance(given, name) <= slipsMax)
    if (meant === undefined || env[meant]) return []
    const why = 'nobody reads it, so the setting has its default'
    return [warning({ what: `${given} is no setting; it looks like ${meant}`, why, mend: `name it ${meant}` })]
  })
}

/** Of Levenshtein: how many letters have to be changed, added or taken away. */
function distance(one: string, other: string): number {
  if (Math.abs(one.length - other.length) > slipsMax) return Number.POSITIVE_INFINITY
  let before = Array.from({ length: other.length + 1 }, (_, at) => at)
  for (let row = 1; row <= one.length; row++) {
    const now = [row]
    for (let column = 1; column <= other.length; column++) {
      const changed = (before[column - 1] ?? 0) + (one[row - 1] === other[column - 1] ? 0 : 1)
      now.push(Math.min(changed, (before[column] ?? 0) + 1, (now[column - 1] ?? 0) + 1))
    }
    before = now
  }
  return before[other.length] ?? 0
}
