/** How long the agent waits when it has failed, and what it waits by. */
import { setTimeout as sleep } from 'node:timers/promises'

/** Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ */
export const backoffBaseMs = 1_000
export const backoffMaxMs = 60_000
/** A server that asks for more than this is mistaken, or wants to be rid of us. */
export const retryAfterMaxMs = 600_000

/**
 * How long to wait after so many failures in a row, the first being number 0: any time up to a bound that doubles, so
 * that a fleet that lost its server together does not come back together. What the server asks for comes on top.
 */
export function backoffDelayMs(failures: number, random: () => number, retryAfterMs = 0): number {
  const bound = Math.min(backoffMaxMs, backoffBaseMs * 2 ** failures)
  return withinReason(retryAfterMs) + random() * bound
}

/** A delay that the server asks for, as far as it can be meant. */
export function withinReason(delayMs: number): number {
  return Math.min(retryAfterMaxMs, Math.max(0, delayMs))
}

/** What passes while nobody sets the clock. A parameter, so that tests need not wait. */
export type Timer = {
  /** Milliseconds since some moment; it never jumps. */
  uptime(): number
  /** Resolves after so long, or when `signal` is aborted. */
  sleep(ms: number, signal: AbortSignal): Promise<void>
}

export const systemTimer: Timer = {
  uptime: () => performance.now(),
  sleep: (ms, signal) => sleep(ms, undefined, { signal }).catch(() => undefined),
}
