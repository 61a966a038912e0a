/**
 * A fleet: what a handshake, a report and an idle stream cost, how soon a revocation reaches its device, and how soon all are
 * back when an instance has died.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { createKey, signingRequestFor } from '../../../src/agent/csr.ts'
import { AdminServiceClient } from '../../../src/gen/edgemesh/v1/admin.ts'
import { type BareEcho, startBareEcho } from '../bare-echo-server.ts'
import { answered, channelOf, channelOptions } from '../enrolled-device.ts'
import {
  demandOpenFiles,
  deviceId,
  type FleetClients,
  fleetProcesses,
  seedDevices,
  seedOthers,
  startFleetClients,
} from '../fleet.ts'
import { healthy } from '../healthy.ts'
import { medianRate, type Rate, rate, showRate } from '../rates.ts'
import type { Group, GroupOptions, Row } from '../row.ts'
import { type Served, startServed } from '../served.ts'

/** A smaller fleet for a smaller machine; then the figures are of that. */
const devicesCount = Number(process.env.BENCH_DEVICES ?? 10_000)
/** Beside the connections: the database, the log, what Node opens for itself. */
const filesBeside = 1_000

export const group: Group = {
  title: `fleet: ${devicesCount.toLocaleString('en')} devices`,
  async *measure(options) {
    demandOpenFiles(devicesCount + filesBeside)
    const ends: (() => unknown)[] = []
    const { progress } = options
    try {
      progress('starting PostgreSQL, a server, and a bare one beside it')
      const served = await startServed()
      ends.push(served.stop)
      const bare = await startBareEcho()
      ends.push(bare.stop)
      const clients = startFleetClients()
      ends.push(clients.stop)
      const sides = { served, bare, clients }
      await addDevices(sides, 0, Math.min(fewRows, devicesCount), options)
      yield await measureHandshakes(sides, options)
      yield* measureReports(sides, options)
      yield* measureMemory(sides, options)
      yield* measureStorm(sides, options)
    } finally {
      for (const end of ends.reverse()) await end()
    }
  },
}

type Sides = { served: Served; bare: BareEcho; clients: FleetClients }

async function addDevices({ served, clients }: Sides, from: number, to: number, { progress }: GroupOptions) {
  progress(`${to - from} devices are put on record`)
  const identities = await seedDevices(served, from, to)
  for (let process = 0; process < fleetProcesses; process++) {
    const part = identities.filter((_, number) => number % fleetProcesses === process)
    await clients.ask(process, { ask: 'devices', group: 'ours', identities: part })
  }
}

const load = () => `load ${loadavg()[0]?.toFixed(1)}`

// ── tls.handshakes ─────────────────────────────────────────────────────────────────────────────────────────────────

/** Odd, so that there is one in the middle. */
const rounds = 5
const handshakesOfRound = 600
const handshakesInFlight = 4
const shareOfOpenssl = 0.9
/** Beside the fleet. */
const handshakesDevice = 999_999

