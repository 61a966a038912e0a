/** A real OPA server for a test, running the policies of this project on a port of its own. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { ExecutionContext } from 'ava'
import { findOpa } from '../../src/access/policy-compiler.ts'
import { freePort } from './free-port.ts'

export { findOpa }

export const policyDirectory = join(import.meta.dirname, '..', '..', 'policies')

export type OpaServer = {
  url: string
  kill(): Promise<void>
  /** On the same port as before. */
  restart(): Promise<void>
}

type OpaOptions = {
  /** Lets in only who knows it. */
  token?: string
  /** What to load, such as a copy that the test will change; the policies of this project unless given. */
  policies?: string
  /** Settings of its own, as `--set` takes them. */
  config?: string[]
  /** In their place, a bundle. */
  bundle?: string
}

/** Ends with the test. Ask `findOpa()` first: without the binary this throws. */
export async function startOpa(t: ExecutionContext, options: OpaOptions = {}): Promise<OpaServer> {
  const port = await freePort()
  const url = `http://127.0.0.1:${port}`
  let server = await run(port, url, options)
  t.teardown(() => end(server))
  return {
    url,
    kill: () => end(server),
    async restart() {
      server = await run(port, url, options)
    },
  }
}

async function run(
  port: number,
  url: string,
  { token, policies = policyDirectory, bundle, config = [] }: OpaOptions,
): Promise<ChildProcess> {
  const opa = findOpa()
  if (opa === undefined) throw new Error('no opa binary in $OPA, PATH, .tools/bin or /go/bin')
  const args = ['run', '--server', '--addr', `127.0.0.1:${port}`, '--log-level', 'error', '--skip-version-check']
  const ignored = ['--ignore', '*_test.rego', '--ignore', '*.json', '--ignore', '*.wasm']
  const guard = token === undefined ? [] : ['--authentication=token', '--authorization=basic']
  const server = spawn(
    opa,
    [
      ...args,
      ...(bundle ? [] : ignored),
      ...guard,
      ...config.map(setting => `--set=${setting}`),
      '--watch',
      ...(bundle ? ['--bundle', bundle] : [policies]),
    ],
    {
      env: { ...process.env, ...(token === undefined ? {} : { EDGEMESH_OPA_TOKEN: token }) },
      stdio: ['ignore', 'ignore', 'pipe'],
    },
  )
  await waitUntilAnswering(url, server)
  // What it says later, such as that it runs as root, is of no use; but it must not block on a full pipe.
  server.stderr?.resume()
  return server
}

/** Any status will do: with a token, OPA refuses this question as soon as it lives. */
async function waitUntilAnswering(url: string, server: ChildProcess): Promise<void> {
  for (let attempt = 0; attempt < 200; attempt++) {
    if (server.exitCode !== null) throw new Error(`opa ended with ${server.exitCode}: ${server.stderr?.read()}`)
    const response = await fetch(`${url}/health`).catch(() => undefined)
    if (response !== undefined) return void (await response.text())
    await sleep(50)
  }
  await end(server)
  throw new Error('opa did not answer within 10 s')
}

async function end(server: ChildProcess): Promise<void> {
  if (server.exitCode !== null || server.signalCode !== null) return
  const exited = once(server, 'exit')
  server.kill('SIGKILL')
  await exited
}
