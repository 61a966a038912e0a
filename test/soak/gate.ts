/** A way to a port that can be cut, shut or stalled: between an instance and its database, or before all instances. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'

export type Gate = {
  port: number
  /** Breaks all connections that there are; new ones are let through. */
  cut(): void
  /** Breaks them, and refuses new ones. */
  shut(): void
  /** Lets no byte through in either direction, and breaks nothing: what a network does that loses packets. */
  stall(): void
  open(): void
  close(): void
}

/** @param ports where connections lead, tried in turns until one answers */
export async function openGate(ports: readonly number[]): Promise<Gate> {
  let state: 'open' | 'shut' | 'stalled' = 'open'
  let turn = 0
  const pairs = new Set<readonly [Socket, Socket]>()
  const waiting = new Set<Socket>()

  async function reach(): Promise<Socket | undefined> {
    for (let tried = 0; tried < ports.length; tried++) {
      const socket = connect({ port: ports[turn++ % ports.length]!, host: '127.0.0.1' }).setNoDelay(true)
      const answered = await new Promise<boolean>(resolve => {
        socket.once('connect', () => resolve(true)).once('error', () => resolve(false))
      })
      if (answered) return socket
    }
    return undefined
  }

  const server = createServer({ pauseOnConnect: true }, async near => {
    near.on('error', () => {})
    if (state === 'shut') return near.destroy()
    waiting.add(near)
    const far = await reach()
    waiting.delete(near)
    if (!far || near.destroyed || (state as string) === 'shut') {
      far?.destroy()
      return near.destroy()
    }
    const pair = [near, far] as const
    pairs.add(pair)
    for (const [socket, other] of [pair, [far, near] as const]) {
      socket
        .on('error', () => {})
        .on('close', () => {
          pairs.delete(pair)
          other.destroy()
        })
        .on('end', () => other.end())
        .on('data', data => {
          // Whoever reads slowly is not read to.
          if (!other.write(data)) socket.pause()
        })
        .on('drain', () => {
          if (state !== 'stalled') other.resume()
        })
    }
    if (state === 'open') for (const socket of pair) socket.resume()
    return undefined
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const cut = () => {
    for (const socket of [...pairs].flat()) socket.destroy()
    for (const socket of waiting) socket.destroy()
  }
  return {
    port: (server.address() as AddressInfo).port,
    cut,
    shut() {
      state = 'shut'
      cut()
    },
    stall() {
      state = 'stalled'
      for (const socket of [...pairs].flat()) socket.pause()
    },
    open() {
      state = 'open'
      for (const socket of [...pairs].flat()) socket.resume()
    },
    close() {
      server.close()
      cut()
    },
  }
}
