/** A whole EdgeMesh in this process, on a database of its own, with an operator and as many devices as a test wants. */

import { type Client, credentials, Metadata, type ServiceError, status } from '@grpc/grpc-js'
import type { ExecutionContext, TestFn } from 'ava'
import pg from 'pg'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { type Clock, systemClock } from '../../src/clock.ts'
import { AdminServiceClient, type CreateEnrollmentTokenRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { AuthorizeServiceClient } from '../../src/gen/edgemesh/v1/authorize.ts'
import { type EnrollResponse, EnrollServiceClient, type Identity } from '../../src/gen/edgemesh/v1/enroll.ts'
import { HeartbeatServiceClient } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import type { DeviceDescription } from '../../src/gen/edgemesh/v1/types.ts'
import { BadRequest, ErrorInfo, RetryInfo } from '../../src/gen/google/rpc/error_details.ts'
import { Status } from '../../src/gen/google/rpc/status.ts'
import { type RunningServer, startServer } from '../../src/server.ts'
import { readSettings } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from './postgres.ts'
import { noTokenRequest } from './token-request.ts'

/** PEM; without certificate and key a client is anonymous. */
export type Credentials = { rootsPem: string; certificatePem?: string; keyPem?: string }

export type EdgeMesh = {
  server: RunningServer
  databaseUrl: string
  pool: Awaited<ReturnType<typeof testDatabase>>['pool']
  operator: Credentials
  anonymous: Credentials
  admin: AdminServiceClient
  token(request?: Partial<CreateEnrollmentTokenRequest>): Promise<string>
  /** A device with a new key, or with the given one. */
  enroll(options?: { token?: string; keyPem?: string; device?: Partial<DeviceDescription> }): Promise<TestDevice>
  clients(credentials: Credentials): Clients
}

export type TestDevice = Credentials & { identity: Identity; keyPem: string; certificatePem: string }

export type Clients = {
  admin: AdminServiceClient
  authorize: AuthorizeServiceClient
  enroll: EnrollServiceClient
  heartbeat: HeartbeatServiceClient
}

export const secrets = {
  ENROLLMENT_TOKEN_SECRET: 'a-test-secret-for-tokens-that-is-long-enough',
  CA_KEY_PASSPHRASE: 'a-test-passphrase-for-the-ca-that-is-long-enough',
}

/** Limits that no test meets by accident; those that mean to, set their own. */
const generous = {
  RATE_LIMIT_ENROLLMENTS: '100000/minute',
  RATE_LIMIT_CONNECTIONS: '1000000/minute',
  RATE_LIMIT_HEALTH: '100000/minute',
}

/** What a server of a test needs beyond DATABASE_URL. */
export const testEnvironment = {
  ...secrets,
  ...generous,
  API_HOST: '127.0.0.1',
  API_PORT: '0',
  METRICS_HOST: '127.0.0.1',
  METRICS_PORT: '0',
  DRAIN_SECONDS: '1',
}

/** @param env settings beyond the defaults, by their variables */
export async function startEdgeMesh(
  t: ExecutionContext,
  env: Record<string, string> = {},
  log = createLog({ level: (process.env.LOG_LEVEL?.toLowerCase() as 'info' | undefined) ?? 'fatal' }),
  clock: Clock = systemClock,
): Promise<EdgeMesh> {
  const db = env.DATABASE_URL ? { url: env.DATABASE_URL, pool: poolOf(t, env.DATABASE_URL) } : await testDatabase(t)
  const settings = readSettings({ ...testEnvironment, DATABASE_URL: db.url, ...env })
  const server = await startServer({ settings, log, clock })
  t.teardown(() => server.stop())
  return { ...(await connect(t, server, `127.0.0.1:${server.apiPort}`)), pool: db.pool, databaseUrl: db.url }
}

/**
 * What `start` gives, for all tests of a file: started before the first, ended after the last.
 *
 * @param timeoutMs how long it may take to start, where that is much
 */
export function shared<T>(test: TestFn, start: (file: ExecutionContext) => Promise<T>, timeoutMs?: number): () => T {
  const ends: (() => unknown)[] = []
  const file = { teardown: (end: () => unknown) => void ends.push(end) } as unknown as ExecutionContext
  let started: { value: T } | undefined
  test.before(async t => {
    if (timeoutMs !== undefined) t.timeout(timeoutMs)
    started = { value: await start(file) }
  })
  test.after.always(async () => {
    for (const end of ends.reverse()) await end()
  })
  return () => {
    if (!started) throw new Error('it starts before the first test')
    return started.value
  }
}

/** One EdgeMesh for all tests of a file. */
export function sharedEdgeMesh(test: TestFn, env: Record<string, string> = {}): () => EdgeMesh {
  return shared(test, file => startEdgeMesh(file, env))
}

/** Another instance on the database of `mesh`, with an operator of its own. */
export function startSecondInstance(
  t: ExecutionContext,
  mesh: EdgeMesh,
  env: Record<string, string> = {},
): Promise<EdgeMesh> {
  return startEdgeMesh(t, { ...env, DATABASE_URL: mesh.databaseUrl })
}

/** The operator and the clients of a server that runs at `address`. */
export async function connect(
  t: ExecutionContext,
  server: RunningServer,
  address: string,
): Promise<Omit<EdgeMesh, 'pool' | 'databaseUrl'>> {
  const operatorKey = createKey()
  const issued = await server.issueOperator({
    name: 'tester',
    role: 'admin',
    csr: signingRequestFor(operatorKey),
    validityMs: 3_600_000,
  })
  const operator = { rootsPem: server.rootsPem, certificatePem: issued.certificatePem, keyPem: operatorKey }
  return { server, ...reach(t, address, operator) }
}

/** What can be done at `address` by who has the credentials of an operator. */
export function reach(
  t: ExecutionContext,
  address: string,
  operator: Credentials,
): Omit<EdgeMesh, 'pool' | 'databaseUrl' | 'server'> {
  const anonymous = { rootsPem: operator.rootsPem }
  const clients = (who: Credentials) => clientsOf(t, address, who)
  const { admin } = clients(operator)

  async function token(request: Partial<CreateEnrollmentTokenRequest> = {}): Promise<string> {
    const answer = await unary(admin, 'createEnrollmentToken', { ...noTokenRequest, ...request })
    return (answer as { tokenText: string }).tokenText
  }

  return {
    operator,
    anonymous,
    admin,
    clients,
    token,
    async enroll({ token: text, keyPem = createKey(), device = {} } = {}) {
      const identity = await enrollOnce(enrollClientOf({ clients, anonymous }), text ?? (await token()), keyPem, device)
      return { ...anonymous, identity, keyPem, certificatePem: identity.certificateChainPem.join('') }
    },
  }
}

function poolOf(t: ExecutionContext, connectionString: string): pg.Pool {
  const pool = new pg.Pool({ connectionString, max: 2 })
  // The database may go away while nobody asks anything; who asks next is told.
  pool.on('error', () => {})
  t.teardown(() => pool.end())
  return pool
}

/** Calls Enroll and takes the identity from its stream. @throws ServiceError as it was refused */
export async function enrollOnce(
  client: EnrollServiceClient,
  token: string,
  keyPem: string,
  device: Partial<DeviceDescription> = {},
): Promise<Identity> {
  const { responses, ended } = await callEnroll(client, { token, keyPem, device })
  const error = await ended
  if (error) throw error
  const identity = responses.map(({ step }) => step).find(step => step?.$case === 'identity')
  if (!identity) throw new Error('the Enroll stream ended without an identity')
  return identity.value
}

export type EnrollAttempt = { token: string; keyPem: string; device?: Partial<DeviceDescription>; csr?: Buffer }

/** The stream of an Enroll call, what has arrived on it so far, and the error that ends it, if one does. */
export async function callEnroll(client: EnrollServiceClient, attempt: EnrollAttempt) {
  const { token, keyPem, csr = await freshCsr(client, keyPem) } = attempt
  const device = { id: '', type: 1, os: 'linux', osVersion: '6.1', labels: {}, ...attempt.device } as DeviceDescription
  const stream = client.enroll({ token, csr, device, sentAt: undefined })
  const responses: EnrollResponse[] = []
  stream.on('data', response => responses.push(response))
  const ended = new Promise<ServiceError | undefined>(resolve => {
    stream.on('error', (error: ServiceError) => resolve(error))
    stream.on('end', () => resolve(undefined))
  })
  return { responses, ended, cancel: () => stream.cancel() }
}

/** Enroll is called without a certificate. */
export function enrollClientOf({ clients, anonymous }: Pick<EdgeMesh, 'clients' | 'anonymous'>): EnrollServiceClient {
  return clients(anonymous).enroll
}

/** What may be shown of a token. */
export function tokenIdOf(text: string): string {
  return text.split('.')[1] as string
}

/** A request for the key, with a challenge of the server. */
export async function freshCsr(client: EnrollServiceClient, keyPem: string): Promise<Buffer> {
  const { challenge } = await unary(client, 'getChallenge', {})
  return signingRequestFor(keyPem, challenge)
}

export function clientsOf(t: ExecutionContext, address: string, who: Credentials): Clients {
  const pem = (text: string | undefined) => (text ? Buffer.from(text) : null)
  const channel = credentials.createSsl(Buffer.from(who.rootsPem), pem(who.keyPem), pem(who.certificatePem))
  // Node 26 takes no IP address as TLS server name.
  const options = { 'grpc.ssl_target_name_override': 'localhost', 'grpc.default_authority': 'localhost' }
  const opened = {
    admin: new AdminServiceClient(address, channel, options),
    authorize: new AuthorizeServiceClient(address, channel, options),
    enroll: new EnrollServiceClient(address, channel, options),
    heartbeat: new HeartbeatServiceClient(address, channel, options),
  }
  t.teardown(() => {
    for (const client of Object.values(opened)) client.close()
  })
  return opened
}

/** A unary call as a promise, with a deadline that only a hang meets. */
export function unary<Method extends string, C extends Client>(
  client: C,
  method: Method,
  request: unknown,
): Promise<UnaryResponse<C, Method>> {
  return new Promise((resolve, reject) => {
    // biome-ignore lint/suspicious/noExplicitAny: the generated methods are overloads that no common type covers
    const call = (client as any)[method].bind(client)
    call(request, new Metadata(), { deadline: Date.now() + 20_000 }, (error: ServiceError | null, response: never) => {
      if (error) reject(error)
      else resolve(response)
    })
  })
}

type UnaryResponse<C, Method extends string> = C extends {
  [M in Method]: (
    request: never,
    metadata: never,
    options: never,
    callback: (error: ServiceError | null, response: infer Response) => void,
  ) => unknown
}
  ? Response
  : never

/** What a caller is told. */
export type Refusal = {
  code: string
  /** The stable one, from `google.rpc.ErrorInfo`. */
  reason: string
  message: string
  /** From `google.rpc.RetryInfo`, where there is one. */
  retryAfterMs: number | undefined
  /** The fields that are wrong, from `google.rpc.BadRequest`, as the proto spells them. */
  fields: string[]
}

export function refusal(error: unknown): Refusal {
  const { code, details, metadata } = error as ServiceError
  const [encoded] = metadata?.get('grpc-status-details-bin') ?? []
  const packed = encoded ? Status.decode(encoded as Buffer).details : []
  const detail = (name: string) => packed.find(({ typeUrl }) => typeUrl.endsWith(`.${name}`))?.value
  const [info, retry, badRequest] = [detail('ErrorInfo'), detail('RetryInfo'), detail('BadRequest')]
  const delay = retry && RetryInfo.decode(retry).retryDelay
  return {
    code: status[code] ?? String(code),
    reason: info ? ErrorInfo.decode(info).reason : '',
    message: details,
    retryAfterMs: delay && delay.seconds * 1_000 + delay.nanos / 1e6,
    fields: badRequest ? BadRequest.decode(badRequest).fieldViolations.map(({ field }) => field) : [],
  }
}

/** Runs what has to be refused. */
export async function refused(call: Promise<unknown>): Promise<Refusal> {
  try {
    await call
  } catch (error) {
    return refusal(error)
  }
  throw new Error('the call was not refused')
}

/** Whether the connection was closed, by what is on record: in its row, or where it has none in the event of that. */
export async function wasClosed({ pool }: Pick<EdgeMesh, 'pool'>, connectionId: string): Promise<boolean> {
  const { rowCount } = await pool.query(
    `select from connections where id = $1 and status = 'closed'
     union all select from audit_events where detail -> 'closed' ? $2 and code = 'OK'`,
    [connectionId, connectionId],
  )
  return rowCount === 1
}

/** Waits for something that has to come true, and says what was missing when it does not. */
export async function eventually<T>(
  what: string,
  probe: () => Promise<T | undefined | false> | T | undefined | false,
  withinMs = 20_000,
) {
  const until = Date.now() + withinMs
  for (;;) {
    const found = await probe()
    if (found) return found
    if (Date.now() > until) throw new Error(`did not happen: ${what}`)
    await new Promise(resolve => setTimeout(resolve, 25))
  }
}
