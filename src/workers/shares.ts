/**
 * What each of several workers gets of what one process would have: connections to the database, memory, a name.
 *
 * Of the bounds of a process, those that stand for what others bear are divided (connections to the database, memory), and
 * those that stand for what a process can do are each worker's own (places for connections, calls that anyone may make).
 */
import { randomBytes } from 'node:crypto'
import { availableParallelism, totalmem } from 'node:os'
import { getHeapStatistics } from 'node:v8'
import type { Settings } from '../settings.ts'

/** What there is to be shared. */
export type Machine = {
  /** Processes that can run at the same time, by the cores and the limits of the group of processes. */
  parallelism: number
  /** What the group may use, or the machine has. */
  memoryBytes: number
  /** What JavaScript may use in this process. */
  heapBytes: number
  /** Whether somebody has said so, or Node has found it by itself. */
  heapGiven: boolean
}

export type Share = {
  databaseConnections: number
  heapMiB: number
  /** Open at the same time, by the memory; the port has a bound of its own. */
  connectionsMost: number
}

/** More would ask the database for more connections than it has, at two each and one to listen. */
export const workersMax = 64

const MiB = 2 ** 20
const parentBytes = 192 * MiB
/** An idle worker has 220 MiB, and needs room for what it does. */
const idleWorkerBytes = 256 * MiB
/** With a thousand connections. */
const workerBytesMin = 384 * MiB
const heapBytesMin = 96 * MiB
/** As in `rpc/port.ts`. */
const connectionBytes = 100_000
const connectionsMostMin = 100
/** Of a connection and all that is kept, most is not on JavaScript's heap, but a heap that grows must not take it all. */
const heapShare = 0.5
/** So that a slow statement does not hold up all else. The change feed has a connection of its own. */
export const databaseConnectionsMin = 2
const instanceIdCharactersMax = 63

export function machine(env: Readonly<Record<string, string | undefined>>): Machine {
  const constrained = process.constrainedMemory()
  const given = heapOptionsOf(env)
  const oldSpaceMiB = given.findLast(option => /old.space.size=/.test(option))?.split('=')[1]
  return {
    parallelism: availableParallelism(),
    memoryBytes: constrained > 0 ? Math.min(constrained, totalmem()) : totalmem(),
    heapBytes: oldSpaceMiB ? Number(oldSpaceMiB) * MiB : getHeapStatistics().heap_size_limit,
    heapGiven: given.length > 0,
  }
}

const heapOption = /^--max[-_](old[-_]space[-_]size([-_]percentage)?|heap[-_]size)=/

function heapOptionsOf({ NODE_OPTIONS = '' }: Readonly<Record<string, string | undefined>>): string[] {
  return [...NODE_OPTIONS.split(/\s+/), ...process.execArgv].filter(option => heapOption.test(option))
}

/** How a worker's Node is started: as this process was, but for its memory. */
export function nodeOptions(env: Readonly<Record<string, string | undefined>>, { heapMiB }: Share) {
  const kept = (env.NODE_OPTIONS ?? '').split(/\s+/).filter(option => !heapOption.test(option))
  return {
    env: { ...env, NODE_OPTIONS: kept.join(' ') },
    execArgv: [...process.execArgv.filter(option => !heapOption.test(option)), `--max-old-space-size=${heapMiB}`],
  }
}

/** One for each core, as many as there is memory for. */
export function workersFor({ parallelism, memoryBytes, heapBytes, heapGiven }: Machine): number {
  const byMemory = Math.floor((memoryBytes - parentBytes) / workerBytesMin)
  const byHeap = heapGiven ? Math.floor(heapBytes / heapBytesMin) : workersMax
  return Math.max(1, Math.min(parallelism, byMemory, byHeap, workersMax))
}

export function shareOf({ memoryBytes, heapBytes, heapGiven }: Machine, poolMax: number, workers: number): Share {
  const bytes = (memoryBytes - parentBytes) / workers
  const heap = heapGiven ? heapBytes / workers : Math.min(heapBytes, bytes * heapShare)
  return {
    databaseConnections: Math.max(databaseConnectionsMin, Math.floor(poolMax / workers)),
    heapMiB: Math.floor(Math.max(heap, heapBytesMin) / MiB),
    connectionsMost: Math.max(connectionsMostMin, Math.floor((bytes - idleWorkerBytes) / connectionBytes)),
  }
}

/** Whether the workers have less than they need to live. */
export function isTooLittle({ memoryBytes, heapBytes, heapGiven }: Machine, workers: number): boolean {
  return memoryBytes - parentBytes < workers * workerBytesMin || (heapGiven && heapBytes < workers * heapBytesMin)
}

/**
 * The settings of a worker. Its name is one that nobody has had: what a worker of the same number held before it died
 * waits to be resumed under the name of that one.
 */
export function settingsOf(settings: Settings, number: number, { databaseConnections }: Share): Settings {
  const ending = `-${number}-${randomBytes(4).toString('hex')}`
  return {
    ...settings,
    instanceId: settings.instanceId.slice(0, instanceIdCharactersMax - ending.length) + ending,
    database: { ...settings.database, poolMax: databaseConnections },
  }
}

/** The INSTANCE_ID whose worker has this name; of a process without workers its own. */
export function instanceOf(name: string): string {
  return name.replace(/-\d+-[0-9a-f]{8}$/, '')
}