async function measureHandshakes(sides: Sides, { progress }: GroupOptions): Promise<Row> {
  const { served, bare, clients } = sides
  const [identity] = await seedDevices(served, handshakesDevice, handshakesDevice + 1)
  const openssl = await startOpensslServer(bare.client)
  const ours = { address: served.address, identity: identity!, cpu: served.cpuSince, rates: [] as Rate[] }
  const echo = { address: bare.address, identity: bare.client, cpu: bare.cpuSince, rates: [] as Rate[] }
  const theirs = openssl && { ...echo, address: openssl.address, cpu: openssl.cpuSince, rates: [] as Rate[] }
  const all = [ours, echo, ...(theirs ? [theirs] : [])]
  const shake = async (side: typeof ours) => {
    const { address, identity } = side
    const count = handshakesOfRound / fleetProcesses
    const before = await side.cpu()
    const startedAt = performance.now()
    await clients.all({ ask: 'handshakes', address, identity, count, inFlight: handshakesInFlight })
    return rate(handshakesOfRound, await side.cpu(before), performance.now() - startedAt)
  }
  try {
    for (const side of all) await shake(side)
    for (let round = 1; round <= rounds; round++) {
      progress(`tls.handshakes: round ${round} of ${rounds}`)
      for (const side of all) side.rates.push(await shake(side))
    }
  } finally {
    await openssl?.stop()
  }
  const [value, echoed] = [medianRate(ours.rates), medianRate(echo.rates)]
  const floor = theirs && medianRate(theirs.rates)
  return {
    name: 'tls.handshakes',
    value: value.perCpuSecond,
    unit: 'handshakes/s',
    floor: floor?.perCpuSecond ?? null,
    ratio: floor ? value.perCpuSecond / floor.perCpuSecond : null,
    note:
      `full, mutual, with the HTTP/2 session after it: ${showRate(value)} for a second of the server's processor time, ` +
      `${Math.round(value.perWallSecond)}/s by the clock; bare grpc-js ${showRate(echoed)}; floor: ` +
      `${floor ? `openssl s_server ${showRate(floor)}` : 'no openssl command here, or no /proc'}; ${load()}`,
    ...(floor && {
      bar: {
        demand: `at least ${shareOfOpenssl} of openssl s_server`,
        met: value.perCpuSecond >= shareOfOpenssl * floor.perCpuSecond,
      },
    }),
  }
}

type Timed = { address: string; cpuSince: Served['cpuSince']; stop(): Promise<void> }

/** With the same certificates; undefined where there is no openssl, or its processor time can't be read. */
async function startOpensslServer({
  rootsPem,
  serverCertificatePem,
  serverKeyPem,
}: BareEcho['client']): Promise<Timed | undefined> {
  try {
    execFileSync('openssl', ['version'], { stdio: 'ignore' })
    await readFile('/proc/self/stat')
  } catch {
    return undefined
  }
  const directory = await mkdtemp(join(tmpdir(), 'edgemesh-bench-'))
  const file = async (name: string, text: string) => {
    await writeFile(join(directory, name), text, { mode: 0o600 })
    return join(directory, name)
  }
  const certificate = await file('server.pem', serverCertificatePem)
  const key = await file('server-key.pem', serverKeyPem)
  const roots = await file('roots.pem', rootsPem)
  const child: ChildProcess = spawn(
    'openssl',
    // biome-ignore format: an option and its value on a line
    ['s_server', '-accept', '127.0.0.1:0', '-key', key, '-cert', certificate, '-cert_chain', certificate,
      '-CAfile', roots, '-Verify', '3', '-alpn', 'h2'],
    { stdio: ['pipe', 'pipe', 'ignore'] },
  )
  const port = await new Promise<number>((resolve, reject) => {
    let said = ''
    child.stdout?.setEncoding('utf8').on('data', text => {
      if (said.length < 1_000) said += text
      const [, found] = /^ACCEPT 127\.0\.0\.1:(\d+)/m.exec(said) ?? []
      if (found) resolve(Number(found))
    })
    child.on('error', reject).on('exit', () => reject(new Error(`openssl s_server has ended: ${said}`)))
  })
  return {
    address: `127.0.0.1:${port}`,
    async cpuSince(before = { user: 0, system: 0 }) {
      const cpu = await cpuOf([child.pid!])
      return { user: cpu.user - before.user, system: cpu.system - before.system }
    },
    async stop() {
      child.kill()
      await rm(directory, { recursive: true, force: true })
    },
  }
}

/** In microseconds, by the kernel's clock of 10 ms. */
async function cpuOf(pids: readonly number[]): Promise<NodeJS.CpuUsage> {
  const sum = { user: 0, system: 0 }
  for (const pid of pids) {
    const stat = await readFile(`/proc/${pid}/stat`, 'utf8')
    // After the name, which may have spaces: state, parent, … and in the 12th and 13th place the two times.
    const fields = stat.slice(stat.lastIndexOf(') ') + 2).split(' ')
    sum.user += Number(fields[11]) * 10_000
    sum.system += Number(fields[12]) * 10_000
  }
  return sum
}

