/**
 * What comes from those who mean harm, or whose client is broken: at every method, and below gRPC.
 *
 * Messages are made from the contract (`support/hostile-messages.ts`), so a new method is covered without a line here.
 */
import { once } from 'node:events'
import { type ClientHttp2Session, connect as connectHttp2, constants } from 'node:http2'
import { connect as connectTcp } from 'node:net'
import { connect as connectTls } from 'node:tls'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import {
  type Client,
  type ClientReadableStream,
  credentials,
  Metadata,
  makeGenericClientConstructor,
  type ServiceDefinition,
} from '@grpc/grpc-js'
import test from 'ava'
import fc from 'fast-check'
import { createKey } from '../../src/client/csr.ts'
import { AdminServiceService } from '../../src/gen/edgemesh/v1/admin.ts'
import { type AuthorizeRequest, AuthorizeServiceService } from '../../src/gen/edgemesh/v1/authorize.ts'
import { EnrollServiceService } from '../../src/gen/edgemesh/v1/enroll.ts'
import { HeartbeatServiceService } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  type Refusal,
  refusal,
  refused,
  shared as share,
  startEdgeMesh,
  type TestDevice,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { type HostileMessage, hasField, hostile, plausible, requestShape } from '../support/hostile-messages.ts'

let device: TestDevice

/** A server with somebody and something to ask about, and a device. */
const shared = share(test, async file => {
  const mesh = await startEdgeMesh(file)
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  device = await mesh.enroll({ device: { id: 'alpha' } })
  return mesh
})
const runs = Number(process.env.FAST_CHECK_RUNS ?? 15)
const messageBytesMax = 256 * 1_024

const services = [EnrollServiceService, AuthorizeServiceService, HeartbeatServiceService, AdminServiceService]
const methods = services.flatMap(service => Object.values(service as unknown as ServiceDefinition))

/** Everything that nobody who sends what is refused may change. */
const stateTables = [
  'enrollment_tokens',
  'token_redemptions',
  'devices',
  'device_postures',
  'health_reports',
  'certificates',
  'users',
  'services',
  'role_grants',
  'policy_data',
  'connections',
]

const unhandled: unknown[] = []
const hear = (error: unknown) => void unhandled.push(error)

test.before(() => void process.on('unhandledRejection', hear))

test.after.always(() => {
  process.off('unhandledRejection', hear)
})

test.afterEach.always('the server has lost no promise', t => {
  t.deepEqual(unhandled, [])
})

type Method = ServiceDefinition[string]
type Outcome = Refusal | 'answered'

/** A client that sends bytes as they are. */
function rawClient(t: { teardown(end: () => void): void }, who: Credentials): Client {
  const pem = (text: string | undefined) => (text ? Buffer.from(text) : null)
  const channel = credentials.createSsl(Buffer.from(who.rootsPem), pem(who.keyPem), pem(who.certificatePem))
  const Raw = makeGenericClientConstructor({}, 'raw')
  const client = new Raw(`127.0.0.1:${shared().server.apiPort}`, channel, {
    'grpc.ssl_target_name_override': 'localhost',
    'grpc.default_authority': 'localhost',
  })
  t.teardown(() => client.close())
  return client
}

const asIs = (bytes: Buffer) => bytes

/** Sends one message and waits for the end of the call, or until it goes on without one. */
function send(client: Client, { path, requestStream, responseStream }: Method, bytes: Buffer): Promise<Outcome> {
  const options = { deadline: Date.now() + 20_000 }
  return new Promise(resolve => {
    if (!requestStream && !responseStream) {
      client.makeUnaryRequest(path, asIs, asIs, bytes, new Metadata(), options, error =>
        resolve(error ? refusal(error) : 'answered'),
      )
      return
    }
    const watch = (stream: ClientReadableStream<Buffer>) =>
      stream
        .on('error', error => resolve(refusal(error)))
        .on('end', () => resolve('answered'))
        .resume()
    if (requestStream) {
      const stream = client.makeBidiStreamRequest(path, asIs, asIs, options)
      watch(stream as unknown as ClientReadableStream<Buffer>)
      stream.write(bytes)
      stream.end()
      return
    }
    const stream = client.makeServerStreamRequest(path, asIs, asIs, bytes, new Metadata(), options)
    watch(stream)
    // One that follows the audit log does not end by itself.
    if (/Audit/.test(path)) {
      stream.once('data', () => {
        resolve('answered')
        stream.cancel()
      })
    }
  })
}

