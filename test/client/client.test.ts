/** `edgemesh/client`, as a daemon or a service of another team uses it. */
import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import {
  type ClientAuthorizations,
  connect,
  type DeviceIdentity,
  EdgeMeshError,
  type EndedConnection,
  enroll,
  type Heartbeat,
  identityFromPem,
  loadIdentity,
  type ReportingEvent,
  readIdentity,
  saveIdentity,
} from '../../src/client/client.ts'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { openOffline } from '../../src/server.ts'
import { readSettings } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import {
  type EdgeMesh,
  eventually,
  startEdgeMesh,
  startSecondInstance,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { healthy } from '../support/healthy.ts'
import { testDatabase } from '../support/postgres.ts'
import { link } from '../support/relay.ts'
import { serve } from '../support/serve.ts'

const question = { user: 'ada', service: 'payroll' }

async function furnished(t: ExecutionContext, env: Record<string, string> = {}): Promise<EdgeMesh> {
  const mesh = await startEdgeMesh(t, { HEARTBEAT_INTERVAL_SECONDS: '1', ...env })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  return mesh
}

/** A daemon that reports and holds connections. What happens to it is kept. */
async function daemon(t: ExecutionContext, mesh: EdgeMesh, server = `127.0.0.1:${mesh.server.apiPort}`) {
  const identity = await enroll({
    server: `127.0.0.1:${mesh.server.apiPort}`,
    token: await mesh.token(),
    device: { id: 'press-7' },
  })
  const kept: DeviceIdentity[] = []
  const events: ReportingEvent[] = []
  const ended: Error[] = []
  const revoked: EndedConnection[] = []
  const posture = { ...healthy }
  const client = connect({ server, identity, onIdentity: renewed => void kept.push(renewed) })
  t.teardown(() => client.close())
  const heartbeat: Heartbeat = client.heartbeat({
    posture: () => posture,
    onEvent: event => events.push(event),
    onEnded: error => ended.push(error),
  })
  const authorizations: ClientAuthorizations = client.authorizations({ onRevoked: end => void revoked.push(end) })
  const told = (name: ReportingEvent['event']) => events.filter(({ event }) => event === name).length
  return { client, identity, heartbeat, authorizations, kept, events, told, ended, revoked, posture }
}

const codes = (ended: EndedConnection[]) => ended.map(({ reasons }) => reasons.map(({ code }) => code).join())

async function failure(t: ExecutionContext, call: () => Promise<unknown> | unknown): Promise<EdgeMeshError> {
  const error = await t.throwsAsync(async () => await call(), { instanceOf: EdgeMeshError })
  return error as EdgeMeshError
}

async function scratch(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-client-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  return folder
}

test('a device enrolls, reports, is allowed, and hears at once when that is taken back', async t => {
  const mesh = await furnished(t)
  const { client, identity, heartbeat, authorizations, revoked, posture, ended } = await daemon(t, mesh)
  t.is(identity.spiffeId, 'spiffe://edgemesh.local/device/press-7')

  t.deepEqual((await heartbeat.report()).failingPosture, [])
  t.true((await client.check(question)).allowed)
  const [answer] = await authorizations.ask([question])
  t.true(answer?.allowed)
  t.deepEqual(authorizations.held(), [answer?.connectionId])

  posture.diskEncrypted = false
  t.deepEqual((await heartbeat.report()).failingPosture, ['disk_encrypted'])
  await eventually('the connection is taken back', () => revoked.length === 1)
  t.is(revoked[0]?.connectionId, answer?.connectionId)
  t.deepEqual(codes(revoked), ['DISK_NOT_ENCRYPTED'])
  t.deepEqual(authorizations.held(), [])
  await eventually('the server was told that it is cut', async () => {
    const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
    return text.includes('edgemesh_revocation_acknowledged_seconds_count 1')
  })

  const [again] = await authorizations.ask([question])
  t.false(again?.allowed)
  t.deepEqual(
    again?.reasons.map(({ code }) => code),
    ['DISK_NOT_ENCRYPTED'],
  )
  t.deepEqual(ended, [])
})

test('the server is killed and comes back: reports go on, and what was allowed is still held', async t => {
  const { url } = await testDatabase(t)
  const port = await freePort()
  const env = { ...testEnvironment, DATABASE_URL: url, API_PORT: String(port), HEARTBEAT_INTERVAL_SECONDS: '1' }
  const mesh = await furnished(t, { DATABASE_URL: url })
  const killed = await serve(t, { ...env, INSTANCE_ID: 'killed' })
  const { heartbeat, authorizations, client, told, revoked, ended, posture } = await daemon(t, mesh, killed.address)
  await heartbeat.report()
  const [answer] = await authorizations.ask([question])
  t.true(answer?.allowed)

  await killed.kill()
  await eventually('it has noticed', () => told('disconnected') > 0)
  const refused = await failure(t, () => client.check(question))
  t.is(refused.code, 'UNAVAILABLE')
  const waiting = heartbeat.report()
  await serve(t, { ...env, INSTANCE_ID: 'next' })
  t.deepEqual((await waiting).failingPosture, [])
  t.true((await client.check(question)).allowed)
  t.deepEqual(authorizations.held(), [answer?.connectionId])
  t.deepEqual(revoked, [])

  posture.diskEncrypted = false
  await heartbeat.report()
  await eventually('it is taken back on the stream that came after', () => revoked.length === 1)
  t.deepEqual(codes(revoked), ['DISK_NOT_ENCRYPTED'])
  t.deepEqual(ended, [])
})

test('an instance that stops sends the client to another, before anything is cut', async t => {
  const mesh = await furnished(t, { DRAIN_SECONDS: '8' })
  const way = await link(t, mesh.server.apiPort)
  const { heartbeat, authorizations, told, revoked } = await daemon(t, mesh, `127.0.0.1:${way.port}`)
  await heartbeat.report()
  const answers = await authorizations.ask([question, question])
  const ids = answers.map(({ connectionId }) => connectionId).sort()

  const second = await startSecondInstance(t, mesh, { HEARTBEAT_INTERVAL_SECONDS: '1' })
  way.leadTo(second.server.apiPort)
  await mesh.server.stop()
  t.is(told('disconnected'), 0)
  t.true(told('reconnecting') > 0)
  await heartbeat.report()
  t.deepEqual(authorizations.held().sort(), ids)
  t.deepEqual(revoked, [])
  const { rows } = await mesh.pool.query("select id from connections where instance_id = $1 and status = 'active'", [
    second.server.instanceId,
  ])
  t.deepEqual(rows.map(({ id }) => id).sort(), ids)
})

test('one connection carries reports, questions and what is held, before and after a renewal', async t => {
  const mesh = await furnished(t)
  const open = async () => {
    const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
    return Number(/^edgemesh_tls_connections(?:{.*})? (\d+)/m.exec(text)?.[1])
  }
  await mesh.token()
  const others = await open()
  const { client, heartbeat, authorizations, told } = await daemon(t, mesh)
  await heartbeat.report()
  await authorizations.ask([question])
  await client.check(question)
  await eventually('one connection', async () => (await open()) === others + 1)
  await client.renew()
  await eventually('another session', () => told('connecting') > 1)
  await heartbeat.report()
  await client.check(question)
  await eventually('one connection again', async () => (await open()) === others + 1)
  t.is(authorizations.held().length, 1)
})

test('a certificate is renewed when asked for, kept, and shown from then on', async t => {
  const mesh = await furnished(t)
  const { client, identity, heartbeat, authorizations, kept, told, revoked } = await daemon(t, mesh)
  await heartbeat.report()
  const [answer] = await authorizations.ask([question])

  const renewed = await client.renew()
  t.not(renewed.keyPem, identity.keyPem)
  t.is(kept.at(-1)?.certificateChainPem, renewed.certificateChainPem)
  t.is(client.identity().certificateChainPem, renewed.certificateChainPem)
  // The session that shows the certificate before is replaced: the connection is held on.
  await eventually('another session', () => told('connecting') > 1)
  await heartbeat.report()
  t.deepEqual(authorizations.held(), [answer?.connectionId])
  t.true((await client.check(question)).allowed)
  t.deepEqual(revoked, [])
})

test('a certificate late in its life is renewed by the heartbeat itself, and handed on to be kept', async t => {
  const mesh = await furnished(t)
  const identity = await enroll({
    server: `127.0.0.1:${mesh.server.apiPort}`,
    token: await mesh.token(),
    device: { id: 'press-8' },
  })
  const kept: DeviceIdentity[] = []
  const late = { ...identity, renewAfter: new Date(0) }
  const client = connect({
    server: `127.0.0.1:${mesh.server.apiPort}`,
    identity: late,
    onIdentity: renewed => void kept.push(renewed),
  })
  t.teardown(() => client.close())
  client.heartbeat({ posture: () => healthy, onEnded: error => t.fail(error.message) })
  await eventually('it is renewed', () => kept.length > 0)
  t.not(kept[0]?.certificateChainPem, identity.certificateChainPem)
  t.is(kept[0]?.spiffeId, identity.spiffeId)

  const folder = await scratch(t)
  await saveIdentity(folder, kept[0] as DeviceIdentity)
  t.deepEqual(await loadIdentity(folder), kept[0])
  t.is((await stat(join(folder, 'device.key'))).mode & 0o777, 0o600)
  t.is(await loadIdentity(join(folder, 'none')), undefined)
})

test('a device that is revoked is told so once, and reports no more', async t => {
  const mesh = await furnished(t)
  const { client, heartbeat, authorizations, ended, revoked } = await daemon(t, mesh)
  await heartbeat.report()
  await authorizations.ask([question])
  await unary(mesh.admin, 'revokeDevice', { id: 'press-7', reason: 'left on a train' })
  await eventually('the end', () => ended.length > 0 && revoked.length > 0)
  t.is(ended.length, 1)
  t.true(ended[0] instanceof EdgeMeshError)
  t.is((ended[0] as EdgeMeshError).reason, 'DEVICE_REVOKED')
  t.is((await failure(t, () => heartbeat.report())).reason, 'DEVICE_REVOKED')
  t.is((await failure(t, () => client.check(question))).code, 'UNAUTHENTICATED')
})

test('a service asks about devices, with an identity of files, and with one that was issued anew', async t => {
  const mesh = await furnished(t)
  const { heartbeat } = await daemon(t, mesh)
  await heartbeat.report()
  const issue = async () => {
    const offline = await openOffline(
      readSettings({ ...testEnvironment, DATABASE_URL: mesh.databaseUrl }),
      createLog({ level: 'fatal' }),
    )
    const key = createKey()
    const csr = signingRequestFor(key)
    const issued = await offline.issueServiceIdentity({ name: 'gateway', csr, validityMs: 3_600_000 })
    await offline.close()
    return { key, certificate: issued.certificatePem, bundle: issued.rootsPem }
  }
  const folder = await scratch(t)
  const pem = await issue()
  const files = { key: join(folder, 'key'), certificate: join(folder, 'crt'), bundle: join(folder, 'ca') }
  await Promise.all([
    writeFile(files.key, pem.key),
    writeFile(files.certificate, pem.certificate),
    writeFile(files.bundle, pem.bundle),
  ])
  const client = connect({ server: `localhost:${mesh.server.apiPort}`, identity: await readIdentity(files) })
  t.teardown(() => client.close())
  t.is(client.identity().spiffeId, 'spiffe://edgemesh.local/service/gateway')
  t.true((await client.check(question, { deviceId: 'press-7' })).allowed)
  const unknown = await failure(t, () => client.check(question))
  t.is(unknown.code, 'INVALID_ARGUMENT')
  t.deepEqual(
    unknown.violations.map(({ field }) => field),
    ['device_id'],
  )

  await client.use(identityFromPem(await issue()))
  t.true((await client.check(question, { deviceId: 'press-7' })).allowed)

  const noDevice = await failure(t, () => client.heartbeat({ posture: () => healthy, onEnded: () => {} }))
  t.is(noDevice.reason, 'NOT_A_DEVICE')
})

test('what is wrong is told with a code, a reason, and where there is one how long to wait', async t => {
  const mesh = await furnished(t, { RATE_LIMIT_CONNECTIONS: '1/minute' })
  const server = `127.0.0.1:${mesh.server.apiPort}`
  const token = await mesh.token()
  const { client, heartbeat } = await daemon(t, mesh)

  t.is((await failure(t, () => enroll({ server, token: 'em1.nonsense' }))).reason, 'TOKEN_MALFORMED')
  await enroll({ server, token, device: { id: 'press-9' } })
  t.is((await failure(t, () => enroll({ server, token, device: { id: 'press-10' } }))).reason, 'TOKEN_OTHER_KEY')
  t.is(
    (await failure(t, () => connect({ server: 'nowhere', identity: client.identity() }))).violations[0]?.field,
    'server',
  )
  t.is(
    (await failure(t, () => client.heartbeat({ posture: () => healthy, onEnded: () => {} }))).reason,
    'HEARTBEAT_RUNNING',
  )

  await heartbeat.report()
  await client.check(question)
  const limited = await failure(t, () => client.check(question))
  t.is(limited.reason, 'RATE_LIMITED')
  t.true((limited.retryAfterMs ?? 0) > 0)

  const { keyPem: key, certificateChainPem: certificate, rootsPem: bundle } = client.identity()
  const wrong = (given: Partial<{ key: string; certificate: string; bundle: string }>) =>
    failure(t, () => identityFromPem({ key, certificate, bundle, ...given }))
  t.is((await wrong({ key: createKey() })).violations[0]?.field, 'key')
  t.is((await wrong({ key: 'secret words' })).violations[0]?.field, 'key')
  t.notRegex((await wrong({ key: 'secret words' })).message, /secret/)
  t.is((await wrong({ certificate: bundle })).violations[0]?.field, 'certificate')
  t.is((await wrong({ bundle: '' })).violations[0]?.field, 'bundle')

  await client.close()
  t.is((await failure(t, () => client.check(question))).reason, 'CLIENT_CLOSED')
  t.is((await failure(t, () => heartbeat.report())).reason, 'CLIENT_CLOSED')
})

test('without a heartbeat questions are answered still, and what is held stays held', async t => {
  const mesh = await furnished(t)
  const { client, heartbeat, authorizations, revoked } = await daemon(t, mesh)
  await heartbeat.report()
  const [answer] = await authorizations.ask([question])
  const closing = heartbeat.close()
  t.true((await client.check(question)).allowed)
  await closing
  t.true((await client.check(question)).allowed)
  t.true((await authorizations.ask([question]))[0]?.allowed)
  t.true(authorizations.held().includes(answer?.connectionId ?? ''))
  await authorizations.closeConnections(authorizations.held())
  t.deepEqual(authorizations.held(), [])
  t.deepEqual(revoked, [])
})

test('posture that throws ends the heartbeat, and it can be started again', async t => {
  const mesh = await furnished(t)
  const { client, heartbeat } = await daemon(t, mesh)
  await heartbeat.report()
  await heartbeat.close()
  const broken = Promise.withResolvers<Error>()
  client.heartbeat({
    posture: () => {
      throw new RangeError('no sensor')
    },
    onEnded: broken.resolve,
  })
  t.is((await broken.promise).message, 'no sensor')
  const again = await eventually('the one before is over', () => {
    try {
      return client.heartbeat({ posture: () => healthy, onEnded: error => t.fail(error.message) })
    } catch {
      return undefined
    }
  })
  t.deepEqual((await again.report()).failingPosture, [])
})
