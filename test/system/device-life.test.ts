import { type ChildProcess, spawn } from 'node:child_process'
import { X509Certificate } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import type { Directive, HeartbeatResponse } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { specialLeaves } from '../support/authority.ts'
import { authorizations, endOf, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  refused,
  shared,
  startEdgeMesh,
  startSecondInstance,
  type TestDevice,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { openssl } from '../support/openssl.ts'

/** Two instances on one database, with somebody to connect and something to connect to. */
const instances = shared(test, async file => {
  const here = await startEdgeMesh(file)
  const there = await startSecondInstance(file, here)
  await unary(here.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(here.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: 'finance', roles: [] })
  return { here, there }
})
const here = () => instances().here
const there = () => instances().there
const both = () => [here(), there()]

const serialOf = ({ certificatePem = '' }: Credentials) => new X509Certificate(certificatePem).serialNumber

/** A device that is connected to an instance by both of its streams and holds a lease there. */
async function connected(t: ExecutionContext, instance: EdgeMesh, device: Credentials) {
  const heart = heartbeats(t, instance, device)
  await heart.beat(healthy)
  const access = authorizations(t, instance, device)
  const { allowed, connectionId } = await access.ask('ada', 'payroll')
  t.true(allowed)
  return { instance, heart, access, connectionId }
}

const check = (instance: EdgeMesh, device: Credentials) => {
  const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
  return unary(instance.clients(device).authorize, 'check', { question, deviceId: '' })
}

async function endedConnection(id: string) {
  return eventually('the end of the connection is on record', async () => {
    const { rows } = await here().pool.query('select status, end_reasons from connections where id = $1', [id])
    return rows[0]?.status !== 'active' && rows[0]
  })
}

/** The revocation list that an instance hands out, as OpenSSL reads it, once it names the certificate. */
async function listNaming(t: ExecutionContext, instance: EdgeMesh, serial: string): Promise<string> {
  return eventually('the list names the certificate', async () => {
    const { trustBundle } = await unary(instance.clients(instance.anonymous).enroll, 'getTrustBundle', {})
    if (!trustBundle) return undefined
    const [list, issuer] = [trustBundle.crlDer, trustBundle.intermediatesPem.join('')]
    const args = ['crl', '-inform', 'DER', '-in', 'list', '-CAfile', 'issuer', '-noout', '-text']
    const { said } = await openssl(t, args, { list, issuer })
    return said.includes('verify OK') && said.includes(serial) ? said : undefined
  })
}

for (const [what, method, request, reason] of [
  ['revoked', 'revokeDevice', { reason: 'stolen' }, 'DEVICE_REVOKED'],
  ['deleted', 'deleteDevice', {}, 'DEVICE_DELETED'],
] as const) {
  test(`a device that is ${what} at one instance is out at all of them: streams, leases, calls, revocation list`, async t => {
    const id = `out-${what}`
    const device = await here().enroll({ device: { id } })
    const kept = await connected(t, there(), await here().enroll({ device: { id: `kept-${what}` } }))
    const sessions = await Promise.all(both().map(instance => connected(t, instance, device)))
    await unary(here().admin, method, { id, ...request })

    for (const { instance, heart, access, connectionId } of sessions) {
      for (const stream of [heart, access]) {
        const ended = await endOf(stream)
        t.deepEqual([ended?.code, ended?.reason], ['UNAUTHENTICATED', reason])
      }
      const { status, end_reasons: reasons } = await endedConnection(connectionId)
      t.is(status, 'revoked')
      t.true(reasons.length > 0)
      for (const { code, message } of reasons) t.regex(`${code} ${message}`, /^[A-Z_]+ .+\.$/)
      const again = await refused(check(instance, device))
      t.deepEqual([again.code, again.reason], ['UNAUTHENTICATED', reason])
      const stream = heartbeats(t, instance, device)
      stream.send({})
      t.is((await endOf(stream))?.reason, reason)
      const { enroll } = instance.clients(device)
      const renewing = await refused(unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) }))
      t.is(renewing.reason, reason)
      await listNaming(t, instance, serialOf(device))
    }
    await kept.heart.beat(healthy)
    t.true((await kept.access.ask('ada', 'payroll')).allowed, 'nobody else has noticed')
  })
}

test('the connections of a certificate that expires are taken back, which is not the same as closed', async t => {
  await here().enroll({ device: { id: 'brief' } })
  const issue = await specialLeaves(here())
  const leaf = await issue({
    spiffeId: 'spiffe://edgemesh.local/device/brief',
    validForMs: 8_000,
    recordedFor: 'brief',
  })
  const { access, connectionId } = await connected(t, there(), leaf)
  t.is((await endOf(access))?.reason, 'CERTIFICATE_EXPIRED')
  const { status, end_reasons: reasons } = await endedConnection(connectionId)
  t.is(status, 'revoked')
  t.like(reasons[0], { code: 'CERTIFICATE_EXPIRED', field: 'device.certificate' })
})

const directivesOf = (responses: HeartbeatResponse[]): Directive['kind'][] =>
  responses.flatMap(({ directives }) => directives.map(({ kind }) => kind))

