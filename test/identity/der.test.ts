import test from 'ava'
import fc from 'fast-check'
import { oidText } from '../../src/identity/der.ts'

/** Base 128, most significant first, all octets but the last with the high bit (X.690 section 8.19.2). */
function octetsOf(arc: bigint): number[] {
  const octets = [Number(arc & 0x7fn)]
  for (let rest = arc >> 7n; rest > 0n; rest >>= 7n) octets.unshift(Number(rest & 0x7fn) | 0x80)
  return octets
}

const arc = fc.oneof(fc.bigInt({ min: 0n, max: 300n }), fc.bigInt({ min: 0n, max: 2n ** 80n }))

test('an object identifier is read back as it was written, with arcs beyond what a number holds too', t => {
  const first = fc.oneof(
    fc.tuple(fc.constantFrom(0n, 1n), fc.bigInt({ min: 0n, max: 39n })),
    fc.tuple(fc.constant(2n), arc),
  )
  fc.assert(
    fc.property(first, fc.array(arc, { maxLength: 8 }), ([top, second], others) => {
      const contents = Buffer.from([top * 40n + second, ...others].flatMap(octetsOf))
      t.is(oidText(contents), [top, second, ...others].join('.'))
    }),
  )
})
