/** Proxies between a client and a server of a test: one made by hand, and the real HAProxy. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { freePort } from './free-port.ts'

export type RelayOptions = {
  /** The address that connections come from, such as 127.0.0.2: all of 127.0.0.0/8 is this host. */
  from?: string
  /** The address to listen on, 127.0.0.1 unless given. */
  on?: string
  /** How much later answers arrive. */
  lateMs?: number
  /** Sent before the client's own first byte, each piece for itself. */
  pieces?: Buffer[]
}

/** Hands every connection on to `port`. @returns the port to connect to */
export async function relay(t: ExecutionContext, port: number, options: RelayOptions = {}): Promise<number> {
  const { from = '127.0.0.1', on = '127.0.0.1', lateMs, pieces = [] } = options
  const sockets = new Set<Socket>()
  const server = createServer(async near => {
    const far = connect({ port, host: '127.0.0.1', localAddress: from }).setNoDelay(true)
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(socket)
      socket.on('error', () => {}).on('close', () => other.destroy())
    }
    for (const piece of pieces) await new Promise(resolve => far.write(piece, resolve))
    near.pipe(far)
    if (lateMs === undefined) far.pipe(near)
    else far.on('data', data => setTimeout(() => near.write(data), lateMs))
  })
  server.listen(0, on)
  await once(server, 'listening')
  t.teardown(() => {
    server.close()
    for (const socket of sockets) socket.destroy()
  })
  return (server.address() as AddressInfo).port
}

export type Link = {
  /** The port to connect to. */
  port: number
  /** Where new connections lead from now on. */
  leadTo(port: number): void
  /** Breaks all connections that there are: nobody says goodbye. */
  cut(): void
  /** From now on nothing passes, on connections that there are and on new ones; they stay open. */
  hold(): void
  /** What comes passes again, and so does what has waited. */
  letGo(): void
}

/** A way to servers that breaks, or leads elsewhere, when a test says so. */
export async function link(t: Pick<ExecutionContext, 'teardown'>, port: number): Promise<Link> {
  let target = port
  let held = false
  const sockets = new Set<Socket>()
  const cut = () => {
    for (const socket of sockets) socket.destroy()
  }
  const server = createServer(near => {
    const far = connect({ port: target, host: '127.0.0.1' }).setNoDelay(true)
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(socket)
      socket
        .on('error', () => {})
        .on('close', () => {
          sockets.delete(socket)
          other.destroy()
        })
    }
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ] as const) {
      socket.on('data', data => {
        if (!other.write(data)) socket.pause()
      })
      other.on('drain', () => held || socket.resume())
      socket.on('end', () => other.end())
    }
    if (held) for (const socket of [near, far]) socket.pause()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.close()
    cut()
  })
  return {
    port: (server.address() as AddressInfo).port,
    leadTo(port) {
      target = port
    },
    cut,
    hold() {
      held = true
      for (const socket of sockets) socket.pause()
    },
    letGo() {
      held = false
      for (const socket of sockets) socket.resume()
    },
  }
}

/** Whether there is an `haproxy` on the path. */
export function hasHaproxy(): boolean {
  try {
    execFileSync('haproxy', ['-v'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

/**
 * HAProxy before `port`. It probes it all the time with TLS handshakes of its own. It ends with the test.
 *
 * @param from the address that its connections come from
 * @param send `send-proxy` (version 1) or `send-proxy-v2`, with its options
 * @returns the port to connect to
 */
export async function haproxy(t: ExecutionContext, port: number, from: string, send: string): Promise<number> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-haproxy-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const ownPort = await freePort()
  const config = join(folder, 'haproxy.cfg')
  await writeFile(
    config,
    `global
  maxconn 100
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  timeout check 10s
listen edgemesh
  bind 127.0.0.1:${ownPort}
  server one 127.0.0.1:${port} source ${from} ${send} check check-ssl verify none inter 50ms fall 5 rise 1
`,
  )
  const child = spawn('haproxy', ['-W', '-db', '-f', config], { stdio: ['ignore', 'ignore', 'pipe'] })
  child.stderr?.resume()
  t.teardown(() => end(child))
  await listening(ownPort, child)
  return ownPort
}

async function listening(port: number, child: ChildProcess): Promise<void> {
  const until = Date.now() + 10_000
  for (;;) {
    if (child.exitCode !== null) throw new Error(`haproxy ended with ${child.exitCode}`)
    const socket = connect(port, '127.0.0.1')
    const open = await new Promise<boolean>(resolve => {
      socket.on('connect', () => resolve(true)).on('error', () => resolve(false))
    })
    socket.destroy()
    if (open) return
    if (Date.now() > until) throw new Error('haproxy does not listen')
    await new Promise(resolve => setTimeout(resolve, 25))
  }
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const exited = once(child, 'exit')
  child.kill('SIGTERM')
  await exited
}
