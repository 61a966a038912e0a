/** `edgemesh serve` as a process of its own, for tests that kill it. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { ExecutionContext } from 'ava'

export type ServedEdgeMesh = {
  address: string
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
 * @param program `main.ts` of this version, or of another
 */
export async function serve(
  t: Pick<ExecutionContext, 'teardown'>,
  env: Record<string, string>,
  program = main,
): Promise<ServedEdgeMesh> {
  const child = spawn(process.execPath, [program, 'serve'], {
    env: { PATH: process.env.PATH, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  t.teardown(() => kill(child))
  return {
    address: await addressOf(child),
    kill: () => kill(child),
    async stop() {
      const exited = once(child, 'exit')
      child.kill('SIGTERM')
      return (await exited)[0]
    },
  }
}

/** The log says which ports were free. */
async function addressOf({ stdout, stderr }: ChildProcess): Promise<string> {
  if (!stdout || !stderr) throw new Error('the process has no output')
  const said: string[] = []
  stderr.setEncoding('utf8').on('data', text => said.push(text))
  return new Promise((resolve, reject) => {
    const lines = createInterface({ input: stdout })
    lines.on('line', line => {
      said.push(line)
      const { port, msg } = readLine(line)
      if (msg === 'edgemesh is serving') resolve(`127.0.0.1:${port}`)
    })
    lines.on('close', () => reject(new Error(`edgemesh serve ended:\n${said.join('\n')}`)))
  })
}

function readLine(line: string): { port?: number; msg?: string } {
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
