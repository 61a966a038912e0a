/** How long one decision takes, and one whole answer: the time that only one in a hundred exceeds. */
import { randomUUID } from 'node:crypto'
import type { ExecutionContext } from 'ava'
import pg from 'pg'
import { Pool } from 'undici'
import { createDecider } from '../../src/access/decide.ts'
import type { Facts, Ground } from '../../src/access/facts.ts'
import type { AuthzInput, PolicyEngine } from '../../src/access/policy-engine.ts'
import { startOpaPolicy } from '../../src/access/policy-server.ts'
import { startShippedPolicy } from '../../src/access/policy-wasm.ts'
import { systemClock } from '../../src/clock.ts'
import { AuthorizeServiceClient, type CheckResponse } from '../../src/gen/edgemesh/v1/authorize.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa, startOpa } from '../support/opa.ts'
import { percentile } from '../support/percentile.ts'
import { question, type Sides } from './decision-rates.ts'
import { answered, channelOf, channelOptions } from './enrolled-device.ts'
import type { GroupOptions, Row } from './row.ts'

const maxAgeMs = 300_000
const decisions = 4_000
const opaDecisions = 3_000
const answers = 3_000
const warmUp = 1_000
const inProcessMsMax = 1
const timesOpaMax = 1.3
const timesFloorMax = 1.5

/** Deciding what is in no cache, with all facts in memory: by the policy in this process, and by an OPA server. */
export async function* decidingTimes({ progress }: GroupOptions): AsyncGenerator<Row> {
  progress('check.uncached-wasm')
  yield await inProcess()
  if (findOpa() === undefined) {
    progress('check.uncached-opa is left out: there is no opa binary in $OPA, PATH, .tools/bin or /go/bin')
    return
  }
  progress('check.uncached-opa')
  yield await byServer()
}

async function inProcess(): Promise<Row> {
  const engine = await startShippedPolicy()
  const inputs = recorded(engine)
  const { decide } = deciderOver(inputs.engine)
  const [ours, bare]: number[][] = [[], []]
  for (let turn = 0; turn < warmUp + decisions; turn++) {
    const took = await time(() => decide(turn))
    const tookAlone = await time(() => engine.evaluate('authz', inputs.last()))
    if (turn < warmUp) continue
    ours?.push(took)
    bare?.push(tookAlone)
  }
  const value = percentile(ours, 99)
  return {
    ...timeRow('check.uncached-wasm', value, percentile(bare, 99)),
    note: `half of it denied; median ${ms(percentile(ours, 50))}; floor: the policy evaluated alone, median ${ms(percentile(bare, 50))}`,
    bar: { demand: `less than ${inProcessMsMax} ms`, met: value < inProcessMsMax },
  }
}

async function byServer(): Promise<Row> {
  const ends: (() => unknown)[] = []
  try {
    const opa = await startOpa({ teardown: (end: () => unknown) => ends.push(end) } as unknown as ExecutionContext)
    const engine = await startOpaPolicy({ url: opa.url, timeoutMs: 5_000, log: createLog({ level: 'error' }) })
    ends.push(engine.stop)
    const http = new Pool(opa.url, { connections: 1 })
    ends.push(() => http.close())
    const inputs = recorded(engine)
    const { decide } = deciderOver(inputs.engine)
    async function askBare(): Promise<void> {
      const { body } = await http.request({
        method: 'POST',
        path: '/v1/data/edgemesh/authz/decision',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ input: inputs.last() }),
      })
      await body.json()
    }
    const [ours, bare]: number[][] = [[], []]
    for (let turn = 0; turn < warmUp + opaDecisions; turn++) {
      const took = await time(() => decide(turn))
      const tookBare = await time(askBare)
      if (turn < warmUp) continue
      ours?.push(took)
      bare?.push(tookBare)
    }
    const [value, floor] = [percentile(ours, 99), percentile(bare, 99)]
    return {
      ...timeRow('check.uncached-opa', value, floor),
      note: `half of it denied; median ${ms(percentile(ours, 50))}; floor: one bare HTTP call to that OPA, median ${ms(percentile(bare, 50))}`,
      bar: { demand: `at most ${timesOpaMax} × the bare call`, met: value <= timesOpaMax * floor },
    }
  } finally {
    for (const end of ends.reverse()) await end()
  }
}

/** The same engine, and the last question that it was asked. */
function recorded(engine: PolicyEngine) {
  let last: AuthzInput | undefined
  return {
    engine: {
      ...engine,
      evaluate: ((entrypoint, input) => {
        last = input as AuthzInput
        return engine.evaluate(entrypoint, input)
      }) satisfies PolicyEngine['evaluate'],
    },
    last: () => last as AuthzInput,
  }
}

