import { randomUUID } from 'node:crypto'
import test from 'ava'
import fc from 'fast-check'
import { connectionIdOf, decisionIdOf, hashOf, newDecisionId, placeOf } from '../../src/access/connection-id.ts'
import { type Chained, createConnectionMap } from '../../src/access/connection-map.ts'

const entry = (id: string): Chained => ({ id, idHash: 0, nextInChain: undefined })

const decisions = Array.from({ length: 3 }, newDecisionId)
/** Only the last ten digits are hashed, so these two have the same hash. */
const alike = ['00000000-0000-7000-8000-00aaaaaaaa07', '11111111-0000-7000-8000-00aaaaaaaa07']

test('connections are added, found, replaced and removed as in a plain map by id, even those of the same hash', t => {
  t.is(hashOf(alike[0]!), hashOf(alike[1]!))
  const id = fc.oneof(
    fc.constantFrom(...alike, '22222222-0000-7000-8000-00aaaaaaaa07'),
    fc
      .tuple(fc.constantFrom(...decisions), fc.constantFrom(0, 1, 31, 127, 255))
      .map(([decision, place]) => connectionIdOf(decision, place)),
  )
  const step = fc.record({ act: fc.constantFrom('add', 'add', 'remove', 'remove another'), id })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), steps => {
      const map = createConnectionMap<Chained>()
      const plain = new Map<string, Chained>()
      for (const { act, id } of steps) {
        if (act === 'add') {
          const added = entry(id)
          t.is(map.add(added), plain.get(id))
          plain.set(id, added)
        } else {
          // One of the same id that was never added leaves the other where it is.
          const known = act === 'remove' ? plain.get(id) : undefined
          t.is(map.remove(known ?? entry(id)), known !== undefined)
          if (known) plain.delete(id)
        }
        t.is(map.get(id), plain.get(id))
        t.is(map.size, plain.size)
      }
      const ids = map.values().map(({ id }) => id)
      t.deepEqual(ids.toSorted(), [...plain.keys()].toSorted())
      for (const [id, known] of plain) t.is(map.get(id), known)
    }),
  )
})

test('ten thousand connections are found while their map grows, and while it gets small again', t => {
  const map = createConnectionMap<Chained>()
  const entries = Array.from({ length: 10_000 }, () => entry(newDecisionId()))
  for (const added of entries) map.add(added)
  t.is(map.size, 10_000)
  for (const known of entries) t.is(map.get(known.id), known)
  for (const [at, known] of entries.entries()) if (at % 100 > 0) map.remove(known)
  t.is(map.size, 100)
  t.deepEqual(
    map
      .values()
      .map(({ id }) => id)
      .toSorted(),
    entries
      .filter((_, at) => at % 100 === 0)
      .map(({ id }) => id)
      .toSorted(),
  )
  for (const [at, known] of entries.entries()) t.is(map.get(known.id), at % 100 === 0 ? known : undefined)
})

test('what is no id of a connection finds none', t => {
  const map = createConnectionMap<Chained>()
  const known = entry(connectionIdOf(decisions[0]!, 171))
  map.add(known)
  t.is(map.get(known.id), known)
  const { id } = known
  const others = ['', '-', 'ab', id.toUpperCase(), `${id}0`, id.slice(1), `${id.slice(0, -2)}g0`, randomUUID()]
  for (const other of others) t.is(map.get(other), undefined, other)
  for (const other of ['', 'ab', `${id.slice(0, -2)}-1`, `${id}0`]) t.is(placeOf(other), -1, other)
})

test('ids of random bytes have hashes of their own, whatever their place in the message', t => {
  const ids = Array.from({ length: 300 }, newDecisionId).flatMap(decision =>
    [0, 1, 2, 16, 31, 127].map(place => connectionIdOf(decision, place)),
  )
  // Of 1,800 numbers of 32 bits two are alike once in 2,600 runs; three pairs never are.
  t.true(new Set(ids.map(hashOf)).size > ids.length - 3)
})

test('an id is read as it was made', t => {
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 255 }), place => {
      const decision = newDecisionId()
      const id = connectionIdOf(decision, place)
      t.is(placeOf(id), place)
      t.is(decisionIdOf(id), decision)
      t.is(id.length, 36)
    }),
  )
})

test('the id of a decision is a UUIDv7 of its time that ends in 00, and none comes twice', t => {
  const times = [0, 1, 1_764_000_000_000, Date.now(), 2 ** 48 - 1]
  const ids = times.flatMap(time => Array.from({ length: 1_000 }, () => [time, newDecisionId(time)] as const))
  for (const [time, id] of ids) {
    t.regex(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{10}00$/)
    t.is(Number.parseInt(id.slice(0, 8) + id.slice(9, 13), 16), time)
  }
  t.is(new Set(ids.map(([, id]) => id.slice(14))).size, ids.length)
  // Each digit that is random has been each of the sixteen, and the one of the variant each of its four.
  const places = [15, 16, 17, 20, 21, 22, ...Array.from({ length: 10 }, (_, at) => 24 + at)]
  for (const place of places) t.is(new Set(ids.map(([, id]) => id[place])).size, 16, `${place}`)
  t.is(new Set(ids.map(([, id]) => id[19])).size, 4)
})
