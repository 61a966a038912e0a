/**
 * What a person sees when a command fails: `error: …` and, where there is a way to mend it, `hint: …`, on stderr.
 *
 *     error: there are no operator credentials in .edgemesh/operator
 *     hint: start a server with: npm start
 */
import { CommanderError } from 'commander'
import { describeCallError, isCallError } from '../client/channel.ts'
import { sentenceOf } from '../client/server-clock.ts'
import { SettingsError } from '../settings.ts'
import { hintFor } from './hints.ts'

/** A command can't do what was asked. The message is lower case and has no full stop. */
export class CommandFailure extends Error {
  readonly hint: string | undefined

  constructor(message: string, hint?: string) {
    super(message)
    this.name = 'CommandFailure'
    this.hint = hint
  }
}

/** Each error with its hint: wrong settings are several, everything else is one. */
export function describeFailure(error: unknown): { message: string; hint?: string }[] {
  if (error instanceof SettingsError) {
    return error.problems.map(({ variable, problem, hint }) => ({
      message: `${variable}: ${problem}`,
      ...withHint(hint),
    }))
  }
  if (isCallError(error)) {
    const described = describeCallError(error)
    return [{ message: lowerFirst(sentenceOf(described)), ...withHint(hintFor(described)) }]
  }
  if (error instanceof AggregateError && error.errors.length > 0) return describeFailure(error.errors[0])
  if (error instanceof Error) {
    const { hint } = error as { hint?: unknown }
    return [
      { message: lowerFirst(error.message) || error.name, ...withHint(typeof hint === 'string' ? hint : undefined) },
    ]
  }
  return [{ message: String(error) }]
}

export function printFailure(error: unknown): void {
  if (error instanceof CommanderError) return // commander has printed it
  for (const { message, hint } of describeFailure(error)) {
    process.stderr.write(`error: ${message}\n`)
    if (hint) process.stderr.write(`hint: ${hint}\n`)
  }
  // Those who debug want the whole story; to everybody else a stack says nothing.
  const debugging = /^(trace|debug)$/i.test(process.env.LOG_LEVEL ?? '')
  if (debugging && error instanceof Error) process.stderr.write(`${error.stack}\n`)
}

export function exitCodeOf(error: unknown): number {
  if (error instanceof SettingsError) return 2
  if (!(error instanceof CommanderError)) return 1
  // Help and version that were asked for. Help that was not, because a command is missing, has a code of its own.
  return error.code === 'commander.helpDisplayed' || error.code === 'commander.version' ? 0 : 2
}

function withHint(hint: string | undefined): { hint?: string } {
  return hint === undefined ? {} : { hint }
}

/** `Cannot read …` becomes `cannot read …`; `ENOENT: …` stays. */
function lowerFirst(message: string): string {
  return /^[A-Z][a-z]/.test(message) ? message.charAt(0).toLowerCase() + message.slice(1) : message
}
