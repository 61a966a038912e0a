import test from 'ava'
import fc from 'fast-check'
import { flatness } from './flat.ts'
import { type Can, createFact, fallenSince, mayStand, mustStand } from './oracle.ts'
import { createRandom } from './random.ts'

test('between a change and its answer a permission may stand or not, and after it only as was answered', t => {
  let now = 0
  const user = createFact('user', 'true', () => now)
  now = 100
  const acknowledged = user.change(false)
  now = 150
  t.deepEqual([mayStand([user], 100, 150), mustStand([user], 90, 150), mustStand([user], 50, 99)], [true, false, true])
  acknowledged()
  now = 200
  t.is(user.at(200), 'false')
  t.true(mayStand([user], 149, 200), 'it could have been asked a moment before')
  t.false(mayStand([user], 150, 200))
  t.is(fallenSince([user], 0, 200), 150)
  user.change(true)
  t.is(fallenSince([user], 0, 200), undefined)
})

test('facts that never hold together at one instant allow nothing', t => {
  let now = 0
  const [one, other] = [createFact('one', 'true', () => now), createFact('other', 'false', () => now)] as const
  now = 10
  one.change(false)()
  now = 20
  other.change(true)()
  t.true(mayStand([one], 0, 30) && mayStand([other], 0, 30))
  t.false(mayStand([one, other], 0, 30))
})

test('what is planned for later gives way to what is said meanwhile', t => {
  let now = 0
  const fresh = createFact('fresh', 'true', () => now)
  fresh.plan({ fromMs: 50, can: 'false' })
  t.is(fresh.at(60), 'false')
  now = 40
  fresh.plan({ fromMs: 40, can: 'true' }, { fromMs: 90, can: 'false' })
  t.deepEqual([fresh.at(60), fresh.at(90)], ['true', 'false'])
})

test('who looks at every instant finds what the oracle finds by its turns', t => {
  const cans: Can[] = ['true', 'false', 'either']
  const line = fc.array(fc.tuple(fc.nat(30), fc.constantFrom(...cans)), { maxLength: 6 })
  fc.assert(
    fc.property(line, line, fc.nat(30), fc.nat(10), (first, second, fromMs, length) => {
      const facts = [first, second].map((turns, at) => {
        const fact = createFact(String(at), 'true', () => 0)
        for (const [ms, can] of turns.toSorted(([a], [b]) => a - b)) fact.plan({ fromMs: ms, can })
        return fact
      })
      const instants = Array.from({ length: length + 1 }, (_, at) => fromMs + at)
      const may = (ms: number) => facts.every(fact => fact.at(ms) !== 'false')
      t.is(mayStand(facts, fromMs, fromMs + length), instants.some(may))
      t.is(
        mustStand(facts, fromMs, fromMs + length),
        instants.every(ms => facts.every(fact => fact.at(ms) === 'true')),
      )
      const last = instants.findLastIndex(may)
      t.is(fallenSince(facts, fromMs, fromMs + length), instants[last + 1])
    }),
  )
})

const limits = { allowedShare: 0.1, allowedLeast: 1 }
const samples = (value: (at: number) => number) =>
  Array.from({ length: 60 }, (_, at) => ({ atMs: at * 1_000, value: value(at) }))

test('a leak is told from noise, from a warm-up and from a single peak', t => {
  const { next } = createRandom(7)
  t.true(
    flatness(
      samples(() => 100 + 30 * next()),
      limits,
    )?.isFlat,
  )
  t.true(
    flatness(
      samples(at => Math.min(100, at * 10)),
      limits,
    )?.isFlat,
  )
  t.true(
    flatness(
      samples(at => (at === 59 ? 1_000 : 100)),
      limits,
    )?.isFlat,
  )
  const leak = flatness(
    samples(at => 100 + at + 10 * next()),
    limits,
  )
  t.false(leak?.isFlat)
  t.true(Math.abs((leak?.growth ?? 0) - 39) < 6)
  t.is(flatness(samples(() => 1).slice(0, 10), limits), undefined, 'too few say nothing')
})

test('the same seed makes the same choices, and another makes others', t => {
  const drawn = (seed: number) => createRandom(seed).shuffled([1, 2, 3, 4, 5, 6, 7, 8, 9])
  t.deepEqual(drawn(1), drawn(1))
  t.notDeepEqual(drawn(1), drawn(2))
  t.deepEqual(drawn(3).toSorted(), [1, 2, 3, 4, 5, 6, 7, 8, 9])
})
