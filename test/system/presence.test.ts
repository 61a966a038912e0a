/** Whether a device is there, as an operator sees it at any instance. */
import test, { type ExecutionContext } from 'ava'
import { DevicePresence } from '../../src/gen/edgemesh/v1/types.ts'
import { heartbeats } from '../support/device.ts'
import { type EdgeMesh, eventually, startEdgeMesh, startSecondInstance, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const { ONLINE, STALE, OFFLINE } = DevicePresence

async function start(t: ExecutionContext) {
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  return { mesh, device }
}

const look = async ({ admin }: EdgeMesh) => (await unary(admin, 'getDevice', { id: 'alpha' })).device!

const listed = async ({ admin }: EdgeMesh, presence: DevicePresence) => {
  const filter = { pageSize: 0, pageToken: '', status: 0, labels: {}, presence }
  return (await unary(admin, 'listDevices', filter)).devices.map(({ id }) => id)
}

const becomes = (mesh: EdgeMesh, presence: DevicePresence) =>
  eventually(`the device is ${presence}`, async () => (await look(mesh)).presence === presence && look(mesh))

test('a device is online while it holds a stream, which every instance knows, and offline some seconds after', async t => {
  const { mesh, device } = await start(t)
  const second = await startSecondInstance(t, mesh)
  t.like(await look(mesh), { presence: OFFLINE, presentSince: undefined, instanceId: '' })
  const stream = heartbeats(t, mesh, device)
  await stream.beat(healthy)
  const { presentSince } = await becomes(second, ONLINE)
  t.is((await look(second)).instanceId, mesh.server.instanceId)
  t.deepEqual([await listed(second, ONLINE), await listed(second, OFFLINE)], [['alpha'], []])

  // It moves: nobody sees it go.
  const elsewhere = heartbeats(t, second, device)
  await elsewhere.beat(healthy)
  stream.end()
  await stream.ended
  await eventually('it is at the other one', async () => (await look(mesh)).instanceId === second.server.instanceId)
  t.deepEqual((await look(mesh)).presentSince, presentSince, 'it has been there all along')

  elsewhere.end()
  await elsewhere.ended
  t.is((await look(mesh)).presence, ONLINE, 'it may be about to come back')
  await becomes(mesh, OFFLINE)
  t.deepEqual([await listed(mesh, ONLINE), await listed(mesh, OFFLINE)], [[], ['alpha']])
})

test('a device that comes back at once has not been away', async t => {
  const { mesh, device } = await start(t)
  const seen = new Set<DevicePresence>()
  const first = heartbeats(t, mesh, device)
  await first.beat(healthy)
  const { presentSince } = await becomes(mesh, ONLINE)
  for (let turn = 0; turn < 5; turn++) {
    const next = heartbeats(t, mesh, device)
    if (turn === 0) {
      first.end()
      await first.ended
    }
    await next.beat(healthy)
    seen.add((await look(mesh)).presence)
    next.end()
    await next.ended
    seen.add((await look(mesh)).presence)
  }
  t.deepEqual([...seen], [ONLINE])
  t.deepEqual((await look(mesh)).presentSince, presentSince)
})

test('a device that holds a stream and does not report is stale', async t => {
  const { mesh, device } = await start(t)
  await heartbeats(t, mesh, device).beat(healthy)
  await becomes(mesh, ONLINE)
  await mesh.pool.query("update device_postures set measured_at = now() - interval '1 hour'")
  t.is((await look(mesh)).presence, STALE)
  t.deepEqual(await listed(mesh, STALE), ['alpha'])
})

test('nobody is at an instance that has given no sign of life, and what it has left is no hindrance', async t => {
  const { mesh, device } = await start(t)
  await mesh.pool.query(
    `insert into instances (id, started_at, seen_at) values ('dead', now(), now() - interval '20 s')`,
  )
  await mesh.pool.query(
    `insert into device_presence (device_id, instance_id, since) values ('alpha', 'dead', now() - interval '1 day')`,
  )
  t.like(await look(mesh), { presence: OFFLINE, presentSince: undefined, instanceId: '' })
  const before = Date.now()
  await heartbeats(t, mesh, device).beat(healthy)
  const { presentSince } = await becomes(mesh, ONLINE)
  t.true(Number(presentSince) > before - 5_000, 'not since the days of the dead')
})

test('an instance that stops takes its word back', async t => {
  const { mesh, device } = await start(t)
  const second = await startSecondInstance(t, mesh)
  await heartbeats(t, mesh, device).beat(healthy)
  await becomes(second, ONLINE)
  await mesh.server.stop()
  t.is((await look(second)).presence, OFFLINE)
})

test('how many devices are there is counted for Prometheus', async t => {
  const { mesh, device } = await start(t)
  await mesh.enroll({ device: { id: 'beta' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const counted = await eventually('they are counted', async () => {
    const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
    return /edgemesh_devices_present\{presence="online"\} 1\n/.test(text) && text.includes('{presence="offline"} 1\n')
  })
  t.true(counted)
})
