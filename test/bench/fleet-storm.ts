/** revoke.reach and storm.recovery: three instances, of which one dies. */
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { AdminServiceClient } from '../../src/gen/edgemesh/v1/admin.ts'
import { percentile } from '../support/percentile.ts'
import { startBareEcho } from './bare-echo-server.ts'
import { answered, channelOf, channelOptions } from './enrolled-device.ts'
import { deviceId, devicesCount, type FleetClients, type FleetSides, fleetProcesses } from './fleet.ts'
import { showLoad } from './rates.ts'
import type { GroupOptions, Row } from './row.ts'
import { type Served, startServed } from './served.ts'

const instances = 3
const revocations = 200
const reachMsMax = 1_000
const timesHandshakesMax = 1.5
/** Of the survivors' devices some go on reporting, to see what they notice: so few that they are no load of their own. */
const beatingStreams = 100
const beatEveryMs = 1_000
const calmMs = 3_000
const stormMsMax = 120_000

export async function* measureStorm({ served, clients }: FleetSides, { progress }: GroupOptions): AsyncGenerator<Row> {
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
  const value = percentile(measured, 99)
  return {
    name: 'revoke.reach',
    value,
    unit: 'ms',
    floor: reachMsMax,
    ratio: reachMsMax / value,
    note:
      `p99 from the operator's call to the device that is told so on its stream, median ${percentile(measured, 50).toFixed(1)} ms, most ` +
      `${Math.max(...measured).toFixed(1)} ms; ${revocations} devices one after the other, of ${devicesCount} with streams at ` +
      `${instances} instances; ${showLoad()}`,
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
      `streams of the survivors broke; their reports were acknowledged within ${percentile(inStorm, 99).toFixed(0)} ms (p99), ` +
      `${percentile(calm, 99).toFixed(0)} ms before it; floor: as many streams opened at ${bare.length} bare grpc-js servers; ${showLoad()}`,
    bar: {
      demand: `at most ${timesHandshakesMax} × the floor, and no stream of the survivors breaks`,
      met: seconds <= timesHandshakesMax * floor && errors === 0,
    },
  }
}
