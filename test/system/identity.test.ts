import type { X509Certificate } from 'node:crypto'
import { connect as connectTls } from 'node:tls'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { type SpecialLeaf, specialLeaves } from '../support/authority.ts'
import { authorizations, endOf, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  refused,
  sharedEdgeMesh,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const mesh = sharedEdgeMesh(test)

const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }

const check = (who: Credentials, deviceId = '') => unary(mesh().clients(who).authorize, 'check', { question, deviceId })

const audited = async (reason: string, actor: string) =>
  (
    await mesh().pool.query(
      "select code from audit_events where method like '%/Check' and reason = $1 and actor = $2 limit 1",
      [reason, actor],
    )
  ).rows.map(row => row.code)

/** A certificate that the service itself would not issue. */
const special = (leaf: Partial<SpecialLeaf>) => async () =>
  (await specialLeaves(mesh()))({ spiffeId: 'spiffe://edgemesh.local/device/special', ...leaf })

async function ofForeignAuthority(t: ExecutionContext): Promise<Credentials> {
  const elsewhere = await startEdgeMesh(t)
  return { ...(await elsewhere.enroll({ device: { id: 'foreign' } })), rootsPem: mesh().anonymous.rootsPem }
}

async function ofRevokedCertificate(): Promise<Credentials> {
  const device = await mesh().enroll({ device: { id: 'lost-certificate' } })
  await mesh().pool.query("update certificates set revoked_at = now() where subject_id = 'lost-certificate'")
  return device
}

async function ofRevokedDevice(): Promise<Credentials> {
  const device = await mesh().enroll({ device: { id: 'lost-device' } })
  await unary(mesh().admin, 'revokeDevice', { id: 'lost-device', reason: 'stolen' })
  return device
}

const anonymous = 'anonymous'
const spiffe = (id: string) => `spiffe://edgemesh.local/device/${id}`

for (const [what, credentials, reason, actor] of [
  ['without a certificate', async () => mesh().anonymous, 'CERTIFICATE_MISSING', anonymous],
  ['with a certificate of another authority', ofForeignAuthority, 'CERTIFICATE_UNTRUSTED', anonymous],
  [
    'with an expired certificate',
    special({ validFromMs: -120_000, validForMs: -60_000 }),
    'CERTIFICATE_EXPIRED',
    anonymous,
  ],
  [
    'with a certificate that is not valid yet',
    special({ validFromMs: 60_000, validForMs: 120_000 }),
    'CERTIFICATE_NOT_YET_VALID',
    anonymous,
  ],
  ["with a server's certificate", special({ purpose: 'server' }), 'CERTIFICATE_PURPOSE', anonymous],
  ['with a certificate that is not on record', special({}), 'CERTIFICATE_UNKNOWN', spiffe('special')],
  [
    'with a certificate on record for a device that is not',
    special({ spiffeId: spiffe('gone'), recordedFor: 'gone' }),
    'DEVICE_DELETED',
    spiffe('gone'),
  ],
  [
    'with a name in another trust domain',
    special({ spiffeId: 'spiffe://elsewhere.example/device/special' }),
    'CERTIFICATE_IDENTITY',
    anonymous,
  ],
  ['with a revoked certificate', ofRevokedCertificate, 'CERTIFICATE_REVOKED', spiffe('lost-certificate')],
  ['with the certificate of a revoked device', ofRevokedDevice, 'DEVICE_REVOKED', spiffe('lost-device')],
] as const) {
  test(`who calls ${what} is refused with ${reason}, on record`, async t => {
    const who = await credentials(t)
    const seen = await refused(check(who))
    t.deepEqual([seen.code, seen.reason], ['UNAUTHENTICATED', reason])
    t.deepEqual(await audited(reason, actor), ['UNAUTHENTICATED'])
    // Streams are refused like single calls.
    const heart = heartbeats(t, mesh(), who)
    heart.send({})
    t.is((await endOf(heart))?.reason, reason)
  })
}

test('a device speaks for itself only', async t => {
  const [alice, bob] = [
    await mesh().enroll({ device: { id: 'alice' } }),
    await mesh().enroll({ device: { id: 'bob' } }),
  ]
  const seen = await refused(check(alice, 'bob'))
  t.deepEqual([seen.code, seen.reason], ['PERMISSION_DENIED', 'OTHER_DEVICE'])
  t.deepEqual(await audited('OTHER_DEVICE', spiffe('alice')), ['PERMISSION_DENIED'])

  // There is nothing in these messages that could name another; what arrives counts for the certificate's device.
  await heartbeats(t, mesh(), alice).beat(healthy)
  const { rows } = await mesh().pool.query(
    "select device_id from health_reports where device_id in ('alice', 'bob') order by 1",
  )
  t.deepEqual(rows, [{ device_id: 'alice' }])
  const { decisionId } = await authorizations(t, mesh(), bob).ask('ada', 'payroll')
  const decided = await mesh().pool.query('select device_id, caller from decisions where id = $1', [
    decisionId.split('.')[0],
  ])
  t.deepEqual(decided.rows, [{ device_id: 'bob', caller: spiffe('bob') }])

  const { enroll } = mesh().clients(bob)
  const renewed = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) })
  t.is(renewed.identity?.deviceId, 'bob')
})

