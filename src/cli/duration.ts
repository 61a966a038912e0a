/** Spans of time as people write them: 90s, 15m, 1h, 7d. */
import { InvalidArgumentError } from 'commander'

const UNIT_MS = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 } as const

/** A hundred years: beyond that a date no longer fits where it is kept. */
const durationMsMax = 36_500 * UNIT_MS.d

/** @returns milliseconds @throws InvalidArgumentError, which names the option and ends in exit code 2 */
export function parseDuration(text: string): number {
  const match = /^([1-9]\d{0,9})([smhd])$/.exec(text)
  const ms = match ? Number(match[1]) * UNIT_MS[match[2] as keyof typeof UNIT_MS] : Number.NaN
  if (!(ms <= durationMsMax)) {
    throw new InvalidArgumentError('It must be a whole number and a unit, such as 90s, 15m, 1h or 7d.')
  }
  return ms
}

/** The shortest spelling that `parseDuration` reads back. Whole seconds only. */
export function formatDuration(ms: number): string {
  const unit = (['d', 'h', 'm'] as const).find(unit => ms >= UNIT_MS[unit] && ms % UNIT_MS[unit] === 0) ?? 's'
  return `${Math.round(ms / UNIT_MS[unit])}${unit}`
}

/** To be read at a glance: in the greatest unit of which it has at least two. */
export function formatRoughly(ms: number): string {
  const unit = (['d', 'h', 'm'] as const).find(unit => ms >= 2 * UNIT_MS[unit]) ?? 's'
  return `${Math.round(ms / UNIT_MS[unit])}${unit}`
}
