/** A real Envoy, as deploy/envoy/envoy.yaml has it, between devices and a service that tells what it has been sent. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer, type IncomingHttpHeaders } from 'node:http'
import { Agent, request } from 'node:https'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { rootsOf, serverCertificate, smallAuthority } from '../agent/small-server.ts'
import { type Credentials, eventually } from './edgemesh.ts'
import { findProgram } from './find-program.ts'
import { freePort } from './free-port.ts'

const configuration = join(import.meta.dirname, '../../deploy/envoy/envoy.yaml')

export type Answer = { status: number; headers: IncomingHttpHeaders; body: string }

export type Proxy = {
  /** A request of a device, over a connection that is kept for the next. */
  get(device: Partial<Credentials>, headers?: Record<string, string>): Promise<Answer>
  /** The headers of every request that has reached the service. */
  reached: IncomingHttpHeaders[]
}

/** @param edit changes the configuration before it is used */
export async function startEnvoy(
  t: ExecutionContext,
  options: { server: number; service: Credentials; edit?: (yaml: string) => string },
): Promise<Proxy> {
  const reached: IncomingHttpHeaders[] = []
  const upstream = createServer((request, response) => {
    reached.push(request.headers)
    response.end('payroll')
  })
  upstream.listen(0, '127.0.0.1')
  await once(upstream, 'listening')
  t.teardown(() => upstream.close())

  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-envoy-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const authority = await smallAuthority()
  const shown = serverCertificate(authority)
  const files = {
    'server.crt': shown.certificateChainPem,
    'server.key': shown.keyPem,
    'ca.crt': options.service.rootsPem,
    'service.crt': options.service.certificatePem ?? '',
    'service.key': options.service.keyPem ?? '',
  }
  for (const [name, content] of Object.entries(files)) await writeFile(join(folder, name), content, { mode: 0o600 })

  const port = await freePort()
  const shipped = await readFile(configuration, 'utf8')
  const yaml = shipped
    .replaceAll(/\/etc\/envoy\/(tls|edgemesh)\//g, `${folder}/`)
    .replace('0.0.0.0, port_value: 8443', `127.0.0.1, port_value: ${port}`)
    .replace('edgemesh.example.com, port_value: 8000', `127.0.0.1, port_value: ${options.server}`)
    .replace('payroll.internal, port_value: 8080', `127.0.0.1, port_value: ${(upstream.address() as AddressInfo).port}`)
  await writeFile(join(folder, 'envoy.yaml'), (options.edit ?? (text => text))(yaml))

  const args = ['-c', join(folder, 'envoy.yaml'), '--log-level', 'warn', '--concurrency', '1', '--disable-hot-restart']
  const envoy = spawn(findProgram('envoy') as string, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  envoy.stderr.on('data', text => {
    said += text
  })
  const exited = once(envoy, 'exit')
  t.teardown(async () => {
    envoy.kill('SIGKILL')
    await exited
  })

  const agents = new Map<string, Agent>()
  t.teardown(() => {
    for (const agent of agents.values()) agent.destroy()
  })
  const agentOf = ({ certificatePem = '', keyPem = '' }: Partial<Credentials>) => {
    const agent =
      agents.get(keyPem) ??
      new Agent({ keepAlive: true, maxSockets: 1, ca: rootsOf(authority), cert: certificatePem, key: keyPem })
    agents.set(keyPem, agent)
    return agent
  }
  const get: Proxy['get'] = async (device, headers = {}) => {
    const call = request({ host: 'localhost', port, agent: agentOf(device), headers, timeout: 20_000, family: 4 })
    call.end()
    const [response] = await once(call, 'response')
    const body = (await response.toArray()).join('')
    return { status: response.statusCode, headers: response.headers, body }
  }
  await eventually('Envoy listens', async () => {
    if (envoy.exitCode !== null) throw new Error(`Envoy has ended:\n${said}`)
    const failure = await get({}).then(
      () => undefined,
      error => error.code,
    )
    return failure !== 'ECONNREFUSED'
  })
  return { get, reached }
}
