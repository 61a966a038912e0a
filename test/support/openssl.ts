/** OpenSSL as an outside judge of certificates and revocation lists. */
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'

/**
 * Runs `openssl`; what stands in `files` lies beside it under those names.
 *
 * @returns what it said on both streams, and whether it was content
 */
export async function openssl(
  t: ExecutionContext,
  args: string[],
  files: Record<string, string | Uint8Array>,
): Promise<{ ok: boolean; said: string }> {
  const cwd = await mkdtemp(join(tmpdir(), 'edgemesh-openssl-'))
  t.teardown(() => rm(cwd, { recursive: true, force: true }))
  for (const [name, content] of Object.entries(files)) await writeFile(join(cwd, name), content)
  return new Promise(resolve => {
    const child = execFile('openssl', args, { cwd }, (error, stdout, stderr) =>
      resolve({ ok: !error, said: stdout + stderr }),
    )
    // s_client goes on for as long as it may be told something.
    child.stdin?.end()
  })
}
