/** Where the time comes from: milliseconds since the Unix epoch. A parameter, so that tests need no sleeping. */
export type Clock = () => number

export const systemClock: Clock = () => Date.now()

/** Up to here another's clock counts as right: the way of a message, and what a cheap clock drifts between two settings. */
export const clockOffsetMsTolerated = 60_000
/** A hundred years, to either side: all clocks that were never set, and still a number that fits everywhere. */
const clockOffsetMsMax = 100 * 365.25 * 86_400_000

/**
 * How far another's clock is ahead of this one; negative: behind.
 *
 * @param sentAt its clock when it sent a message
 * @returns undefined where it did not say, or nothing that is a time
 */
export function clockOffsetMs(sentAt: Date | undefined, receivedAtMs: number): number | undefined {
  const offsetMs = sentAt === undefined ? Number.NaN : Math.round(sentAt.getTime() - receivedAtMs)
  return Number.isNaN(offsetMs) ? undefined : Math.max(-clockOffsetMsMax, Math.min(offsetMs, clockOffsetMsMax))
}

const units = [
  ['years', 365.25 * 86_400_000],
  ['days', 86_400_000],
  ['h', 3_600_000],
  ['min', 60_000],
] as const

/** Such as `your clock is 3 h behind`, for whoever's clock is so far ahead; undefined where it is right. */
export function clockOffsetSentence(offsetMs: number | undefined): string | undefined {
  if (offsetMs === undefined || Math.abs(offsetMs) <= clockOffsetMsTolerated) return undefined
  const size = Math.abs(offsetMs)
  // 90 min says more than 2 h.
  const [unit, unitMs] = units.find(([, ms]) => size >= 2 * ms) ?? ['s', 1_000]
  return `your clock is ${Math.round(size / unitMs)} ${unit} ${offsetMs > 0 ? 'ahead' : 'behind'}`
}
