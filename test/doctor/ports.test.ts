/** Ports that are taken, can't be had, or are open to those who should not come. */
import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import test from 'ava'
import { outsideAddress, told } from '../support/doctor.ts'
import { startEdgeMesh } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'

test('ports that are free, and those that an instance has, are found well', async t => {
  const API_PORT = String(await freePort())
  t.deepEqual(await told({ API_PORT }, 'ports'), [
    `ok: API_PORT ${API_PORT} is free; METRICS_PORT is whichever is free`,
  ])
  const { server } = await startEdgeMesh(t)
  const env = { API_PORT: String(server.apiPort), METRICS_PORT: String(server.metricsPort) }
  t.deepEqual(await told(env, 'ports'), [
    `ok: an instance has API_PORT ${server.apiPort}; an instance has METRICS_PORT ${server.metricsPort}`,
  ])
})

test('ports that another program has, or an address that this host has not, are told', async t => {
  const taken = createServer(socket => socket.on('error', () => {}).end('who are you\n')).listen(0, '127.0.0.1')
  await once(taken, 'listening')
  t.teardown(() => taken.close())
  const port = String((taken.address() as AddressInfo).port)
  t.deepEqual(await told({ API_PORT: port }, 'ports'), [`failed: API_PORT ${port} is taken by another program`])
  t.deepEqual(await told({ METRICS_PORT: port }, 'ports'), [`failed: METRICS_PORT ${port} is taken by another program`])
  const free = String(await freePort())
  t.deepEqual(await told({ API_HOST: '203.0.113.7', API_PORT: free }, 'ports'), [
    `failed: API_PORT ${free} can not be had on 203.0.113.7 (EADDRNOTAVAIL)`,
  ])
})

test('metrics that listen where the internet may come are told', async t => {
  t.deepEqual(await told({}, 'metrics-exposure'), ['ok: on 127.0.0.1 alone'])
  t.deepEqual(await told({ METRICS_HOST: '10.1.2.3' }, 'metrics-exposure'), ['ok: on 10.1.2.3 alone'])
  t.deepEqual(await told({ METRICS_HOST: '203.0.113.7' }, 'metrics-exposure'), [
    'warning: METRICS_PORT listens on 203.0.113.7, which the internet may reach',
  ])
})

const host = outsideAddress()
const title = 'metrics that can be read at the address where devices connect fail'
if (host === undefined) {
  test.skip(`${title}: this host has no address beside 127.0.0.1`, t => t.pass())
} else {
  test(title, async t => {
    const { server } = await startEdgeMesh(t, { METRICS_HOST: '0.0.0.0' })
    const env = { METRICS_HOST: '0.0.0.0', METRICS_PORT: String(server.metricsPort) }
    t.deepEqual(await told(env, 'metrics-exposure', { publicAddress: { host, port: 8000 } }), [
      `failed: metrics can be read where devices connect: http://${host}:${server.metricsPort}/metrics`,
    ])
  })
}