/** With the right to call: what is refused is refused for what it says. */
function callerOf(t: { teardown(end: () => void): void }, path: string): Client {
  const operator = path.includes('.AdminService/')
  return rawClient(t, operator ? shared().operator : path.endsWith('/Enroll') ? shared().anonymous : device)
}

async function stateOf({ pool }: EdgeMesh): Promise<Record<string, string>> {
  const counts = stateTables.map(
    table => `(select md5(string_agg(r::text, '' order by r::text)) from ${table} r) ${table}`,
  )
  const { rows } = await pool.query(`select ${counts.join(', ')}`)
  return rows[0]
}

/** What a caller may be told of bad input; that the server is at fault is not among it. */
const fair = new Set([
  'INVALID_ARGUMENT',
  'NOT_FOUND',
  'ALREADY_EXISTS',
  'FAILED_PRECONDITION',
  'PERMISSION_DENIED',
  'UNAUTHENTICATED',
  'RESOURCE_EXHAUSTED',
  'UNIMPLEMENTED',
])

/** What is unfair in an answer; `undefined` if nothing. */
function unfair(method: Method, outcome: Outcome): string | undefined {
  if (outcome === 'answered') return undefined
  if (!fair.has(outcome.code)) return `${outcome.code}: ${outcome.message}`
  if (outcome.code !== 'INVALID_ARGUMENT') return undefined
  const shape = requestShape(method.path)
  const known = (field: string) =>
    hasField(shape, field) || (field === 'request' && outcome.reason === 'MALFORMED_MESSAGE')
  // A oneof is named where none of its members is given.
  if (outcome.fields.length > 0 && outcome.fields.every(field => known(field) || field === 'kind')) return undefined
  return `${outcome.message} names ${JSON.stringify(outcome.fields)}`
}

async function normalCalls(mesh: EdgeMesh): Promise<string> {
  const { answer } = await unary(mesh.clients(device).authorize, 'check', {
    question: { id: 'normal', user: 'ada', service: 'payroll', action: '' },
    deviceId: '',
  })
  return answer?.questionId ?? ''
}

for (const method of methods) {
  const name = method.path.slice('/edgemesh.v1.'.length)

  test.serial(`${name} refuses what makes no sense, names the field, and changes nothing`, async t => {
    const client = callerOf(t, method.path)
    const before = await stateOf(shared())
    const made = hostile(requestShape(method.path))
    const wrong: string[] = []
    let answered = 0
    const queue = [...made]
    const work = async () => {
      for (let next: HostileMessage | undefined = queue.pop(); next; next = queue.pop()) {
        const outcome = await send(client, method, next.bytes)
        if (outcome === 'answered') answered++
        const complaint = unfair(method, outcome)
        if (complaint) wrong.push(`${next.what} → ${complaint}`)
      }
    }
    await Promise.all(Array.from({ length: 8 }, work))
    t.deepEqual(wrong, [])
    if (answered === 0) t.deepEqual(await stateOf(shared()), before)
    t.is(await normalCalls(shared()), 'normal')
  })

  test.serial(`${name} survives bytes that are no message`, async t => {
    const client = callerOf(t, method.path)
    const whole = plausible(requestShape(method.path))
    const bytes = fc.oneof(
      fc.uint8Array({ maxLength: 300 }).map(Buffer.from),
      fc.nat(whole.length).map(length => whole.subarray(0, length)),
      fc.tuple(fc.nat(Math.max(0, whole.length - 1)), fc.integer({ min: 0, max: 255 })).map(([at, byte]) => {
        const flipped = Buffer.from(whole)
        if (flipped.length > 0) flipped[at] = byte
        return flipped
      }),
    )
    await fc.assert(
      fc.asyncProperty(bytes, async message => {
        const complaint = unfair(method, await send(client, method, message))
        if (complaint) throw new Error(complaint)
      }),
      { numRuns: runs },
    )
    const tooLarge = await send(client, method, Buffer.alloc(messageBytesMax + 1))
    t.is(tooLarge === 'answered' ? tooLarge : tooLarge.code, 'RESOURCE_EXHAUSTED')
  })
}