// ── stream.memory ──────────────────────────────────────────────────────────────────────────────────────────────────

const timesBareMax = 1.15
/** What is needed for the first connections only is not counted. */
const streamsWarmUp = 200
/** For what is in flight to be done, and garbage to be seen as such. */
const settleMs = 2_000

async function* measureMemory({ served, clients }: Sides, { progress }: GroupOptions): AsyncGenerator<Row> {
  // New ones: what the others have done before leaves them memory that is free, and would be used first.
  const fresh = { ours: await startServed({}, served), bare: await startBareEcho() }
  try {
    yield* memoryOf(fresh, clients, progress)
  } finally {
    await fresh.bare.stop()
    await fresh.ours.stop()
  }
}

async function* memoryOf(
  fresh: { ours: Served; bare: BareEcho },
  clients: FleetClients,
  progress: GroupOptions['progress'],
): AsyncGenerator<Row> {
  const sizes = [0.1, 0.5, 1].map(share => Math.round(devicesCount * share))
  const ours = { group: 'ours', server: fresh.ours, base: 0, kilobytes: [] as number[] }
  const echo = { group: 'fresh', server: fresh.bare, base: 0, kilobytes: [] as number[] }
  const identities = Array.from({ length: devicesCount / fleetProcesses }, () => fresh.bare.client)
  await clients.all({ ask: 'devices', group: 'fresh', identities })
  for (const side of [ours, echo]) {
    const addresses = [side.server.address]
    const { group } = side
    progress(`stream.memory: warming up ${group}`)
    await clients.all({ ask: 'open', group, addresses, from: 0, to: streamsWarmUp / fleetProcesses })
    await clients.all({ ask: 'close', group })
    await sleep(settleMs)
    side.base = await side.server.rssBytes()
    let open = 0
    for (const size of sizes) {
      progress(`stream.memory: ${group}, ${size} streams`)
      await clients.all({ ask: 'open', group, addresses, from: open / fleetProcesses, to: size / fleetProcesses })
      open = size
      await sleep(settleMs)
      side.kilobytes.push(((await side.server.rssBytes()) - side.base) / 1_024 / size)
    }
    await clients.all({ ask: 'close', group })
  }
  for (const [at, size] of sizes.entries()) {
    const [value, floor] = [ours.kilobytes[at]!, echo.kilobytes[at]!]
    yield {
      name: at === sizes.length - 1 ? 'stream.memory' : `stream.memory.${size}`,
      value,
      unit: 'kB',
      floor,
      ratio: floor / value,
      note:
        `RSS for each of ${size} connections with mutual TLS and an idle heartbeat stream, garbage collected; floor: bare ` +
        'grpc-js with as many',
      bar: { demand: `at most ${timesBareMax} × bare grpc-js`, met: value <= timesBareMax * floor },
    }
  }
}

// ── heartbeat.persisted, heartbeat.flat ────────────────────────────────────────────────────────────────────────────

const reportingStreams = 512
const reportsOfRound = 10_000
const rowsOfStatement = 500
/** The table of a large fleet, beside that of a small one. */
const [fewRows, manyRows] = [1_000, 100_000]
const timesFewMax = 1.25

