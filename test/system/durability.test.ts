import type { ExecutionContext } from 'ava'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { type AuthorizeClient, authorizations, endOf, type HeartbeatClient, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  type EdgeMesh,
  enrollOnce,
  eventually,
  shared,
  startEdgeMesh,
  type TestDevice,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { operatorOf } from '../support/operator.ts'
import { testDatabase } from '../support/postgres.ts'
import { serve } from '../support/serve.ts'
import { noTokenRequest } from '../support/token-request.ts'

type InUse = { mesh: EdgeMesh; heart: HeartbeatClient; access: AuthorizeClient }

/** A service with a device that may reach something. */
async function furnished(t: ExecutionContext): Promise<InUse> {
  const mesh = await startEdgeMesh(t)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const device = await mesh.enroll()
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  return { mesh, heart, access: authorizations(t, mesh, device) }
}

const inUse = shared(test, furnished)

/** A service that can be killed and started again, and what its users hold. */
async function killable(t: ExecutionContext) {
  const { url, pool } = await testDatabase(t)
  const operator = await operatorOf({ ...testEnvironment, DATABASE_URL: url })
  let running = await serve(t, { ...testEnvironment, DATABASE_URL: url })
  const clients = (who: Credentials) => clientsOf(t, running.address, who)
  return {
    pool,
    clients,
    admin: () => clients(operator).admin,
    anonymous: { rootsPem: operator.rootsPem },
    async killAndRestart() {
      await running.kill()
      running = await serve(t, { ...testEnvironment, DATABASE_URL: url })
    },
  }
}

for (const [what, table, act] of [
  ['an enrollment', 'certificates', ({ mesh }) => mesh.enroll()],
  ['an administrative change', 'users', ({ mesh }) => unary(mesh.admin, 'updateUser', { id: 'ada', name: 'Augusta' })],
  ['a heartbeat', 'health_reports', ({ heart }) => heart.beat(healthy)],
  ['an allowed connection', 'decisions', ({ access }) => access.ask('ada', 'payroll')],
  ['a denied one', 'decisions', ({ access }) => access.ask('nobody', 'payroll')],
] as [string, string, (given: InUse) => Promise<unknown>][]) {
  test.serial(`${what} is acknowledged when it is in the database, and not before`, async t => {
    const blocker = await inUse().mesh.pool.connect()
    let acknowledged = false
    let acting: Promise<unknown>
    try {
      await blocker.query('begin')
      await blocker.query(`lock table ${table} in share mode`)
      acting = act(inUse()).then(() => {
        acknowledged = true
      })
      // Looked at more than once, so that an answer that was sent too early has arrived.
      let seen = 0
      await eventually('the write waits for the lock', async () => {
        const waiting = `select from pg_locks join pg_class on pg_class.oid = relation where not granted
          and relname ^@ $1 and database = (select oid from pg_database where datname = current_database())`
        if ((await inUse().mesh.pool.query(waiting, [table])).rowCount) seen++
        return seen >= 4
      })
      t.false(acknowledged)
    } finally {
      await blocker.query('rollback')
      blocker.release()
    }
    await acting
    t.true(acknowledged)
  })
}

test('whatever was acknowledged before kill -9 is there after the restart, and the device goes on', async t => {
  const service = await killable(t)
  const { pool } = service
  const only = async (statement: string, parameters: unknown[]) => (await pool.query(statement, parameters)).rows

  // An admin change.
  const { tokenText } = await unary(service.admin(), 'createEnrollmentToken', { ...noTokenRequest, usesMax: 100 })
  await service.killAndRestart()

  // An enrollment, among many that are cut off.
  const keys = Array.from({ length: 20 }, createKey)
  const { promise: enough, resolve } = Promise.withResolvers<void>()
  const acknowledged: TestDevice[] = []
  const enrollments = keys.map(async keyPem => {
    const identity = await enrollOnce(service.clients(service.anonymous).enroll, tokenText, keyPem)
    const certificatePem = identity.certificateChainPem.join('')
    if (acknowledged.push({ ...service.anonymous, identity, keyPem, certificatePem }) === 5) resolve()
  })
  await Promise.race([enough, Promise.all(enrollments)])
  const ended = Promise.allSettled(enrollments)
  await service.killAndRestart()
  await ended
  const ids = acknowledged.map(device => device.identity.deviceId)
  t.is((await only('select id from devices where id = any($1)', [ids])).length, acknowledged.length)
  const [{ uses }] = await only('select uses from enrollment_tokens', [])
  t.is((await only('select id from devices', [])).length, uses, 'a use for every device, a device for every use')

  // A heartbeat, with the certificate from before.
  const device = acknowledged[0] as TestDevice
  const id = device.identity.deviceId
  await heartbeats(t, service, device).beat({ ...healthy, diskPercent: 41 })
  await service.killAndRestart()
  const [kept] = await only('select posture, failing from device_postures where device_id = $1', [id])
  t.is(kept?.posture.diskPercent, 41)
  t.is((await only('select sequence from health_reports where device_id = $1', [id])).length, 1)

  // An allowed connection, which rests on that heartbeat.
  await unary(service.admin(), 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(service.admin(), 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const answer = await authorizations(t, service, device).ask('ada', 'payroll')
  t.true(answer.allowed)
  await service.killAndRestart()
  const decisions = await only('select questions from decisions where id = $1', [answer.decisionId.split('.')[0]])
  t.true(decisions[0]?.questions[0].allow)
  const [resumed] = await authorizations(t, service, device).resume([answer.connectionId])
  t.true(resumed?.allowed)
  t.deepEqual(await only('select device_id, service_id from connections where id = $1', [answer.connectionId]), [
    { device_id: id, service_id: 'payroll' },
  ])
  const [{ calls }] = await only(
    "select count(*)::int as calls from audit_events where method like '%/Heartbeat' and code = 'OK' and actor = $1",
    [device.identity.spiffeId],
  )
  t.true(calls > 0)

  // A revocation.
  t.true((await authorizations(t, service, device).ask('ada', 'payroll')).allowed)
  await unary(service.admin(), 'revokeDevice', { id, reason: 'stolen' })
  await service.killAndRestart()
  const cut = heartbeats(t, service, device)
  cut.send({})
  t.is((await endOf(cut))?.reason, 'DEVICE_REVOKED')
})
