import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { authorizations, endOf, heartbeats } from '../support/device.ts'
import {
  type EdgeMesh,
  enrollOnce,
  eventually,
  refused,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const log = createLog({ level: 'fatal' })

/** A PostgreSQL that the test may stop. */
async function ownPostgres(t: ExecutionContext) {
  const directory = await mkdtemp(join(tmpdir(), 'edgemesh-outage-'))
  let running = await startEmbeddedPostgres({ directory, log })
  t.teardown(async () => {
    await running.stop()
    await rm(directory, { recursive: true, force: true })
  })
  const { url, port } = running
  return {
    url,
    stop: () => running.stop(),
    async start() {
      running = await startEmbeddedPostgres({ directory, log, port })
    },
    /** Comes back by itself. */
    crash: () => running.kill(),
  }
}

const outageMs = 10_000

async function readyz({ server }: EdgeMesh): Promise<{ status: number; failing: string[] }> {
  const response = await fetch(`http://127.0.0.1:${server.metricsPort}/readyz`)
  const { checks } = (await response.json()) as { checks: Record<string, { ok: boolean }> }
  return { status: response.status, failing: Object.keys(checks).filter(name => !checks[name]?.ok) }
}

const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }

async function openConnection(t: ExecutionContext, mesh: EdgeMesh, id: string) {
  const device = await mesh.enroll({ device: { id } })
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  const { allowed, connectionId } = await access.ask('ada', 'payroll')
  t.true(allowed)
  const check = () => unary(mesh.clients(device).authorize, 'check', { question, deviceId: '' })
  return { device, heart, access, connectionId, check }
}

test('while the database is away nothing new is allowed and nothing acknowledged is lost; back, all goes on', async t => {
  const postgres = await ownPostgres(t)
  const patient = await startEdgeMesh(t, { DATABASE_URL: postgres.url })
  const strict = await startSecondInstance(t, patient, { LEASE_GRACE_SECONDS: '2' })
  await unary(patient.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(patient.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const token = await patient.token({ usesMax: 2 })
  const alpha = await openConnection(t, patient, 'alpha')
  const beta = await openConnection(t, strict, 'beta')

  await postgres.stop()
  const stoppedAt = Date.now()
  const [check, enrollment, change] = await Promise.all([
    refused(alpha.check()),
    refused(enrollOnce(patient.clients(patient.anonymous).enroll, token, createKey())),
    refused(unary(patient.admin, 'revokeDevice', { id: 'alpha', reason: '' })),
  ])
  for (const [what, seen] of Object.entries({ check, enrollment, change })) {
    t.is(seen.code, 'UNAVAILABLE', what)
    t.true((seen.retryAfterMs ?? 0) > 0, `${what} is told when to come back`)
  }
  for (const mesh of [patient, strict]) {
    const { status, failing } = await readyz(mesh)
    t.is(status, 503)
    t.deepEqual(failing, ['database', 'facts'])
  }
  t.is((await fetch(`http://127.0.0.1:${patient.server.metricsPort}/healthz`)).status, 200)

  const undecided = await alpha.access.ask('ada', 'payroll')
  t.false(undecided.allowed)
  t.truthy(undecided.retryAfter, 'the stream stays, and its questions are told when to come back')

  const givenUp = await beta.access.revocationOf(beta.connectionId)
  t.deepEqual(
    givenUp.reasons.map(reason => reason.code),
    ['FACTS_UNKNOWN'],
  )
  t.deepEqual(alpha.access.revoked, [], 'the grace time of the other instance is not over')
  const waiting = alpha.heart.beat({ diskPercent: 42 })
  // The rest of ten seconds, for whatever would break only later.
  await new Promise(resolve => setTimeout(resolve, Math.max(0, stoppedAt + outageMs - Date.now())))

  await postgres.start()
  await waiting
  for (const mesh of [patient, strict]) {
    await eventually('the instance is ready', async () => (await readyz(mesh)).status === 200)
  }
  await alpha.heart.beat()
  await beta.heart.beat()
  t.true((await alpha.access.ask('ada', 'payroll')).allowed)
  t.true((await beta.access.ask('ada', 'payroll')).allowed)
  t.true((await alpha.check()).answer?.allowed)
  t.deepEqual(alpha.access.revoked, [], 'its connection outlived the outage')
  await patient.enroll({ token })

  const { rows: kept } = await patient.pool.query(
    `select c.id, c.status, p.posture ->> 'diskPercent' as disk from connections c
     join device_postures p using (device_id) where c.id = any($1) order by device_id`,
    [[alpha.connectionId, beta.connectionId]],
  )
  t.deepEqual(kept[0], { id: alpha.connectionId, status: 'active', disk: '42' })
  await eventually('the connection that was given up is on record as revoked', async () => {
    const { rows } = await patient.pool.query('select status, end_reasons from connections where id = $1', [
      beta.connectionId,
    ])
    return rows[0].status === 'revoked' && rows[0].end_reasons[0].code === 'FACTS_UNKNOWN'
  })
  await eventually('the refused calls are on record', async () => {
    const { rows } = await patient.pool.query(
      "select distinct method from audit_events where code = 'UNAVAILABLE' order by method",
    )
    return rows.length === 3
  })

  await unary(strict.admin, 'revokeDevice', { id: 'alpha', reason: 'stolen' })
  for (const stream of [alpha.heart, alpha.access]) t.is((await endOf(stream))?.reason, 'DEVICE_REVOKED')
  t.is((await refused(alpha.check())).reason, 'DEVICE_REVOKED')
})

test('after a crash of the database everything acknowledged is there, and a revocation right after it is enforced', async t => {
  const postgres = await ownPostgres(t)
  const mesh = await startEdgeMesh(t, { DATABASE_URL: postgres.url })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const { heart, access, connectionId } = await openConnection(t, mesh, 'alpha')
  await heart.beat({ diskPercent: 43 })
  postgres.crash()

  await eventually('the revocation is taken', () =>
    unary(mesh.admin, 'revokeDevice', { id: 'alpha', reason: 'stolen' }).catch(() => undefined),
  )
  for (const stream of [heart, access]) t.is((await endOf(stream))?.reason, 'DEVICE_REVOKED')
  const { rows } = await mesh.pool.query(
    `select p.posture ->> 'diskPercent' as disk, c.decision_id <> '' as decided from connections c
     join device_postures p using (device_id) where c.id = $1`,
    [connectionId],
  )
  t.deepEqual(rows, [{ disk: '43', decided: true }])
})

test('an instance that is told to stop while the database is away stops', async t => {
  const postgres = await ownPostgres(t)
  const mesh = await startEdgeMesh(t, { DATABASE_URL: postgres.url })
  const device = await mesh.enroll()
  await heartbeats(t, mesh, device).beat(healthy)
  await postgres.stop()
  await refused(mesh.token())
  await mesh.server.stop()
  await t.throwsAsync(fetch(`http://127.0.0.1:${mesh.server.metricsPort}/healthz`))
  await postgres.start()
})
