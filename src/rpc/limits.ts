/** Rate limits of this instance, by source address or by device. What exceeds one is told when to come back. */
import { RateLimiterMemory, RateLimiterRes } from 'rate-limiter-flexible'
import { Fault } from '../fault.ts'
import type { RateLimit } from '../settings.ts'

/**
 * @param name the setting, for the message
 * @returns a function that takes `points` from the allowance of `key`
 * @throws Fault RESOURCE_EXHAUSTED `RATE_LIMITED` with RetryInfo
 */
export function rateLimit(name: string, { count, windowSeconds }: RateLimit) {
  const limiter = new RateLimiterMemory({ points: count, duration: windowSeconds })
  return async (key: string, points = 1): Promise<void> => {
    try {
      await limiter.consume(key, points)
    } catch (refusal) {
      if (!(refusal instanceof RateLimiterRes)) throw refusal
      const message = `more than ${count} in ${windowSeconds} s (${name}); try again later`
      throw new Fault('RESOURCE_EXHAUSTED', 'RATE_LIMITED', message, { retryAfterMs: refusal.msBeforeNext })
    }
  }
}
