/** Labels of devices: what operators and devices may call them, in one place, since the two are merged. */
import type { FieldViolation } from '../fault.ts'

export const labelsMax = 32
const labelKeyCharactersMax = 63
const labelValueCharactersMax = 255

/** Neither terminals nor logs want them, and PostgreSQL can't keep NUL. */
export const controlCharacter = /\p{Cc}/u

/** What is wrong with labels; `field` is their path as the proto spells it. A key is named with its value's mistake only. */
export function labelViolations(labels: Readonly<Record<string, string>>, field: string): FieldViolation[] {
  const violations: FieldViolation[] = []
  const entries = Object.entries(labels)
  if (entries.length > labelsMax) violations.push({ field, description: `has to have at most ${labelsMax} entries` })
  for (const [key, value] of entries.slice(0, labelsMax)) {
    if (key.length === 0 || key.length > labelKeyCharactersMax || controlCharacter.test(key)) {
      const description = `keys have to be of 1 to ${labelKeyCharactersMax} characters, none a control character`
      violations.push({ field, description })
    } else if (value.length > labelValueCharactersMax || controlCharacter.test(value)) {
      const description = `has to be of at most ${labelValueCharactersMax} characters, none a control character`
      violations.push({ field: `${field}.${key}`, description })
    }
  }
  return violations
}