async function* measureReports(sides: Sides, options: GroupOptions): AsyncGenerator<Row> {
  const { served, clients } = sides
  const { progress } = options
  const addresses = [served.address]
  const streams = Math.min(reportingStreams, devicesCount) / fleetProcesses
  await clients.all({ ask: 'open', group: 'ours', addresses, from: 0, to: streams })
  const pool = new pg.Pool({ connectionString: served.databaseUrl, max: 1 })
  try {
    const backends = await databaseProcesses(pool)
    const oneRound = async () => {
      const [before, databaseBefore] = [await served.cpuSince(), await backends?.()]
      const startedAt = performance.now()
      await clients.all({ ask: 'report', group: 'ours', streams, reports: reportsOfRound / fleetProcesses })
      const wallMs = performance.now() - startedAt
      const cpu = await served.cpuSince(before)
      const databaseCpu = databaseBefore === undefined ? 0 : (await backends!()) - databaseBefore
      return { ...rate(reportsOfRound, cpu, wallMs), us: (cpu.user + cpu.system + databaseCpu) / reportsOfRound }
    }
    const severalRounds = async (what: string) => {
      await oneRound()
      const measured: Awaited<ReturnType<typeof oneRound>>[] = []
      for (let round = 1; round <= rounds; round++) {
        progress(`${what}: round ${round} of ${rounds}`)
        measured.push(await oneRound())
      }
      return measured
    }

    const few = await severalRounds(`heartbeat.persisted, ${fewRows} devices`)
    const bare = await bareStatement(pool)
    const [value, floor] = [medianRate(few), medianRate(bare)]
    yield {
      name: 'heartbeat.persisted',
      value: value.perCpuSecond,
      unit: 'reports/s',
      floor: floor.perCpuSecond,
      ratio: value.perCpuSecond / floor.perCpuSecond,
      note:
        `acknowledged after their commit: ${showRate(value)} for a second of the server's processor time, ` +
        `${Math.round(value.perWallSecond)}/s by the clock over ${streams * fleetProcesses} streams; floor: the same rows by ` +
        `one statement of ${rowsOfStatement}, ${showRate(floor)} for a second of the client's processor time; ${load()}`,
    }

    await addDevices(sides, Math.min(fewRows, devicesCount), devicesCount, options)
    await seedOthers(served, manyRows - devicesCount)
    const many = await severalRounds(`heartbeat.flat, ${manyRows} devices`)
    const [usFew, usMany] = [few, many].map(measured => median(measured.map(({ us }) => us))) as [number, number]
    yield {
      name: 'heartbeat.flat',
      value: usMany,
      unit: 'µs a report',
      floor: usFew,
      ratio: usFew / usMany,
      note:
        `processor time of the server${backends ? ' and of PostgreSQL' : ''} with ${manyRows} devices on record; floor: with ` +
        `${fewRows}; ${load()}`,
      bar: { demand: `at most ${timesFewMax} × that of the small table`, met: usMany <= timesFewMax * usFew },
    }
  } finally {
    await pool.end()
    await clients.all({ ask: 'close', group: 'ours' })
  }
}

/** Nothing but the rows: what a report leaves behind, by one statement for hundreds, with its commit. */
async function bareStatement(pool: pg.Pool): Promise<Rate[]> {
  await pool.query(
    'create table bare_postures (device_id text primary key, posture jsonb, measured_at timestamptz, received_at timestamptz)',
  )
  await pool.query(
    'create table bare_reports (device_id text, sequence bigint, posture jsonb, measured_at timestamptz, received_at timestamptz)',
  )
  const ids = Array.from({ length: rowsOfStatement }, (_, number) => deviceId(number))
  const { attributes: _, ...posture } = healthy()
  const once = async (sequence: number) => {
    const now = ids.map(() => new Date())
    await pool.query(
      `with kept as (
         insert into bare_postures select id, posture::jsonb, measured, received
         from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) as t(id, posture, measured, received)
         on conflict (device_id) do update set
           posture = excluded.posture, measured_at = excluded.measured_at, received_at = excluded.received_at)
       insert into bare_reports select id, $5, posture::jsonb, measured, received
       from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) as t(id, posture, measured, received)`,
      [ids, ids.map(() => JSON.stringify(posture)), now, now, sequence],
    )
  }
  const measured: Rate[] = []
  for (let round = 0; round <= rounds; round++) {
    const before = process.cpuUsage()
    const startedAt = performance.now()
    const statements = reportsOfRound / rowsOfStatement
    for (let turn = 0; turn < statements; turn++) await once(turn)
    if (round > 0) measured.push(rate(reportsOfRound, process.cpuUsage(before), performance.now() - startedAt))
  }
  return measured
}

