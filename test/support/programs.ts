/** The programs that judge what is shipped: where they are, what they say, and tests that are skipped, saying so, without them. */
import { execFile } from 'node:child_process'
import { delimiter, join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { isExecutable } from './executable.ts'

export const root = join(import.meta.dirname, '..', '..')
export const deploy = join(root, 'deploy')

/**
 * .ci/tools puts them into .tools/bin; Debian has those of administrators where only root looks. Not the whole search path:
 * npm puts programs of other people there, of the same names.
 */
export function findProgram(name: string, ...elsewhere: string[]): string | undefined {
  const folders = [join(root, '.tools', 'bin'), ...elsewhere, ...(process.env.PATH ?? '').split(delimiter)]
  return [...folders, '/usr/bin', '/usr/sbin', '/bin', '/sbin']
    .filter(folder => folder !== '' && !folder.includes('node_modules'))
    .map(folder => join(folder, name))
    .find(isExecutable)
}

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
