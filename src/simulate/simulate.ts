/**
 * A fleet of simulated devices against any server, in a few processes: one process may not have as many connections open as
 * a large fleet needs.
 *
 *     const summary = await simulate({ server: 'localhost:8000', token, devices: 1000, …, onProgress: draw, signal })
 *
 * First every device is enrolled or refused; from then on time counts, for the script and for how long it goes on. A
 * device begins to report as soon as it is enrolled.
 */
import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { extname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Asking } from './device.ts'
import type { Order, Plan, Word } from './fleet-process.ts'
import type { PostureMix } from './mix.ts'
import type { Action, Step } from './script.ts'
import { emptyTally, quantileMs, sumOf, type Tally } from './tally.ts'

export type Simulation = {
  server: string
  token: string
  idPrefix: string
  devices: number
  processes: number
  mix: PostureMix
  asking?: Asking
  script: readonly Step[]
  /** Besides the script: every so often so great a share of the devices loses its session. */
  reconnecting?: { everyMs: number; share: number }
  /** How long to go on once all are enrolled; until `signal` without it. */
  durationMs?: number
  /** Over how long the enrollments are spread. */
  rampMs: number
  onProgress: (progress: Progress) => void
  signal: AbortSignal
  random?: () => number
}

export type Progress = {
  phase: 'enrolling' | 'running' | 'done'
  elapsedMs: number
  devices: number
  enrolled: number
  states: Tally['states']
  heartbeats: number
  heartbeatsPerSecond: number
  acknowledgedMs: { p50: number | undefined; p99: number | undefined }
  allowed: number
  denied: number
  decisionsPerSecond: number
  revocations: number
  reconnects: number
  scripted: Record<string, number>
  errors: Record<string, number>
  /** Memory of the simulating processes, by device. */
  bytesPerDevice: number
}

export type Summary = Progress & {
  /** How the devices were when the end began. */
  statesAtEnd: Tally['states']
  enrolledInMs: number
  /** Devices that were not well at the end, for other reasons than the script's. */
  failedDevices: number
}

const progressEveryMs = 1_000
/** Of the whole fleet at once: a server signs some hundred certificates a second, and more only wait. */
const enrollingMax = 32
/** Ending takes the grace of a stream; a process that needs longer has lost the server. */
const stopMsMax = 15_000

export async function simulate(simulation: Simulation): Promise<Summary> {
  const { devices, processes, signal, durationMs, script, reconnecting, random = Math.random } = simulation
  const startedAt = performance.now()
  const workers = Array.from({ length: Math.min(processes, devices) }, startWorker)
  const failure = Promise.race(workers.map(({ failed }) => failed))
  failure.catch(() => {})
  let phase: Progress['phase'] = 'enrolling'
  let before = { atMs: startedAt, heartbeats: 0, decisions: 0 }

  const total = () => sumOf(workers.map(({ last }) => last.tally))
  const progress = (): Progress => {
    const now = performance.now()
    const tally = total()
    const decisions = tally.allowed + tally.denied
    // The last is of the whole time.
    const since = phase === 'done' ? { atMs: startedAt, heartbeats: 0, decisions: 0 } : before
    const seconds = Math.max(0.001, (now - since.atMs) / 1_000)
    const { acknowledgements, rssBytes, broken: _, ...counts } = tally
    const shown: Progress = {
      phase,
      elapsedMs: Math.round(now - startedAt),
      devices,
      ...counts,
      heartbeatsPerSecond: round((tally.heartbeats - since.heartbeats) / seconds),
      decisionsPerSecond: round((decisions - since.decisions) / seconds),
      acknowledgedMs: { p50: quantile(acknowledgements, 0.5), p99: quantile(acknowledgements, 0.99) },
      bytesPerDevice: Math.round(rssBytes / devices),
    }
    before = { atMs: now, heartbeats: tally.heartbeats, decisions }
    return shown
  }
  const showing = setInterval(() => simulation.onProgress(progress()), progressEveryMs)

  const act = (action: Action, share: number) => {
    const hit = drawn(devices, share, random)
    for (const [index, worker] of workers.entries()) {
      worker.send({ act: action, devices: hit.filter(number => number % workers.length === index) })
    }
  }

  try {
    // Step 1: Enroll them.
    for (const [index, worker] of workers.entries()) worker.send({ start: planFor(simulation, index, workers.length) })
    const enrolled = Promise.all(workers.map(worker => worker.enrolled))
    await Promise.race([enrolled, failure, aborted(signal)])
    const enrolledInMs = Math.round(performance.now() - startedAt)

    // Step 2: Let them live, and let happen what the script says.
    phase = 'running'
    const ending = new AbortController()
    const until = AbortSignal.any([signal, ending.signal])
    const happening = [
      play(script, act, until),
      ...(reconnecting
        ? [repeat(reconnecting.everyMs, () => act({ action: 'disconnect' }, reconnecting.share), until)]
        : []),
    ]
    try {
      if (!signal.aborted)
        await Promise.race([durationMs === undefined ? aborted(signal) : wait(durationMs, signal), failure])
    } finally {
      ending.abort()
      await Promise.all(happening)
    }

    // Step 3: End them in order, and count.
    await Promise.race([Promise.all(workers.map(worker => worker.heard())), failure])
    const { states: statesAtEnd, broken } = total()
    for (const worker of workers) worker.send({ stop: true })
    await Promise.race([
      Promise.all(workers.map(worker => worker.stopped)),
      sleep(stopMsMax, undefined, { ref: false }),
    ])
    phase = 'done'
    const lost = signal.aborted ? 0 : statesAtEnd.enrolling
    return { ...progress(), statesAtEnd, enrolledInMs, failedDevices: broken + lost }
  } finally {
    clearInterval(showing)
    for (const worker of workers) worker.end()
  }
}

