/** What the instance behind METRICS_PORT on this host says of itself. */
import { request } from 'node:http'
import { isIPv6 } from 'node:net'
import type { Settings } from '../settings.ts'
import type { Readiness } from '../telemetry/http.ts'
import { CannotLook } from './finding.ts'

export type Instance = {
  readiness: Readiness
  /** Of all its processes. */
  samples: readonly Sample[]
}

export type Sample = { name: string; labels: Readonly<Record<string, string>>; value: number }

/** Of the server, too, which gives readiness three seconds. */
const answerMs = 5_000
/** A scrape of 64 workers is about a megabyte. */
const answerBytesMax = 16 * 1024 * 1024

/** @throws {CannotLook} where there is none */
export async function lookAtInstance(metrics: Settings['metrics']): Promise<Instance> {
  if (metrics.port === 0) throw new CannotLook('METRICS_PORT is 0, so nobody knows where an instance would be')
  const host = nearHost(metrics.host)
  const where = `${host}:${metrics.port}`
  let readiness: string
  try {
    readiness = await get(host, metrics.port, '/readyz')
  } catch {
    throw new CannotLook(`no instance answers at ${where}`)
  }
  try {
    const text = await get(host, metrics.port, '/metrics')
    if (!isEdgeMesh(text)) throw new Error('no edgemesh_build_info')
    return { readiness: JSON.parse(readiness), samples: readSamples(text) }
  } catch {
    throw new CannotLook(`what answers at ${where} is no instance of EdgeMesh`)
  }
}

export const isEdgeMesh = (scrape: string) => /^edgemesh_build_info[{ ]/m.test(scrape)

/** Where to reach from this host what listens on a setting's address. */
export function nearHost(host: string): string {
  if (host === '0.0.0.0') return '127.0.0.1'
  return host === '::' ? '::1' : host
}

/** @returns the body, whatever the status is */
export function get(host: string, port: number, path: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>()
  const signal = AbortSignal.timeout(answerMs)
  const asked = request({ host, port, path, family: isIPv6(host) ? 6 : undefined, signal }, response => {
    const chunks: Buffer[] = []
    let bytes = 0
    response.on('data', (chunk: Buffer) => {
      bytes += chunk.length
      if (bytes > answerBytesMax) asked.destroy(new Error(`the answer is longer than ${answerBytesMax} bytes`))
      chunks.push(chunk)
    })
    response.on('error', reject).on('end', () => resolve(Buffer.concat(chunks).toString('utf8')))
  })
  asked.on('error', reject).end()
  return promise
}

const sampleLine = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/
const labelPair = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g

/** The text format of Prometheus; what is no sample is left out. */
export function readSamples(scrape: string): Sample[] {
  return scrape.split('\n').flatMap(line => {
    const [, name, labels = '', value] = sampleLine.exec(line) ?? []
    if (name === undefined) return []
    const pairs = [...labels.matchAll(labelPair)].map(([, key = '', text = '']) => [key, text])
    return [{ name, labels: Object.fromEntries(pairs), value: Number(value) }]
  })
}

/** The value below which that share of what a histogram has counted lies: the bound of its bucket; undefined: it is empty. */
export function quantile(samples: readonly Sample[], name: string, share: number): number | undefined {
  const buckets = new Map<number, number>()
  for (const sample of samples) {
    if (sample.name !== `${name}_bucket`) continue
    const bound = Number(sample.labels.le === '+Inf' ? Number.POSITIVE_INFINITY : sample.labels.le)
    buckets.set(bound, (buckets.get(bound) ?? 0) + sample.value)
  }
  const bounds = [...buckets.keys()].sort((one, other) => one - other)
  const total = buckets.get(bounds.at(-1) ?? 0) ?? 0
  if (total === 0) return undefined
  return bounds.find(bound => (buckets.get(bound) ?? 0) >= total * share)
}
