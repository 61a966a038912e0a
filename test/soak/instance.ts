/** An instance of EdgeMesh as a process of its own, behind a way to the database that can be cut. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { freePort } from '../support/free-port.ts'
import { type Gate, openGate } from './gate.ts'
import type { Probed } from './probe.ts'

export type Instance = {
  name: string
  /** host:port */
  address: string
  apiPort: number
  /** Its way to the database. */
  gate: Gate
  /** Resolves when it is ready. */
  start(): Promise<void>
  ready(): Promise<boolean>
  /** With -9. */
  kill(): Promise<void>
  /** With SIGTERM. @returns its exit code, or `undefined` where it had to be killed */
  drain(withinMs: number): Promise<number | undefined>
  isRunning(): boolean
  /** Something is done to it: until this is called nobody expects it to do what one does that is well. */
  disturb(): () => void
  /** Whether nothing was done to it in that time. */
  wasCalm(fromMs: number, untilMs: number): boolean
  probe(): Promise<Probed | undefined>
  /** What it has logged as a bug. */
  complaints: string[]
  /** Nothing that was started is left. */
  end(): Promise<void>
}

const main = join(import.meta.dirname, '../../src/main.ts')
const probe = join(import.meta.dirname, 'probe.ts')
const startMsMax = 60_000
const complaintsMax = 50
/** What is logged as these is a bug; outages are warnings. */
const bugLevels = new Set<unknown>(['error', 'fatal', 50, 60])
/** Who was disturbed needs as long to be as before: connections are opened, what was kept is loaded anew. */
const settlingMs = 2_000

export async function createInstance(
  name: string,
  env: Record<string, string>,
  databaseUrl: string,
): Promise<Instance> {
  const gate = await openGate([Number(new URL(databaseUrl).port)])
  const url = new URL(databaseUrl)
  url.host = `127.0.0.1:${gate.port}`
  const [apiPort, metricsPort] = [await freePort(), await freePort()]
  const complaints: string[] = []
  const disturbances: { fromMs: number; untilMs: number }[] = [
    { fromMs: Number.NEGATIVE_INFINITY, untilMs: Number.POSITIVE_INFINITY },
  ]
  let child: ChildProcess | undefined

  const isRunning = () => child !== undefined && child.exitCode === null && child.signalCode === null

  async function ready(): Promise<boolean> {
    try {
      const signal = AbortSignal.timeout(2_000)
      return (await fetch(`http://127.0.0.1:${metricsPort}/readyz`, { signal })).ok
    } catch {
      return false
    }
  }

  function disturb(): () => void {
    const disturbance = { fromMs: Date.now(), untilMs: Number.POSITIVE_INFINITY }
    disturbances.push(disturbance)
    if (disturbances.length > 1_000) disturbances.shift()
    return () => {
      disturbance.untilMs = Date.now() + settlingMs
    }
  }

  function listen(started: ChildProcess): void {
    createInterface({ input: started.stdout! }).on('line', line => {
      const { level, msg = '', err } = readLine(line)
      if (!bugLevels.has(level) || complaints.length >= complaintsMax) return
      complaints.push(`${msg}${err?.message ? `: ${err.message}` : ''}${err?.stack ? `\n${err.stack}` : ''}`)
    })
    started.stderr!.setEncoding('utf8').on('data', text => {
      if (complaints.length < complaintsMax) complaints.push(`stderr: ${text}`)
    })
  }

  async function gone(started: ChildProcess, signal: NodeJS.Signals): Promise<void> {
    if (started.exitCode !== null || started.signalCode !== null) return
    const exited = once(started, 'exit')
    started.kill(signal)
    await exited
  }

  return {
    name,
    address: `127.0.0.1:${apiPort}`,
    apiPort,
    gate,
    complaints,
    isRunning,
    ready,
    disturb,
    async start() {
      child = spawn(process.execPath, ['--trace-deprecation', '--import', probe, main, 'serve'], {
        env: {
          PATH: process.env.PATH,
          ...env,
          INSTANCE_ID: name,
          DATABASE_URL: url.href,
          API_PORT: String(apiPort),
          METRICS_PORT: String(metricsPort),
        },
        stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
      })
      listen(child)
      const until = Date.now() + startMsMax
      while (!(await ready())) {
        if (!isRunning()) throw new Error(`${name} has ended while it started: ${complaints.slice(-3).join('; ')}`)
        if (Date.now() > until) throw new Error(`${name} is not ready after ${startMsMax / 1_000} s`)
        await sleep(50)
      }
      if (disturbances[0]?.untilMs === Number.POSITIVE_INFINITY) disturbances[0].untilMs = Date.now() + settlingMs
    },
    async kill() {
      if (child) await gone(child, 'SIGKILL')
    },
    async drain(withinMs) {
      if (!child) return undefined
      const draining = child
      const killing = setTimeout(() => draining.kill('SIGKILL'), withinMs)
      await gone(draining, 'SIGTERM')
      clearTimeout(killing)
      return draining.exitCode ?? undefined
    },
    wasCalm: (fromMs, untilMs) =>
      disturbances.every(disturbance => disturbance.untilMs < fromMs || disturbance.fromMs > untilMs),
    async probe() {
      const asked = child
      if (!asked?.connected) return undefined
      const answer = once(asked, 'message', { signal: AbortSignal.timeout(5_000) })
      asked.send('probe', () => {})
      return answer.then(
        ([probed]) => probed as Probed,
        () => undefined,
      )
    },
    async end() {
      gate.close()
      if (child) await gone(child, 'SIGKILL')
    },
  }
}

function readLine(line: string): { level?: unknown; msg?: string; err?: { message?: string; stack?: string } } {
  try {
    return JSON.parse(line)
  } catch {
    return {}
  }
}
