/** A fleet for measurements: its devices put on record at once, and the few processes in which they live. */
import { type ChildProcess, fork } from 'node:child_process'
import { createPrivateKey, createPublicKey } from 'node:crypto'
import { once } from 'node:events'
import { join } from 'node:path'
import { createKey } from '../../src/client/csr.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { openAuthorities } from '../../src/identity/authorities.ts'
import { describeCertificate } from '../../src/identity/certificate-description.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { entities } from '../../src/server.ts'
import type { BareEcho } from './bare-echo-server.ts'
import type { Identity } from './enrolled-device.ts'
import type { GroupOptions } from './row.ts'
import type { Served } from './served.ts'

export type FleetQuestion =
  | { ask: 'devices'; group: string; identities: Identity[] }
  /** Opens a heartbeat stream for each on a connection of its own, a few at a time. */
  | { ask: 'open'; group: string; addresses: string[]; from?: number; to?: number }
  /** The same for all at once, each after up to a second. */
  | { ask: 'rush'; group: string; addresses: string[]; from?: number }
  | { ask: 'close'; group: string }
  /** On so many streams one report after the other. */
  | { ask: 'report'; group: string; streams: number; reports: number }
  | { ask: 'handshakes'; address: string; identity: Identity; count: number; inFlight: number }
  /** When the device has been told of its end. */
  | { ask: 'told'; group: string; device: number }
  /** From now on whoever loses its stream to the dead one comes back to the others, as the agent does. */
  | { ask: 'storm'; addresses: string[]; deadAddress: string }
  | { ask: 'latency'; group: string; streams: number; everyMs: number; forMs: number }
  | { ask: 'became' }

export type FleetAnswer = {
  /** Since the epoch, as `performance` has it. */
  atMs?: number
  measured?: number[]
  lost?: number
  back?: number
  lastBackMs?: number
  /** Streams that ended although their instance was there. */
  lostUnawares?: number
  refusals?: number
}

export type FleetClients = {
  /** Asks one process. */
  ask(process: number, question: FleetQuestion): Promise<FleetAnswer>
  all(question: FleetQuestion): Promise<FleetAnswer[]>
  stop(): Promise<void>
}

/** Each may have half of what the server has. */
export const fleetProcesses = 2

/** A smaller fleet for a smaller machine; then the figures are of that. */
export const devicesCount = Number(process.env.BENCH_DEVICES ?? 10_000)
/** The table of a small fleet. */
export const fewRows = 1_000

export type FleetSides = { served: Served; bare: BareEcho; clients: FleetClients }

export async function addDevices(
  { served, clients }: FleetSides,
  from: number,
  to: number,
  { progress }: GroupOptions,
) {
  progress(`${to - from} devices are put on record`)
  const identities = await seedDevices(served, from, to)
  for (let process = 0; process < fleetProcesses; process++) {
    const part = identities.filter((_, number) => number % fleetProcesses === process)
    await clients.ask(process, { ask: 'devices', group: 'ours', identities: part })
  }
}

export function startFleetClients(): FleetClients {
  const children = Array.from({ length: fleetProcesses }, startChild)
  const ask = (index: number, question: FleetQuestion) => children[index]!.ask(question)
  return {
    ask,
    all: question => Promise.all(children.map(child => child.ask(question))),
    stop: async () => void (await Promise.all(children.map(child => child.stop()))),
  }
}

function startChild() {
  const child: ChildProcess = fork(join(import.meta.dirname, 'fleet-clients.ts'), {
    execArgv: [],
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  })
  const exited = once(child, 'exit')
  const waiting = new Map<number, PromiseWithResolvers<FleetAnswer>>()
  let questions = 0
  child.on('message', ({ id, error, ...answer }: FleetAnswer & { id: number; error?: string }) => {
    if (error === undefined) waiting.get(id)?.resolve(answer)
    else waiting.get(id)?.reject(new Error(error))
    waiting.delete(id)
  })
  exited.then(([code, signal]) => {
    for (const { reject } of waiting.values()) reject(new Error(`a process of the fleet has ended: ${signal ?? code}`))
  })
  return {
    ask(question: FleetQuestion): Promise<FleetAnswer> {
      const id = ++questions
      const asked = Promise.withResolvers<FleetAnswer>()
      waiting.set(id, asked)
      child.send({ id, ...question })
      return asked.promise
    },
    async stop() {
      if (child.connected) child.disconnect()
      await exited
    },
  }
}

