import test from 'ava'
import fc from 'fast-check'
import { createLeaseSet } from '../../src/access/lease-set.ts'

type Lease = { name: number; atStream: number; atDevice: number }
const namesOf = (leases: Lease[]) => leases.map(({ name }) => name).toSorted()

test('a set of leases holds what a plain set would, and a lease is in one set of each kind', t => {
  const step = fc.record({
    act: fc.constantFrom('add', 'add', 'remove'),
    set: fc.constantFrom(0, 1, 2),
    lease: fc.nat({ max: 7 }),
  })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80 }), steps => {
      const leases = Array.from({ length: 8 }, (_, name): Lease => ({ name, atStream: -1, atDevice: -1 }))
      // Two streams of one device.
      const sets = [
        createLeaseSet<'atStream', Lease>('atStream'),
        createLeaseSet<'atStream', Lease>('atStream'),
        createLeaseSet<'atDevice', Lease>('atDevice'),
      ]
      const plain = sets.map(() => new Set<Lease>())
      for (const { act, set, lease: name } of steps) {
        const lease = leases[name]!
        const [ours, theirs] = [sets[set]!, plain[set]!]
        const isElsewhere = set < 2 && plain[1 - set]!.has(lease)
        if (act === 'remove') t.is(ours.remove(lease), theirs.delete(lease))
        else if (!theirs.has(lease) && !isElsewhere) {
          ours.add(lease)
          theirs.add(lease)
        }
        sets.forEach((one, at) => {
          t.is(one.size, plain[at]!.size)
          // They come in no order.
          t.deepEqual(namesOf(one.values()), namesOf([...plain[at]!]))
          for (const any of leases) t.is(one.has(any), plain[at]!.has(any))
        })
      }
    }),
  )
})
