/**
 * The servers behind DATABASE_URL, and which of them is the primary.
 *
 *     postgresql://edgemesh:…@one:5432,two:5432/edgemesh?target_session_attrs=read-write
 *
 * A connection is to a server that takes writes, or it is none: a standby that answers under the primary's name is
 * refused, whether the URL names one server, a balancer before several, or all of them. Where it names several, they are
 * asked all at once, so that one that is silent holds nobody up, and the answer holds until a connection to that server fails.
 * States of the choice:
 *
 * - unknown: at the start, and after a failed connection. Who connects asks all servers; who comes meanwhile waits with it.
 * - chosen: everyone connects to it. When another is chosen, what is open to the one before is cut: it may not know yet
 *   that it is no primary any more, and its answers are old.
 *
 * Of two that both take writes, the one that was promoted last is the primary: it is on a higher timeline.
 */
import pg from 'pg'
import { ConnectFailure, type DatabaseFailure, databaseFailure } from './failure.ts'

export type DatabaseServers = {
  /** A connection to the primary, for `pg.Pool` or by itself. */
  Client: typeof pg.Client
  /** How often each kind of failure was met, by connections and statements. */
  failures: ReadonlyMap<DatabaseFailure, number>
  count(kind: DatabaseFailure): void
}

type Address = { name: string; host: string; port: number; url: string }

/** How long the servers may take to say which of them is the primary; a connection then takes as long again at most. */
const askMs = 1_500
/** Once one has said that it takes writes, how long others may still say that they were promoted after it. */
const othersMs = 200
/** A new connection's first question. */
const firstAnswerMs = 3_000

const isStandby = 'select pg_is_in_recovery() as standby'
// The timeline is the first eight digits of the name of the segment that is being written.
const whichTimeline = `select ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint::float8 as timeline`

/**
 * Connects to nothing yet.
 *
 * @param url of one server, or of several in `?host=one,two&port=5432,5433`, as `readSettings` gives it.
 *   `target_session_attrs=any` takes a standby as well, for what only reads.
 * @param options.takesStandby as if that were in the URL
 */
export function databaseServers(url: string, options: { takesStandby?: boolean } = {}): DatabaseServers {
  const { addresses, takesAny } = readUrl(url)
  const takesStandby = takesAny || options.takesStandby === true
  const [only] = addresses.length === 1 ? addresses : []
  const failures = new Map<DatabaseFailure, number>()
  let chosen = only
  let choosing: Promise<Address> | undefined

  const count = (kind: DatabaseFailure) => void failures.set(kind, (failures.get(kind) ?? 0) + 1)

  function primary(): Address | Promise<Address> {
    if (chosen) return chosen
    choosing ??= choose(addresses, takesStandby)
      .then(address => {
        chosen = address
        cutAll(address, 'others')
        return address
      })
      .finally(() => {
        choosing = undefined
      })
    return choosing
  }

  /** The next connection asks anew. */
  function doubt(address: Address | undefined): void {
    if (chosen === address) chosen = only
  }

  function cutAll(address: Address | undefined, which: 'these' | 'others' = 'these'): void {
    for (const client of open) if ((client.address === address) === (which === 'these')) client.cut()
  }

  class ServerClient extends pg.Client {
    address: Address | undefined
    /** Whether PostgreSQL gives its statements up before we do: then one that is not answered at all is not just slow. */
    readonly #isAnsweredInTime: boolean

    constructor(config: pg.ClientConfig = {}) {
      super({ ...config, connectionString: addresses[0]!.url })
      const [theirs, ours] = [Number(config.statement_timeout ?? 0), Number(config.query_timeout ?? 0)]
      this.#isAnsweredInTime = theirs > 0 && theirs < ours
      // Whoever holds the connection hears of its end by other ways too; nobody listening must not end the process.
      this.on('error', error => {
        const kind = databaseFailure(error)
        if (kind && this.address) count(kind)
      })
      this.on('end', () => open.delete(this))
    }

    override connect(): Promise<pg.Client>
    override connect(callback: (error: Error | null, client?: pg.Client) => void): void
    override connect(callback?: (error: Error | null, client?: pg.Client) => void): Promise<pg.Client> | undefined {
      const connected = this.#connectToPrimary()
      if (!callback) return connected
      connected.then(
        client => process.nextTick(callback, null, client),
        error => process.nextTick(callback, error),
      )
      return undefined
    }

    async #connectToPrimary(): Promise<pg.Client> {
      try {
        this.address = await primary()
        this.host = this.address.host
        this.port = this.address.port
        await super.connect()
        open.add(this)
        if (!takesStandby) await demandPrimary(this)
        return this
      } catch (error) {
        doubt(this.address)
        this.cut()
        const failure = connectFailure(error, this.address)
        count(failure.kind)
        throw failure
      }
    }

    // biome-ignore lint/suspicious/noExplicitAny: the overloads of `pg`, which all come to this
    override query(...asked: any[]): any {
      const callback = asked.at(-1)
      if (typeof callback === 'function') {
        asked[asked.length - 1] = (error: Error | null, result: unknown) => {
          if (error) this.#failed(error)
          callback(error, result)
        }
        return this.#send(asked)
      }
      const answer = this.#send(asked)
      if (answer instanceof Promise) answer.catch(error => this.#failed(error))
      return answer
    }

    // biome-ignore lint/suspicious/noExplicitAny: as above
    #send(asked: any[]): any {
      // biome-ignore lint/suspicious/noExplicitAny: as above
      return (super.query as any)(...asked)
    }

    /** A connection that is of no use any more does not go back to those who would wait for it. */
    #failed(error: Error): void {
      const kind = databaseFailure(error)
      if (!kind) return
      count(kind)
      if (kind === 'read_only') doubt(this.address)
      // Whoever has asked hears of it only after this, so it is still theirs, and a pool does not take it back.
      if (kind === 'read_only' || kind === 'silent') this.end().catch(() => {})
      // The server, or the way to it, is gone: who asks next must not wait as long for another connection of before.
      if (kind === 'silent' && this.#isAnsweredInTime) cutAll(this.address)
    }

    /** At once, whoever has it: a pool in which it is idle is told as well. */
    cut(): void {
      this.connection.stream.destroy()
    }
  }

  const open = new Set<ServerClient>()
  return { Client: ServerClient as unknown as typeof pg.Client, failures, count }
}

