/** A process that simulates some of the devices. It is told everything over IPC, so that no argument shows the token. */
import { setMaxListeners } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Asking, type SimulatedDevice, simulatedDevice } from './device.ts'
import { healthsOf, type PostureMix } from './mix.ts'
import type { Action } from './script.ts'
import { emptyTally, type Tally } from './tally.ts'

export type Plan = {
  server: string
  token: string
  idPrefix: string
  /** The numbers of the devices that this process simulates. */
  devices: number[]
  devicesOfFleet: number
  mix: PostureMix
  asking: Asking | undefined
  rampMs: number
  enrollingMax: number
}

export type Order = { start: Plan } | { act: Action; devices: number[] } | { stop: true }
export type Word = { tally: Tally; enrolling: boolean; stopped: boolean }

/** How often the parent is told. */
const tellEveryMs = 500

// Ctrl-C reaches the whole group; the parent says when to end.
for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(name, () => {})
process.on('disconnect', () => process.exit())

const stopping = new AbortController()
// Each device listens, and there are thousands.
setMaxListeners(0, stopping.signal)
const tally = emptyTally()
const devices = new Map<number, SimulatedDevice>()
let running: Promise<void> | undefined

process.on('message', (order: Order) => {
  if ('start' in order) running = run(order.start)
  else if ('act' in order) for (const number of order.devices) devices.get(number)?.act(order.act)
  else void stop()
})

function tell(enrolling: boolean, stopped: boolean): Promise<void> {
  tally.rssBytes = process.memoryUsage.rss()
  const word: Word = { tally, enrolling, stopped }
  return new Promise(resolve => process.send?.(word, () => resolve()))
}

async function run({ server, token, idPrefix, devices: numbers, devicesOfFleet, ...plan }: Plan): Promise<void> {
  const startedAt = performance.now()
  const healths = healthsOf(plan.mix, devicesOfFleet)
  for (const number of numbers) {
    const id = `${idPrefix}-${String(number).padStart(5, '0')}`
    const health = healths[number] ?? 'healthy'
    devices.set(number, simulatedDevice({ server, id, health, asking: plan.asking, tally, signal: stopping.signal }))
  }
  let enrolling = true
  // To the end, also when all devices of this process have ended: the parent waits for the last word of each.
  setInterval(() => void tell(enrolling, false), tellEveryMs)
  const lives: Promise<void>[] = []
  const left = devices.entries()
  await Promise.all(
    Array.from({ length: plan.enrollingMax }, async () => {
      for (const [number, device] of left) {
        const dueMs = startedAt + (plan.rampMs * number) / devicesOfFleet - performance.now()
        if (dueMs > 0) await sleep(dueMs, undefined, { signal: stopping.signal }).catch(() => {})
        await device.enroll(token)
        lives.push(device.live())
      }
    }),
  )
  enrolling = false
  await tell(enrolling, false)
  await Promise.all(lives)
}

async function stop(): Promise<void> {
  stopping.abort()
  await running
  await tell(false, true)
  process.exit()
}
