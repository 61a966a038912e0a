/** Three instances behind the load balancers that are shipped, started from their files; two of the instances are there. */
import { setTimeout as sleep } from 'node:timers/promises'
import { credentials } from '@grpc/grpc-js'
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { HeartbeatRequest, HeartbeatServiceClient } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  enrollOnce,
  eventually,
  startEdgeMesh,
  startSecondInstance,
  type TestDevice,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { startHolder } from '../support/holder.ts'
import { balancer, balancers, checkFile, startBalancer } from '../support/load-balancers.ts'
import { relay } from '../support/relay.ts'
import { serve } from '../support/serve.ts'

/** Clients of tests that dial an instance themselves come from elsewhere than the balancer. */
const environment = { TRUSTED_PROXIES: balancer, HEARTBEAT_INTERVAL_SECONDS: '1', DRAIN_SECONDS: '8' }

async function start(t: ExecutionContext) {
  const mesh = await startEdgeMesh(t, environment)
  const second = await startSecondInstance(t, mesh, environment)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: '', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  return { mesh, second }
}

/** A heartbeat stream on which one report is made and nothing more is said, by a client that pings or does not. */
async function idleStream(t: ExecutionContext, port: number, device: TestDevice, pingEveryMs?: number) {
  const channel = credentials.createSsl(
    Buffer.from(device.rootsPem),
    Buffer.from(device.keyPem),
    Buffer.from(device.certificatePem),
  )
  const client = new HeartbeatServiceClient(`127.0.0.1:${port}`, channel, {
    'grpc.ssl_target_name_override': 'localhost',
    'grpc.default_authority': 'localhost',
    'grpc.use_local_subchannel_pool': 1,
    ...(pingEveryMs && { 'grpc.keepalive_time_ms': pingEveryMs }),
  })
  const stream = client.heartbeat()
  t.teardown(() => {
    stream.cancel()
    client.close()
  })
  const state = { isOpen: true }
  const end = () => {
    state.isOpen = false
  }
  stream.on('error', end).on('end', end)
  stream.write(HeartbeatRequest.fromPartial({ sequence: 1, posture: healthy }))
  await new Promise((resolve, reject) => stream.once('data', resolve).once('error', reject))
  return { state, report: (sequence: number) => void stream.write(HeartbeatRequest.fromPartial({ sequence })) }
}

