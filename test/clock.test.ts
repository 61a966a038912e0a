import test from 'ava'
import fc from 'fast-check'
import { clockOffsetMs, clockOffsetSentence } from '../src/clock.ts'
import { durationOf } from '../src/duration.ts'

const [second, minute, hour, day, year] = [1_000, 60_000, 3_600_000, 86_400_000, 365.25 * 86_400_000] as const
const now = Date.parse('2026-11-24T12:00:00Z')

for (const [offset, sentence] of [
  [undefined, undefined],
  [0, undefined],
  [minute, undefined],
  [-minute, undefined],
  [61 * second, 'your clock is 61 s ahead'],
  [-90 * second, 'your clock is 90 s behind'],
  [-2 * minute, 'your clock is 2 min behind'],
  [90 * minute, 'your clock is 90 min ahead'],
  [-3 * hour, 'your clock is 3 h behind'],
  [-3 * hour - 20 * minute, 'your clock is 3 h behind'],
  [36 * hour, 'your clock is 36 h ahead'],
  [10 * day, 'your clock is 10 days ahead'],
  [500 * day, 'your clock is 500 days ahead'],
  [-56.9 * year, 'your clock is 57 years behind'],
] as const) {
  test(`a clock that is off by ${offset} ms is told: ${sentence ?? 'nothing'}`, t => {
    t.is(clockOffsetSentence(offset), sentence)
  })
}

test('a clock is ahead by what it says that it is later, as far as a hundred years', t => {
  t.is(clockOffsetMs(new Date(now + 3 * hour), now), 3 * hour)
  t.is(clockOffsetMs(new Date(now - 3 * hour), now), -3 * hour)
  t.is(clockOffsetMs(new Date(0), now), -now)
  t.is(clockOffsetMs(new Date(8.64e15), now), 100 * year)
  t.is(clockOffsetMs(new Date(-8.64e15), now), -100 * year)
  t.is(clockOffsetMs(undefined, now), undefined)
  t.is(clockOffsetMs(new Date(Number.NaN), now), undefined)
})

test('whatever a clock says, its offset is a whole number that google.protobuf.Duration can hold', t => {
  fc.assert(
    fc.property(fc.date({ noInvalidDate: false }), sentAt => {
      const offset = clockOffsetMs(sentAt, now)
      if (offset === undefined) return Number.isNaN(sentAt.getTime())
      const { seconds, nanos } = durationOf(offset)
      t.true(Number.isInteger(offset) && Number.isInteger(seconds) && Number.isInteger(nanos))
      t.true(Math.abs(nanos) < 1e9 && seconds * nanos >= 0, 'both parts have one sign')
      return Math.round(seconds * 1_000 + nanos / 1e6) === offset && Math.abs(seconds) <= 315_576_000_000
    }),
  )
})