/** Facts in memory of which every other question is allowed; no question comes twice. */
function deciderOver(engine: PolicyEngine) {
  let version = 0
  const fact = <V>(value: V) => ({ version: ++version, loadedAt: Date.now(), value })
  const posture = { ...healthy, attributes: {} }
  const requirements = {
    patches_current: true,
    antivirus_enabled: true,
    disk_encrypted: true,
    firewall_enabled: false,
    cpu_percent_max: 90,
    memory_percent_max: 90,
    disk_percent_max: null,
  }
  const ground: Ground = {
    device: fact({
      id: 'laptop-7',
      type: 'laptop',
      status: 'active',
      statusReason: '',
      labels: { site: 'berlin' },
      posture,
      measuredAtMs: Date.now(),
    }),
    user: fact({ id: 'ada', role: 'developer', status: 'active' }),
    service: fact({ id: 'orders', labels: {}, status: 'active' }),
    grants: fact(new Map([['orders', ['*']]])),
    policy: fact({ requirements, hours: null }),
  }
  const disabled: Ground = { ...ground, user: fact({ id: 'eve', role: 'developer', status: 'disabled' }) }
  const facts: Pick<Facts, 'ground' | 'maxAgeMs'> = {
    maxAgeMs,
    ground: ({ user }) => {
      ground.device.value!.measuredAtMs = Date.now()
      return user === 'ada' ? ground : disabled
    },
  }
  const decider = createDecider({ facts: facts as Facts, engine, clock: systemClock, onError: 'deny' })
  const users = ['ada', 'eve']
  return {
    async decide(turn: number): Promise<void> {
      const user = users[turn % 2] as string
      const asked = { deviceId: 'laptop-7', user, service: 'orders', action: `connect-${turn}` }
      const { verdict } = await decider.decide(asked)
      if (verdict.allow !== (user === 'ada')) throw new Error(`decided wrongly: ${verdict.onRecord.first}`)
    },
  }
}

/** One answer after another, its record on disk before it leaves; between them a bare commit, and a bare echo. */
export async function answerTimes({ served, device, echo }: Sides, { progress }: GroupOptions): Promise<Row> {
  progress('check.answer')
  const ours = new AuthorizeServiceClient(served.address, channelOf(device), channelOptions)
  const bare = new AuthorizeServiceClient(echo.address, channelOf(echo.client), channelOptions)
  const database = new pg.Client({ connectionString: served.databaseUrl })
  await database.connect()
  try {
    await database.query(
      'create table bench_rows (id uuid primary key, at timestamptz not null, document jsonb not null)',
    )
    const { rows } = await database.query<{ questions: string }>(
      'select questions::text as questions from decisions limit 1',
    )
    const document = rows[0]?.questions
    const commit = () =>
      database.query({
        name: 'commit',
        text: 'insert into bench_rows (id, at, document) values ($1, now(), $2::jsonb)',
        values: [randomUUID(), document],
      })
    const ask = (client: AuthorizeServiceClient, turn: number) => () =>
      answered<CheckResponse>(done => client.check({ question: question(turn), deviceId: '' }, done))
    const took = { ours: [] as number[], echo: [] as number[], commit: [] as number[] }
    for (let turn = 0; turn < warmUp + answers; turn++) {
      const times = {
        ours: await time(ask(ours, turn)),
        echo: await time(ask(bare, turn)),
        commit: await time(commit),
      }
      if (turn < warmUp) continue
      took.ours.push(times.ours)
      took.echo.push(times.echo)
      took.commit.push(times.commit)
    }
    const p99 = { ours: percentile(took.ours, 99), floor: percentile(took.echo, 99) + percentile(took.commit, 99) }
    const p50 = { echo: ms(percentile(took.echo, 50)), commit: ms(percentile(took.commit, 50)) }
    return {
      ...timeRow('check.answer', p99.ours, p99.floor),
      note: `one at a time; median ${ms(percentile(took.ours, 50))}; floor: a bare echo (median ${p50.echo}) and a bare commit of one row (median ${p50.commit})`,
      bar: { demand: `at most ${timesFloorMax} × the floor`, met: p99.ours <= timesFloorMax * p99.floor },
    }
  } finally {
    await database.end()
    ours.close()
    bare.close()
  }
}

function timeRow(name: string, value: number, floor: number) {
  return { name, value, unit: 'ms, p99', floor, ratio: floor / value }
}

async function time(work: () => unknown): Promise<number> {
  const startedAt = performance.now()
  const doing = work()
  if (doing instanceof Promise) await doing
  return performance.now() - startedAt
}

const ms = (value: number) => `${value.toFixed(3)} ms`
