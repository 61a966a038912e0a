/** Connections that want nothing: how many of them the port keeps, and for how long. */
import { once } from 'node:events'
import { mock } from 'node:test'
import { type ConnectionOptions, connect, type TLSSocket } from 'node:tls'
import test from 'ava'
import { heartbeats } from '../support/device.ts'
import { type EdgeMesh, eventually, startEdgeMesh } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

/** One that shows no certificate. Whether the other end hangs up is to be seen from its events. */
function silent({ server }: EdgeMesh, options: ConnectionOptions & { localAddress?: string } = {}): TLSSocket {
  const socket = connect({
    host: '127.0.0.1',
    port: server.apiPort,
    servername: 'localhost',
    rejectUnauthorized: false,
    ALPNProtocols: ['h2'],
    ...options,
  })
  socket.on('error', () => {})
  return socket
}

/** Until the server's first frame has come: the connection has its place. @returns whether it got one */
async function takesPlace(socket: TLSSocket): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>()
  socket.once('data', () => resolve(true))
  socket.once('close', () => resolve(false))
  return promise
}

async function refusedCounted({ server }: EdgeMesh, why: string): Promise<number> {
  const scraped = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  return Number(scraped.match(new RegExp(`^edgemesh_refused_connections_total\\{why="${why}"\\} (\\d+)`, 'm'))?.[1])
}

test.serial('a connection that does not ask for HTTP/2 is ended with its handshake, and counted', async t => {
  const mesh = await startEdgeMesh(t)
  t.is(await refusedCounted(mesh, 'not_http2'), 0)
  t.false(await takesPlace(silent(mesh, { ALPNProtocols: [] })))
  t.is(await refusedCounted(mesh, 'not_http2'), 1)
})

test.serial('an address full of connections without a certificate keeps out no other, and no device', async t => {
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll()
  const full: TLSSocket[] = []
  t.teardown(() => {
    for (const socket of full) socket.destroy()
  })
  // The clients of the test have places, too; the server knows how many.
  while (full.length <= 1_000) {
    const some = Array.from({ length: 50 }, () => silent(mesh))
    const taken = await Promise.all(some.map(takesPlace))
    full.push(...some.filter((_, at) => taken[at]))
    if (taken.includes(false)) break
  }
  t.true(full.length <= 1_000 && full.length >= 990, `${full.length} connections`)
  t.true((await refusedCounted(mesh, 'address_full')) > 0)

  const elsewhere = silent(mesh, { localAddress: '127.0.0.2' })
  t.true(await takesPlace(elsewhere))
  elsewhere.destroy()
  await heartbeats(t, mesh, device).beat(healthy)

  full.pop()?.destroy()
  await eventually('a place that is given up is free', async () => {
    const next = silent(mesh)
    const taken = await takesPlace(next)
    if (taken) full.push(next)
    return taken
  })
})

test.serial('a connection without a call loses its place after two minutes, also where it never hangs up', async t => {
  const mesh = await startEdgeMesh(t)
  mock.timers.enable({ apis: ['setTimeout', 'Date'], now: Date.now() })
  t.teardown(() => mock.timers.reset())
  const socket = silent(mesh, { allowHalfOpen: true } as ConnectionOptions)
  t.teardown(() => socket.destroy())
  t.true(await takesPlace(socket))
  let ended = false
  socket.once('end', () => {
    ended = true
  })
  socket.resume()
  mock.timers.tick(119_000)
  await new Promise(resolve => setImmediate(resolve))
  t.false(ended)
  mock.timers.tick(1_000)
  await once(socket, 'end')
  await new Promise(resolve => setImmediate(resolve))
  mock.timers.tick(5_000)
  mock.timers.reset()
  await eventually('nobody is there any more', () => {
    if (socket.destroyed) return true
    socket.write(Buffer.alloc(16))
    return false
  })
  t.pass()
})
