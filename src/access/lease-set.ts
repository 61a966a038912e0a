/**
 * Sets of leases. Each lease remembers where it is in the one of its kind that it is in, so nothing is hashed: adding and removing
 * one is two writes. They are in no order.
 */

/** In which set: that of its stream, or that of its device. The lease's field of this name is where it is in it, or -1. */
export type SetOfLeases = 'atStream' | 'atDevice'

export type LeaseSet<Lease> = {
  /** It must be in no set of this kind. */
  add(lease: Lease): void
  has(lease: Lease): boolean
  /** @returns whether it was there */
  remove(lease: Lease): boolean
  readonly size: number
  /** None may be added or removed meanwhile. */
  forEach(visit: (lease: Lease) => void): void
  /** As they are now. */
  values(): Lease[]
}

export function createLeaseSet<Kind extends SetOfLeases, Lease extends Record<Kind, number>>(
  kind: Kind,
): LeaseSet<Lease> {
  const leases: Lease[] = []
  const has = (lease: Lease) => leases[lease[kind]] === lease
  const place = (lease: Lease, at: number) => {
    ;(lease as Record<Kind, number>)[kind] = at
  }
  return {
    has,
    add(lease) {
      place(lease, leases.length)
      leases.push(lease)
    },
    remove(lease) {
      if (!has(lease)) return false
      const last = leases.pop() as Lease
      // The last one takes its place.
      if (last !== lease) {
        leases[lease[kind]] = last
        place(last, lease[kind])
      }
      place(lease, -1)
      return true
    },
    get size() {
      return leases.length
    },
    forEach(visit) {
      for (let at = 0; at < leases.length; at++) visit(leases[at] as Lease)
    },
    values: () => [...leases],
  }
}