for (const [name, shipped] of Object.entries(balancers)) {
  const { program } = shipped
  if (!program) {
    test.skip(`${name} is not here${name === 'nginx' ? ' with its stream module' : ''}: .ci/tools installs it`, t =>
      t.pass())
    continue
  }

  test(`${name} finds nothing wrong with its file`, async t => {
    t.is(await checkFile(t, shipped), '')
  })

  test(`behind ${name} devices enroll, report and are allowed at either instance, and are on record with their own address`, async t => {
    const { mesh, second } = await start(t)
    const port = await startBalancer(t, shipped, [mesh.server, second.server])
    const near = await relay(t, port, { from: '127.0.0.5' })
    const clients = (who: Credentials) => clientsOf(t, `127.0.0.1:${near}`, who)
    for (const id of ['alpha', 'beta', 'gamma', 'delta']) {
      const keyPem = createKey()
      const identity = await enrollOnce(clients(mesh.anonymous).enroll, await mesh.token(), keyPem, { id })
      const device = { ...mesh.anonymous, keyPem, certificatePem: identity.certificateChainPem.join('') }
      await heartbeats(t, { clients }, device).beat(healthy)
      t.true((await authorizations(t, { clients }, device).ask('ada', 'payroll')).allowed)
    }
    const { rows } = await mesh.pool.query<{ address: string; instance: string }>(
      `select distinct source_address as address, instance_id as instance from audit_events
       where method like '%/Heartbeat' order by 2`,
    )
    t.deepEqual([...new Set(rows.map(({ address }) => address))], ['127.0.0.5'])
    const both = [mesh.server.instanceId, second.server.instanceId]
    t.deepEqual(rows.map(({ instance }) => instance).sort(), both.sort())
  })

  test(`behind ${name} an instance stops, and an agent moves on with all that it holds`, async t => {
    const { mesh, second } = await start(t)
    const server = `127.0.0.1:${await startBalancer(t, shipped, [mesh.server, second.server])}`
    const { held, ended } = await startHolder(t, server, await mesh.token())
    const [answer] = await held.ask([{ user: 'ada', service: 'payroll' }])
    t.true(answer?.allowed)
    const holder = async () => {
      const { rows } = await mesh.pool.query<{ id: string; status: string }>(
        'select instance_id as id, status from connections',
      )
      return rows[0] ?? { id: '', status: 'none' }
    }
    await eventually('the connection has lasted', async () => (await holder()).status === 'active')
    const stopped = (await holder()).id === mesh.server.instanceId ? mesh : second
    const other = stopped === mesh ? second : mesh
    // What reports there has to move, too.
    await stopped.server.stop()
    await eventually('the other one holds it', async () => (await holder()).id === other.server.instanceId)
    t.deepEqual(await holder(), { id: other.server.instanceId, status: 'active' })
    t.deepEqual(ended, [])
    await eventually('it reports there', async () => {
      const { rows } = await mesh.pool.query("select instance_id as id from device_presence where device_id = 'alpha'")
      return rows[0]?.id === other.server.instanceId
    })
  })

  test(`behind ${name} an instance is killed, and an agent goes on elsewhere without losing anything that it holds`, async t => {
    const mesh = await startEdgeMesh(t)
    await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: '', role: 'admin' })
    await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
    const env = { ...testEnvironment, ...environment, DATABASE_URL: mesh.databaseUrl }
    const backends = {
      one: await serve(t, { ...env, INSTANCE_ID: 'one' }),
      two: await serve(t, { ...env, INSTANCE_ID: 'two' }),
    }
    const server = `127.0.0.1:${await startBalancer(t, shipped, Object.values(backends))}`
    const { held, ended } = await startHolder(t, server, await mesh.token())
    const question = { user: 'ada', service: 'payroll' }
    t.true((await held.ask([question]))[0]?.allowed)
    const holder = async () =>
      (
        await mesh.pool.query<{ id: 'one' | 'two' }>(
          "select instance_id as id from connections where status = 'active'",
        )
      ).rows[0]?.id
    const killed = await eventually('the connection has lasted', holder)
    const survivor = killed === 'one' ? 'two' : 'one'
    await backends[killed].kill()
    await eventually('the other one holds it', async () => (await holder()) === survivor)
    t.true((await held.ask([question]))[0]?.allowed, 'and answers at once')
    await eventually('it reports there', async () => {
      const { rows } = await mesh.pool.query("select instance_id as id from device_presence where device_id = 'alpha'")
      return rows[0]?.id === survivor
    })
    t.deepEqual(ended, [])
  })

  test(`behind ${name} reports and pings keep a stream for longer than a connection may be idle, and nothing else does`, async t => {
    const idleSeconds = 4
    const { mesh, second } = await start(t)
    const port = await startBalancer(t, shipped, [mesh.server, second.server], shipped.idle.only(idleSeconds))
    const device = () => mesh.enroll()
    const silent = await idleStream(t, port, await device())
    const pinging = await idleStream(t, port, await device(), 1_000)
    const reporting = await idleStream(t, port, await device())
    let sequence = 1
    const beating = setInterval(() => reporting.report(++sequence), 1_000)
    t.teardown(() => clearInterval(beating))
    await sleep(3 * idleSeconds * 1_000)
    t.deepEqual([silent.state.isOpen, pinging.state.isOpen, reporting.state.isOpen], [false, true, true])
  })

  test(`behind ${name} a stream on which nobody says anything is kept by the pings of its instance`, async t => {
    t.timeout(120_000)
    // Less than two of them, where the file allows two hours: what lives through this lives through a year.
    const idleSeconds = 40
    const { mesh, second } = await start(t)
    const port = await startBalancer(t, shipped, [mesh.server, second.server], shipped.idle.only(idleSeconds))
    const silent = await idleStream(t, port, await mesh.enroll())
    await sleep((idleSeconds + 15) * 1_000)
    t.true(silent.state.isOpen)
  })
}
