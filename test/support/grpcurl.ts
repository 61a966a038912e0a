/** The real grpcurl, wherever it is on this machine. */
import { execFile, execFileSync } from 'node:child_process'
import { delimiter, join } from 'node:path'
import { isExecutable } from './executable.ts'

/** Its path: GRPCURL, the search path, .tools/bin, Go's own bin. `undefined` if there is none. */
export function findGrpcurl(): string | undefined {
  const folders = [...(process.env.PATH ?? '').split(delimiter), join(import.meta.dirname, '../../.tools/bin'), goBin()]
  const candidates = [process.env.GRPCURL, ...folders.filter(Boolean).map(folder => join(folder as string, 'grpcurl'))]
  return candidates.find(candidate => candidate && isExecutable(candidate))
}

export type Ran = { exitCode: number; stdout: string; stderr: string }

const runMsMax = 20_000

export function run(program: string, args: string[]): Promise<Ran> {
  return new Promise(resolve => {
    execFile(program, args, { timeout: runMsMax }, (error, stdout, stderr) =>
      resolve({ exitCode: error ? Number(error.code ?? 1) : 0, stdout, stderr }),
    )
  })
}

function goBin(): string | undefined {
  try {
    const folder = execFileSync('go', ['env', 'GOPATH'], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    return join(folder.trim(), 'bin')
  } catch {
    return undefined
  }
}
