/** stream.memory: what an idle stream takes, beside bare grpc-js. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type BareEcho, startBareEcho } from './bare-echo-server.ts'
import { devicesCount, type FleetClients, type FleetSides, fleetProcesses } from './fleet.ts'
import type { GroupOptions, Row } from './row.ts'
import { type Served, startServed } from './served.ts'

const timesBareMax = 1.15
/** What is needed for the first connections only is not counted. */
const streamsWarmUp = 200
/** For what is in flight to be done, and garbage to be seen as such. */
const settleMs = 2_000

export async function* measureMemory({ served, clients }: FleetSides, { progress }: GroupOptions): AsyncGenerator<Row> {
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
