import test from 'ava'
import { authorizations, heartbeats } from '../support/device.ts'
import { eventually, refused, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa, startOpa } from '../support/opa.ts'

const withOpa = findOpa() === undefined ? test.skip : test

withOpa(
  'while OPA is away nothing is allowed and nothing is taken back; back, it decides again (needs opa)',
  async t => {
    const opa = await startOpa(t)
    const mesh = await startEdgeMesh(t, { OPA_URL: opa.url })
    await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
    await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
    const device = await mesh.enroll()
    const heart = heartbeats(t, mesh, device)
    await heart.beat(healthy)
    const access = authorizations(t, mesh, device)
    const { allowed, connectionId } = await access.ask('ada', 'payroll')
    t.true(allowed)
    const check = (user: string) => {
      const question = { id: 'q', user, service: 'payroll', action: '' }
      return unary(mesh.clients(device).authorize, 'check', { question, deviceId: '' })
    }
    const readyz = async () => {
      const response = await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/readyz`)
      return { status: response.status, body: (await response.json()) as { checks: { policy: { ok: boolean } } } }
    }
    const before = await check('nobody')
    t.false(before.answer?.allowed)
    const [{ questions }] = (
      await mesh.pool.query('select questions from decisions where id = $1', [before.answer?.decisionId.split('.')[0]])
    ).rows
    t.deepEqual(
      questions[0].reasons.map((reason: { code: string }) => reason.code),
      before.answer?.reasons.map(reason => reason.code),
    )

    await opa.kill()
    // Nobody has asked for these yet, so no answer can come from memory.
    for (const user of ['grace', 'alan', 'edsger']) {
      const seen = await refused(check(user))
      t.deepEqual([seen.code, seen.reason], ['UNAVAILABLE', 'POLICY_UNAVAILABLE'])
      t.true((seen.retryAfterMs ?? 0) > 0)
    }
    await eventually('the instance is not ready', async () => {
      const { status, body } = await readyz()
      return status === 503 && !body.checks.policy.ok
    })
    const undecided = await access.ask('ken', 'payroll')
    t.false(undecided.allowed)
    t.truthy(undecided.retryAfter, 'the stream stays, and its questions are told when to come back')
    // Asks for a new decision on the open connection, which can't be had.
    await mesh.pool.query("select pg_notify('edgemesh_changes', $1)", [`device:${device.identity.deviceId}`])
    t.is((await refused(unary(mesh.admin, 'getDevice', { id: device.identity.deviceId }))).reason, 'POLICY_UNAVAILABLE')
    t.deepEqual(access.revoked, [])

    await opa.restart()
    await eventually('the instance is ready', async () => (await readyz()).status === 200)
    t.false((await eventually('an answer', () => check('grace').catch(() => undefined))).answer?.allowed)
    t.true((await check('ada')).answer?.allowed)
    t.deepEqual(access.revoked, [], 'the connection outlived the outage')

    await heart.beat({ diskEncrypted: false })
    const { reasons } = await access.revocationOf(connectionId)
    t.deepEqual(
      reasons.map(reason => reason.code),
      ['DISK_NOT_ENCRYPTED'],
    )
  },
)
