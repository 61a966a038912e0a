import { randomUUID } from 'node:crypto'
import test from 'ava'
import fc from 'fast-check'
import { connectionIdOf, messageOf, placeOf, readConnectionId } from '../../src/access/connection-id.ts'
import { createConnectionMap } from '../../src/access/connection-map.ts'
import { newDecisionId } from '../../src/access/decision-records.ts'

const connection = (id: string) => ({ id, ...readConnectionId(id) })
const messages = Array.from({ length: 3 }, () => messageOf(newDecisionId()))

test('connections are added, found, replaced and removed as in a plain map by id, whichever messages they are of', t => {
  const id = fc
    .tuple(fc.constantFrom(...messages), fc.constantFrom(0, 1, 31, 127, 255))
    .map(([message, place]) => connectionIdOf(message, place))
  const step = fc.record({ act: fc.constantFrom('add', 'add', 'remove', 'remove another'), id })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), steps => {
      const map = createConnectionMap<ReturnType<typeof connection>>()
      const plain = new Map<string, ReturnType<typeof connection>>()
      for (const { act, id } of steps) {
        if (act === 'add') {
          const added = connection(id)
          map.add(added)
          plain.set(id, added)
        } else {
          // One of the same id that was never added leaves the other where it is.
          const known = act === 'remove' ? plain.get(id) : undefined
          t.is(map.remove(known ?? connection(id)), known !== undefined)
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

test('what is no id of a connection finds none', t => {
  const map = createConnectionMap<ReturnType<typeof connection>>()
  const known = connection(connectionIdOf(messages[0]!, 171))
  map.add(known)
  t.is(map.get(known.id), known)
  const others = [
    '',
    '-',
    'ab',
    known.id.toUpperCase(),
    `${known.id}0`,
    known.id.slice(1),
    `${known.message}g0`,
    randomUUID(),
  ]
  for (const other of others) t.is(map.get(other), undefined, other)
  t.is(map.get(`${known.message}-1`), undefined)
  t.throws(() => readConnectionId(`${known.message}xx`), { instanceOf: RangeError })
})

test('an id is read as it was made', t => {
  fc.assert(
    fc.property(fc.uuid(), fc.integer({ min: 0, max: 255 }), (uuid, place) => {
      const id = connectionIdOf(messageOf(uuid), place)
      t.is(placeOf(id), place)
      t.is(messageOf(id), uuid.slice(0, -2))
      t.is(id.length, 36)
    }),
  )
})
