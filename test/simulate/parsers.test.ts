import test from 'ava'
import fc from 'fast-check'
import { parseDuration } from '../../src/cli/duration.ts'
import { healthsOf, parsePostureMix, postureOf } from '../../src/simulate/mix.ts'
import { parseScript } from '../../src/simulate/script.ts'
import { bucketOf, emptyTally, quantileMs } from '../../src/simulate/tally.ts'

const weights = fc
  .record({ healthy: fc.nat(1_000), stale: fc.nat(1_000), failing: fc.nat(1_000) })
  .filter(({ healthy, stale, failing }) => healthy + stale + failing > 0)

test('a posture mix is read as it is written, and every fleet holds its shares to a device', t => {
  fc.assert(
    fc.property(weights, fc.integer({ min: 1, max: 500 }), (mix, devices) => {
      const text = Object.entries(mix).map(([health, weight]) => `${health}=${weight}`)
      t.deepEqual(parsePostureMix(text.join(',')), mix)
      const counts = { healthy: 0, stale: 0, failing: 0 }
      for (const health of healthsOf(mix, devices)) counts[health] += 1
      const sum = mix.healthy + mix.stale + mix.failing
      for (const health of ['healthy', 'stale', 'failing'] as const) {
        t.true(Math.abs(counts[health] - (devices * mix[health]) / sum) <= 2)
      }
    }),
  )
  const counts = { healthy: 0, stale: 0, failing: 0 }
  for (const health of healthsOf({ healthy: 90, stale: 5, failing: 5 }, 100)) counts[health] += 1
  t.deepEqual(counts, { healthy: 90, stale: 5, failing: 5 })
})

test('a posture mix that is none is refused with a sentence, whatever it is', t => {
  for (const text of ['', 'healthy', 'healthy=-1', 'sick=5', 'healthy=1,healthy=2', 'healthy=0', 'healthy=9999999']) {
    t.throws(() => parsePostureMix(text), { instanceOf: RangeError }, text)
  }
  fc.assert(
    fc.property(fc.string(), text => {
      try {
        parsePostureMix(text)
      } catch (error) {
        t.true(error instanceof RangeError)
      }
    }),
  )
  t.pass()
})

test('a stale device says that it was measured days ago', t => {
  t.true(Number(postureOf('stale', 1e12).measuredAt) < 1e12 - 86_400_000)
  t.is(Number(postureOf('healthy', 1e12).measuredAt), 1e12)
})

const step = fc.record({
  at: fc.integer({ min: 1, max: 1_000 }).map(seconds => `${seconds}s`),
  action: fc.constantFrom('disconnect', 'posture', 'stop-heartbeats'),
  share: fc.double({ min: 0.001, max: 1, noNaN: true }),
})

test('the steps of a script come in the order of their moments', t => {
  fc.assert(
    fc.property(fc.array(step, { minLength: 1, maxLength: 20 }), steps => {
      const read = parseScript(JSON.stringify(steps), parseDuration).map(({ atMs }) => atMs)
      t.deepEqual(
        read,
        steps.map(({ at }) => parseDuration(at)).sort((a, b) => a - b),
      )
    }),
  )
})

for (const [what, text, names] of [
  ['no JSON', '[', /not JSON/],
  ['no list', '{}', /array/],
  ['empty', '[]', />=1 items/],
  ['of an unknown action', '[{"at":"1s","action":"explode","share":1}]', /\[0\]\.action/],
  ['with a share above 1', '[{"at":"1s","action":"disconnect","share":2}]', /at most 1.*\[0\]\.share/],
  ['with a share of 0', '[{"at":"1s","action":"disconnect","share":0}]', /above 0/],
  ['with a moment without a unit', '[{"at":"1","action":"disconnect","share":1}]', /90s or 15m.*\[0\]\.at/],
  ['with a field too many', '[{"at":"1s","action":"disconnect","share":1,"of":2}]', /"of"/],
] as const) {
  test(`a script that is ${what} is refused and says where`, t => {
    t.throws(() => parseScript(text, parseDuration), { instanceOf: RangeError, message: names })
  })
}

test('quantiles are right to a tenth', t => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 30_000 }), { minLength: 1, maxLength: 50 }), times => {
      const { acknowledgements } = emptyTally()
      for (const ms of times) acknowledgements[bucketOf(ms)]! += 1
      const longest = Math.max(...times)
      const told = quantileMs(acknowledgements, 1) ?? 0
      t.true(told >= longest * 0.999 && told <= longest * 1.11)
    }),
  )
  t.is(quantileMs(emptyTally().acknowledgements, 0.5), undefined)
})