class StandbyError extends Error {}

async function demandPrimary(client: pg.Client): Promise<void> {
  const { rows } = await client.query<{ standby: boolean }>({ text: isStandby, ...{ query_timeout: firstAnswerMs } })
  if (rows[0]?.standby) throw new StandbyError('is a standby, which takes no writes')
}

function connectFailure(cause: unknown, address: Address | undefined): ConnectFailure {
  if (cause instanceof ConnectFailure) return cause
  const kind = cause instanceof StandbyError ? 'read_only' : (databaseFailure(cause) ?? 'unreachable')
  return new ConnectFailure(`no connection to the database at ${address?.name}: ${messageOf(cause)}`, kind, cause)
}

/** What is said of a name with several addresses, none of which answers, is in the parts. */
function messageOf(error: unknown): string {
  if (error instanceof AggregateError && !error.message) return error.errors.map(messageOf).join(', ')
  return error instanceof Error ? error.message : String(error)
}

/** Asks all of them. @throws ConnectFailure that says of each what is wrong with it */
async function choose(addresses: readonly Address[], takesStandby: boolean): Promise<Address> {
  const problems: string[] = []
  let best: { address: Address; timeline: number } | undefined
  let hurry: NodeJS.Timeout | undefined
  const { promise: othersHadTheirTime, resolve } = Promise.withResolvers<void>()
  const asked = addresses.map(async address => {
    try {
      const timeline = (await timelineOf(address)) ?? (takesStandby ? 0 : undefined)
      if (timeline === undefined) throw new StandbyError('is a standby, which takes no writes')
      if (!best || timeline > best.timeline) best = { address, timeline }
      hurry ??= setTimeout(resolve, othersMs)
    } catch (error) {
      problems.push(`${address.name}: ${messageOf(error)}`)
    }
  })
  await Promise.race([Promise.all(asked), othersHadTheirTime])
  clearTimeout(hurry)
  if (best) return best.address
  throw new ConnectFailure(`no server of the database takes writes now (${problems.join('; ')})`, 'unreachable')
}

/** @returns undefined for a standby */
async function timelineOf({ url }: Address): Promise<number | undefined> {
  const client = new pg.Client({
    connectionString: url,
    connectionTimeoutMillis: askMs,
    query_timeout: askMs,
    application_name: 'edgemesh which server',
  })
  client.on('error', () => {})
  // Connecting and asking have this long together.
  const end = setTimeout(() => client.connection.stream.destroy(), askMs)
  try {
    await client.connect()
    const { rows } = await client.query<{ standby: boolean }>(isStandby)
    if (rows[0]?.standby) return undefined
    // What is PostgreSQL to us alone, such as a cloud's own storage below it, may have no such thing.
    const { rows: known } = await client.query<{ timeline: number }>(whichTimeline).catch(() => ({ rows: [] }))
    return known[0]?.timeline ?? 0
  } finally {
    clearTimeout(end)
    client.end().catch(() => {})
  }
}

function readUrl(url: string): { addresses: Address[]; takesAny: boolean } {
  const { hostname, port, searchParams } = new URL(url)
  const hosts = (searchParams.get('host') ?? hostname).split(',')
  const ports = (searchParams.get('port') ?? port).split(',')
  const addresses = hosts.map((given, at) => {
    const host = given.replace(/^\[(.*)\]$/, '$1')
    const ownPort = Number(ports[at] ?? ports[0]) || defaultPort
    return { name: `${given}:${ownPort}`, host, port: ownPort, url: urlOf(url, host, ownPort) }
  })
  return { addresses, takesAny: searchParams.get('target_session_attrs') === 'any' }
}

const defaultPort = 5_432

function urlOf(several: string, host: string, port: number): string {
  const url = new URL(several)
  url.searchParams.set('host', host)
  url.searchParams.set('port', String(port))
  return url.href
}
