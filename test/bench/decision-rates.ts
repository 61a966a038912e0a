/** What an answer costs, beside the same messages sent back by a bare gRPC server. */
import {
  type AuthorizeResponse,
  AuthorizeServiceClient,
  type CheckResponse,
  type Question,
} from '../../src/gen/edgemesh/v1/authorize.ts'
import type { BareEcho } from './bare-echo-server.ts'
import { channelOf, channelOptions, type EnrolledDevice, type Identity } from './enrolled-device.ts'
import { profileRows } from './profile.ts'
import { medianRate, type Rate, rate, showRate } from './rates.ts'
import type { GroupOptions, Row } from './row.ts'
import type { Served } from './served.ts'

/** Each device has a connection of its own, and asks again when it has its answer. */
const connections = 128
/** As many questions as fit into the largest message of these, each about another service. */
export const servicesCount = 32
const rounds = 5
/** A server is fast when V8 has seen it work for a while: what counts is how it is from then on. */
const warmUpRounds = 10

/** Something that asks `count` questions of a server, and says so when all are answered. */
type Load = (clients: AuthorizeServiceClient[], count: number) => Promise<void>
/** What is decided by this server, about this device, and what is sent back by that one. */
export type Sides = { served: Served; device: EnrolledDevice; echo: BareEcho }

/** @param committing a bare server, too, but one that has a row on disk before it answers a message on a stream */
export async function* decisionRates(sides: Sides, committing: BareEcho, options: GroupOptions): AsyncGenerator<Row> {
  yield* beside('check.unary', unaryLoad, 4_096, sides, options, ofFloor(0.7))
  yield* beside('check.stream', streamLoad(1), 8_192, sides, options, ofFloor(0.7))
  yield* beside('check.stream-committed', streamLoad(1), 8_192, { ...sides, echo: committing }, options, ofFloor(0.65))
  yield* beside('check.batch32', streamLoad(servicesCount), 65_536, sides, options, atLeast(150_000))
}

type Bar = (row: { value: number; ratio: number }) => NonNullable<Row['bar']>
const ofFloor =
  (share: number): Bar =>
  ({ ratio }) => ({ demand: `at least ${share} of the floor`, met: ratio >= share })
const atLeast =
  (count: number): Bar =>
  ({ value }) => ({ demand: `at least ${count} decisions/s`, met: value >= count })

async function* beside(
  name: string,
  load: Load,
  count: number,
  { served, device, echo }: Sides,
  { progress, profile }: GroupOptions,
  bar: Bar,
): AsyncGenerator<Row> {
  const ours = { clients: clientsOf(served.address, device), cpuSince: served.cpuSince, rates: [] as Rate[] }
  const bare = { clients: clientsOf(echo.address, echo.client), cpuSince: echo.cpuSince, rates: [] as Rate[] }
  for (let round = 1; round <= warmUpRounds; round++) {
    progress(`${name}: warming up, ${round} of ${warmUpRounds}`)
    for (const { clients } of [bare, ours]) await load(clients, count)
  }
  for (let round = 1; round <= rounds; round++) {
    progress(`${name}: round ${round} of ${rounds}`)
    for (const side of [bare, ours]) {
      const before = await side.cpuSince()
      const startedAt = performance.now()
      await load(side.clients, count)
      side.rates.push(rate(count, await side.cpuSince(before), performance.now() - startedAt))
    }
  }
  const [value, floor] = [medianRate(ours.rates), medianRate(bare.rates)]
  const measured = { value: value.perCpuSecond, ratio: value.perCpuSecond / floor.perCpuSecond }
  yield {
    name,
    ...measured,
    unit: 'decisions/s',
    floor: floor.perCpuSecond,
    note:
      `${showRate(value)} for a second of the server's processor time, ${Math.round(value.perWallSecond)}/s by the clock; ` +
      `floor: a bare server that sends ${echo.commits ? 'them once a row of each is on disk' : 'the same messages'}, ${showRate(floor)}`,
    bar: bar(measured),
  }
  if (profile) {
    progress(`${name}: where the time goes`)
    const { recorded, cpu } = await served.profile(() => load(ours.clients, count))
    yield* profileRows(name, recorded, count, cpu.user + cpu.system)
  }
  for (const client of [...ours.clients, ...bare.clients]) client.close()
}

export const question = (turn: number): Question => ({
  id: `q${turn}`,
  user: 'bench',
  service: serviceOf(turn),
  action: '',
})

export const serviceOf = (turn: number) => `service-${turn % servicesCount}`

const unaryLoad: Load = async (clients, count) => {
  let next = 0
  const one = (at: number, turn: number) =>
    new Promise<void>((resolve, reject) => {
      const client = clients[at] as AuthorizeServiceClient
      client.check({ question: question(turn), deviceId: '' }, (error, { answer } = {} as CheckResponse) => {
        if (error) reject(error)
        else if (answer?.allowed) resolve()
        else reject(new Error(`denied: ${JSON.stringify(answer)}`))
      })
    })
  await Promise.all(
    clients.map(async (_, client) => {
      for (let turn = next++; turn < count; turn = next++) await one(client, turn)
    }),
  )
}

/** Messages that a stream has in flight. */
const streamInFlight = 1
const closedAtOnce = 128

const streamLoad =
  (questionsPerMessage: number): Load =>
  async (clients, count) => {
    await Promise.all(
      clients.map(client =>
        askStream(client, questionsPerMessage, Math.ceil(count / clients.length / questionsPerMessage)),
      ),
    )
  }

/** Each allowed connection is closed again, 128 at a time, as a device does whose connections are short. */
function askStream(client: AuthorizeServiceClient, questionsPerMessage: number, messages: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const stream = client.authorize()
    let sent = 0
    let answered = 0
    let closing = 0
    const open: string[] = []
    const send = () => {
      const questions = Array.from({ length: questionsPerMessage }, (_, at) =>
        question(sent * questionsPerMessage + at),
      )
      sent++
      stream.write({ kind: { $case: 'questions', value: { questions } } })
    }
    const close = (connectionIds: string[]) => {
      closing++
      stream.write({ kind: { $case: 'close', value: { connectionIds } } })
    }
    stream.on('data', ({ kind }: AuthorizeResponse) => {
      if (kind?.$case === 'answers') {
        answered++
        for (const answer of kind.value.answers) {
          if (!answer.allowed) reject(new Error(`denied: ${JSON.stringify(answer)}`))
          open.push(answer.connectionId)
        }
        if (sent < messages) send()
        if (open.length >= closedAtOnce || answered === messages) close(open.splice(0))
      } else closing--
      if (answered === messages && closing === 0) stream.end()
    })
    stream.on('error', reject)
    stream.on('end', resolve)
    for (let first = 0; first < Math.min(streamInFlight, messages); first++) send()
  })
}

/** Each has a connection of its own. */
function clientsOf(address: string, who: Identity): AuthorizeServiceClient[] {
  const channel = channelOf(who)
  return Array.from({ length: connections }, () => new AuthorizeServiceClient(address, channel, channelOptions))
}
