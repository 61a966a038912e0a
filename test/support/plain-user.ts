/** What an operator does who is not root: programs run as such a user, from a folder of their own. */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { chown, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { type Account, chooseAccount } from '../../src/db/embedded-account.ts'

/** A user who is not root, and a folder that is theirs and gone with the test. */
export type PlainUser = {
  folder: string
  account: Account
  /** A file of theirs, which nobody else can read. @returns its path */
  file(name: string, text: string): Promise<string>
  /** A folder of theirs. */
  subfolder(name: string): Promise<string>
  spawn(program: string, args: string[], options?: { env?: Record<string, string> }): ChildProcess
  run(program: string, args: string[], env?: Record<string, string>): Promise<Ran>
}

export type Ran = { exitCode: number | null; stdout: string; stderr: string }

export async function plainUser(t: Pick<ExecutionContext, 'teardown'>): Promise<PlainUser> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-backup-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const account = await chooseAccount(folder, [tmpdir()])
  const own = async (path: string) => {
    if (account.owner) await chown(path, account.owner.uid, account.owner.gid)
    return path
  }
  await own(folder)
  const command = (program: string, args: string[], env: Record<string, string>) => {
    const { file, args: words, options } = account.command(program, args)
    // `chooseAccount` has the user; the shell of one who has no home of theirs gets this one.
    return { file, words, options: { ...options, cwd: folder, env: { PATH: process.env.PATH, HOME: folder, ...env } } }
  }
  return {
    folder,
    account,
    async file(name, text) {
      const path = join(folder, name)
      await writeFile(path, text, { mode: 0o600 })
      return own(path)
    },
    subfolder: async name => own(await mkdtemp(join(folder, `${name}-`))),
    spawn(program, args, { env = {} } = {}) {
      const { file, words, options } = command(program, args, env)
      return spawn(file, words, { ...options, stdio: ['ignore', 'pipe', 'pipe'] })
    },
    run(program, args, env = {}) {
      const { file, words, options } = command(program, args, env)
      return new Promise(resolve => {
        execFile(file, words, { ...options, maxBuffer: 64 * 2 ** 20 }, (error, stdout, stderr) => {
          const exitCode = error ? (typeof error.code === 'number' ? error.code : null) : 0
          resolve({ exitCode, stdout, stderr })
        })
      })
    },
  }
}
