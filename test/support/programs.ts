/** The programs that judge what is shipped: what they say, and tests that are skipped, saying so, without them. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'

export const root = join(import.meta.dirname, '..', '..')
export const deploy = join(root, 'deploy')

export type Said = { exitCode: number; said: string; stdout: string }

export function say(
  program: string,
  args: string[],
  options: { env?: NodeJS.ProcessEnv; cwd?: string; uid?: number; gid?: number } = {},
): Promise<Said> {
  return new Promise(resolve => {
    execFile(program, args, { maxBuffer: 64e6, ...options }, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code ?? 1) : 0, said: stdout + stderr, stdout })
    })
  })
}

/**
 * A test that programs decide.
 *
 * @param found by name; what is undefined is missing
 */
export function judged<Name extends string>(
  title: string,
  found: Record<Name, string | undefined>,
  body: (t: ExecutionContext, programs: Record<Name, string>) => Promise<void>,
): void {
  const missing = (Object.keys(found) as Name[]).filter(name => found[name] === undefined)
  if (missing.length > 0) {
    test.skip(`${title} (${missing.join(' and ')} is missing: .ci/tools brings it)`, t => t.pass())
  } else {
    test(title, t => body(t, found as Record<Name, string>))
  }
}