test.serial('thousands of bad messages leave no memory behind', async t => {
  setFlagsFromString('--expose-gc')
  const gc = runInNewContext('gc') as () => void
  const method = AuthorizeServiceService.check as unknown as Method
  const client = callerOf(t, method.path)
  const messages = hostile(requestShape(method.path))
  const round = async () => {
    for (let at = 0; at < messages.length; at += 16) {
      await Promise.all(messages.slice(at, at + 16).map(({ bytes }) => send(client, method, bytes)))
    }
    gc()
    return process.memoryUsage().heapUsed / 2 ** 20
  }
  for (let warmUp = 0; warmUp < 3; warmUp++) await round()
  const before = await round()
  for (let more = 0; more < 10; more++) await round()
  const grown = (await round()) - before
  t.true(grown < 30, `the heap has grown by ${grown.toFixed(1)} MiB`)
})

// What the contract says in words.

type Beat = Parameters<ReturnType<typeof heartbeats>['send']>[0]
const posture = { attributes: {}, measuredAt: undefined, ...healthy } as Beat['posture']

for (const [what, messages, field] of [
  ["does not bring the posture in a stream's first message", [{}], 'posture'],
  ['counts from 0', [{ sequence: 0, posture }], 'sequence'],
  ['repeats its number', [{ sequence: 7, posture }, { sequence: 7 }], 'sequence'],
  ['counts backwards', [{ sequence: 7, posture }, { sequence: 6 }], 'sequence'],
  [
    'has 1,025 open connections',
    [{ posture, openConnectionIds: Array.from({ length: 1_025 }, String) }],
    'open_connection_ids',
  ],
  ['uses 101 % of its processor', [{ posture: { ...posture, cpuPercent: 101 } }], 'posture.cpu_percent'],
  ['uses NaN % of its memory', [{ posture: { ...posture, memoryPercent: Number.NaN } }], 'posture.memory_percent'],
  ['uses infinitely much disk', [{ posture: { ...posture, diskPercent: Infinity } }], 'posture.disk_percent'],
  ['has NUL in an attribute', [{ posture: { ...posture, attributes: { a: '\0' } } }], 'posture.attributes'],
] as [string, Beat[], string][]) {
  test.serial(`a device that ${what} is told so`, async t => {
    const heart = heartbeats(t, shared(), device)
    for (const message of messages) heart.send(message)
    const end = await heart.ended
    t.is(end?.code, 'INVALID_ARGUMENT')
    t.deepEqual(end?.fields, [field])
  })
}

const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
const ask = (...questions: (typeof question)[]) => ({ $case: 'questions' as const, value: { questions } })
const someId = '0199c0de-0000-7000-8000-000000000000'

for (const [what, kind, field] of [
  ['no question', ask(), 'questions.questions'],
  ['129 questions', ask(...Array.from({ length: 129 }, () => question)), 'questions.questions'],
  ['a question whose id is too long', ask(question, { ...question, id: 'i'.repeat(65) }), 'questions.questions[1].id'],
  ['a question about nobody', ask({ ...question, user: '' }), 'questions.questions[0].user'],
  ['a question about no service', ask({ ...question, service: '' }), 'questions.questions[0].service'],
  ['an endless action', ask({ ...question, action: 'a'.repeat(33) }), 'questions.questions[0].action'],
  ['NUL in a name', ask({ ...question, user: 'a\0' }), 'questions.questions[0].user'],
  ['a renewal of nothing', { $case: 'renew', value: { connectionIds: [] } }, 'renew.connection_ids'],
  ['an end of nothing', { $case: 'close', value: { connectionIds: [] } }, 'close.connection_ids'],
  [
    'an end of 129 connections',
    { $case: 'close', value: { connectionIds: Array(129).fill(someId) } },
    'close.connection_ids',
  ],
  [
    'an acknowledgement of nothing',
    { $case: 'acknowledge', value: { connectionIds: [] } },
    'acknowledge.connection_ids',
  ],
  [
    'a resumption of 129 connections',
    { $case: 'resume', value: { connectionIds: Array(129).fill(someId) } },
    'resume.connection_ids',
  ],
  ['none of the kinds', undefined, 'kind'],
] as [string, NonNullable<AuthorizeRequest['kind']>, string][]) {
  test.serial(`a device that sends ${what} is told so`, async t => {
    const access = authorizations(t, shared(), device)
    access.send(kind)
    const end = await access.ended
    t.is(end?.code, 'INVALID_ARGUMENT')
    t.deepEqual(end?.fields, [field])
  })
}

