/** What a fleet has done so far: counts that processes send each other and that add up. */

/**
 *     enrolling   has no identity yet
 *     connecting  opens a session
 *     reporting   a report of this session was acknowledged
 *     silent      the script has stopped its heartbeats
 *     waiting     backs off before the next session
 *     failed      was refused for good
 *     stopped     the simulation has ended it
 */
export const states = ['enrolling', 'connecting', 'reporting', 'silent', 'waiting', 'failed', 'stopped'] as const
export type DeviceState = (typeof states)[number]

export type Tally = {
  states: Record<DeviceState, number>
  /** Devices that are without a session, or were refused for good, and not by the script. */
  broken: number
  enrolled: number
  heartbeats: number
  allowed: number
  denied: number
  revocations: number
  reconnects: number
  /** What the script or --reconnect-every has done to devices, by action. */
  scripted: Record<string, number>
  /** By stable reason. What a device has recovered from is here too. */
  errors: Record<string, number>
  /** See `bucketOf`. */
  acknowledgements: number[]
  /** Memory of the processes that simulate. */
  rssBytes: number
}

export function emptyTally(): Tally {
  return {
    states: { enrolling: 0, connecting: 0, reporting: 0, silent: 0, waiting: 0, failed: 0, stopped: 0 },
    broken: 0,
    enrolled: 0,
    heartbeats: 0,
    allowed: 0,
    denied: 0,
    revocations: 0,
    reconnects: 0,
    scripted: {},
    errors: {},
    acknowledgements: new Array(bucketsMax).fill(0),
    rssBytes: 0,
  }
}

/** Whoever invents reasons without end fills no memory. */
const reasonsMax = 100

export function count(counts: Record<string, number>, name: string, by = 1): void {
  const known = Object.hasOwn(counts, name) || Object.keys(counts).length < reasonsMax ? name : 'OTHER'
  counts[known] = (counts[known] ?? 0) + by
}

export function sumOf(tallies: readonly Tally[]): Tally {
  const sum = emptyTally()
  for (const tally of tallies) {
    for (const state of states) sum.states[state] += tally.states[state]
    for (const name of [
      'broken',
      'enrolled',
      'heartbeats',
      'allowed',
      'denied',
      'revocations',
      'reconnects',
      'rssBytes',
    ] as const)
      sum[name] += tally[name]
    for (const [name, by] of Object.entries(tally.scripted)) count(sum.scripted, name, by)
    for (const [name, by] of Object.entries(tally.errors)) count(sum.errors, name, by)
    for (const [bucket, by] of tally.acknowledgements.entries()) sum.acknowledgements[bucket]! += by
  }
  return sum
}

// Buckets a tenth apart, from a tenth of a millisecond to beyond the half minute that a session waits.
const bucketRatio = 1.1
const bucketMinMs = 0.1
const bucketsMax = 140

export function bucketOf(ms: number): number {
  const bucket = Math.ceil(Math.log(Math.max(ms, bucketMinMs) / bucketMinMs) / Math.log(bucketRatio))
  return Math.min(bucketsMax - 1, bucket)
}

/** The time within which `share` of what was counted came, to a tenth of it; nothing where nothing came. */
export function quantileMs(buckets: readonly number[], share: number): number | undefined {
  const total = buckets.reduce((sum, count) => sum + count, 0)
  let left = total * share
  for (const [bucket, count] of buckets.entries()) {
    left -= count
    if (count > 0 && left <= 1e-9) return bucketMinMs * bucketRatio ** bucket
  }
  return undefined
}
