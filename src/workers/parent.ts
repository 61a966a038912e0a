/**
 * The parent of the workers of `edgemesh serve --workers`: has both ports, hands each connection to the worker that has the
 * fewest, answers for all on the telemetry port, and replaces a worker that dies.
 *
 *     const workers = await startWorkers({ settings, count, machine, env, log, stopping })
 *     …
 *     await workers.stop()
 *
 * A worker's states:
 *
 * - `starting`: it is not given any connection
 * - `serving`
 * - `stopping`: told to, or by itself; others get the connections, unless there are none
 * - `gone`: its process has ended; another takes its number after a pause, unless all stop
 *
 * The first one starts alone, since it may have to migrate the database and to make the authority. A worker that can't start
 * ends the start of all; later it is tried again for ever, as what keeps it from it may pass.
 *
 * Why connections are handed on one by one, rather than spread by the kernel (`reusePort`) or in turn (`node:cluster`): they
 * live long, so what counts is not how new ones are spread but how many each worker has. Measured with 1,000 of them, and again
 * after one worker was killed and its clients had come back to the one in its place:
 *
 *     reusePort    515 485    244 242 267 247    then  255 745    71 300 325 304
 *     cluster      558 442    289 237 237 237    then  279 721    72 309 310 309
 *     handed on    500 500    250 250 250 250    then  500 500    250 250 250 250
 *
 * Besides, the one listener outlives every worker, so none takes a queue of connections along; and a second server on the same port
 * is told that it is taken. It costs the parent 0.2 ms a connection, beside 3.5 ms for its handshake at the worker.
 */
import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net'
import { extname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Settings } from '../settings.ts'
import { type Readiness, startTelemetryHttp } from '../telemetry/http.ts'
import type { Log } from '../telemetry/log.ts'
import { startParentMetrics } from '../telemetry/metrics.ts'
import { mergeReadiness, mergeScrapes } from './answers.ts'
import { isTooLittle, type Machine, nodeOptions, type Share, settingsOf, shareOf } from './shares.ts'
import type { Load, Order, Question, Word } from './worker.ts'

export type Workers = {
  port: number
  metricsPort: number
  /** Has all of them drain at the same time. @returns how many had to be killed */
  stop(): Promise<{ killed: number }>
}

type Worker = {
  /** From 1; stays when the process is replaced. */
  number: number
  state: 'starting' | 'serving' | 'stopping' | 'gone'
  process: ChildProcess
  startedAt: number
  /** Connections that it was sent. */
  sent: number
  /** Those that have not left this process yet. */
  onTheirWay: Set<Socket>
  load: Load
  /** Looks in a row at which it had not said a word. */
  missed: number
  /** For that, it was killed. */
  silent: boolean
  /** Why it could not start. */
  failure: Error | undefined
  asked: Map<number, { resolve: (answer: unknown) => void; reject: (error: Error) => void }>
  /** That it serves; or why it doesn't. */
  started: PromiseWithResolvers<void>
  ended: PromiseWithResolvers<void>
}

/**
 * A worker with more handshakes under way than this is busy, and the next connection goes to another, even if that has
 * more: after a death there are thousands, and all cores are to share that work. It is about a second's.
 */
const handshakesMost = 256
/** Connections on their way to a worker that has not taken them yet. With that many at each, no more are taken. */
const onTheWayMax = 1_000
/** Less than who asks for readiness waits (`READY_MS_MAX`), and much less than a scrape does. */
const answerMsMax = 2_000
const askedMax = 256
/** A worker that has not said a word at so many looks in a row hangs: its kind speak every second. */
const lookEveryMs = 5_000
const missedMax = 6
/** Before it serves it has to load all its code, and a host that starts everything at once is slow. */
const missedStartingMax = 24
/** One that has not at more than so many is given no connection meanwhile. */
const missedBusy = 1
const replaceAfterMs = 250
const replaceAfterMsMax = 30_000
/** One that has lived as long did not die of its start. */
const livedMs = 60_000
/** What a worker may take to end beyond the time to drain, before it is killed. */
const endMarginMs = 5_000

