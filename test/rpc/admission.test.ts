import { once } from 'node:events'
import { type AddressInfo, connect, createServer, Socket } from 'node:net'
import { mock } from 'node:test'
import test, { type ExecutionContext } from 'ava'
import {
  admitAtPace,
  handshakesPerTurnMax,
  type RefusedArrival,
  waitingMax,
  waitMsMax,
} from '../../src/rpc/admission.ts'
import { eventually } from '../support/edgemesh.ts'

/** A port that lets in at the pace, and begins no handshake. */
async function pacedPort(t: ExecutionContext, { arriveAtOnce = 0 } = {}) {
  const admitted: Socket[] = []
  /** How many were let in, by turn of the event loop. */
  const turns: number[] = []
  const refused: RefusedArrival[] = []
  let turn = -1
  const admission = admitAtPace({
    admit(socket) {
      admitted.push(socket)
      if (turn === -1) {
        turn = turns.push(0) - 1
        setImmediate(() => {
          turn = -1
        })
      }
      turns[turn]! += 1
    },
    onAdmitted: () => {},
    onRefused: why => refused.push(why),
  })
  const arrived: Socket[] = []
  const server = createServer(socket => {
    arrived.push(socket)
    t.teardown(() => socket.destroy())
    if (arriveAtOnce === 0) admission.arrive(socket)
    else if (arrived.length === arriveAtOnce) for (const each of arrived) admission.arrive(each)
  })
  t.teardown(() => server.close())
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const client = async (says = 'hello') => {
    const socket = connect({ port, host: '127.0.0.1' }).on('error', () => {})
    t.teardown(() => socket.destroy())
    await once(socket, 'connect')
    if (says) socket.write(says)
    return socket
  }
  return { admission, admitted, turns, refused, client }
}

test.serial('of many who come at once each turn of the event loop takes so many, until all are in', async t => {
  const count = 100
  const { admission, admitted, turns, client } = await pacedPort(t, { arriveAtOnce: count })
  await Promise.all(Array.from({ length: count }, () => client()))
  await eventually('all are in', () => admitted.length === count)
  t.true(Math.max(...turns) <= handshakesPerTurnMax, `${turns}`)
  t.is(admission.waiting(), 0)
})

test.serial('what a client has said before its turn came is there for who reads it then', async t => {
  const { admitted, client } = await pacedPort(t)
  await client('first words')
  const socket = await eventually('it is in', () => admitted[0])
  t.is(String(socket.read()), 'first words')
})

test.serial('those who say nothing keep nobody out, and are hung up on after ten seconds', async t => {
  mock.timers.enable({ apis: ['setTimeout'] })
  t.teardown(() => mock.timers.reset())
  const { admission, admitted, client } = await pacedPort(t)
  const silent = await Promise.all(Array.from({ length: 50 }, () => client('')))
  await client()
  while (admitted.length < 1) await new Promise(resolve => setImmediate(resolve))
  t.is(admission.waiting(), 0)
  const closed = Promise.all(silent.map(socket => once(socket.resume(), 'close')))
  mock.timers.tick(10_000)
  await closed
  t.is(admitted.length, 1)
})

test.serial('what is too long for a first record of TLS is hung up on', async t => {
  const { admitted, refused, client } = await pacedPort(t)
  const socket = await client('x'.repeat(60_000))
  socket.resume()
  await eventually('it is hung up on', () => socket.closed)
  t.deepEqual([...refused], ['no_hello'])
  t.is(admitted.length, 0)
})

test.serial('who leaves while it waits is not waited for, and its place is free', async t => {
  const { admission, admitted, client } = fakeArrivals(t)
  const [first, ...others] = Array.from({ length: handshakesPerTurnMax + 2 }, () => client())
  t.is(admission.waiting(), 2)
  others.at(-1)?.destroy()
  await eventually('the last but one is in', () => admission.waiting() === 0)
  t.deepEqual(admitted, [first, ...others.slice(0, -1)])
})

test.serial('who finds the queue full is hung up on at once, and so is who would wait too long', async t => {
  let now = 0
  mock.method(performance, 'now', () => now)
  t.teardown(() => mock.restoreAll())
  const { admission, admitted, refused, client } = fakeArrivals(t)
  const all = Array.from({ length: handshakesPerTurnMax + waitingMax + 3 }, () => client())
  t.is(admission.waiting(), waitingMax)
  t.deepEqual(refused, ['queue_full', 'queue_full', 'queue_full'])
  t.true(all.slice(-3).every(({ destroyed }) => destroyed))

  now = waitMsMax + 1
  await new Promise(resolve => setImmediate(resolve))
  t.is(admission.waiting(), 0)
  t.is(admitted.length, handshakesPerTurnMax)
  t.is(refused.filter(why => why === 'waited_too_long').length, waitingMax)
})

/** Arrivals without a network, all in one turn of the event loop, that have spoken. */
function fakeArrivals(t: ExecutionContext) {
  const admitted: Socket[] = []
  const refused: RefusedArrival[] = []
  const admission = admitAtPace({
    admit: socket => admitted.push(socket),
    onAdmitted: () => {},
    onRefused: why => refused.push(why),
  })
  const client = () => {
    const socket = new Socket()
    socket.push('hello')
    t.teardown(() => socket.destroy())
    admission.arrive(socket)
    return socket
  }
  return { admission, admitted, refused, client }
}
