/** Where the time comes from: milliseconds since the Unix epoch. A parameter, so that tests need no sleeping. */
export type Clock = () => number

export const systemClock: Clock = () => Date.now()

/** A clock that is wrong by no more than this is nobody's trouble, and is not spoken of. */
export const clockOffsetToleratedMs = 60_000

const units = [
  { name: 'year', ms: 31_557_600_000 },
  { name: 'day', ms: 86_400_000 },
  { name: 'hour', ms: 3_600_000 },
  { name: 'minute', ms: 60_000 },
  { name: 'second', ms: 1_000 },
]

/**
 * `your clock is 3 hours behind the server's`
 *
 * @param offsetMs what the caller's clock says minus what the server's says
 */
export function clockOffsetSentence(offsetMs: number): string {
  const size = Math.abs(offsetMs)
  // The largest unit of which there are two, so that 90 minutes are not told as 2 hours.
  const { name, ms } = units.find(unit => size >= 2 * unit.ms) ?? { name: 'second', ms: 1_000 }
  const count = Math.round(size / ms)
  const much = `${count} ${name}${count === 1 ? '' : 's'}`
  return `your clock is ${much} ${offsetMs < 0 ? 'behind' : 'ahead of'} the server's`
}