/**
 * @param count of the workers
 * @param stopping what is told to stop: from then on nobody is replaced
 * @throws why a worker could not start, or a port not be had, or that it was told to stop before; nothing is left then
 */
export async function startWorkers(options: {
  settings: Settings
  count: number
  machine: Machine
  env: Readonly<Record<string, string | undefined>>
  log: Log
  stopping: AbortSignal
}): Promise<Workers> {
  const { settings, count, log } = options
  const share = shareOf(options.machine, settings.database.poolMax, count)
  log.info({ workers: count, each: share }, 'starting workers')
  if (isTooLittle(options.machine, count)) log.warn({ workers: count }, 'there is little memory for so many workers')
  /** By number, beginning with 1. */
  const workers: Worker[] = []
  /** By number: ends in a row, each soon after its start. */
  const failures: number[] = []
  const metrics = startParentMetrics(() => countStates(workers))
  let stopping = options.stopping.aborted
  options.stopping.addEventListener('abort', () => {
    stopping = true
  })
  const killAll = () => {
    for (const { process } of workers) process.kill('SIGKILL')
  }
  // Whatever ends this process: nobody else would end them.
  process.on('exit', killAll)

  // ── A worker's life ──────────────────────────────────────────────────────────────────────────────────────────────

  function start(number: number): Worker {
    const worker = spawn(number, share, options)
    workers[number - 1] = worker
    worker.process.on('message', (word: Word) => hear(worker, word))
    worker.process.on('error', error => {
      worker.failure ??= error
    })
    void endOf(worker.process).then(how => bury(worker, how))
    return worker
  }

  function hear(worker: Worker, word: Word): void {
    worker.missed = 0
    if ('load' in word) {
      worker.load = word.load
    } else if ('serving' in word) {
      worker.state = 'serving'
      worker.started.resolve()
    } else if ('stopping' in word) {
      worker.state = 'stopping'
    } else if ('failed' in word) {
      worker.failure = Object.assign(new Error(word.failed.message), word.failed)
    } else {
      const asker = worker.asked.get(word.id)
      worker.asked.delete(word.id)
      if ('answer' in word) asker?.resolve(word.answer)
      else asker?.reject(new Error(word.problem))
    }
  }

  function bury(worker: Worker, { code, signal }: End): void {
    const { number, failure, state, silent } = worker
    const how = silent ? 'silent' : code === 0 ? 'left' : 'crashed'
    worker.state = 'gone'
    const end = `worker ${number} has ended ${signal ? `by ${signal}` : `with ${code}`}`
    for (const { reject } of worker.asked.values()) reject(new Error(end))
    worker.asked.clear()
    // Nobody else would end them, and their clients would wait.
    for (const socket of worker.onTheirWay) socket.destroy()
    worker.started.reject(failure ?? new Error(`${end} before it served`))
    worker.ended.resolve()
    const seen = { worker: String(number), pid: worker.process.pid, code, signal, err: failure }
    if (stopping) {
      // One that has no ears yet is ended by a signal to all.
      if (how !== 'left' && state !== 'starting') log.error(seen, 'a worker has crashed while it stopped')
      return
    }
    metrics.workerEnded(how)
    failures[number] = performance.now() - worker.startedAt > livedMs ? 0 : (failures[number] ?? 0) + 1
    // Its first start has failed, and with it that of all.
    if (state === 'starting' && !served && failures[number] === 1) return
    const retryMs = how === 'left' && failures[number] <= 1 ? 0 : pauseMs(failures[number])
    if (how === 'left') log.warn(seen, 'a worker was told to stop by somebody else; another takes its place')
    else log.error({ ...seen, how, retryMs }, 'a worker has died; another takes its place')
    setTimeout(() => {
      if (!stopping) start(number)
    }, retryMs).unref()
  }

  // ── Connections ──────────────────────────────────────────────────────────────────────────────────────────────────

  function handOn(socket: Socket): void {
    const worker = choose(workers, stopping)
    if (!worker) {
      metrics.refusedConnection()
      socket.destroy()
      return
    }
    worker.sent++
    worker.onTheirWay.add(socket)
    worker.process.send({ take: true } satisfies Order, socket, error => {
      worker.onTheirWay.delete(socket)
      if (!error) return
      worker.sent--
      socket.destroy()
    })
  }

  // ── Answering for all ────────────────────────────────────────────────────────────────────────────────────────────

  let questions = 0
  async function ask(worker: Worker, question: Question): Promise<unknown> {
    if (worker.state === 'gone' || worker.asked.size >= askedMax) throw new Error('it can not be asked')
    const id = ++questions
    const { promise, ...asker } = Promise.withResolvers<unknown>()
    worker.asked.set(id, asker)
    const timer = setTimeout(() => asker.reject(new Error(`no answer within ${answerMsMax} ms`)), answerMsMax)
    worker.process.send({ question, id } satisfies Order, error => error && asker.reject(error))
    return promise.finally(() => {
      clearTimeout(timer)
      worker.asked.delete(id)
    })
  }

  function askAll<T>(question: Question): Promise<{ worker: string; answer: T | undefined }[]> {
    return Promise.all(
      workers.map(async worker => {
        const answer = (await ask(worker, question).catch(() => undefined)) as T | undefined
        return { worker: String(worker.number), answer }
      }),
    )
  }

  const readiness = shared(async () => mergeReadiness(await askAll<Readiness>({ ask: 'readiness' })))
  const scrape = shared(async () =>
    mergeScrapes([{ worker: 'parent', answer: await metrics.scrape() }, ...(await askAll<string>({ ask: 'scrape' }))]),
  )
  function sayScrape(_request: IncomingMessage, response: ServerResponse): void {
    response.setHeader('content-type', 'text/plain; charset=utf-8; version=0.0.4')
    scrape().then(
      text => response.end(text),
      error => {
        log.error({ err: error }, 'metrics can not be told')
        response.writeHead(500).end()
      },
    )
  }
  async function revocationList(issuerKeyId: string | undefined): Promise<Buffer | undefined> {
    let problem: unknown = new Error('no worker serves now')
    for (const worker of workers.filter(({ state }) => state === 'serving')) {
      try {
        return (await ask(worker, { ask: 'revocationList', issuerKeyId })) as Buffer | undefined
      } catch (error) {
        problem = error
      }
    }
    throw problem
  }

  // ── The start, and the end ───────────────────────────────────────────────────────────────────────────────────────

  /** Once all of the first ones have. */
  let served = false
  const looking = setInterval(() => {
    for (const worker of workers) {
      const most = worker.state === 'starting' ? missedStartingMax : missedMax
      if (worker.state === 'gone' || ++worker.missed <= most || worker.silent) continue
      worker.silent = true
      log.error({ worker: String(worker.number) }, 'a worker has been silent for too long and is killed')
      worker.process.kill('SIGKILL')
    }
  }, lookEveryMs)

  async function end(): Promise<{ killed: number }> {
    stopping = true
    clearInterval(looking)
    const alive = workers.filter(({ state }) => state !== 'gone')
    for (const { process } of alive) {
      // One whose channel is gone has heard of that, and stops.
      if (process.connected) process.send({ stop: true } satisfies Order, () => {})
    }
    const all = Promise.all(alive.map(({ ended }) => ended.promise))
    const late = new AbortController()
    await Promise.race([all, sleep(settings.drainMs + endMarginMs, undefined, { signal: late.signal }).catch(() => {})])
    late.abort()
    const stuck = alive.filter(({ state }) => state !== 'gone')
    for (const { number, process } of stuck) {
      log.error({ worker: String(number) }, 'a worker has not stopped in time and is killed')
      process.kill('SIGKILL')
    }
    await all
    process.off('exit', killAll)
    return { killed: stuck.length }
  }

  let listener: Server | undefined
  try {
    await start(1).started.promise
    if (stopping) throw new Error('it was told to stop before it served')
    await Promise.all(Array.from({ length: count - 1 }, (_, at) => start(at + 2).started.promise))
    served = true
    listener = await listen(settings.api, handOn, log)
    const http = await startTelemetryHttp({
      ...settings.metrics,
      metrics: sayScrape,
      ready: readiness,
      revocationList,
      log,
    })
    const ports = { port: (listener.address() as AddressInfo).port, metricsPort: http.port }
    log.info({ ...ports, workers: count, trustDomain: settings.identity.trustDomain }, 'edgemesh is serving')
    const opened = listener
    let stopped: ReturnType<typeof end> | undefined
    return {
      ...ports,
      stop() {
        stopped ??= end().finally(async () => {
          opened.close()
          await http.stop()
          await metrics.stop()
          log.info('edgemesh has stopped')
        })
        return stopped
      },
    }
  } catch (error) {
    listener?.close()
    await end()
    await metrics.stop()
    throw error
  }
}

