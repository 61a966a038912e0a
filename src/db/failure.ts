/**
 * What is wrong with the database when it does not do what it was asked: docs/database-failures.md has each kind, what
 * callers see of it, what heals it and what an operator does.
 */
import { ExponentialBackoff, handleWhen, retry } from 'cockatiel'
import { Fault } from '../fault.ts'

/** A reason to try again, not a bug. What is none of these is one, and answered INTERNAL. */
export type DatabaseFailure =
  /** There is no connection, or the one there was is gone. */
  | 'unreachable'
  /** It has taken the statement and says nothing. */
  | 'silent'
  /** All connections of this process were in use for too long. */
  | 'pool_exhausted'
  /** It has no connection left for this process. */
  | 'too_many_connections'
  /** It is shutting down, starting up or recovering, or an administrator has ended the session. */
  | 'shutdown'
  /** It is a standby, or takes no writes. */
  | 'read_only'
  /** Its disk is full. */
  | 'disk_full'
  /** It is out of memory or of another resource, or its disk fails. */
  | 'out_of_resources'
  /** The statement, or the transaction, took too long. */
  | 'timeout'
  /** A lock was not to be had in time. */
  | 'locked'
  /** Two transactions waited for each other; ours was taken back. */
  | 'deadlock'
  /** Two transactions can't both have been first; ours was taken back. */
  | 'serialization'
  /** A right or a table is missing, which an operator has to mend. */
  | 'not_set_up'

/** By SQLSTATE, the most particular first. */
const kindsByCode: readonly (readonly [RegExp, DatabaseFailure])[] = [
  [/^40001$/, 'serialization'],
  [/^40P01$/, 'deadlock'],
  [/^55P03$/, 'locked'],
  // 25P03, 25P04: a transaction that was idle, or went on, for too long. 57P05: so was the session.
  [/^(57014|25P03|25P04|57P05)$/, 'timeout'],
  [/^25006$/, 'read_only'],
  // 55000: the database takes no connections.
  [/^(57P..|55000)$/, 'shutdown'],
  [/^53300$/, 'too_many_connections'],
  [/^53100$/, 'disk_full'],
  // 58: PostgreSQL's own files can't be read or written.
  [/^(53|58)...$/, 'out_of_resources'],
  // 40003: whether it was committed is not known.
  [/^(08...|40003)$/, 'unreachable'],
  [/^(42501|42P01)$/, 'not_set_up'],
  [/^(E(CONN|NET|HOST|ADDR)[A-Z]+|EPIPE|ETIMEDOUT|ENOTFOUND|EAI_AGAIN|EMFILE|ENFILE)$/, 'unreachable'],
]

/** `pg` gives these no code. */
const kindsByMessage: readonly (readonly [RegExp, DatabaseFailure])[] = [
  [/^timeout exceeded when trying to connect/, 'pool_exhausted'],
  [/^Query read timeout/, 'silent'],
  [
    /^(Connection terminated|Client has encountered a connection error|Client was closed|Cannot use a pool after)/,
    'unreachable',
  ],
]

/** No connection to the database could be made. Whatever the reason is, it is none of the statement's. */
export class ConnectFailure extends Error {
  readonly kind: DatabaseFailure

  constructor(message: string, kind: DatabaseFailure, cause?: unknown) {
    super(message, { cause })
    this.name = 'ConnectFailure'
    this.kind = kind
  }
}

/** What is wrong with the database by what the error says; undefined: nothing. */
export function databaseFailure(error: unknown): DatabaseFailure | undefined {
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    if (at instanceof ConnectFailure) return at.kind
    const { code } = at as { code?: unknown }
    if (typeof code === 'string') {
      for (const [codes, kind] of kindsByCode) if (codes.test(code)) return kind
    }
    for (const [messages, kind] of kindsByMessage) if (messages.test(at.message)) return kind
  }
  return undefined
}

/** Whether the error says that the database can't be reached or does not do its work now: a reason to try again, not a bug. */
export function isDatabaseOutage(error: unknown): boolean {
  return databaseFailure(error) !== undefined
}

/** What a caller is told of an outage. Of what kind it is, is for operators. */
export function databaseUnavailable(cause: unknown): Fault {
  return new Fault('UNAVAILABLE', 'DATABASE_UNAVAILABLE', 'the database is not available now; try again', {
    retryAfterMs: databaseRetryMs,
    cause,
  })
}

const databaseRetryMs = 1_000

/** PostgreSQL has taken the whole transaction back and asks for it again: it is known that none of it was done. */
function wasTakenBack(error: unknown): boolean {
  const kind = databaseFailure(error)
  return kind === 'deadlock' || kind === 'serialization'
}

/** With jitter, or the two that met would meet again. Five waits together are under a second. */
const takenBack = retry(handleWhen(wasTakenBack), {
  maxAttempts: 5,
  backoff: new ExponentialBackoff({ initialDelay: 10, maxDelay: 200 }),
})

/** For as long as it takes, at most every other second. */
const away = retry(handleWhen(isDatabaseOutage), {
  maxAttempts: Number.POSITIVE_INFINITY,
  backoff: new ExponentialBackoff({ initialDelay: 200, maxDelay: 2_000 }),
})

/**
 * Asks again for as long as the database is away, for whoever stays until it is back.
 *
 * @param signal aborts when nobody waits any more
 * @throws what is no outage; the outage, once nobody waits
 */
export function untilAvailable<T>(ask: () => Promise<T>, signal: AbortSignal): Promise<T> {
  return away.execute(ask, signal)
}

/**
 * Does a whole transaction again, a few times, when PostgreSQL has taken it back for another's sake.
 *
 * @param transaction a statement of its own, or everything from `begin` to `commit`. It may be run several times, and what it
 *   leaves outside of the database has to be as if it had been run once.
 * @throws what the last attempt has thrown
 */
export function untilCommitted<T>(transaction: () => Promise<T>): Promise<T> {
  return takenBack.execute(transaction)
}