test('a quarantined device hears of it at once at every instance, keeps its streams, and is denied until it is released', async t => {
  const device = await here().enroll({ device: { id: 'patient' } })
  const sessions = await Promise.all(both().map(instance => connected(t, instance, device)))
  const before = sessions.map(({ heart }) => heart.responses.length)

  await unary(here().admin, 'quarantineDevice', { id: 'patient', reason: 'odd traffic' })
  const quarantined: Directive['kind'] = { $case: 'quarantined', value: { reason: 'odd traffic' } }
  for (const [at, { heart, access, connectionId }] of sessions.entries()) {
    const pushed = await eventually('a message that nobody asked for', () => heart.responses[before[at] ?? 0])
    t.like(pushed, { acknowledgedSequence: 0, nextInterval: undefined, directives: [{ kind: quarantined }] })
    const revocation = await access.revocationOf(connectionId)
    t.deepEqual(
      revocation.reasons.map(({ code }) => code),
      ['DEVICE_QUARANTINED'],
    )
    const denied = await access.ask('ada', 'payroll')
    t.false(denied.allowed)
    t.deepEqual(
      denied.reasons.map(({ code, actual }) => [code, actual]),
      [['DEVICE_QUARANTINED', 'quarantined']],
    )
    // Each acknowledgement repeats it, for a device that missed it.
    t.deepEqual((await heart.beat()).directives, [{ kind: quarantined }])
  }

  await unary(there().admin, 'releaseDevice', { id: 'patient' })
  for (const { heart, access } of sessions) {
    await eventually('the device hears that it is released', () =>
      directivesOf(heart.responses).some(kind => kind?.$case === 'released'),
    )
    await eventually('connections are allowed again', async () => (await access.ask('ada', 'payroll')).allowed)
    t.deepEqual((await heart.beat()).directives, [])
    t.deepEqual(
      directivesOf(heart.responses).map(kind => kind?.$case),
      ['quarantined', 'quarantined', 'released'],
    )
  }
})

test('a device that connects while it is quarantined hears of it with its first report, and of its release at once', async t => {
  const device = await here().enroll({ device: { id: 'latecomer' } })
  await unary(here().admin, 'quarantineDevice', { id: 'latecomer', reason: 'lost' })
  const heart = heartbeats(t, there(), device)
  t.deepEqual(directivesOf([await heart.beat(healthy)]), [{ $case: 'quarantined', value: { reason: 'lost' } }])
  await unary(here().admin, 'releaseDevice', { id: 'latecomer' })
  await eventually('the device hears that it is released', () =>
    directivesOf(heart.responses).some(kind => kind?.$case === 'released'),
  )
})

test('a device that changes in other ways is not bothered with it', async t => {
  const device = await here().enroll({ device: { id: 'calm' } })
  const heart = heartbeats(t, there(), device)
  await heart.beat(healthy)
  await heart.beat({ diskEncrypted: false })
  await unary(there().clients(device).enroll, 'renewCertificate', {
    csr: await freshCsr(there().clients(device).enroll, createKey()),
  })
  await heart.beat({ diskEncrypted: true })
  t.deepEqual(directivesOf(heart.responses), [])
  t.is(heart.responses.length, 3)
})

test('a revoked device is told why before its stream is cut, and a deleted one that it may enroll again', async t => {
  const sessions = await Promise.all(
    ['told-1', 'told-2'].map(async id => connected(t, there(), await here().enroll({ device: { id } }))),
  )
  await unary(here().admin, 'revokeDevice', { id: 'told-1', reason: 'left on a train' })
  await unary(here().admin, 'deleteDevice', { id: 'told-2' })
  const [revoked, deleted] = [await endOf(sessions[0]!.heart), await endOf(sessions[1]!.heart)]
  t.deepEqual(directivesOf(sessions[0]!.heart.responses), [{ $case: 'revoked', value: { reason: 'left on a train' } }])
  t.is(revoked?.message, 'device told-1 has been revoked: left on a train')
  t.deepEqual(directivesOf(sessions[1]!.heart.responses), [])
  t.regex(deleted?.message ?? '', /enroll it again with a new token/)
})

test('a device that waits for approval may not connect anywhere until it is approved, at any instance', async t => {
  const device = await here().enroll({ device: { id: 'newcomer' } })
  const { heart, access } = await connected(t, there(), device)
  await here().pool.query("update devices set status = 'pending' where id = 'newcomer'")
  // Whoever changes something announces the device.
  await heart.beat({ firewallEnabled: false })
  const denied = await eventually('the device is denied', async () => {
    const answer = await access.ask('ada', 'payroll')
    return answer.allowed ? undefined : answer
  })
  t.deepEqual(
    denied.reasons.map(({ code }) => code),
    ['DEVICE_PENDING'],
  )
  const { device: approved } = await unary(here().admin, 'approveDevice', { id: 'newcomer' })
  t.is(approved?.status, DeviceStatus.ACTIVE)
  await eventually('the device is allowed', async () => (await access.ask('ada', 'payroll')).allowed)
  await heart.beat()
})

