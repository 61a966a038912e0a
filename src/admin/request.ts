/**
 * What requests have to look like: the shapes that several of them share, and the one check that turns everything that
 * is wrong with a request into a single INVALID_ARGUMENT.
 */
import { z } from 'zod'
import { invalidFields } from '../fault.ts'
import { controlCharacter, labelViolations } from '../identity/labels.ts'
import { isSafeId, safeIdRule } from '../identity/spiffe-id.ts'

const nameCharactersMax = 255
const reasonCharactersMax = 255
/** RFC 5321 section 4.5.3.1.3: 256 with the angle brackets. */
const emailCharactersMax = 254
/** A caller mends the first few and asks again; a request of nothing but mistakes must not make a huge answer. */
const violationsMax = 100

/** Text of at most `charactersMax` characters, possibly empty. */
export function text(charactersMax: number) {
  return z
    .string()
    .max(charactersMax, `has to be of at most ${charactersMax} characters`)
    .refine(value => !controlCharacter.test(value), 'must not contain control characters')
}

export const id = z.string().refine(isSafeId, safeIdRule)

/** An id where the empty string stands for none. */
export const optionalId = z.union([z.literal(''), id], {
  error: `has to be empty, or ${safeIdRule}`,
})

export const name = text(nameCharactersMax)

/** Why an operator does something, for people. */
export const reason = text(reasonCharactersMax)

export const email = text(emailCharactersMax).regex(/^[^\s@]+@[^\s@.]+(?:\.[^\s@.]+)*$/, 'has to be an e-mail address')

export const role = z
  .string()
  .regex(/^[a-z][a-z0-9_-]{0,62}$/, 'has to be of 1 to 63 characters of a-z, 0-9, "_" and "-", the first a letter')

export const labels = z.record(z.string(), z.string()).superRefine((given, context) => {
  for (const { field, description } of labelViolations(given, '')) {
    context.addIssue({ code: 'custom', message: description, path: field === '' ? [] : [field.slice(1)] })
  }
})

/** Four-digit years: all that a Timestamp may be (RFC 3339), and PostgreSQL's own range is wider. */
export const time = z
  .date({ error: 'has to be a time between the years 1 and 9999' })
  .min(new Date('0001-01-01T00:00:00Z'))
  .max(new Date('9999-12-31T23:59:59.999Z'))

/** A value of the enum that the proto declares, UNSPECIFIED included. */
export function enumValue<const E extends Record<string, number>>(values: E) {
  return z.enum(values, { error: `has to be one of ${Object.keys(values).join(', ')}` })
}

/** The same where UNSPECIFIED is no answer. */
export function specified<const E extends Record<string, number>>(values: E) {
  return enumValue(values).refine(value => value !== 0, 'must not be UNSPECIFIED')
}

/** The request as `shape` reads it. @throws Fault INVALID_ARGUMENT that names every field that is wrong */
export function check<S extends z.ZodType>(shape: S, request: unknown): z.output<S> {
  const result = shape.safeParse(request)
  if (result.success) return result.data
  const violations = result.error.issues.slice(0, violationsMax).map(issue => ({
    field: protoPath(issue.path),
    description: issue.message,
  }))
  throw invalidFields(violations)
}

/** The path as the proto spells it: `grant.actions[0]`, `labels.site`. */
function protoPath(path: PropertyKey[]): string {
  return path.reduce<string>((before, segment, index) => {
    if (typeof segment === 'number') return `${before}[${segment}]`
    // What follows `labels` is a key that the caller chose, not a name of ours.
    const name = path[index - 1] === 'labels' ? String(segment) : snakeCase(String(segment))
    return before ? `${before}.${name}` : name
  }, '')
}

function snakeCase(camelCase: string): string {
  return camelCase.replace(/[A-Z]/g, letter => `_${letter.toLowerCase()}`)
}
