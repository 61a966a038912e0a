import test from 'ava'
import { applyLifecycleRules } from '../../src/admin/lifecycle.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { LifecycleAction, SetLifecycleRuleRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { entities } from '../../src/server.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { heartbeats } from '../support/device.ts'
import { eventually, startEdgeMesh, startSecondInstance, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { invalid, operator, refused } from './operator.ts'

const { QUARANTINE, DELETE } = LifecycleAction

const rule = (id: string, action: LifecycleAction, unseenDays: number, labels: Record<string, string> = {}) =>
  SetLifecycleRuleRequest.fromPartial({ rule: { id, action, unseenDays, labels } })

test('a rule replaces the one of its name, is listed, and can be taken away', async t => {
  const { admin, call, time } = await operator(t)
  const { rule: kept } = await admin.setLifecycleRule(rule('old', QUARANTINE, 30, { site: 'berlin' }), call())
  t.deepEqual(kept, {
    id: 'old',
    action: QUARANTINE,
    unseenDays: 30,
    labels: { site: 'berlin' },
    createdAt: new Date(time.now),
  })
  await admin.setLifecycleRule(rule('old', DELETE, 60), call())
  await admin.setLifecycleRule(rule('other', QUARANTINE, 1), call())
  const { rules } = await admin.listLifecycleRules({ pageSize: 0, pageToken: '' }, call())
  t.deepEqual(
    rules.map(({ id, action, unseenDays, labels }) => [id, action, unseenDays, labels]),
    [
      ['old', DELETE, 60, {}],
      ['other', QUARANTINE, 1, {}],
    ],
  )
  const { rules: first, nextPageToken: pageToken } = await admin.listLifecycleRules(
    { pageSize: 1, pageToken: '' },
    call(),
  )
  const { rules: rest } = await admin.listLifecycleRules({ pageSize: 1, pageToken }, call())
  t.deepEqual([...first, ...rest], rules)
  await admin.deleteLifecycleRule({ id: 'old' }, call())
  await refused(t, admin.deleteLifecycleRule({ id: 'old' }, call()), 'NOT_FOUND', 'LIFECYCLE_RULE_NOT_FOUND')
})

test('every wrong field of a rule is named at once', async t => {
  const { admin, call } = await operator(t)
  await invalid(t, admin.setLifecycleRule({ rule: undefined }, call()), ['rule'])
  await invalid(t, admin.setLifecycleRule(rule('A b', 0, 0), call()), ['rule.id', 'rule.action', 'rule.unseen_days'])
})

async function fleet(t: Parameters<typeof startEdgeMesh>[0]) {
  const mesh = await startEdgeMesh(t)
  const names = ['gone', 'here', 'fresh', 'office', 'out']
  const devices = new Map<string, Awaited<ReturnType<typeof mesh.enroll>>>()
  for (const id of names) {
    const token = await mesh.token({ labels: { site: id === 'office' ? 'office' : 'field' } })
    devices.set(id, await mesh.enroll({ token, device: { id } }))
  }
  await unary(mesh.admin, 'revokeDevice', { id: 'out', reason: 'stolen' })
  await mesh.pool.query(
    `update devices set enrolled_at = now() - interval '40 days', updated_at = now() - interval '40 days' where id <> 'fresh'`,
  )
  const ownEvents = () => ({ vouch: () => '', committed() {}, rolledBack() {} })
  const db = await openDatabase({ url: mesh.databaseUrl, poolMax: 4, entities })
  t.teardown(db.close)
  const log = createLog({ level: 'silent' })
  const apply = () =>
    applyLifecycleRules({ db, clock: Date.now, instanceId: 'one', trustDomain: 'edgemesh.local', ownEvents, log })
  const statuses = async () =>
    Object.fromEntries(
      (await mesh.pool.query('select id, status from devices order by id')).rows.map(({ id, status }) => [id, status]),
    )
  return { mesh, devices, apply, statuses }
}

test('devices that were not seen for long are quarantined, told why, and on record; those that are there are not', async t => {
  const { mesh, devices, apply, statuses } = await fleet(t)
  const stream = heartbeats(t, mesh, devices.get('here')!)
  await stream.beat(healthy)
  await mesh.pool.query(`update device_postures set received_at = now() - interval '40 days'`)
  await eventually(
    'it is there',
    async () => (await mesh.pool.query('select 1 from device_presence')).rows.length === 1,
  )
  await unary(mesh.admin, 'setLifecycleRule', rule('forgotten', QUARANTINE, 30, { site: 'field' }))
  t.deepEqual(await apply(), { quarantined: 1, deleted: 0 })
  t.deepEqual(await statuses(), {
    fresh: 'active',
    gone: 'quarantined',
    here: 'active',
    office: 'active',
    out: 'revoked',
  })
  t.deepEqual(await apply(), { quarantined: 0, deleted: 0 }, 'once')

  const { device } = await unary(mesh.admin, 'getDevice', { id: 'gone' })
  t.is(device?.statusReason, 'not seen for 30 days (rule forgotten)')
  const { rows } = await mesh.pool.query(
    `select actor, method, target, code, detail ->> 'after' as after from audit_events where method = 'lifecycle'`,
  )
  const actor = 'spiffe://edgemesh.local/service/edgemesh'
  t.deepEqual(rows, [{ actor, method: 'lifecycle', target: 'device/gone', code: 'OK', after: 'quarantined' }])

  // Whoever is let in again has its time anew.
  await unary(mesh.admin, 'releaseDevice', { id: 'gone' })
  t.deepEqual(await apply(), { quarantined: 0, deleted: 0 })
})

test('devices that were not seen for long are deleted with their certificates, but for those that are out for good', async t => {
  const { mesh, apply, statuses } = await fleet(t)
  await unary(mesh.admin, 'setLifecycleRule', rule('forgotten', DELETE, 30))
  t.deepEqual(await apply(), { quarantined: 0, deleted: 3 })
  t.deepEqual(await statuses(), { fresh: 'active', out: 'revoked' })
  const { rows } = await mesh.pool.query(
    `select count(*)::int as live from certificates where subject_kind = 'device' and revoked_at is null`,
  )
  t.is(rows[0].live, 1)
})

test('of instances that apply a rule at once each device is moved by one', async t => {
  const { mesh, apply } = await fleet(t)
  await startSecondInstance(t, mesh)
  await unary(mesh.admin, 'setLifecycleRule', rule('forgotten', QUARANTINE, 30))
  const runs = await Promise.all([apply(), apply(), apply()])
  t.is(
    runs.reduce((sum, { quarantined }) => sum + quarantined, 0),
    3,
  )
  const { rows } = await mesh.pool.query("select target from audit_events where method = 'lifecycle' order by target")
  t.deepEqual(
    rows.map(({ target }) => target),
    ['device/gone', 'device/here', 'device/office'],
  )
})