/** Microseconds of processor time of all of PostgreSQL's processes; undefined where they are elsewhere. */
async function databaseProcesses(pool: pg.Pool): Promise<(() => Promise<number>) | undefined> {
  const { rows } = await pool.query<{ pid: number }>('select pg_backend_pid() as pid')
  const fieldsOf = async (pid: number | string) => {
    const stat = await readFile(`/proc/${pid}/stat`, 'utf8')
    return {
      name: stat.slice(stat.indexOf('(') + 1, stat.lastIndexOf(') ')),
      fields: stat.slice(stat.lastIndexOf(') ') + 2).split(' '),
    }
  }
  const own = await fieldsOf(rows[0]!.pid).catch(() => undefined)
  if (own?.name !== 'postgres') return undefined
  const parent = own.fields[1]!
  return async () => {
    const pids = (await readdir('/proc')).filter(name => /^\d+$/.test(name))
    let us = 0
    for (const pid of pids) {
      const found = await fieldsOf(pid).catch(() => undefined)
      if (found?.fields[1] === parent) us += (Number(found.fields[11]) + Number(found.fields[12])) * 10_000
    }
    return us
  }
}

const median = (values: number[]) =>
  values.toSorted((one, other) => one - other)[Math.floor(values.length / 2)] ?? Number.NaN
const quantile = (values: number[], share: number) =>
  values.toSorted((one, other) => one - other)[Math.min(values.length - 1, Math.floor(values.length * share))] ??
  Number.NaN

// ── revoke.reach, storm.recovery ───────────────────────────────────────────────────────────────────────────────────

const instances = 3
const revocations = 200
const reachMsMax = 1_000
const timesHandshakesMax = 1.5
/** Of the survivors' devices some go on reporting, to see what they notice. */
const beatingStreams = 100
const beatEveryMs = 250
const calmMs = 3_000
const stormMsMax = 120_000

async function* measureStorm({ served, clients }: Sides, { progress }: GroupOptions): AsyncGenerator<Row> {
  const ends: (() => unknown)[] = []
  try {
    progress(`starting ${instances} instances`)
    const others: Served[] = []
    for (let count = 1; count < instances; count++) {
      const other = await startServed({}, served)
      ends.push(other.stop)
      others.push(other)
    }
    const doomed = others.at(-1)!
    const survivors = [served, ...others.slice(0, -1)]
    const addresses = [...survivors, doomed].map(({ address }) => address)
    progress(`${devicesCount} devices connect`)
    await clients.all({ ask: 'open', group: 'ours', addresses })
    yield await measureReach(served, clients, progress)
    yield await measureRecovery(survivors, doomed, clients, progress)
  } finally {
    for (const end of ends.reverse()) await end()
  }
}

async function measureReach(served: Served, clients: FleetClients, progress: GroupOptions['progress']): Promise<Row> {
  const keyPem = createKey()
  const certificatePem = await served.operatorCertificate(signingRequestFor(keyPem))
  const channel = channelOf({ rootsPem: served.rootsPem, keyPem, certificatePem })
  const admin = new AdminServiceClient(served.address, channel, channelOptions)
  const measured: number[] = []
  try {
    for (let turn = 0; turn < revocations; turn++) {
      if (turn % 50 === 0) progress(`revoke.reach: ${turn} of ${revocations}`)
      const told = clients.ask(turn % fleetProcesses, {
        ask: 'told',
        group: 'ours',
        device: Math.floor(turn / fleetProcesses),
      })
      const askedAt = performance.timeOrigin + performance.now()
      const answer = answered<unknown>(done => admin.revokeDevice({ id: deviceId(turn), reason: 'measured' }, done))
      const { atMs = Number.NaN } = await told
      await answer
      measured.push(atMs - askedAt)
    }
  } finally {
    admin.close()
  }
  const value = quantile(measured, 0.99)
  return {
    name: 'revoke.reach',
    value,
    unit: 'ms',
    floor: reachMsMax,
    ratio: reachMsMax / value,
    note:
      `p99 from the operator's call to the device that is told so on its stream, median ${median(measured).toFixed(1)} ms, most ` +
      `${Math.max(...measured).toFixed(1)} ms; ${revocations} devices one after the other, of ${devicesCount} with streams at ` +
      `${instances} instances; ${load()}`,
    bar: { demand: `at most ${reachMsMax} ms`, met: value <= reachMsMax },
  }
}