test('the name of a deleted device is free: for a new certificate of it, or for another that takes it for good', async t => {
  const keyPem = createKey()
  const first = await here().enroll({ device: { id: 'phoenix' }, keyPem })
  const { answer } = await check(here(), first)
  await unary(here().admin, 'revokeDevice', { id: 'phoenix', reason: 'by mistake' })
  await unary(here().admin, 'deleteDevice', { id: 'phoenix' })

  const second = await there().enroll({ device: { id: 'phoenix' }, keyPem })
  await heartbeats(t, there(), second).beat(healthy)
  for (const instance of both()) t.regex((await refused(check(instance, first))).reason, /^(CERTIFICATE|DEVICE)_/)
  await unary(there().admin, 'deleteDevice', { id: 'phoenix' })

  const third = await here().enroll({ device: { id: 'phoenix' } })
  for (const instance of both()) {
    await heartbeats(t, instance, third).beat(healthy)
    t.is((await refused(check(instance, second))).reason, 'DEVICE_DELETED')
  }
  // Having once been the device does not make it that again.
  const back = await refused(there().enroll({ device: { id: 'phoenix' }, keyPem }))
  t.deepEqual([back.code, back.reason], ['ALREADY_EXISTS', 'DEVICE_EXISTS'])

  const { decision } = await unary(here().admin, 'getDecision', { id: answer?.decisionId ?? '' })
  t.is(decision?.deviceId, 'phoenix')
  const { rows } = await here().pool.query(
    `select regexp_replace(method, '.*/', '') as method, detail ->> 'after' as after from audit_events
     where target = 'device/phoenix' and method like '%Device' order by at, id`,
  )
  t.deepEqual(rows, [
    { method: 'RevokeDevice', after: 'revoked' },
    { method: 'DeleteDevice', after: 'deleted' },
    { method: 'DeleteDevice', after: 'deleted' },
  ])
  const { rows: redemptions } = await here().pool.query(
    "select count(*)::int from token_redemptions where device_id = 'phoenix'",
  )
  t.is(redemptions[0].count, 3)
})

test('whatever a device renews while it is deleted, no certificate of it is left that stands', async t => {
  const device = await here().enroll({ device: { id: 'racer' } })
  const renewals = both().flatMap(instance => {
    const { enroll } = instance.clients(device)
    return Array.from({ length: 8 }, async () =>
      unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) }),
    )
  })
  // Some of them first.
  await Promise.race(renewals)
  const deleting = unary(here().admin, 'deleteDevice', { id: 'racer' })
  const outcomes = await Promise.allSettled([...renewals])
  await deleting
  const { rows } = await here().pool.query(
    `select count(*)::int, count(*) filter (where revoked_at is null)::int as standing from certificates
     where subject_id = 'racer'`,
  )
  const renewed = outcomes.filter(({ status }) => status === 'fulfilled').length
  t.true(renewed >= 1)
  t.is(rows[0].count, 1 + renewed)
  t.is(rows[0].standing, 0)
})

/** A connection that OpenSSL's own client makes and holds until the server ends it. */
async function holdConnection(t: ExecutionContext, { server }: EdgeMesh, device: TestDevice): Promise<ChildProcess> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-s_client-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const [leaf = '', ...above] = device.identity.certificateChainPem
  const files = { leaf, chain: above.join(''), key: device.keyPem, roots: device.rootsPem }
  for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text, { mode: 0o600 })
  const where = ['-connect', `127.0.0.1:${server.apiPort}`, '-servername', 'localhost', '-alpn', 'h2']
  const who = ['-cert', 'leaf', '-cert_chain', 'chain', '-key', 'key', '-CAfile', 'roots', '-verify_return_error']
  const client = spawn('openssl', ['s_client', ...where, ...who], { cwd: folder, stdio: ['pipe', 'pipe', 'ignore'] })
  t.teardown(() => client.kill())
  let said = ''
  client.stdout.on('data', data => {
    said += data
  })
  await eventually('the handshake', () => said.includes('Verify return code: 0 (ok)'))
  return client
}

const isOpen = ({ exitCode, signalCode }: ChildProcess) => exitCode === null && signalCode === null

test("a revoked device's connection is ended at every instance, and so is each that it makes anew", async t => {
  const [lost, kept] = [
    await here().enroll({ device: { id: 'wired-1' } }),
    await here().enroll({ device: { id: 'wired-2' } }),
  ]
  const open = await Promise.all(both().map(instance => holdConnection(t, instance, lost)))
  const others = await Promise.all(both().map(instance => holdConnection(t, instance, kept)))
  t.true(open.every(isOpen))
  await unary(here().admin, 'revokeDevice', { id: 'wired-1', reason: 'stolen' })
  await eventually('the connections have been ended', () => !open.some(isOpen))

  for (const instance of both()) {
    const again = await holdConnection(t, instance, lost)
    await eventually('the new connection has been ended', () => !isOpen(again))
  }
  t.true(others.every(isOpen), 'nobody else has noticed')
})
