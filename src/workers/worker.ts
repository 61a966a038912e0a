/**
 * A worker of `edgemesh serve --workers`: a whole server, but for its ports, which are its parent's. It is told everything
 * over IPC, its settings among it, so that all workers have the same ones whatever becomes of the files they came from.
 *
 * A signal has it stop as its parent's word does: Ctrl-C reaches the whole group. What it has then not been told to do, it
 * does by itself, and is replaced. It also stops, in good order, when its parent has died.
 */
import type { Socket } from 'node:net'
import type { Employment, RunningServer } from '../server.ts'
import type { Settings } from '../settings.ts'
import { version } from '../version.ts'

export type Question = { ask: 'scrape' } | { ask: 'readiness' } | { ask: 'revocationList'; issuerKeyId?: string }

export type Order =
  | { start: { settings: Settings; worker: string; employment: Employment } }
  /** A socket comes with it, unless it was closed on its way. */
  | { take: true }
  | { question: Question; id: number }
  | { stop: true }

/** Of the connections that were sent: how many have come, are open with their handshake over, have ended. */
export type Load = { received: number; secure: number; ended: number }

export type Word =
  | { serving: true }
  | { failed: { message: string; hint?: string; stack?: string } }
  | { stopping: true }
  | { load: Load }
  | { answer: unknown; id: number }
  | { problem: string; id: number }

/** How often the parent is told of the load, as long as it changes. */
const tellEveryMs = 100
/** It is told so often in any case: one that says nothing is taken for dead. */
const signOfLifeMs = 1_000
/** A scrape has a bounded number of series, a revocation list a line for each certificate that was revoked. */
const answerBytesMax = 64 * 2 ** 20

let server: RunningServer | undefined
let tracing: { stop(): Promise<void> } | undefined
let stopping = false
let received = 0
/** Closed before the server had them. */
let lost = 0

process.on('message', (order: Order, socket?: Socket) => {
  if ('take' in order) take(socket)
  else if ('start' in order) void start(order.start)
  else if ('question' in order) void answer(order)
  else void stop()
})
process.on('disconnect', () => void stop())
for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(name, () => void stop())

function tell(word: Word): Promise<void> {
  return new Promise(resolve => {
    if (process.connected) process.send?.(word, () => resolve())
    else resolve()
  })
}

async function start({ settings, worker, employment }: Extract<Order, { start: unknown }>['start']): Promise<void> {
  // Signals are heard before all this code has been loaded.
  const [{ startServer }, { createLog }, { startTracing }] = await Promise.all([
    import('../server.ts'),
    import('../telemetry/log.ts'),
    import('../telemetry/tracing.ts'),
  ])
  const log = createLog({ level: settings.log.level }).child({ worker })
  process.on('uncaughtException', error => {
    log.fatal({ err: error }, 'a worker has met an error that nobody handles')
    process.exit(1)
  })
  try {
    tracing = await startTracing(process.env, { instanceId: settings.instanceId, version, log })
    server = await startServer({ settings, log, employment })
  } catch (error) {
    const { message, stack, hint } = error as Error & { hint?: string }
    await tell({ failed: { message, stack, hint } })
    process.exit(1)
  }
  await tell({ serving: true })
  if (stopping) await end(server)
}

function take(socket: Socket | undefined): void {
  received++
  if (server && socket) {
    server.take(socket)
  } else {
    lost++
    socket?.destroy()
  }
}

async function answer({ question, id }: Extract<Order, { question: unknown }>): Promise<void> {
  try {
    const value = await answerOf(question)
    const bytes = typeof value === 'string' || Buffer.isBuffer(value) ? value.length : 0
    if (bytes > answerBytesMax) throw new Error(`the answer has ${bytes} bytes, more than ${answerBytesMax}`)
    await tell({ answer: value, id })
  } catch (error) {
    await tell({ problem: (error as Error).message, id })
  }
}

async function answerOf(question: Question): Promise<unknown> {
  if (!server) throw new Error('it has not started yet')
  switch (question.ask) {
    case 'scrape':
      return server.scrape()
    case 'readiness':
      return server.readiness()
    case 'revocationList':
      return server.revocationList(question.issuerKeyId)
  }
}

/** Once it has started, if it has not yet. */
async function stop(): Promise<void> {
  if (stopping) return
  stopping = true
  if (server) await end(server)
}

async function end(running: RunningServer): Promise<void> {
  await tell({ stopping: true })
  await running.stop()
  await tracing?.stop()
  process.exit(0)
}

let told: Load = { received: 0, secure: 0, ended: 0 }
let toldAt = 0
setInterval(() => {
  const { secure, ended } = server?.load() ?? { secure: 0, ended: 0 }
  const load = { received, secure, ended: ended + lost }
  const unchanged = load.received === told.received && load.secure === told.secure && load.ended === told.ended
  const now = performance.now()
  if (unchanged && now - toldAt < signOfLifeMs) return
  told = load
  toldAt = now
  void tell({ load })
}, tellEveryMs)
