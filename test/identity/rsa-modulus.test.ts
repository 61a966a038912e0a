/** What the requests in `csr/` can't show: where each rule ends, and that good keys pass. */
import { generateKeyPairSync, generatePrimeSync } from 'node:crypto'
import test from 'ava'
import fc from 'fast-check'
import { weaknessOfModulus } from '../../src/identity/rsa-modulus.ts'

const prime = (bits: number) => generatePrimeSync(bits, { bigint: true })

/** A number `gap` above `start`, or a little more, with no small factor: only its closeness can give it away. */
function near(start: bigint, gap: bigint): bigint {
  let candidate = (start + gap) | 1n
  while (/divisible/.test(weaknessOfModulus(candidate) ?? '')) candidate += 2n
  return candidate
}

for (const bits of [2048, 3072, 4096]) {
  test(`an RSA key of ${bits} bits that was made well passes`, t => {
    const { publicKey } = generateKeyPairSync('rsa', { modulusLength: bits })
    const { n = '' } = publicKey.export({ format: 'jwk' })
    t.is(weaknessOfModulus(BigInt(`0x${Buffer.from(n, 'base64url').toString('hex')}`)), undefined)
  })

  test(`primes of a modulus of ${bits} bits are found when they are close, and only then`, t => {
    const p = prime(bits / 2)
    const reach = BigInt(bits / 4)
    t.regex(weaknessOfModulus(p * near(p, 2n)) ?? '', /close to each other/)
    t.regex(weaknessOfModulus(p * near(p, 1n << reach)) ?? '', /close to each other/)
    t.is(weaknessOfModulus(p * near(p, 1n << (reach + 20n))), undefined)
  })
}

test('a modulus that any prime up to 751 divides is refused, and the sentence names the prime', t => {
  const large = prime(2040)
  const sieve = Array.from({ length: 750 }, (_, at) => at + 2)
  const smallPrimes = sieve.filter(number => sieve.every(other => other >= number || number % other !== 0))
  t.is(smallPrimes.at(-1), 751)
  t.regex(weaknessOfModulus(2n * large) ?? '', /even/)
  for (const small of smallPrimes.slice(1)) {
    t.regex(weaknessOfModulus(BigInt(small) * large) ?? '', new RegExp(`divisible by ${small},`))
  }
  t.is(weaknessOfModulus(757n * large), undefined)
})

test('close factors of any size are found, and the search ends for any number', t => {
  fc.assert(
    fc.property(fc.bigInt({ min: 1n << 40n, max: 1n << 2048n }), fc.nat(1_000), (number, gap) => {
      const odd = number | 1n
      t.not(weaknessOfModulus(odd * (odd + 2n * BigInt(gap))), undefined)
      weaknessOfModulus(number)
    }),
    { numRuns: 500 },
  )
})