test.serial('nothing that follows a refused heartbeat is taken', async t => {
  const mesh = shared()
  const other = await mesh.enroll()
  const heart = heartbeats(t, mesh, other)
  await heart.beat(healthy)
  heart.send({ sequence: 10, posture })
  heart.send({ sequence: 10, posture })
  for (let sequence = 11; sequence < 200; sequence++) heart.send({ sequence, posture })
  t.deepEqual((await heart.ended)?.fields, ['sequence'])
  // A device's reports are written in the order in which they came: when this one is there, all before it are.
  await heartbeats(t, mesh, other).beat(healthy)
  const { rows } = await mesh.pool.query('select sequence::int from health_reports where device_id = $1 order by 1', [
    other.identity.deviceId,
  ])
  t.deepEqual(
    rows.map(row => row.sequence).filter(sequence => sequence > 10),
    [],
  )
})

test.serial('a question about another device is not for devices to ask', async t => {
  const { authorize } = shared().clients(device)
  const told = await refused(unary(authorize, 'check', { question, deviceId: 'beta' }))
  t.is(told.reason, 'OTHER_DEVICE')
})

test.serial('a certificate request of another shape is refused by its field', async t => {
  const { enroll } = shared().clients(device)
  for (const csr of [Buffer.alloc(0), Buffer.from(createKey()), Buffer.alloc(9_000, 0x30)]) {
    const told = await refused(unary(enroll, 'renewCertificate', { csr }))
    t.is(told.code, 'INVALID_ARGUMENT')
    t.deepEqual(told.fields, ['csr'])
  }
})

// Below gRPC.

/** What is sent before TLS, or inside of it, and what comes back until the server hangs up. */
const trash: [string, Buffer][] = [
  ['HTTP/1', Buffer.from('GET / HTTP/1.1\r\nhost: localhost\r\n\r\n')],
  ['zeros', Buffer.alloc(4_096)],
  ['a handshake of the wrong kind', Buffer.from('16030100ff0100', 'hex')],
  ['a record that is too long', Buffer.from('160301ffff', 'hex')],
]

for (const [what, bytes] of trash) {
  test.serial(`${what} instead of TLS does not hurt others`, async t => {
    const socket = connectTcp(shared().server.apiPort, '127.0.0.1')
    t.teardown(() => socket.destroy())
    socket.on('error', () => {})
    socket.resume()
    socket.write(bytes)
    // A handshake that is only unfinished gets the time that a slow one needs.
    if (what !== 'a handshake of the wrong kind') await once(socket, 'close')
    t.is(await normalCalls(shared()), 'normal')
  })

  test.serial(`${what} inside TLS does not hurt others`, async t => {
    const { server, anonymous } = shared()
    const socket = connectTls({
      port: server.apiPort,
      host: '127.0.0.1',
      servername: 'localhost',
      ca: anonymous.rootsPem,
      ALPNProtocols: ['h2'],
    })
    t.teardown(() => socket.destroy())
    socket.on('error', () => {})
    await once(socket, 'secureConnect')
    socket.resume()
    socket.write(bytes)
    socket.end()
    await once(socket, 'close')
    t.is(await normalCalls(shared()), 'normal')
  })
}

test.serial('a client that speaks no HTTP/2 is not served', async t => {
  const { server, anonymous } = shared()
  const socket = connectTls({
    port: server.apiPort,
    host: '127.0.0.1',
    servername: 'localhost',
    ca: anonymous.rootsPem,
    ALPNProtocols: ['http/1.1'],
  })
  t.teardown(() => socket.destroy())
  const [error] = await once(socket, 'error')
  t.regex(String(error), /no application protocol/i)
})

function http2Session(t: { teardown(end: () => void): void }): ClientHttp2Session {
  const { server, anonymous } = shared()
  const session = connectHttp2(`https://127.0.0.1:${server.apiPort}`, {
    ca: anonymous.rootsPem,
    cert: device.certificatePem,
    key: device.keyPem,
    servername: 'localhost',
  })
  session.on('error', () => {})
  t.teardown(() => session.destroy())
  return session
}

const grpcHeaders = {
  [constants.HTTP2_HEADER_METHOD]: 'POST',
  [constants.HTTP2_HEADER_CONTENT_TYPE]: 'application/grpc',
  te: 'trailers',
}

