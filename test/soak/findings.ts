/** What was found to be broken, and how often: once each in words, however often it happens. */

export type Findings = {
  /** @param rule what had to hold, the same words each time */
  broken(rule: string, detail: string): void
  list(): { rule: string; times: number; examples: string[] }[]
}

const examplesMax = 5

export function createFindings(startedAtMs: number): Findings {
  const found = new Map<string, { times: number; examples: string[] }>()
  return {
    broken(rule, detail) {
      const kept = found.get(rule) ?? { times: 0, examples: [] }
      kept.times += 1
      if (kept.examples.length < examplesMax) {
        kept.examples.push(`at ${((Date.now() - startedAtMs) / 1_000).toFixed(1)} s: ${detail}`)
      }
      found.set(rule, kept)
    },
    list: () => [...found].map(([rule, { times, examples }]) => ({ rule, times, examples })),
  }
}
