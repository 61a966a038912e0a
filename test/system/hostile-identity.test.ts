/** What somebody might try with another's identity, and what must not be left behind by mistake. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import { bitString, decodeDer, integer, sequence } from '../../src/identity/der.ts'
import { heartbeats } from '../support/device.ts'
import {
  clientsOf,
  type EdgeMesh,
  eventually,
  freshCsr,
  refused,
  sharedEdgeMesh,
  startEdgeMesh,
  unary,
} from '../support/edgemesh.ts'
import { startEnroll } from '../support/enrolling.ts'
import { freePort } from '../support/free-port.ts'
import { healthy } from '../support/healthy.ts'
import { testDatabase } from '../support/postgres.ts'

const mesh = sharedEdgeMesh(test)
const listAll = { pageSize: 1, pageToken: '', status: 0, labels: {} }

/** A way to `host` that arrives there from that very port of ours. */
async function arrivingFrom(t: ExecutionContext, localPort: number, host: string, port: number): Promise<string> {
  const sockets = new Set<Socket>()
  const server = createServer(near => {
    const far = connect({ host, port, localAddress: '127.0.0.1', localPort })
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(socket)
      socket.on('error', () => {}).on('close', () => other.destroy())
      socket.pipe(other)
    }
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.close()
    for (const socket of sockets) socket.destroy()
  })
  return `127.0.0.1:${(server.address() as AddressInfo).port}`
}

test('who calls another address of ours from the address and port of an operator does not become the operator', async t => {
  const own = await startEdgeMesh(t, { API_HOST: '0.0.0.0' })
  const port = await freePort()
  const [stranger, operator] = await Promise.all(
    ['127.0.0.2', '127.0.0.1'].map(host => arrivingFrom(t, port, host, own.server.apiPort)),
  )
  const anonymous = clientsOf(t, stranger as string, own.anonymous).admin
  t.is((await refused(unary(anonymous, 'listDevices', listAll))).reason, 'CERTIFICATE_MISSING')
  // Whoever comes second is hung up on; the first is who it was, also after that.
  const second = await refused(unary(clientsOf(t, operator as string, own.operator).admin, 'listDevices', listAll))
  t.is(second.code, 'UNAVAILABLE')
  t.is((await refused(unary(anonymous, 'listDevices', listAll))).reason, 'CERTIFICATE_MISSING')
})

/** The other signature that is as good: (r, n − s) for (r, s). Nobody needs the key for it. */
function withTheOtherSignature(csr: Buffer): Buffer {
  const order = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n
  const [info, algorithm, bits] = decodeDer(csr).children
  const [r, s] = decodeDer(bits!.contents.subarray(1)).children
  const other = (order - BigInt(`0x${s!.contents.toString('hex')}`)).toString(16).padStart(64, '0')
  const signature = sequence(integer(r!.contents), integer(Buffer.from(other, 'hex')))
  return sequence(info!.der, algorithm!.der, bitString(signature))
}

test('a captured request is not good again under the other signature that anybody can make of its own', async t => {
  const token = await mesh().token({ usesMax: 5 })
  const keyPem = createKey()
  const { enroll } = mesh().clients(mesh().anonymous)
  const csr = await freshCsr(enroll, keyPem)
  await (await startEnroll(t, enroll, { token, keyPem, csr })).identity()
  const replay = await startEnroll(t, enroll, { token, keyPem, csr: withTheOtherSignature(csr) })
  t.is(await replay.outcome(), 'CSR_REPLAYED')
})

async function rotating(own: EdgeMesh, stages: Stage[]) {
  for (const stage of stages) {
    await unary(own.admin, 'rotateAuthority', { stage, force: true })
    await eventually(`stage ${stage}`, async () => {
      const seen = await unary(own.admin, 'getAuthority', {})
      return seen.rotationStage === stage
    })
  }
}

test('an authority is not forgotten while a device has its newest certificate of it, used or not', async t => {
  const own = await startEdgeMesh(t)
  const device = await own.enroll({ device: { id: 'away' } })
  await heartbeats(t, own, device).beat(healthy)
  await rotating(own, [Stage.PUBLISHED, Stage.ISSUING])
  const { enroll } = own.clients(device)
  await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) })
  await rotating(own, [Stage.PUBLISHED])
  const back = await refused(unary(own.admin, 'rotateAuthority', { stage: Stage.STABLE, force: false }))
  t.is(back.reason, 'ROTATION_NOT_READY')
  t.regex(back.message, /^1 devices and operators hold certificates/)
  // Renewed back, it needs the other one no more.
  await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) })
  await unary(own.admin, 'rotateAuthority', { stage: Stage.STABLE, force: false })
})

test('a device that may still come back with an expired certificate of the old authority is not left behind unasked', async t => {
  const own = await startEdgeMesh(t)
  await own.enroll({ device: { id: 'asleep' } })
  await own.pool.query("update certificates set not_after = now() - interval '1 day' where subject_id = 'asleep'")
  await rotating(own, [Stage.PUBLISHED, Stage.ISSUING])
  const refusal = await refused(unary(own.admin, 'rotateAuthority', { stage: Stage.RETIRING, force: false }))
  t.regex(refusal.message, /^1 of 1 devices/)
})

test('the version before finds the authority of today, or the way back is refused', async t => {
  const { url, pool, ...db } = await testDatabase(t)
  const own = await startEdgeMesh(t, { DATABASE_URL: url })
  await rotating(own, [Stage.PUBLISHED, Stage.ISSUING])
  await unary(own.admin, 'rotateAuthority', { stage: Stage.RETIRING, force: true })
  await own.server.stop()
  const newer = [
    '0009-device-labels',
    '0008-lifecycle-rules',
    '0007-presence',
    '0006-rate-limit-credit',
    '0005-audit-privileges',
    '0004-lease-resume',
    '0003-audit-seals',
  ]
  for (const name of newer) t.deepEqual(await db.migrateDown(), [name])
  await t.throwsAsync(db.migrateDown(), { message: /the certificate authority is being replaced/ })
  // As the last step of a rotation does it; the operator of this test has been left behind.
  await pool.query("delete from authorities where stage = 'retired'")
  const { rows: before } = await pool.query('select root_pem from authorities')
  await db.migrateDown()
  const { rows: after } = await pool.query('select id, root_pem from authorities')
  t.deepEqual(after, [{ id: 1, root_pem: before[0].root_pem }])
})

test('a holder that renews without end comes to one', async t => {
  const own = await startEdgeMesh(t, { RATE_LIMIT_ENROLLMENTS: '3/minute' })
  const device = await own.enroll()
  const { enroll } = own.clients(device)
  const renew = async () => unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) })
  for (let count = 0; count < 3; count++) await renew()
  t.is((await refused(renew())).reason, 'RATE_LIMITED')

  const patient = await mesh().enroll({ device: { id: 'patient' } })
  await mesh().pool.query(
    `insert into certificates (serial, subject_kind, subject_id, public_key_sha256, not_before, not_after, created_at)
     select 'kept-' || n, 'device', 'patient', '', now(), now() + interval '1 hour', now() from generate_series(1, 63) n`,
  )
  const client = mesh().clients(patient).enroll
  const csr = await freshCsr(client, createKey())
  t.is((await refused(unary(client, 'renewCertificate', { csr }))).reason, 'TOO_MANY_CERTIFICATES')
})