async function measureRecovery(
  survivors: Served[],
  doomed: Served,
  clients: FleetClients,
  progress: GroupOptions['progress'],
): Promise<Row> {
  const addresses = survivors.map(({ address }) => address)
  const beat = async (forMs: number) => {
    const streams = beatingStreams / fleetProcesses
    const answers = await clients.all({ ask: 'latency', group: 'ours', streams, everyMs: beatEveryMs, forMs })
    return answers.flatMap(({ measured = [] }) => measured)
  }
  const became = async () => {
    const answers = await clients.all({ ask: 'became' })
    const sum = (name: 'lost' | 'back' | 'lostUnawares' | 'refusals') =>
      answers.reduce((total, answer) => total + (answer[name] ?? 0), 0)
    const lastBackMs = Math.max(...answers.map(answer => answer.lastBackMs ?? 0))
    return {
      lost: sum('lost'),
      back: sum('back'),
      lostUnawares: sum('lostUnawares'),
      refusals: sum('refusals'),
      lastBackMs,
    }
  }
  await clients.all({ ask: 'storm', addresses, deadAddress: doomed.address })
  progress('storm.recovery: before it')
  const calm = await beat(calmMs)
  const before = await became()

  progress('storm.recovery: an instance dies')
  const cpuBefore = await Promise.all(survivors.map(({ cpuSince }) => cpuSince()))
  const diedAt = performance.timeOrigin + performance.now()
  doomed.kill()
  let now = before
  const inStorm: number[] = []
  for (;;) {
    inStorm.push(...(await beat(1_000)))
    now = await became()
    if (now.lost > 0 && now.back === now.lost) break
    if (performance.timeOrigin + performance.now() - diedAt > stormMsMax) {
      throw new Error(`of ${now.lost} devices only ${now.back} are back after ${stormMsMax / 1_000} s`)
    }
  }
  const cpu = await Promise.all(survivors.map(({ cpuSince }, at) => cpuSince(cpuBefore[at])))
  const cpuSeconds = cpu.reduce((sum, { user, system }) => sum + (user + system) / 1e6, 0)
  const seconds = (now.lastBackMs - diedAt) / 1_000

  progress('storm.recovery: as many come to two bare servers')
  const bare = await Promise.all(survivors.map(() => startBareEcho()))
  let floor: number
  try {
    const identities = Array.from(
      { length: Math.round(now.lost / fleetProcesses) },
      (_, at) => bare[at % bare.length]!.client,
    )
    await clients.all({ ask: 'devices', group: 'rush', identities })
    const startedAt = performance.timeOrigin + performance.now()
    const answers = await clients.all({ ask: 'rush', group: 'rush', addresses: bare.map(({ address }) => address) })
    floor = (Math.max(...answers.map(({ atMs = 0 }) => atMs)) - startedAt) / 1_000
    await clients.all({ ask: 'close', group: 'rush' })
  } finally {
    for (const { stop } of bare) await stop()
  }
  const errors = now.lostUnawares - before.lostUnawares
  return {
    name: 'storm.recovery',
    value: seconds,
    unit: 's',
    floor,
    ratio: floor / seconds,
    note:
      `${now.lost} of ${devicesCount} devices are back at ${survivors.length} instances after kill -9, each after a random part of a second at ` +
      `first; ${cpuSeconds.toFixed(1)} s of the survivors' processor time; ${now.refusals} attempts were refused or lost; ${errors} ` +
      `streams of the survivors broke; their reports were acknowledged within ${quantile(inStorm, 0.99).toFixed(0)} ms (p99), ` +
      `${quantile(calm, 0.99).toFixed(0)} ms before it; floor: as many streams opened at ${bare.length} bare grpc-js servers; ${load()}`,
    bar: {
      demand: `at most ${timesHandshakesMax} × the floor, and no stream of the survivors breaks`,
      met: seconds <= timesHandshakesMax * floor && errors === 0,
    },
  }
}
