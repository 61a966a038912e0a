/** The load balancers that are shipped, started from their very files: `deploy/haproxy`, `deploy/nginx`. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { findProgram } from './find-program.ts'
import { freePort } from './free-port.ts'

const deploy = join(import.meta.dirname, '..', '..', 'deploy')
const streamModule = '/usr/lib/nginx/modules/ngx_stream_module.so'

/** Where their connections come from, so that they are told from those that tests make themselves. */
export const balancer = '127.0.0.9'

export type Backend = { apiPort: number; metricsPort: number }

/** What a test has changed in the file beyond addresses: one text for another, each once. */
export type Edit = [from: string, to: string]

export type Balancer = {
  /** Prepares the file, and says what it is started with. */
  prepare(
    t: ExecutionContext,
    backends: Backend[],
    edits?: Edit[],
  ): Promise<{ port: number; args: string[]; env: NodeJS.ProcessEnv }>
  /** How long a connection may be idle, as the file has it, and what has it be only so long. */
  idle: { shipped: string[]; only(seconds: number): Edit[] }
  program: string | undefined
  /** What has it check its file and end. */
  checkOnly: string
}

async function folderOf(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-balancer-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  return folder
}

/** The file with what stands in it replaced, each once. @throws when it is not there */
function edited(text: string, ...edits: Edit[]): string {
  return edits.reduce((before, [from, to]) => {
    if (before.split(from).length !== 2) throw new Error(`${from} is to be in the file, once`)
    return before.replace(from, to)
  }, text)
}

export const balancers: Record<'haproxy' | 'nginx', Balancer> = {
  haproxy: {
    program: findProgram('haproxy'),
    checkOnly: '-c',
    idle: {
      shipped: ['timeout client 2h', 'timeout server 2h'],
      only: seconds => [
        ['timeout client 2h', `timeout client ${seconds}s`],
        ['timeout server 2h', `timeout server ${seconds}s`],
      ],
    },
    async prepare(t, backends, edits = []) {
      const folder = await folderOf(t)
      const [port, nowhere] = [await freePort(), await freePort()]
      const shipped = await readFile(join(deploy, 'haproxy', 'haproxy.cfg'), 'utf8')
      const file = join(folder, 'haproxy.cfg')
      const source: Edit = ['default-server ', `default-server source ${balancer} `]
      // Not every machine that runs tests allows as many open files as the file asks for.
      await writeFile(file, edited(shipped, source, ['maxconn 50000', 'maxconn 500'], ...edits))
      const env: NodeJS.ProcessEnv = {
        PATH: process.env.PATH,
        HAPROXY_SOCKET: join(folder, 'admin'),
        EDGEMESH_BIND: `127.0.0.1:${port}`,
      }
      for (const [at, name] of ['ONE', 'TWO', 'THREE'].entries()) {
        env[`EDGEMESH_${name}`] = `127.0.0.1:${backends[at]?.apiPort ?? nowhere}`
        env[`EDGEMESH_${name}_METRICS_PORT`] = String(backends[at]?.metricsPort ?? nowhere)
      }
      return { port, args: ['-f', file], env }
    },
  },
  nginx: {
    program: existsSync(streamModule) ? findProgram('nginx') : undefined,
    checkOnly: '-t',
    idle: { shipped: ['proxy_timeout 2h;'], only: seconds => [['proxy_timeout 2h;', `proxy_timeout ${seconds}s;`]] },
    async prepare(t, backends, edits = []) {
      const folder = await folderOf(t)
      const [port, nowhere] = [await freePort(), await freePort()]
      const shipped = await readFile(join(deploy, 'nginx', 'nginx.conf'), 'utf8')
      const file = join(folder, 'nginx.conf')
      const servers = [1, 2, 3].map(
        (host, at): Edit => [`192.0.2.${host}:8000`, `127.0.0.1:${backends[at]?.apiPort ?? nowhere}`],
      )
      await writeFile(
        file,
        edited(
          shipped,
          ...servers,
          ['listen 8000 ', `proxy_bind ${balancer}; listen 127.0.0.1:${port} `],
          ['pid /run/nginx.pid;', `pid ${join(folder, 'pid')}; daemon off; master_process off;`],
          ['worker_rlimit_nofile 131072;', ''],
          ['worker_connections 60000;', 'worker_connections 1000;'],
          ...edits,
        ),
      )
      return {
        port,
        args: ['-c', file, '-p', folder, '-e', join(folder, 'error.log')],
        env: { PATH: process.env.PATH },
      }
    },
  },
}

/** What it says against its file; empty: nothing. */
export async function checkFile(t: ExecutionContext, { program, checkOnly, prepare }: Balancer): Promise<string> {
  const { args, env } = await prepare(t, [])
  const said = openSync(join(await folderOf(t), 'said'), 'w')
  try {
    // Its log goes to stdout, which it opens by name: that can't be a pipe of ours.
    execFileSync(program as string, [checkOnly, ...args], {
      env,
      encoding: 'utf8',
      stdio: ['ignore', said, 'pipe'],
    })
    return ''
  } catch (error) {
    return (error as { stderr: string }).stderr
  } finally {
    closeSync(said)
  }
}

/** Runs until the test ends. @returns the port to connect to */
export async function startBalancer(
  t: ExecutionContext,
  balancer: Balancer,
  backends: Backend[],
  edits: Edit[] = [],
): Promise<number> {
  const { port, args, env } = await balancer.prepare(t, backends, edits)
  const process = spawn(balancer.program as string, args, { env, stdio: 'ignore' })
  t.teardown(() => end(process))
  for (let attempt = 0; attempt < 200; attempt++) {
    if (process.exitCode !== null) throw new Error(`it has ended with ${process.exitCode}`)
    if (await accepts(port)) return port
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  throw new Error('it does not accept connections')
}

function accepts(port: number): Promise<boolean> {
  return new Promise(resolve => {
    const probe = connect({ port, host: '127.0.0.1' })
    probe.on('connect', () => resolve(true)).on('error', () => resolve(false))
    probe.on('connect', () => probe.destroy())
  })
}

async function end(process: ChildProcess): Promise<void> {
  if (process.exitCode !== null || process.signalCode !== null) return
  const exited = once(process, 'exit')
  process.kill('SIGKILL')
  await exited
}
