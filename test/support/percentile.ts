/** The value that so many percent of the others do not exceed (nearest rank). NaN where there is none. */
export function percentile(values: readonly number[] = [], percent: number): number {
  const sorted = values.toSorted((one, other) => one - other)
  return sorted[Math.ceil((sorted.length * percent) / 100) - 1] ?? Number.NaN
}
