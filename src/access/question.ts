/** A question before it is decided: whether it can be one, and whom an assertion says that it is about. */
import { callEntry, type JournalEntry } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import { type Fault, invalidField } from '../fault.ts'
import type { Question } from '../gen/edgemesh/v1/authorize.ts'
import type { AccessQuestion } from './decide.ts'
import { UserAssertionRefused, type UserAssertions } from './user-assertion.ts'

const questionIdCharactersMax = 64
const actionCharactersMax = 32
/** An e-mail address is of 254 characters at most (RFC 5321). */
const nameCharactersMax = 254

/**
 * @param place the field that holds it, or its place in the message; a path is made only of what is wrong
 * @param asserted the user may be named by an assertion alone
 */
export function checkQuestion(
  question: Question,
  deviceId: string,
  place: string | number,
  asserted = false,
): AccessQuestion {
  const { id, user, service, action } = question
  if (id.length > questionIdCharactersMax) {
    throw invalidField(pathOf(place, 'id'), `has to be of at most ${questionIdCharactersMax} characters`)
  }
  if (action.length > actionCharactersMax || action.includes('\0')) {
    throw invalidField(pathOf(place, 'action'), `has to be of at most ${actionCharactersMax} characters, without NUL`)
  }
  if (!(asserted && user === '')) checkName(user, () => pathOf(place, 'user'))
  checkName(service, () => pathOf(place, 'service'))
  return { deviceId, user, service, action: action || 'connect' }
}

function pathOf(place: string | number, field: keyof Question): string {
  return `${typeof place === 'number' ? `questions.questions[${place}]` : place}.${field}`
}

export function checkName(name: string, path: () => string): void {
  if (name.length === 0) throw invalidField(path(), 'is missing')
  if (name.length > nameCharactersMax || name.includes('\0')) {
    throw invalidField(path(), `has to be of at most ${nameCharactersMax} characters, without NUL`)
  }
}

/**
 * Puts the user whom the assertion names into the questions. @returns until when that holds, ms since epoch
 *
 * @throws UserAssertionRefused; Fault UNAVAILABLE when the issuer's keys can't be had
 */
export async function nameUsers(
  { assertions }: { assertions: UserAssertions | undefined },
  userAssertion: string,
  questions: AccessQuestion[],
): Promise<number> {
  if (!assertions) throw new Error('nobody verifies assertions')
  const named = questions.map(({ user }) => user)
  const { user, expiresAtMs } = await assertions.identify(userAssertion, named)
  for (const question of questions) question.user = user
  return expiresAtMs
}

/** @throws what is no refusal */
export function refusalOf(error: unknown): UserAssertionRefused {
  if (error instanceof UserAssertionRefused) return error
  throw error
}

/** The event of a message that was denied before policy was asked. */
export function refusalEntry(call: Call, asked: AccessQuestion[], { code, reason }: Fault): JournalEntry {
  const questions = asked.map(({ user, service, action }) => ({ user, service, action }))
  return callEntry({ ...call, audit: { ...call.audit, detail: { questions } } }, { code, reason })
}