function planFor(simulation: Simulation, index: number, processes: number): Plan {
  const { server, token, idPrefix, devices, mix, asking, rampMs } = simulation
  const numbers = Array.from({ length: devices }, (_, number) => number).filter(number => number % processes === index)
  return {
    server,
    token,
    idPrefix,
    devices: numbers,
    devicesOfFleet: devices,
    mix,
    asking,
    rampMs,
    enrollingMax: Math.max(1, Math.floor(enrollingMax / processes)),
  }
}

function startWorker() {
  // The token goes to a worker as a message, and to no process by its environment.
  const { EDGEMESH_TOKEN: _, ...inherited } = process.env
  // Threads that come and go with enrollments each leave an arena of memory behind, half a process of them.
  const env = { MALLOC_ARENA_MAX: '1', ...inherited }
  const options = {
    env,
    serialization: 'advanced',
    execArgv: [],
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  } as const
  const child: ChildProcess = fork(join(import.meta.dirname, `fleet-process${extname(import.meta.filename)}`), {
    ...options,
    execArgv: [],
    stdio: [...options.stdio],
  })
  const enrolled = Promise.withResolvers<void>()
  const stopped = Promise.withResolvers<void>()
  const failed = Promise.withResolvers<never>()
  failed.promise.catch(() => {})
  const hearing = new Set<() => void>()
  const worker = {
    last: { tally: emptyTally(), enrolling: true, stopped: false } as Word,
    enrolled: enrolled.promise,
    stopped: stopped.promise,
    /** Rejects when the process has died. */
    failed: failed.promise,
    send: (order: Order) => void child.send(order, () => {}),
    /** Resolves with the next word. */
    heard: () => new Promise<void>(resolve => hearing.add(resolve)),
    end: () => void child.kill('SIGKILL'),
  }
  child.on('message', (word: Word) => {
    worker.last = word
    if (!word.enrolling) enrolled.resolve()
    if (word.stopped) stopped.resolve()
    for (const resolve of hearing) resolve()
    hearing.clear()
  })
  void once(child, 'exit').then(([code, signal]) => {
    if (!worker.last.stopped)
      failed.reject(new Error(`a simulating process has ended: ${signal ?? `exit code ${code}`}`))
    stopped.resolve()
  }, failed.reject)
  return worker
}

async function play(script: readonly Step[], act: (action: Action, share: number) => void, signal: AbortSignal) {
  const startedAt = performance.now()
  for (const step of script) {
    await wait(step.atMs - (performance.now() - startedAt), signal)
    if (signal.aborted) return
    act(step, step.share)
  }
}

async function repeat(everyMs: number, act: () => void, signal: AbortSignal): Promise<void> {
  for (;;) {
    await wait(everyMs, signal)
    if (signal.aborted) return
    act()
  }
}

/** Timers reach no further; who simulates for a month has other trouble. */
const waitMsMax = 2 ** 31 - 1

function wait(ms: number, signal: AbortSignal): Promise<void> {
  return sleep(Math.min(waitMsMax, Math.max(0, ms)), undefined, { signal }).catch(() => {})
}

function aborted(signal: AbortSignal): Promise<void> {
  return new Promise(resolve => {
    if (signal.aborted) resolve()
    signal.addEventListener('abort', () => resolve(), { once: true })
  })
}

/** So many devices that they are `share` of all, at least one, each once. */
function drawn(devices: number, share: number, random: () => number): number[] {
  const numbers = Array.from({ length: devices }, (_, number) => number)
  const wanted = Math.max(1, Math.round(devices * share))
  for (let at = 0; at < wanted; at += 1) {
    const other = at + Math.floor(random() * (devices - at))
    ;[numbers[at], numbers[other]] = [numbers[other]!, numbers[at]!]
  }
  return numbers.slice(0, wanted)
}

function quantile(buckets: readonly number[], share: number): number | undefined {
  const ms = quantileMs(buckets, share)
  return ms === undefined ? undefined : round(ms)
}

function round(value: number): number {
  return Math.round(value * 10) / 10
}
