/** Whether what is measured again and again stays the same. */

export type Flatness = { first: number; last: number; growth: number; allowed: number; isFlat: boolean }

/** How much of the run is left out: pools fill, code is compiled, caches grow to their size. */
const warmUpShare = 1 / 3
/** Below that a slope says nothing. */
const samplesMin = 20

/**
 * The growth from the end of the warm-up to the end by the median of all slopes between two samples (Theil and Sen), which no
 * single sample can bend.
 *
 * @param allowedShare of the median, that it may grow by
 * @param allowedLeast in the unit of the samples: small figures vary by more than their share
 * @returns `undefined` where there are too few samples
 */
export function flatness(
  samples: readonly { atMs: number; value: number }[],
  { allowedShare, allowedLeast }: { allowedShare: number; allowedLeast: number },
): Flatness | undefined {
  const [begin, end] = [samples[0]?.atMs ?? 0, samples.at(-1)?.atMs ?? 0]
  const warm = samples.filter(({ atMs }) => atMs >= begin + (end - begin) * warmUpShare)
  if (warm.length < samplesMin) return undefined
  const slopes = warm.flatMap((one, at) =>
    warm.slice(at + 1).map(other => (other.value - one.value) / (other.atMs - one.atMs)),
  )
  const middle = median(warm.map(({ value }) => value))
  const spanMs = (warm.at(-1)?.atMs ?? 0) - (warm[0]?.atMs ?? 0)
  const growth = median(slopes) * spanMs
  const allowed = Math.max(middle * allowedShare, allowedLeast)
  return { first: warm[0]?.value ?? 0, last: warm.at(-1)?.value ?? 0, growth, allowed, isFlat: growth <= allowed }
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN
}
