/** The database at the start of a server: one that is away is waited for, a wrong word in DATABASE_URL is told at once. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Log } from '../telemetry/log.ts'
import { ConnectFailure } from './failure.ts'
import { databaseServers } from './servers.ts'

/**
 * More than a failover takes, and than a database that starts at the same time as we do. Whoever has started us starts us again
 * after that, and sees by then that something is wrong.
 */
const waitMsMax = 60_000
const retryMs = 1_000
const connectTimeoutMs = 3_000

/** What waiting does not heal, by the code of the error: SQLSTATE, or that of Node's TLS. */
const mistakes: readonly (readonly [RegExp, hint: string])[] = [
  [/^28...$/, 'see the user and the password in DATABASE_URL, and pg_hba.conf of the server'],
  [/^3D000$/, 'create the database, or see the name at the end of DATABASE_URL'],
  [
    /^(CERT_|DEPTH_ZERO_|SELF_SIGNED_|UNABLE_TO_|ERR_TLS_CERT_)/,
    'see the certificate of the server, and sslmode and sslrootcert in DATABASE_URL',
  ],
]

/** There is no database to serve with. */
export class NoDatabaseError extends Error {
  readonly hint: string

  constructor(message: string, hint: string, cause: unknown) {
    super(message, { cause })
    this.name = 'NoDatabaseError'
    this.hint = hint
  }
}

/**
 * Resolves once the primary takes connections, or when nobody wants it any more.
 *
 * @param options.stopping what is told to stop
 * @throws {NoDatabaseError} at once where waiting heals nothing, or after a minute
 */
export async function awaitDatabase(
  url: string,
  options: { log: Log; stopping: AbortSignal; waitMs?: number },
): Promise<void> {
  const { log, stopping, waitMs = waitMsMax } = options
  const { Client } = databaseServers(url)
  const giveUpAt = performance.now() + waitMs
  let told = ''
  while (!stopping.aborted) {
    const client = new Client({ connectionTimeoutMillis: connectTimeoutMs })
    try {
      await client.connect()
      return await client.end()
    } catch (error) {
      const { message } = error as Error
      const hint = hintOf(error)
      if (hint) throw new NoDatabaseError(message, hint, error)
      if (performance.now() > giveUpAt) {
        const seconds = Math.round(waitMs / 1_000)
        throw new NoDatabaseError(
          `${message}; it was waited for ${seconds} s`,
          'see that the database runs and that DATABASE_URL names it; then start again, as a service manager does by itself',
          error,
        )
      }
      if (message !== told) log.warn({ cause: message, seconds: waitMs / 1_000 }, 'waiting for the database')
      told = message
    }
    await sleep(retryMs, undefined, { signal: stopping }).catch(() => {})
  }
}

/** @returns undefined for what may pass */
function hintOf(error: unknown): string | undefined {
  const { code } = ((error instanceof ConnectFailure && error.cause) || error) as { code?: unknown }
  return mistakes.find(([codes]) => typeof code === 'string' && codes.test(code))?.[1]
}