function spawn(
  number: number,
  share: Share,
  { settings, env }: { settings: Settings; env: Readonly<Record<string, string | undefined>> },
): Worker {
  const child = fork(join(import.meta.dirname, `worker${extname(import.meta.filename)}`), {
    ...nodeOptions(env, share),
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    serialization: 'advanced',
  })
  const order: Order = {
    start: {
      settings: settingsOf(settings, number, share),
      worker: String(number),
      employment: { connectionsMost: share.connectionsMost },
    },
  }
  child.send(order, () => {})
  const started = Promise.withResolvers<void>()
  // Whoever waits for it hears of it; of those who replace others, nobody waits.
  started.promise.catch(() => {})
  return {
    number,
    state: 'starting',
    process: child,
    startedAt: performance.now(),
    sent: 0,
    onTheirWay: new Set(),
    load: { received: 0, secure: 0, ended: 0 },
    missed: 0,
    silent: false,
    failure: undefined,
    asked: new Map(),
    started,
    ended: Promise.withResolvers(),
  }
}

type End = { code: number | null; signal: NodeJS.Signals | null }

/** When nothing can be heard of it any more. */
async function endOf(child: ChildProcess): Promise<End> {
  const disconnected = new Promise(resolve => child.once('disconnect', resolve))
  await new Promise(resolve => child.once('exit', resolve).once('error', () => child.pid ?? resolve(undefined)))
  // What it has said last may be on its way.
  if (child.connected) await disconnected
  return { code: child.exitCode, signal: child.signalCode }
}

