import test from 'ava'
import fc from 'fast-check'
import { backoffBaseMs, backoffDelayMs, backoffMaxMs, retryAfterMaxMs } from '../../src/client/waiting.ts'

const failures = fc.nat(5_000)
const random = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })

test('the wait is never longer than a minute, however often the server was not there', t => {
  fc.assert(
    fc.property(failures, random, (count, share) => {
      const delay = backoffDelayMs(count, () => share)
      return delay >= 0 && delay <= Math.min(backoffMaxMs, backoffBaseMs * 2 ** count)
    }),
  )
  t.pass()
})

test('a server that wants to be left alone is, for as long as it said and not for days', t => {
  fc.assert(
    fc.property(failures, random, fc.integer({ min: -1_000, max: 1e12 }), (count, share, retryAfterMs) => {
      const wanted = Math.min(retryAfterMaxMs, Math.max(0, retryAfterMs))
      const delay = backoffDelayMs(count, () => share, retryAfterMs)
      return delay >= wanted && delay <= wanted + backoffMaxMs
    }),
  )
  t.pass()
})
