import { loadavg } from 'node:os'

/**
 * How often something can be done in a second of processor time, which other work on the machine changes little: it is
 * what `process.cpuUsage` says of all threads, in user and in system mode.
 */
export type Rate = { perCpuSecond: number; perWallSecond: number }

/** The middle one of several, and how far the others were from it. */
export type MedianRate = Rate & { perCpuSecondMin: number; perCpuSecondMax: number }

/** Something to do again and again; `turn` counts. What is asynchronous may be done several times at once. */
export type Work = { once: (turn: number) => unknown; inFlight?: number }

/** Odd, so that there is one in the middle. The processor's clock counts in steps of 4 ms: a second is exact enough. */
const rounds = 5
const roundMs = 1_000
const warmUpMs = 1_000

/** Median rates, measured in turns, so that whatever else the machine does falls on all of them alike. */
export async function ratesInTurns<Name extends string>(
  works: Record<Name, Work>,
  progress: (text: string) => void,
): Promise<Record<Name, MedianRate>> {
  const entries = Object.entries(works) as [Name, Work][]
  const measured = new Map<Name, Rate[]>(entries.map(([name]) => [name, []]))
  for (const [, work] of entries) await rateOf(work, warmUpMs)
  for (let round = 1; round <= rounds; round++) {
    progress(`${entries.map(([name]) => name).join(', ')}: round ${round} of ${rounds}`)
    for (const [name, work] of entries) measured.get(name)?.push(await rateOf(work, roundMs))
  }
  return Object.fromEntries(entries.map(([name]) => [name, medianRate(measured.get(name) ?? [])])) as Record<
    Name,
    MedianRate
  >
}

async function rateOf({ once, inFlight = 1 }: Work, forMs: number): Promise<Rate> {
  const startedAt = performance.now()
  const cpuBefore = process.cpuUsage()
  let turns = 0
  async function repeat() {
    while (performance.now() - startedAt < forMs) {
      const doing = once(turns++)
      if (doing instanceof Promise) await doing
    }
  }
  await Promise.all(Array.from({ length: inFlight }, repeat))
  return rate(turns, process.cpuUsage(cpuBefore), performance.now() - startedAt)
}

export function rate(count: number, { user, system }: NodeJS.CpuUsage, wallMs: number): Rate {
  return { perCpuSecond: (count * 1e6) / (user + system), perWallSecond: (count * 1e3) / wallMs }
}

/** By processor time. */
export function medianRate(rates: readonly Rate[]): MedianRate {
  const sorted = rates.toSorted((one, other) => one.perCpuSecond - other.perCpuSecond)
  const median = sorted[Math.floor(sorted.length / 2)] as Rate
  return {
    ...median,
    perCpuSecondMin: sorted[0]?.perCpuSecond ?? Number.NaN,
    perCpuSecondMax: sorted.at(-1)?.perCpuSecond ?? Number.NaN,
  }
}

/** Such as `3950/s (3900 to 3990)`. */
export function showRate({ perCpuSecond, perCpuSecondMin, perCpuSecondMax }: MedianRate): string {
  const [median, least, most] = [perCpuSecond, perCpuSecondMin, perCpuSecondMax].map(Math.round)
  return `${median}/s (${least} to ${most})`
}

/** What else the machine does. */
export const showLoad = () => `load ${loadavg()[0]?.toFixed(1)}`
