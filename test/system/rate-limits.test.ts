/** Rate limits on real servers: across instances, by the client's own address or by device. */
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { endOf, heartbeats } from '../support/device.ts'
import {
  clientsOf,
  type EdgeMesh,
  enrollOnce,
  type Refusal,
  refusal,
  refused,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { line } from '../support/proxy-header.ts'
import { relay } from '../support/relay.ts'

const balancer = '127.0.0.9'

/** A client whose connection comes from `address`, as a trusted proxy tells it. */
async function clientFrom(t: ExecutionContext, { server, anonymous }: EdgeMesh, address: string) {
  const family = address.includes(':') ? 'TCP6 %s ::1' : 'TCP4 %s 10.0.0.1'
  const header = line(`PROXY ${family.replace('%s', address)} 56324 443`)
  const port = await relay(t, server.apiPort, { from: balancer, pieces: [header] })
  return clientsOf(t, `127.0.0.1:${port}`, anonymous).enroll
}

async function refusalsOf(enrollments: Promise<unknown>[]): Promise<Refusal[]> {
  const settled = await Promise.allSettled(enrollments)
  return settled.flatMap(call => (call.status === 'rejected' ? [refusal(call.reason)] : []))
}

test('of fifty enrollments that race at two instances, ten are let through; nobody else is held up', async t => {
  const env = { RATE_LIMIT_ENROLLMENTS: '10/minute', TRUSTED_PROXIES: balancer }
  const one = await startEdgeMesh(t, env)
  const instances = [one, await startSecondInstance(t, one, env)]
  const token = await one.token({ usesMax: 100 })
  const storm = await Promise.all(instances.map(instance => clientFrom(t, instance, '203.0.113.7')))
  const racing = Array.from({ length: 50 }, (_, at) =>
    enrollOnce(storm[at % 2] as (typeof storm)[0], token, createKey()),
  )
  const refusals = await refusalsOf(racing)

  t.is(refusals.length, 40)
  for (const { code, reason, retryAfterMs } of refusals) {
    t.deepEqual([code, reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
    t.true(retryAfterMs !== undefined && retryAfterMs > 0 && retryAfterMs <= 60_000)
  }
  const { rows } = await one.pool.query('select count(*)::int as devices from devices')
  t.is(rows[0].devices, 10)
  for (const instance of instances) {
    await enrollOnce(await clientFrom(t, instance, '203.0.113.8'), token, createKey())
  }

  const audited = async () => {
    const { rows } = await one.pool.query<{ rows: number; refused: number }>(
      `select count(*)::int as rows, sum(coalesce((detail->>'refused')::int, 1))::int as refused from audit_events
       where reason = 'RATE_LIMITED' and source_address = '203.0.113.7'`,
    )
    return rows[0]
  }
  t.is((await audited())?.rows, 2, 'the first at each instance is on record before it is answered')
  for (const { server } of instances) await server.stop()
  t.deepEqual(
    await audited(),
    { rows: 4, refused: 40 },
    'the others as one event at each, which says how many they were',
  )
})

test('an attempt counts whatever becomes of it, and the addresses of one IPv6 network count together', async t => {
  const mesh = await startEdgeMesh(t, { RATE_LIMIT_ENROLLMENTS: '2/hour', TRUSTED_PROXIES: balancer })
  const attempt = async (address: string) =>
    (await refused(enrollOnce(await clientFrom(t, mesh, address), 'em1.wrong', createKey()))).reason
  t.is(await attempt('2001:db8:0:1::1'), 'TOKEN_MALFORMED')
  t.is(await attempt('2001:db8:0:1:ffff::2'), 'TOKEN_MALFORMED')
  t.is(await attempt('2001:db8:0:1::3'), 'RATE_LIMITED')
  t.is(await attempt('2001:db8:0:2::3'), 'TOKEN_MALFORMED')
})

test('who floods the calls that anyone may make is refused, with a certificate as well as without, and nobody else is', async t => {
  const mesh = await startEdgeMesh(t, { RATE_LIMIT_ENROLLMENTS: '1/minute', TRUSTED_PROXIES: balancer })
  const device = await mesh.enroll()
  const flood = await clientFrom(t, mesh, '203.0.113.7')
  for (const method of ['getChallenge', 'getTrustBundle'] as const) {
    const refusals = await refusalsOf(Array.from({ length: 30 }, () => unary(flood, method, {})))
    t.true(refusals.length >= 10)
    for (const { code, reason } of refusals) t.deepEqual([code, reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
  }
  await unary(await clientFrom(t, mesh, '203.0.113.8'), 'getChallenge', {})
  const own = mesh.clients(device).enroll
  const refusals = await refusalsOf(Array.from({ length: 30 }, () => unary(own, 'getTrustBundle', {})))
  t.true(refusals.length >= 10)
  await unary(mesh.clients(mesh.operator).enroll, 'getTrustBundle', {})
})

test('a device that asks three instances at once gets its limit and at most a tenth more, and is told when to come back', async t => {
  const env = { RATE_LIMIT_CONNECTIONS: '60/minute' }
  const one = await startEdgeMesh(t, env)
  const instances = [one, await startSecondInstance(t, one, env), await startSecondInstance(t, one, env)]
  const device = await one.enroll({ device: { id: 'alpha' } })
  const question = { id: '', user: 'ada', service: 'orders', action: '' }
  const asking = instances.flatMap(instance => {
    const { authorize } = instance.clients(device)
    return Array.from({ length: 50 }, () => unary(authorize, 'check', { question, deviceId: '' }))
  })
  const refusals = await refusalsOf(asking)
  const answered = asking.length - refusals.length
  t.true(answered >= 60 && answered <= 66, `${answered} answered`)
  for (const { code, reason, retryAfterMs } of refusals) {
    t.deepEqual([code, reason], ['RESOURCE_EXHAUSTED', 'RATE_LIMITED'])
    t.true(retryAfterMs !== undefined && retryAfterMs > 0 && retryAfterMs <= 60_000)
  }
  const { rows } = await one.pool.query('select count(*)::int as decisions from decisions')
  t.is(rows[0].decisions, answered)
})

test('a device that reports at three instances at once gets its limit and at most a tenth more; one that does not, all of its own', async t => {
  const env = { RATE_LIMIT_HEALTH: '20/minute' }
  const one = await startEdgeMesh(t, env)
  const instances = [one, await startSecondInstance(t, one, env), await startSecondInstance(t, one, env)]
  const [device, modest] = [await one.enroll({ device: { id: 'alpha' } }), await one.enroll({ device: { id: 'beta' } })]
  const streams = instances.map(instance => heartbeats(t, instance, device))
  const reports = streams.map(async stream => {
    for (let sent = 0; sent < 30; sent++) await stream.beat(healthy)
  })
  const ends = await Promise.all(streams.map(endOf))
  await Promise.allSettled(reports)
  for (const end of ends) {
    t.like(end, { code: 'RESOURCE_EXHAUSTED', reason: 'RATE_LIMITED' })
    t.true(end?.retryAfterMs !== undefined && end.retryAfterMs > 0 && end.retryAfterMs <= 60_000)
  }
  const acknowledged = streams.flatMap(({ responses }) => responses.filter(one => one.acknowledgedSequence > 0)).length
  t.true(acknowledged >= 20 && acknowledged <= 22, `${acknowledged} acknowledged`)

  const moving = heartbeats(t, instances[1]!, modest)
  for (let sent = 0; sent < 10; sent++) await moving.beat(healthy)
  const moved = heartbeats(t, instances[2]!, modest)
  for (let sent = 0; sent < 10; sent++) await moved.beat(healthy)
  t.pass()
})
