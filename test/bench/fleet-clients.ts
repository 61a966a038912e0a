/**
 * Thousands of devices in one process, as light as they can be: gRPC by hand on node:http2, so that they take less of the
 * machine than what is measured. Started and asked by `fleet.ts`.
 */
import { type ClientHttp2Stream, connect as connectHttp2 } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, createSecureContext, type SecureContext, type TLSSocket } from 'node:tls'
import { backoffDelayMs } from '../../src/client/waiting.ts'
import { HeartbeatRequest, HeartbeatResponse } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { Posture } from '../../src/gen/edgemesh/v1/types.ts'
import { healthy } from '../support/healthy.ts'
import type { Identity } from './enrolled-device.ts'
import type { FleetAnswer, FleetQuestion } from './fleet.ts'

/** As gRPC's clients have it. */
const connectMsMax = 20_000
const openingAtOnce = 32

const contexts = new Map<string, SecureContext>()
function contextOf({ rootsPem, keyPem, certificatePem }: Identity): SecureContext {
  let context = contexts.get(certificatePem)
  if (!context) {
    context = createSecureContext({ ca: rootsPem, key: keyPem, cert: certificatePem })
    contexts.set(certificatePem, context)
  }
  return context
}

function dial(address: string, identity: Identity): TLSSocket {
  const [host, port] = address.split(':')
  const secureContext = contextOf(identity)
  const options = { host, port: Number(port), servername: 'localhost', ALPNProtocols: ['h2'], secureContext }
  return connect(options).on('error', () => {})
}

type Device = {
  identity: Identity
  address: string
  socket?: TLSSocket
  stream?: ClientHttp2Stream
  sequence: number
  /** The first report on the stream has been acknowledged. */
  isOpen: boolean
  /** It has been told so, and is not to come back. */
  isRevoked: boolean
  /** Resolves with the next acknowledgement. */
  acknowledged?: PromiseWithResolvers<void>
  /** The server has said that the device is revoked, or its stream has ended. */
  told: PromiseWithResolvers<number>
}

const groups = new Map<string, Device[]>()
/** Where devices go whose stream is lost, with what has become of them; undefined: nobody should lose one. */
let storm: { addresses: string[]; deadAddress: string; lost: number; back: number; lastBackMs: number } | undefined
let lostUnawares = 0
let refusals = 0

function frame(request: Uint8Array): Buffer {
  const head = Buffer.alloc(5)
  head.writeUInt32BE(request.length, 1)
  return Buffer.concat([head, request])
}

const posture = Posture.fromPartial(healthy)

function report(device: Device): Promise<void> {
  device.acknowledged = Promise.withResolvers()
  device.acknowledged.promise.catch(() => {})
  device.sequence += 1
  const request = HeartbeatRequest.fromPartial({ sequence: device.sequence, posture, sentAt: new Date() })
  device.stream?.write(frame(HeartbeatRequest.encode(request).finish()))
  return device.acknowledged.promise
}

/** Resolves when the first report is acknowledged. */
async function open(device: Device, address: string): Promise<void> {
  device.address = address
  const socket = dial(address, device.identity)
  device.socket = socket
  const session = connectHttp2('https://localhost', { createConnection: () => socket })
  session.on('error', () => {})
  const late = setTimeout(() => socket.destroy(), connectMsMax)
  session.once('remoteSettings', () => clearTimeout(late))
  const stream = session.request({
    ':method': 'POST',
    ':path': '/edgemesh.v1.HeartbeatService/Heartbeat',
    'content-type': 'application/grpc',
    te: 'trailers',
  })
  device.stream = stream
  device.sequence = 0
  device.told = Promise.withResolvers()
  let received: Buffer = Buffer.alloc(0)
  stream.on('error', () => {})
  stream.on('data', (chunk: Buffer) => {
    received = received.length === 0 ? chunk : Buffer.concat([received, chunk])
    while (received.length >= 5 && received.length >= 5 + received.readUInt32BE(1)) {
      const end = 5 + received.readUInt32BE(1)
      const { directives } = HeartbeatResponse.decode(received.subarray(5, end))
      if (directives.some(({ kind }) => kind?.$case === 'revoked')) {
        device.isRevoked = true
        device.told.resolve(epochMs())
      }
      received = received.subarray(end)
      device.acknowledged?.resolve()
    }
  })
  socket.once('close', () => clearTimeout(late))
  stream.once('close', () => {
    device.told.resolve(epochMs())
    device.acknowledged?.reject(new Error(`the stream to ${address} is lost`))
    if (device.stream === stream) lose(device)
  })
  await report(device)
  device.isOpen = true
}

