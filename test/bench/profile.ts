/**
 * Where a server's processor time goes, in words that mean something to who reads them.
 *
 * V8 looks at what runs, several times a millisecond. Its samples are counted, not the time between them: on a busy
 * machine a thread is taken off its core, mostly while it wakes another process by writing to it, and that time is
 * nobody's work. What remains of it is one sample each, so socket writes look somewhat dearer than they are. The shares
 * are those of the main thread while it is not idle; of the whole process's time per call each gets its share.
 */
import type { Profiler } from 'node:inspector'
import type { Row } from './row.ts'

type Kind = { name: string; what: string; in: RegExp }

/** A sample belongs to the first kind that the innermost of its frames is in; frames that are in none are passed over. */
const kinds: readonly Kind[] = [
  { name: 'sockets', what: 'writing to PostgreSQL and to clients', in: /^node:internal\/stream_base_commons/ },
  { name: 'cryptography', what: 'keys, signatures, hashes, lint by OpenSSL', in: /^node:internal\/crypto\// },
  {
    name: 'der',
    what: 'requests and certificates read and written',
    in: /\/src\/identity\/(der|csr|certificates|pem|spiffe-id|rsa-modulus)\.ts$/,
  },
  { name: 'orm', what: 'MikroORM and its query builder', in: /\/node_modules\/(@mikro-orm|kysely)\// },
  { name: 'database-driver', what: 'pg', in: /\/node_modules\/(pg|pg-[a-z]+|pgpass|postgres-[a-z]+)\// },
  { name: 'grpc', what: 'gRPC, HTTP/2, TLS', in: /\/node_modules\/@grpc\/|^node:internal\/(http2|tls)\/|^node:_tls/ },
  { name: 'protobuf', what: 'messages encoded and decoded', in: /\/src\/gen\/|\/node_modules\/@bufbuild\// },
  {
    name: 'audit',
    what: 'audit journal, log, metrics, traces',
    in: /\/src\/(audit|telemetry)\/|\/node_modules\/(@opentelemetry|pino)\//,
  },
  { name: 'own', what: 'the rest of EdgeMesh: tokens, limits, dispatch', in: /\/src\/|\/node_modules\/rate-limiter/ },
]

const garbage = { name: 'garbage-collection', what: 'young and old generation, on the main thread' }
const loop = { name: 'event-loop', what: 'Node itself: promises, timers, polling, reading sockets' }
/** The profiler's own frames, and those that do nothing. */
const notWork: ReadonlySet<string> = new Set(['(idle)', 'post'])

/**
 * A row for each kind, the largest first.
 *
 * @param cpuMicros processor time of the whole process while `calls` were served
 */
export function profileRows(name: string, profile: Profiler.Profile, calls: number, cpuMicros: number): Row[] {
  const counts = countsByKind(profile)
  const all = counts.values().reduce((sum, { count }) => sum + count, 0)
  return [...counts.values()]
    .toSorted((one, other) => other.count - one.count)
    .map(({ kind, count }) => ({
      name: `${name}.${kind.name}`,
      value: ((count / all) * cpuMicros) / calls,
      unit: 'µs/call',
      floor: null,
      ratio: null,
      note: `${((100 * count) / all).toFixed(1)} %: ${kind.what}`,
    }))
}

type Counted = { kind: Pick<Kind, 'name' | 'what'>; count: number }

function countsByKind({ nodes, samples = [] }: Profiler.Profile): Map<string, Counted> {
  const frames = new Map(nodes.map(({ id, callFrame }) => [id, callFrame]))
  const parents = new Map(nodes.flatMap(({ id, children = [] }) => children.map(child => [child, id])))
  const kindOfNode = new Map<number, Counted['kind'] | undefined>()
  const counts = new Map<string, Counted>()
  for (const id of samples) {
    if (!kindOfNode.has(id)) kindOfNode.set(id, kindOf(id))
    const kind = kindOfNode.get(id)
    if (kind === undefined) continue
    const counted = counts.get(kind.name) ?? { kind, count: 0 }
    counted.count++
    counts.set(kind.name, counted)
  }
  return counts

  function kindOf(id: number): Counted['kind'] | undefined {
    const innermost = frames.get(id)
    if (innermost === undefined || notWork.has(innermost.functionName)) return undefined
    if (innermost.functionName === '(garbage collector)') return garbage
    for (let at: number | undefined = id; at !== undefined; at = parents.get(at)) {
      const url = frames.get(at)?.url ?? ''
      const kind = kinds.find(candidate => candidate.in.test(url))
      if (kind) return kind
    }
    return loop
  }
}