test.serial('a web browser is told that this is not for it', async t => {
  const stream = http2Session(t).request({ ':path': '/', ':method': 'GET' })
  const [headers] = await once(stream, 'response')
  t.is(headers[':status'], 415)
  stream.close()
})

test.serial('methods that do not exist are unimplemented', async t => {
  const client = rawClient(t, device)
  for (const path of ['/edgemesh.v1.AuthorizeService/Nothing', '/nothing/Nothing', '/', '//']) {
    const outcome = await send(client, { path, requestStream: false, responseStream: false } as Method, Buffer.alloc(0))
    t.is(outcome === 'answered' ? outcome : outcome.code, 'UNIMPLEMENTED', path)
  }
})

test.serial('a thousand streams on one connection wait for their turn, and others are served meanwhile', async t => {
  const session = http2Session(t)
  await once(session, 'remoteSettings')
  t.is(session.remoteSettings.maxConcurrentStreams, 256)
  const path = AuthorizeServiceService.authorize.path
  const streams = Array.from({ length: 1_000 }, () => session.request({ ...grpcHeaders, ':path': path }))
  for (const stream of streams) stream.on('error', () => {})
  t.is(await normalCalls(shared()), 'normal')
  const open = () => openStreams(path)
  await eventually('as many streams as one connection may have', async () => (await open()) >= 256)
  t.is(await open(), 256)
  session.destroy()
  await eventually('the streams are gone', async () => (await open()) === 0)
})

/** The metric of open streams of a method; 0 where it has none. */
async function openStreams(path: string): Promise<number> {
  const text = await (await fetch(`http://127.0.0.1:${shared().server.metricsPort}/metrics`)).text()
  const line = text.split('\n').find(line => line.startsWith('edgemesh_streams_open{') && line.includes(path))
  return Number(line?.split(' ').at(-1) ?? 0)
}

test.serial('calls that are cut off in the middle leave nothing open', async t => {
  const path = AuthorizeServiceService.authorize.path
  await heartbeats(t, shared(), device).beat(healthy)
  for (let at = 0; at < 30; at++) {
    const stream = shared().clients(device).authorize.authorize()
    stream.on('error', () => {})
    stream.on('data', () => {})
    stream.write({ kind: ask(...Array.from({ length: 8 }, (_, id) => ({ ...question, id: String(id) }))) })
    // At another moment of the question's life each time: before it arrives, while it is decided, when it is answered.
    await new Promise(resolve => setTimeout(resolve, at))
    stream.cancel()
  }
  await eventually('no stream is open', async () => (await openStreams(path)) === 0)
  await eventually('no connection is open without its stream, but those that wait to be resumed', async () => {
    const { rows } = await shared().pool.query(
      "select count(*)::int as open from connections where status = 'active' and resume_by is null",
    )
    return rows[0].open === 0
  })
  const text = await (await fetch(`http://127.0.0.1:${shared().server.metricsPort}/metrics`)).text()
  const active = text.split('\n').filter(line => line.startsWith('edgemesh_connections_active{'))
  t.deepEqual(
    active.filter(line => !line.endsWith(' 0')),
    [],
  )
})

test.serial('who never reads the answers gets no more of them, and costs the server no memory', async t => {
  const { authorize } = shared().clients(device)
  const stream = authorize.authorize()
  t.teardown(() => stream.cancel())
  stream.on('error', () => {})
  // A client of grpc-js that has never read buffers all by itself; one that has begun to read can hold the server up.
  stream.once('data', () => stream.pause())
  const sent = 600
  // Denials with reasons: a message of these is answered by twenty times its size.
  const kind = ask(...Array.from({ length: 128 }, (_, id) => ({ ...question, id: String(id), user: 'nobody' })))
  const before = await answered()
  for (let at = 0; at < sent; at++) stream.write({ kind })
  // Answered until nothing moves any more.
  let [seen, still] = [-1, 0]
  await eventually('the server stops answering', async () => {
    const now = await answered()
    still = now === seen && now > before ? still + 1 : 0
    seen = now
    return still >= 20
  })
  t.true(seen - before < sent, `${seen - before} of ${sent} messages were answered`)
  t.is(await normalCalls(shared()), 'normal')
})

/** Messages on Authorize streams that are on record. */
async function answered(): Promise<number> {
  const { rows } = await shared().pool.query<{ count: number }>(
    "select count(*)::int as count from decisions where method like '%/Authorize'",
  )
  return rows[0]?.count ?? 0
}
