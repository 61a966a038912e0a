/** What those who watch an instance see of it: while it serves, and while it stops. */
import { once } from 'node:events'
import { connect } from 'node:net'
import { Client, credentials } from '@grpc/grpc-js'
import test from 'ava'
import { HeartbeatServiceService } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import { type EdgeMesh, eventually, refused, shared as share, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const shared = share(test, startEdgeMesh)

const services = ['', ...['Enroll', 'Authorize', 'Heartbeat', 'Admin'].map(name => `edgemesh.v1.${name}Service`)]
const serving = Buffer.from('0801', 'hex')
const notServing = Buffer.from('0802', 'hex')

/** A client without a certificate, such as a load balancer. Messages of grpc.health.v1 are small enough to spell out. */
function health(t: { teardown(end: () => void): void }, { server, anonymous }: EdgeMesh) {
  const client = new Client(`127.0.0.1:${server.apiPort}`, credentials.createSsl(Buffer.from(anonymous.rootsPem)), {
    'grpc.ssl_target_name_override': 'localhost',
    'grpc.default_authority': 'localhost',
  })
  t.teardown(() => client.close())
  const asIs = (bytes: Buffer) => bytes
  const request = (service: string) =>
    service ? Buffer.concat([Buffer.from([0x0a, service.length]), Buffer.from(service)]) : Buffer.alloc(0)
  return {
    check: (service: string, bytes = request(service)) =>
      new Promise<Buffer>((resolve, reject) => {
        client.makeUnaryRequest('/grpc.health.v1.Health/Check', asIs, asIs, bytes, (error, answer) =>
          error ? reject(error) : resolve(answer as Buffer),
        )
      }),
    watch(service: string) {
      const seen: Buffer[] = []
      const stream = client.makeServerStreamRequest('/grpc.health.v1.Health/Watch', asIs, asIs, request(service))
      stream.on('data', answer => seen.push(answer))
      stream.on('error', () => {})
      t.teardown(() => stream.cancel())
      return seen
    },
  }
}

for (const service of services) {
  test(`anyone may ask whether ${service || 'the server'} is serving`, async t => {
    const { check, watch } = health(t, shared())
    t.deepEqual(await check(service), serving)
    const seen = watch(service)
    await eventually('the first answer', () => seen.length > 0)
    t.deepEqual(seen, [serving])
  })
}

test('the health of what does not exist is not known', async t => {
  const { check } = health(t, shared())
  t.is((await refused(check('nothing'))).code, 'NOT_FOUND')
  t.is((await refused(check('', Buffer.from('0aff', 'hex')))).code, 'INVALID_ARGUMENT')
})

test('probes and scrapers are answered over HTTP', async t => {
  const get = (path: string) => fetch(`http://127.0.0.1:${shared().server.metricsPort}${path}`)
  t.is(await (await get('/healthz')).text(), 'ok\n')
  const ready = await get('/readyz')
  t.is(ready.status, 200)
  const { checks } = (await ready.json()) as { checks: Record<string, { ok: boolean }> }
  t.deepEqual(Object.keys(checks).sort(), ['audit', 'authority', 'database', 'facts', 'lifecycle', 'policy'])
  t.true(Object.values(checks).every(({ ok }) => ok))
  const metrics = await get('/metrics')
  t.regex(metrics.headers.get('content-type') ?? '', /^text\/plain/)
  t.regex(await metrics.text(), /^edgemesh_build_info\{/m)
  t.is((await get('/')).status, 404)
})

test.serial('an instance that stops says so, acknowledges what it was told, and sends devices elsewhere', async t => {
  const listening = () => process.getActiveResourcesInfo().filter(kind => kind === 'TCPServerWrap').length
  const before = listening()
  const mesh = await startEdgeMesh(t)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  const halfOpen = connect(mesh.server.apiPort, '127.0.0.1')
  const hungUp = once(halfOpen, 'close')
  halfOpen.on('error', () => {}).resume()
  const watched = services.map(service => health(t, mesh).watch(service))
  await eventually('the first answers', () => watched.every(seen => seen.length > 0))
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  const allowed = await access.ask('ada', 'payroll')
  t.true(allowed.allowed)

  // Reports that the server has taken when it is told to stop; the last of them may wait for their commit.
  for (let sequence = 10; sequence < 20; sequence++) heart.send({ sequence })
  await eventually('the first of them is on record', () =>
    heart.responses.some(({ acknowledgedSequence }) => acknowledgedSequence >= 10),
  )
  const stopped = mesh.server.stop()
  t.like(await heart.ended, { code: 'UNAVAILABLE', reason: 'DRAINING' })
  t.like(await access.ended, { code: 'UNAVAILABLE', reason: 'DRAINING' })
  await stopped
  await hungUp
  t.is((await refused(health(t, mesh).check(''))).code, 'UNAVAILABLE')
  t.is(listening(), before, 'no port is left open')

  const directives = heart.responses.flatMap(({ directives }) => directives.map(({ kind }) => kind?.$case))
  t.deepEqual(directives, ['reconnect'])
  const acknowledged = Math.max(...heart.responses.map(({ acknowledgedSequence }) => acknowledgedSequence))
  t.is(acknowledged, 19, 'what was under way is acknowledged')
  const { rows } = await mesh.pool.query('select max(sequence)::int as last from health_reports')
  t.is(rows[0].last, acknowledged)
  for (const seen of watched) t.deepEqual(seen.slice(0, 2), [serving, notServing])
  const { rows: connections } = await mesh.pool.query(
    'select status, resume_by > now() as waits from connections where id = $1',
    [allowed.connectionId],
  )
  t.deepEqual(connections, [{ status: 'active', waits: true }], 'what it held waits to be resumed')
  const { rows: ends } = await mesh.pool.query(
    "select method, reason from audit_events where code = 'UNAVAILABLE' and reason = 'DRAINING' order by method",
  )
  t.deepEqual(
    ends.map(({ method }) => method),
    ['/edgemesh.v1.AuthorizeService/Authorize', HeartbeatServiceService.heartbeat.path],
  )
})