function lose(device: Device): void {
  const wasOpen = device.isOpen
  device.isOpen = false
  device.stream = undefined
  device.socket?.destroy()
  if (!wasOpen || device.isRevoked) return
  if (device.address !== storm?.deadAddress) lostUnawares += 1
  else {
    storm.lost += 1
    void comeBack(device, storm)
  }
}

async function comeBack(device: Device, during: NonNullable<typeof storm>): Promise<void> {
  for (let failures = 0; during === storm; failures++) {
    await sleep(backoffDelayMs(failures, Math.random))
    const address = during.addresses[Math.floor(Math.random() * during.addresses.length)]!
    try {
      await open(device, address)
      during.back += 1
      during.lastBackMs = epochMs()
      return
    } catch {
      refusals += 1
    }
  }
}

function close(device: Device): void {
  const { socket } = device
  device.stream = undefined
  device.socket = undefined
  device.isOpen = false
  socket?.destroy()
}

function epochMs(): number {
  return performance.timeOrigin + performance.now()
}

async function each<Item>(items: Item[], atOnce: number, work: (item: Item) => Promise<void>): Promise<void> {
  const left = items.values()
  await Promise.all(
    Array.from({ length: Math.min(atOnce, items.length) }, async () => {
      for (const item of left) await work(item)
    }),
  )
}

/** Until the server has said something after its handshake, which is when it is over for both. */
function handshake(address: string, identity: Identity): Promise<void> {
  return new Promise((resolve, reject) => {
    const socket = dial(address, identity)
    socket.once('session', () => {
      socket.removeAllListeners('close')
      socket.destroy()
      resolve()
    })
    socket.once('close', () => reject(new Error(`no handshake with ${address}`)))
    socket.resume()
  })
}

async function answer(question: FleetQuestion): Promise<FleetAnswer> {
  const devices = (group: string, from = 0, to?: number) => (groups.get(group) ?? []).slice(from, to)
  switch (question.ask) {
    case 'devices': {
      const { identities } = question
      const known = devices(question.group)
      for (const identity of identities)
        known.push({
          identity,
          address: '',
          sequence: 0,
          isOpen: false,
          isRevoked: false,
          told: Promise.withResolvers(),
        })
      groups.set(question.group, known)
      return {}
    }
    case 'open': {
      const { addresses, group, from, to } = question
      const opening = devices(group, from, to).map((device, at) => ({
        device,
        address: addresses[at % addresses.length]!,
      }))
      await each(opening, openingAtOnce, ({ device, address }) => open(device, address))
      return {}
    }
    case 'rush': {
      const { addresses, group, from } = question
      const rushing = devices(group, from)
      await Promise.all(
        rushing.map(async (device, at) => {
          await sleep(backoffDelayMs(0, Math.random))
          await open(device, addresses[at % addresses.length]!)
        }),
      )
      return { atMs: epochMs() }
    }
    case 'close': {
      for (const device of devices(question.group)) close(device)
      return {}
    }
    case 'report': {
      const turns = devices(question.group, 0, question.streams)
      let left = question.reports
      await Promise.all(
        turns.map(async device => {
          while (left-- > 0) await report(device)
        }),
      )
      return {}
    }
    case 'handshakes': {
      const { address, identity, count, inFlight } = question
      await each(Array.from({ length: count }), inFlight, () => handshake(address, identity))
      return {}
    }
    case 'told':
      return { atMs: await devices(question.group)[question.device]!.told.promise }
    case 'storm':
      storm = { ...question, lost: 0, back: 0, lastBackMs: 0 }
      return {}
    case 'latency': {
      const beating = devices(question.group).filter(({ isOpen, address }) => isOpen && address !== storm?.deadAddress)
      const measured: number[] = []
      const until = performance.now() + question.forMs
      await Promise.all(
        beating.slice(0, question.streams).map(async device => {
          while (performance.now() < until && device.stream) {
            const startedAt = performance.now()
            await report(device).then(
              () => measured.push(performance.now() - startedAt),
              () => {},
            )
            await sleep(question.everyMs)
          }
        }),
      )
      return { measured }
    }
    case 'became': {
      const { lost = 0, back = 0, lastBackMs = 0 } = storm ?? {}
      return { lost, back, lastBackMs, lostUnawares, refusals }
    }
  }
}

process.on('message', async ({ id, ...question }: FleetQuestion & { id: number }) => {
  try {
    process.send?.({ id, ...(await answer(question as FleetQuestion)) })
  } catch (error) {
    process.send?.({ id, error: String(error) })
  }
})
process.on('disconnect', () => process.exit())
