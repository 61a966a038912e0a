/** OpenSSL as an outside judge of certificates and revocation lists, and as the client of those who have no agent. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'

/** What it said on both streams, and whether it was content. */
export type Said = { ok: boolean; said: string }

/** A folder in which one command finds what another has made. */
export type OpensslFolder = {
  path: string
  openssl(...args: string[]): Promise<Said>
  write(name: string, content: string | Uint8Array): Promise<void>
  read(name: string): Promise<string>
}

export async function opensslFolder(t: ExecutionContext): Promise<OpensslFolder> {
  const path = await mkdtemp(join(tmpdir(), 'edgemesh-openssl-'))
  t.teardown(() => rm(path, { recursive: true, force: true }))
  return {
    path,
    openssl: (...args) =>
      new Promise(resolve => {
        const child = execFile('openssl', args, { cwd: path }, (error, stdout, stderr) =>
          resolve({ ok: !error, said: stdout + stderr }),
        )
        // s_client goes on for as long as it may be told something.
        child.stdin?.end()
      }),
    write: (name, content) => writeFile(join(path, name), content),
    read: name => readFile(join(path, name), 'utf8'),
  }
}

/** Runs `openssl` once; what stands in `files` lies beside it under those names. */
export async function openssl(
  t: ExecutionContext,
  args: string[],
  files: Record<string, string | Uint8Array>,
): Promise<Said> {
  const folder = await opensslFolder(t)
  for (const [name, content] of Object.entries(files)) await folder.write(name, content)
  return folder.openssl(...args)
}
