/** `edgemesh serve` as a process of its own, for tests that kill it. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { ExecutionContext } from 'ava'

export type ServedEdgeMesh = {
  address: string
  apiPort: number
  metricsPort: number
  /** The telemetry port. */
  http: string
  pid: number
  /** What it has said so far: its log, and what is no log. */
  log: Record<string, unknown>[]
  said: string[]
  /** How it ended, once it has. */
  ended: Promise<{ code: number | null; signal: NodeJS.Signals | null }>
  /** With -9: nothing is finished, nothing is said. */
  kill(): Promise<void>
  /** As a supervisor does: it drains. @returns its exit code */
  stop(): Promise<number | null>
}

const main = join(import.meta.dirname, '../../src/main.ts')

/**
 * Resolves when it serves.
 *
 * @param env settings by their variables, besides which only PATH is passed on
 * @param options.args for `edgemesh serve`
 * @param options.nodeArgs for Node itself
 * @param options.program `main.ts` of this version, or of another
 */
export async function serve(
  t: Pick<ExecutionContext, 'teardown' | 'log' | 'passed'>,
  env: Record<string, string>,
  options: { args?: string[]; nodeArgs?: string[]; program?: string } = {},
): Promise<ServedEdgeMesh> {
  const { args = [], nodeArgs = [], program = main } = options
  const child = spawn(process.execPath, [...nodeArgs, program, 'serve', ...args], {
    env: { PATH: process.env.PATH, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
    // A group of its own, as a shell makes it, so that a signal can be sent to all.
    detached: true,
  })
  t.teardown(() => killGroup(child))
  const ended = once(child, 'exit').then(([code, signal]) => ({ code, signal }))
  const said: string[] = []
  const log: Record<string, unknown>[] = []
  t.teardown(() => {
    if (t.passed === false) t.log(said.join('\n'))
  })
  const { apiPort, metricsPort } = await portsOf(child, said, log)
  return {
    address: `127.0.0.1:${apiPort}`,
    apiPort,
    metricsPort,
    http: `http://127.0.0.1:${metricsPort}`,
    pid: child.pid as number,
    log,
    said,
    ended,
    kill: () => kill(child),
    async stop() {
      child.kill('SIGTERM')
      return (await ended).code
    },
  }
}

/** The log says which ports were free. */
async function portsOf({ stdout, stderr }: ChildProcess, said: string[], log: Record<string, unknown>[]) {
  if (!stdout || !stderr) throw new Error('the process has no output')
  stderr.setEncoding('utf8').on('data', text => said.push(text))
  return new Promise<{ apiPort: number; metricsPort: number }>((resolve, reject) => {
    const lines = createInterface({ input: stdout })
    lines.on('line', line => {
      said.push(line)
      const entry = readLine(line)
      log.push(entry)
      const { port, metricsPort, msg } = entry
      if (msg === 'edgemesh is serving') resolve({ apiPort: Number(port), metricsPort: Number(metricsPort) })
    })
    lines.on('close', () => reject(new Error(`edgemesh serve ended:\n${said.join('\n')}`)))
  })
}

function readLine(line: string): Record<string, unknown> {
  try {
    return JSON.parse(line)
  } catch {
    return {}
  }
}

async function kill(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const exited = once(child, 'exit')
  child.kill('SIGKILL')
  await exited
}

async function killGroup(child: ChildProcess): Promise<void> {
  await kill(child)
  try {
    process.kill(-(child.pid as number), 'SIGKILL')
  } catch {
    // There is nobody left.
  }
}