/** @throws with what to do, where this process and its children may not open as many files */
export function demandOpenFiles(needed: number): void {
  const { userLimits } = process.report.getReport() as unknown as {
    userLimits: { open_files: { soft: number | 'unlimited'; hard: number | 'unlimited' } }
  }
  const { hard } = userLimits.open_files
  if (hard !== 'unlimited' && hard < needed) {
    throw new Error(
      `${needed} open files are needed in one process, and ${hard} are allowed: raise it with ulimit -n ${needed}, or ` +
        'measure a smaller fleet with BENCH_DEVICES',
    )
  }
}

const dayMs = 86_400_000
const rowsAtOnce = 5_000

/** Puts devices on record with a certificate each, as if they had enrolled. */
export async function seedDevices(served: Served, from: number, to: number): Promise<Identity[]> {
  const db = await openDatabase({ url: served.databaseUrl, poolMax: 1, entities })
  try {
    const { set } = await openAuthorities({
      db,
      trustDomain: 'edgemesh.local',
      validityDays: 1,
      passphrase: served.secrets.CA_KEY_PASSPHRASE,
      files: undefined,
      clock: Date.now,
    })
    const now = Date.now()
    const [notBefore, notAfter] = [new Date(now - 60_000), new Date(now + dayMs)]
    const seeded: { id: string; serial: string; publicKey: string; fingerprint: string; identity: Identity }[] = []
    for (let number = from; number < to; number++) {
      const id = deviceId(number)
      const keyPem = createKey()
      const issued = set.issuing.issueLeaf({
        serial: Buffer.from(newSerial(), 'hex'),
        spki: createPublicKey(createPrivateKey(keyPem)).export({ type: 'spki', format: 'der' }),
        spiffeId: `spiffe://edgemesh.local/device/${id}`,
        commonName: id,
        purpose: 'client',
        notBefore,
        notAfter,
      })
      const certificatePem = [issued.pem, ...set.issuing.intermediates].join('')
      seeded.push({
        id,
        serial: issued.serialHex,
        publicKey: describeCertificate(issued.der).publicKeySha256,
        fingerprint: issued.fingerprintSha256,
        identity: { rootsPem: served.rootsPem, keyPem, certificatePem },
      })
    }
    for (let at = 0; at < seeded.length; at += rowsAtOnce) {
      const rows = seeded.slice(at, at + rowsAtOnce)
      const [ids, keys] = [rows.map(({ id }) => id), rows.map(({ publicKey }) => publicKey)]
      await db.pool.query(insertDevices, [ids, keys])
      await db.pool.query(
        `insert into certificates (serial, subject_kind, subject_id, public_key_sha256, fingerprint_sha256, issuer_key_id,
           not_before, not_after, created_at)
         select serial, 'device', id, key, fingerprint, $5, $6, $7, now()
         from unnest($1::text[], $2::text[], $3::text[], $4::text[]) as t(serial, id, key, fingerprint)`,
        [
          rows.map(({ serial }) => serial),
          ids,
          keys,
          rows.map(({ fingerprint }) => fingerprint),
          set.issuing.issuerKeyId,
          notBefore,
          notAfter,
        ],
      )
    }
    await db.pool.query('analyze devices, certificates')
    return seeded.map(({ identity }) => identity)
  } finally {
    await db.close()
  }
}

export const deviceId = (number: number) => `bench-${String(number).padStart(6, '0')}`

const insertDevices = `
  insert into devices (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
  select id, 'server', 'linux', '6.12', '{}', 'active', 'spiffe://edgemesh.local/device/' || id, key, now(), now()
  from unnest($1::text[], $2::text[]) as t(id, key)`

/** Devices that are only on record, with a posture each, so that tables are as large as those of a fleet. */
export async function seedOthers(served: Served, count: number): Promise<void> {
  const db = await openDatabase({ url: served.databaseUrl, poolMax: 1, entities })
  try {
    for (let at = 0; at < count; at += rowsAtOnce) {
      const ids = Array.from({ length: Math.min(rowsAtOnce, count - at) }, (_, number) => `other-${at + number}`)
      await db.pool.query(insertDevices, [ids, ids])
      await db.pool.query(
        `insert into device_postures (device_id, posture, failing, measured_at, received_at)
         select id, '{"cpuPercent": 10, "diskEncrypted": true}', '[]', now(), now() from unnest($1::text[]) as id`,
        [ids],
      )
    }
    await db.pool.query('analyze devices, device_postures')
  } finally {
    await db.close()
  }
}
