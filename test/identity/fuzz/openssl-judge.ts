/** What the `openssl` command thinks of many certificate requests at once: starting it costs more than its thinking. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export type Verdict = {
  /** Whether it can read the request and its signature is that of its key. */
  accepted: boolean
  /** DER SubjectPublicKeyInfo of the key as it has understood it. */
  spki: Buffer | undefined
  said: string
}

// `openssl req -verify` has told the outcome by its exit code only since version 3.3; what it says is the same in all.
const script = `command -v openssl >/dev/null || { echo there is no openssl command here >&2; exit 127; }
  i=0; for form in "$@"; do openssl req -in $i -inform $form -verify -noout -pubkey >$i.key 2>$i.said; i=$((i + 1)); done`

export async function opensslVerdicts(requests: readonly Buffer[]): Promise<Verdict[]> {
  const cwd = await mkdtemp(join(tmpdir(), 'edgemesh-fuzz-'))
  try {
    await Promise.all(requests.map((request, at) => writeFile(join(cwd, String(at)), request)))
    const forms = requests.map(request => (request[0] === 0x30 ? 'DER' : 'PEM'))
    await new Promise<void>((resolve, reject) => {
      execFile('sh', ['-c', script, 'sh', ...forms], { cwd }, error => (error ? reject(error) : resolve()))
    })
    return await Promise.all(requests.map((_, at) => verdict(cwd, at)))
  } finally {
    await rm(cwd, { recursive: true, force: true })
  }
}

async function verdict(cwd: string, at: number): Promise<Verdict> {
  const [said, key] = await Promise.all(['said', 'key'].map(kind => readFile(join(cwd, `${at}.${kind}`), 'utf8')))
  const accepted = /^Certificate request self-signature verify OK$|^verify OK$/m.test(said ?? '')
  const [, base64] = /-----BEGIN PUBLIC KEY-----([^-]*)/.exec(key ?? '') ?? []
  return { accepted, spki: base64 === undefined ? undefined : Buffer.from(base64, 'base64'), said: said ?? '' }
}