/** The one with the fewest connections, unless it is busy with those that it has just been given. */
function choose(workers: readonly Worker[], stopping: boolean): Worker | undefined {
  let best: Worker | undefined
  for (const worker of workers) {
    if (worker.state !== 'serving' && !(stopping && worker.state === 'stopping')) continue
    if (!worker.process.connected || worker.missed > missedBusy) continue
    if (worker.sent - worker.load.received >= onTheWayMax) continue
    if (!best || isLessLoaded(worker, best)) best = worker
  }
  return best
}

function isLessLoaded(one: Worker, other: Worker): boolean {
  const [handshakes, others] = [handshakesOf(one), handshakesOf(other)]
  if (handshakes >= handshakesMost || others >= handshakesMost) return handshakes < others
  return one.sent - one.load.ended < other.sent - other.load.ended
}

function handshakesOf({ sent, load }: Worker): number {
  return sent - load.secure - load.ended
}

function countStates(workers: readonly Worker[]): Map<string, number> {
  const counts = new Map<string, number>(['starting', 'serving', 'stopping', 'gone'].map(state => [state, 0]))
  for (const { state } of workers) counts.set(state, (counts.get(state) ?? 0) + 1)
  return counts
}

/** Half to all of a time that doubles: workers that died together do not start together. */
function pauseMs(failures: number): number {
  const most = Math.min(replaceAfterMsMax, replaceAfterMs * 2 ** (failures - 1))
  return Math.round((most * (1 + Math.random())) / 2)
}

async function listen({ host, port }: Settings['api'], handOn: (socket: Socket) => void, log: Log): Promise<Server> {
  const listener = createServer({ pauseOnConnect: true }, handOn)
  listener.listen(port, host)
  await once(listener, 'listening')
  listener.on('error', error => log.error({ err: error }, 'the port failed'))
  return listener
}

/** Who asks while the same is asked already gets the same answer. */
function shared<T>(work: () => Promise<T>): () => Promise<T> {
  let underWay: Promise<T> | undefined
  return () => {
    underWay ??= work().finally(() => {
      underWay = undefined
    })
    return underWay
  }
}
