/** The real grpcurl, wherever it is on this machine. */
import { execFile, execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { findProgram } from './find-program.ts'

/** Its path; Go puts it into a folder of its own. */
export function findGrpcurl(): string | undefined {
  return findProgram('grpcurl', goBin())
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

function goBin(): string {
  try {
    const folder = execFileSync('go', ['env', 'GOPATH'], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    return join(folder.trim(), 'bin')
  } catch {
    return ''
  }
}
