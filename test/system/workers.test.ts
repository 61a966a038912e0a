/** `edgemesh serve --workers`: several processes that nobody who calls can tell from one. */
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, type TLSSocket } from 'node:tls'
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { endOf, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  clientsOf,
  enrollOnce,
  eventually,
  refused,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { operatorOf } from '../support/operator.ts'
import { testDatabase } from '../support/postgres.ts'
import { line } from '../support/proxy-header.ts'
import { relay } from '../support/relay.ts'
import { type ServedEdgeMesh, serve } from '../support/serve.ts'
import { twoRoles } from '../support/service-role.ts'
import { noTokenRequest } from '../support/token-request.ts'

/** So many workers on a database of their own, and whoever calls them. */
async function start(t: ExecutionContext, workers: number, env: Record<string, string> = {}, nodeArgs: string[] = []) {
  const { url, pool } = await testDatabase(t)
  const operator = await operatorOf({ ...testEnvironment, DATABASE_URL: url })
  const settings = { ...testEnvironment, DATABASE_URL: url, ...env }
  const served = await serve(t, settings, { args: ['--workers', String(workers)], nodeArgs })
  const clients = (who: Credentials) => clientsOf(t, served.address, who)
  const { admin } = clients(operator)
  return {
    served,
    clients,
    admin,
    operator,
    pool,
    async device(id: string) {
      const { tokenText } = await unary(admin, 'createEnrollmentToken', noTokenRequest)
      const keyPem = createKey()
      const { rootsPem } = operator
      const identity = await enrollOnce(clients({ rootsPem }).enroll, tokenText as string, keyPem, { id })
      return { rootsPem, keyPem, certificatePem: identity.certificateChainPem.join('') }
    },
  }
}

const workersOf = ({ pid }: { pid: number }) =>
  readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number)

const isAlive = (pid: number) => {
  try {
    // One that has ended and that nobody has asked for yet is a zombie.
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false
  }
}

/** The values of a family by one of its labels. */
async function scraped({ http }: ServedEdgeMesh, family: string, label: string): Promise<Map<string, number>> {
  const text = await (await fetch(`${http}/metrics`)).text()
  const samples = text.matchAll(new RegExp(`^${family}\\{(?:.*,)?${label}="([^"]*)".*\\} (\\S+)$`, 'gm'))
  return new Map([...samples].map(([, value, number]) => [value as string, Number(number)]))
}

const connectionsOf = async (served: ServedEdgeMesh) => [
  ...(await scraped(served, 'edgemesh_tls_connections', 'worker')).values(),
]

/** A client is through with its handshake a moment before the server is. */
const spread = (served: ServedEdgeMesh, even: number[]) =>
  eventually(`connections at the workers: ${even}`, async () => String(await connectionsOf(served)) === String(even))

/** Once all serve, and the one with that process is none of them. On a machine that is busy a start takes long. */
async function replaced(served: ServedEdgeMesh, pid: number, workers: number): Promise<void> {
  for (;;) {
    const pids = workersOf(served)
    if (pids.length === workers && !pids.includes(pid)) {
      const states = await scraped(served, 'edgemesh_workers', 'state')
      if (states.get('serving') === workers) return
    }
    await sleep(50)
  }
}

async function holdConnections(t: ExecutionContext, { address }: ServedEdgeMesh, count: number): Promise<TLSSocket[]> {
  const held: TLSSocket[] = []
  const port = Number(address.split(':')[1])
  let left = count
  const openers = Array.from({ length: 20 }, async () => {
    while (left-- > 0) {
      const socket = connect({ port, host: '127.0.0.1', ALPNProtocols: ['h2'], rejectUnauthorized: false })
      socket.on('error', () => {})
      socket.resume()
      held.push(socket)
      await once(socket, 'secureConnect')
    }
  })
  t.teardown(() => {
    for (const socket of held) socket.destroy()
  })
  await Promise.all(openers)
  return held
}

