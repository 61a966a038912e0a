/** What several workers answer to those who watch the service, as the answer of one. */
import type { Readiness } from '../telemetry/http.ts'

/** What a worker has answered; undefined: nothing. */
export type Answered<T> = { worker: string; answer: T | undefined }

/**
 * Scrapes as one, in the text format of Prometheus: each series carries whose it is as `worker`, each family stands once.
 *
 * They are not summed. A sum would go back when a worker is replaced, or need to be kept for ever; it would be wrong for
 * what all workers alike know of the fleet, and for quantiles. `sum without (worker)` sums what can be.
 */
export function mergeScrapes(scrapes: readonly Answered<string>[]): string {
  /** By its `# HELP` line, in the order in which they are first seen. */
  const families = new Map<string, { type: string; samples: string[] }>()
  for (const { worker, answer = '' } of scrapes) {
    let samples: string[] = []
    for (const line of answer.split('\n')) {
      if (line.startsWith('# HELP ')) {
        const family = families.get(line) ?? { type: '', samples: [] }
        families.set(line, family)
        samples = family.samples
      } else if (line.startsWith('# TYPE ')) {
        const family = [...families.values()].find(family => family.samples === samples)
        if (family) family.type = line
      } else if (line !== '' && !line.startsWith('#')) {
        samples.push(line.replace(/^([a-zA-Z_:][\w:]*)(\{?)/, (_, name, brace) => labelled(name, worker, brace !== '')))
      }
    }
  }
  const lines = [...families].flatMap(([help, { type, samples }]) => [help, type, ...samples])
  return `${lines.join('\n')}\n`
}

function labelled(name: string, worker: string, hasLabels: boolean): string {
  return `${name}{worker="${worker}"${hasLabels ? ',' : '}'}`
}

/** Of the workers that there should be, so great a part has to be ready: one that is being replaced takes nobody out. */
const enough = 0.5

/**
 * Ready when at least half of the workers are; each check holds when it does at as many. Who fails one is named in its
 * detail, whether or not it holds.
 */
export function mergeReadiness(answers: readonly Answered<Readiness>[]): Readiness {
  const needed = Math.ceil(answers.length * enough)
  const readyCount = answers.filter(({ answer }) => answer?.ready).length
  const ready = readyCount >= needed
  const merged: Readiness = {
    ready,
    checks: { workers: { ok: ready, detail: `${readyCount} of ${answers.length} are ready` } },
  }
  const names = new Set(answers.flatMap(({ answer }) => Object.keys(answer?.checks ?? {})))
  for (const name of names) {
    const told = answers.flatMap(({ worker, answer }) => {
      const check = answer?.checks[name]
      return check ? [{ worker, ...check }] : []
    })
    const failing = told.find(({ ok }) => !ok)
    const ok = told.filter(({ ok }) => ok).length >= needed
    const detail = failing ? `worker ${failing.worker}: ${failing.detail ?? 'fails'}` : told[0]?.detail
    merged.checks[name] = { ok, ...(detail !== undefined && { detail }) }
  }
  return merged
}