test('devices may not administer, auditors may look only, and operators have no heartbeat', async t => {
  const device = await mesh().enroll({ device: { id: 'climber' } })
  const climbing = await refused(unary(mesh().clients(device).admin, 'listDevices', listAll))
  t.deepEqual([climbing.code, climbing.reason], ['PERMISSION_DENIED', 'WRONG_CALLER'])

  const keyPem = createKey()
  const csr = signingRequestFor(keyPem)
  const issued = await mesh().server.issueOperator({ name: 'otto', role: 'auditor', csr, validityMs: 60_000 })
  const auditor = mesh().clients({ ...issued, keyPem })
  const { devices } = await unary(auditor.admin, 'listDevices', listAll)
  t.true(devices.some(({ id }: { id: string }) => id === 'climber'))
  const revoking = await refused(unary(auditor.admin, 'revokeDevice', { id: 'climber', reason: '' }))
  t.deepEqual([revoking.code, revoking.reason], ['PERMISSION_DENIED', 'OPERATOR_NOT_PERMITTED'])
  await heartbeats(t, mesh(), device).beat(healthy)

  const heart = heartbeats(t, mesh(), { ...device, ...issued, keyPem })
  heart.send({})
  const ended = await endOf(heart)
  t.deepEqual([ended?.code, ended?.reason], ['PERMISSION_DENIED', 'WRONG_CALLER'])
})

const listAll = { pageSize: 1_000, pageToken: '', status: 0, labels: {} }

test('streams end when the certificate that opened them expires', async t => {
  const device = await mesh().enroll({ device: { id: 'short-lived' } })
  const issue = await specialLeaves(mesh())
  const leaf = await issue({ spiffeId: spiffe('short-lived'), validForMs: 4_000, recordedFor: 'short-lived' })
  const heart = heartbeats(t, mesh(), { ...device, ...leaf })
  await heart.beat(healthy)
  const access = authorizations(t, mesh(), { ...device, ...leaf })
  await access.ask('ada', 'payroll')
  for (const stream of [heart, access]) {
    const ended = await endOf(stream)
    t.deepEqual([ended?.code, ended?.reason], ['UNAUTHENTICATED', 'CERTIFICATE_EXPIRED'])
  }
  await heartbeats(t, mesh(), device).beat(healthy)
})

test('the server changes its certificate without a restart, and open streams live on', async t => {
  const renewing = await startEdgeMesh(t, { SERVER_CERT_VALIDITY_HOURS: '0.002' })
  const heart = heartbeats(t, renewing, await renewing.enroll())
  await heart.beat(healthy)
  const before = await serverCertificate(renewing)
  const after = await eventually('another server certificate', async () => {
    const presented = await serverCertificate(renewing)
    return presented.serialNumber !== before.serialNumber && presented
  })
  t.true(after.validToDate > before.validToDate)
  await heart.beat(healthy)
  await renewing.enroll()
  const { rows } = await renewing.pool.query(
    "select count(*)::int, max(not_after) > now() as lasts from certificates where subject_kind = 'service'",
  )
  t.true(rows[0].lasts)
  t.true(rows[0].count <= 10, `${rows[0].count} certificates in the life of one or two`)
})

/** What a new handshake presents. */
function serverCertificate({ server }: EdgeMesh): Promise<X509Certificate> {
  return new Promise((resolve, reject) => {
    const socket = connectTls(
      { host: '127.0.0.1', port: server.apiPort, servername: 'localhost', ca: server.rootsPem, ALPNProtocols: ['h2'] },
      () => {
        const presented = socket.getPeerX509Certificate()
        socket.destroy()
        if (presented) resolve(presented)
        else reject(new Error('the server presented no certificate'))
      },
    )
    socket.on('error', reject)
  })
}

test('a revocation at one instance cuts the streams at the other', async t => {
  const other = await startSecondInstance(t, mesh())
  const device = await mesh().enroll({ device: { id: 'wanderer' } })
  const [heart, access] = [heartbeats(t, other, device), authorizations(t, other, device)]
  await heart.beat(healthy)
  await access.ask('ada', 'payroll')
  await unary(mesh().admin, 'revokeDevice', { id: 'wanderer', reason: 'stolen' })
  for (const stream of [heart, access]) {
    const ended = await endOf(stream)
    t.deepEqual([ended?.code, ended?.reason], ['UNAUTHENTICATED', 'DEVICE_REVOKED'])
  }
  const again = await refused(unary(other.clients(device).authorize, 'check', { question, deviceId: '' }))
  t.is(again.reason, 'DEVICE_REVOKED')
})

test('a revocation that an instance could not hear of is enforced as soon as it is back in touch', async t => {
  const device = await mesh().enroll({ device: { id: 'unheard' } })
  const heart = heartbeats(t, mesh(), device)
  await heart.beat(healthy)
  // The feed's connection goes first, and nobody announces what comes next.
  await mesh().pool.query(
    `with gone as (
       select pg_terminate_backend(pid) from pg_stat_activity
       where datname = current_database() and application_name = 'edgemesh change feed'
     ) update devices set status = 'revoked' where id = 'unheard' and (select count(*) from gone) > 0`,
  )
  t.is((await endOf(heart))?.reason, 'DEVICE_REVOKED')
})