for (const workers of [2, 4]) {
  test(`${workers} workers have as many connections each, also after one was replaced and its clients have come back`, async t => {
    const { served } = await start(t, workers, { INSTANCE_ID: 'i'.repeat(63) })
    const count = 200
    const even = Array.from({ length: workers }, () => count / workers)
    const held = await holdConnections(t, served, count)
    await spread(served, even)
    const names = [...(await scraped(served, 'edgemesh_build_info', 'instance_id')).keys()]
    t.is(new Set(names).size, workers)
    for (const name of names) t.regex(name, /^i{50,}-\d-[0-9a-f]{8}$/)
    t.true(names.every(name => name.length <= 63))

    const [victim] = workersOf(served) as [number]
    process.kill(victim, 'SIGKILL')
    await eventually(
      'the loss of the connections',
      () => held.filter(({ closed }) => closed).length === count / workers,
    )
    await replaced(served, victim, workers)
    await holdConnections(t, served, count / workers)
    await spread(served, even)
    const newNames = [...(await scraped(served, 'edgemesh_build_info', 'instance_id')).keys()]
    t.is(newNames.filter(name => !names.includes(name)).length, 1, 'the new one has a new name')
  })
}

test('when a worker is killed, streams of the others go on, it is replaced, and scrapes and probes are answered all along', async t => {
  const { served, device, clients } = await start(t, 2)
  const streamsAtEach = async () => {
    const text = await (await fetch(`${served.http}/metrics`)).text()
    return text.match(/^edgemesh_streams_open\{worker="\d",method="[^"]*Heartbeat"\} [1-9]$/gm) ?? []
  }
  const streams = await Promise.all(
    ['a', 'b', 'c', 'd'].map(async id => {
      const stream = heartbeats(t, { clients }, await device(id))
      let broken = false
      stream.ended.then(() => {
        broken = true
      })
      await stream.beat(healthy)
      return { stream, isBroken: () => broken }
    }),
  )
  t.deepEqual((await streamsAtEach()).length, 2, 'each worker has some')
  let watching = true
  const answers: { ready: number; live: number; workers: number }[] = []
  const watch = (async () => {
    while (watching) {
      const [ready, live] = await Promise.all(['/readyz', '/healthz'].map(path => fetch(`${served.http}${path}`)))
      const workers = (await scraped(served, 'edgemesh_tls_connections', 'worker')).size
      answers.push({ ready: ready?.status ?? 0, live: live?.status ?? 0, workers })
      await sleep(20)
    }
  })()
  const [victim] = workersOf(served) as [number]
  process.kill(victim, 'SIGKILL')
  await eventually('the end of the streams of the killed one', () => streams.some(({ isBroken }) => isBroken()))
  await replaced(served, victim, 2)
  watching = false
  await watch
  const left = streams.filter(({ isBroken }) => !isBroken())
  t.true(left.length > 0)
  for (const { stream } of left) await stream.beat(healthy)
  t.false(left.some(({ isBroken }) => isBroken()))
  t.deepEqual([...new Set(answers.map(({ ready, live }) => `${ready} ${live}`))], ['200 200'])
  t.true(answers.every(({ workers }) => workers >= 1))
  t.like(
    served.log.find(({ msg }) => msg === 'a worker has died; another takes its place'),
    { level: 'error', worker: '1', pid: victim, signal: 'SIGKILL', how: 'crashed' },
  )
  t.is((await scraped(served, 'edgemesh_worker_exits_total', 'how')).get('crashed'), 1)
  t.false(workersOf(served).includes(victim))
  const crl = await fetch(`${served.http}/crl`)
  t.deepEqual([crl.status, crl.headers.get('content-type')], [200, 'application/pkix-crl'])
  t.is(new Uint8Array(await crl.arrayBuffer())[0], 0x30)
})

for (const [how, signal] of [
  ['the parent', (pid: number) => process.kill(pid, 'SIGTERM')],
  ['the whole group', (pid: number) => process.kill(-pid, 'SIGTERM')],
  ['the whole group by Ctrl-C', (pid: number) => process.kill(-pid, 'SIGINT')],
] as const) {
  test(`told to stop by a signal to ${how}, all workers ask their devices to leave, and it ends with 0`, async t => {
    const { served, device, clients } = await start(t, 2, { DRAIN_SECONDS: '4' })
    const streams = await Promise.all(['a', 'b'].map(async id => heartbeats(t, { clients }, await device(id))))
    await Promise.all(streams.map(stream => stream.beat(healthy)))
    t.deepEqual(await connectionsOf(served).then(counts => counts.every(count => count > 0)), true)
    const workers = workersOf(served)
    signal(served.pid)
    await Promise.all(
      streams.map(stream =>
        eventually('the request to leave', () =>
          stream.responses.some(({ directives }) => directives.some(({ kind }) => kind?.$case === 'reconnect')),
        ),
      ),
    )
    for (const stream of streams) stream.end()
    for (const stream of streams) t.is(await endOf(stream), undefined)
    t.deepEqual(await served.ended, { code: 0, signal: null })
    t.false(workers.some(isAlive))
    t.is(served.log.at(-1)?.msg, 'edgemesh has stopped')
    t.false(served.log.some(({ level }) => level === 'error' || level === 'fatal'))
  })
}

test('behind a trusted proxy, workers see the addresses of clients', async t => {
  const balancer = '127.0.0.9'
  const { served, operator, pool } = await start(t, 2, { TRUSTED_PROXIES: balancer })
  const port = Number(served.address.split(':')[1])
  for (const client of ['203.0.113.7', '203.0.113.8', '203.0.113.9']) {
    const header = line(`PROXY TCP4 ${client} 10.0.0.1 56324 443`)
    // Byte by byte, so that the header arrives at the worker in pieces.
    const proxied = await relay(t, port, { from: balancer, pieces: [header.subarray(0, 5), header.subarray(5)] })
    const { enroll } = clientsOf(t, `127.0.0.1:${proxied}`, { rootsPem: operator.rootsPem })
    t.is((await refused(enrollOnce(enroll, 'em1.wrong', createKey()))).reason, 'TOKEN_MALFORMED')
    const seen = await eventually('the event', async () => {
      const { rows } = await pool.query(
        'select instance_id from audit_events where source_address = $1 and reason = $2',
        [client, 'TOKEN_MALFORMED'],
      )
      return rows.length > 0 && rows
    })
    t.is(seen.length, 1)
  }
})

test('a worker that dies again and again is replaced ever later', async t => {
  const { served } = await start(t, 2)
  for (let death = 0; death < 3; death++) {
    const [first, second] = workersOf(served) as [number, number]
    // The children are listed in the order of their starts: the one that was replaced is the younger.
    const victim = death === 0 ? first : second
    process.kill(victim, 'SIGKILL')
    await replaced(served, victim, 2)
  }
  const pauses = served.log.flatMap(({ msg, worker, retryMs }) =>
    msg === 'a worker has died; another takes its place' && worker === '1' ? [retryMs as number] : [],
  )
  t.is(pauses.length, 3)
  for (const [at, most] of [250, 500, 1_000].entries()) {
    t.true((pauses[at] as number) >= most / 2 && (pauses[at] as number) <= most, String(pauses))
  }
})

test('a second Ctrl-C ends all at once', async t => {
  const { served, device, clients } = await start(t, 2, { DRAIN_SECONDS: '60' })
  await heartbeats(t, { clients }, await device('a')).beat(healthy)
  const workers = workersOf(served)
  process.kill(-served.pid, 'SIGINT')
  await sleep(1_000)
  t.true(workers.some(isAlive))
  process.kill(-served.pid, 'SIGINT')
  t.deepEqual(await served.ended, { code: 130, signal: null })
  await eventually('the end of the workers', () => !workers.some(isAlive))
})

test('with auto and the embedded database there is one process, and it says why', async t => {
  const dataDir = await mkdtemp(join(tmpdir(), 'edgemesh-workers-'))
  t.teardown(() => rm(dataDir, { recursive: true, force: true }))
  const served = await serve(t, { ...testEnvironment, DATA_DIR: dataDir }, { args: ['--workers', 'auto'] })
  t.like(
    served.log.find(({ msg }) => msg === 'there is one process'),
    { cause: 'the embedded database' },
  )
  process.kill(served.pid, 'SIGTERM')
  t.deepEqual(await served.ended, { code: 0, signal: null })
})

test('a worker that does not end is killed, and the exit code says that something was', async t => {
  const { served } = await start(t, 2, { DRAIN_SECONDS: '0.5' })
  const [stuck] = workersOf(served)
  process.kill(stuck as number, 'SIGSTOP')
  process.kill(served.pid, 'SIGTERM')
  t.deepEqual(await served.ended, { code: 1, signal: null })
  t.false(isAlive(stuck as number))
  t.like(
    served.log.find(({ msg }) => msg === 'a worker has not stopped in time and is killed'),
    { level: 'error', worker: '1' },
  )
})

test('a worker that is told to stop by somebody else drains and is replaced at once', async t => {
  const { served } = await start(t, 2)
  const [left] = workersOf(served) as [number]
  process.kill(left, 'SIGTERM')
  await replaced(served, left, 2)
  t.is((await scraped(served, 'edgemesh_worker_exits_total', 'how')).get('left'), 1)
})

test('a worker that hangs is killed and replaced', async t => {
  const { served } = await start(t, 2)
  const [hung] = workersOf(served) as [number]
  process.kill(hung, 'SIGSTOP')
  await new Promise<void>(resolve => {
    const looking = setInterval(() => {
      if (isAlive(hung)) return
      clearInterval(looking)
      resolve()
    }, 100)
  })
  await replaced(served, hung, 2)
  t.is((await scraped(served, 'edgemesh_worker_exits_total', 'how')).get('silent'), 1)
  t.like(
    served.log.find(({ msg }) => msg === 'a worker has been silent for too long and is killed'),
    { level: 'error', worker: '1' },
  )
})

test('when the parent is killed its workers end by themselves', async t => {
  const { served } = await start(t, 2)
  const workers = workersOf(served)
  t.is(workers.length, 2)
  await served.kill()
  await eventually('their end', () => !workers.some(isAlive))
  t.pass()
})

test('workers share the connections to the database and the memory, and it says so', async t => {
  const env = { DATABASE_POOL_SIZE: '7', DATABASE_MAX_OVERFLOW: '2' }
  const { served } = await start(t, 2, env, ['--max-old-space-size=512'])
  const said = served.log.find(({ msg }) => msg === 'starting workers')
  t.like(said, { workers: 2, each: { databaseConnections: 4, heapMiB: 256 } })
  for (const pid of workersOf(served)) {
    const args = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0')
    t.deepEqual(
      args.filter(arg => arg.startsWith('--max-old-space-size')),
      ['--max-old-space-size=256'],
    )
    t.false(args.some(arg => arg.includes(testEnvironment.ENROLLMENT_TOKEN_SECRET)))
  }
})

/** Ten times as many as there are connections; each of them waits for at most three seconds for its turn at one. */
const devicesAtOnce = 20

test('workers with the fewest connections to the database, two each, do all that is asked of them at once', async t => {
  const { device, clients } = await start(t, 2, { DATABASE_POOL_SIZE: '1', DATABASE_MAX_OVERFLOW: '0' })
  const devices = await Promise.all(Array.from({ length: devicesAtOnce }, (_, at) => device(`device-${at}`)))
  const question = { id: '', user: 'ada', service: 'orders', action: '' }
  await Promise.all(
    devices.map(async device => {
      const stream = heartbeats(t, { clients }, device)
      const { authorize } = clients(device)
      for (let turn = 0; turn < 3; turn++) {
        await Promise.all([stream.beat(healthy), unary(authorize, 'check', { question, deviceId: '' })])
      }
    }),
  )
  t.is(new Set(devices.map(({ certificatePem }) => certificatePem)).size, devicesAtOnce)
})

test('workers that can not start end the start with one error and exit code 1', async t => {
  // Nobody has migrated, and the role may not.
  const { service } = await twoRoles(t)
  const env = { ...testEnvironment, DATABASE_URL: service.url }
  const failure = await t.throwsAsync(serve(t, env, { args: ['--workers', '3'] }))
  t.regex(failure?.message ?? '', /error: the schema is not up to date/)
  t.is(failure?.message.match(/error: /g)?.length, 1)
})
