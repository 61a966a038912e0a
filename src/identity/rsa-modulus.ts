/**
 * RSA moduli that have the right size and can be factored all the same, by whoever knows how they were made.
 *
 * Each kind has come out of real devices: a broken random number generator gives small factors or close primes, and a
 * library in millions of TPMs and smart cards gave primes of a structure that betrays them. A modulus that was made
 * well passes, but for one in 200 million that has the marks of that library by chance.
 *
 * It costs 0.05 to 0.1 ms of a processor, and can't be made to cost more than 5 ms: every loop has its bound.
 */

/** What a factoring program divides by first. More primes would find hardly more. */
const smallPrimesMax = 752

const smallPrimes = primesUpTo(smallPrimesMax)

/** 1,038 bits. The modulus is divided by it once; the primes then divide what remains. */
const smallPrimesProduct = smallPrimes.reduce((product, prime) => product * BigInt(prime), 1n)

/**
 * Steps of Fermat's method that are tried. A hundred find the primes of a modulus of 2048 bits when they are less than
 * 2^516 apart; two random ones are 2^1022 apart or so.
 */
const fermatRoundsMax = 100

/**
 * Primes of the broken library (CVE-2017-15361, "ROCA") are powers of 65537 modulo each of the first 39 primes, and so
 * is the product of two. Of 17 of these, 65537 gives only a part of the residues. A random modulus lies in that part
 * for all 17 with a chance of 2^-27.8.
 */
const rocaPrimeMax = 167
const rocaMarks = smallPrimes
  .filter(prime => prime > 2 && prime <= rocaPrimeMax)
  .map(prime => ({ prime, powers: powersOf(65537 % prime, prime) }))
  .filter(({ prime, powers }) => powers.size < prime - 1)

/** @returns what makes the modulus weak, to stand after "an RSA key"; `undefined` when nothing that is looked for */
export function weaknessOfModulus(modulus: bigint): string | undefined {
  if (modulus % 2n === 0n) return 'with an even modulus, which is no product of two large primes'
  const remainder = modulus % smallPrimesProduct
  const factor = smallPrimes.find(prime => remainder % BigInt(prime) === 0n)
  if (factor !== undefined) return `whose modulus is divisible by ${factor}, so it is no product of two large primes`
  if (rocaMarks.every(({ prime, powers }) => powers.has(Number(remainder % BigInt(prime))))) {
    return 'of a generator that is known to be broken (ROCA, CVE-2017-15361); update the firmware that made it'
  }
  if (hasClosePrimes(modulus)) return 'whose primes are so close to each other that they can be found'
  return undefined
}

/**
 * Fermat's method: n = a² − b² is (a + b)(a − b), and when the factors are close, a is just above the root of n.
 *
 * @param modulus odd
 */
function hasClosePrimes(modulus: bigint): boolean {
  let root = squareRoot(modulus)
  if (root * root === modulus) return true
  root += 1n
  let difference = root * root - modulus
  for (let round = 0; round < fermatRoundsMax; round++) {
    if (isSquare(difference)) return true
    difference += 2n * root + 1n
    root += 1n
  }
  return false
}

/** Two in a hundred numbers are a square modulo 55,440 = 2⁴·3²·5·7·11: of the others no root is drawn. */
const sieveModulus = 55_440
const squaresInSieve = new Set(Array.from({ length: sieveModulus }, (_, root) => root ** 2 % sieveModulus))

function isSquare(value: bigint): boolean {
  if (!squaresInSieve.has(Number(value % BigInt(sieveModulus)))) return false
  const root = squareRoot(value)
  return root * root === value
}

/** The whole part of the square root, by Newton's method from above: a dozen divisions for 4096 bits. */
function squareRoot(value: bigint): bigint {
  if (value < 2n) return value
  let root = 1n << BigInt(Math.ceil(bitLength(value) / 2))
  for (;;) {
    const next = (root + value / root) >> 1n
    if (next >= root) return root
    root = next
  }
}

function bitLength(value: bigint): number {
  const hex = value.toString(16)
  return 4 * (hex.length - 1) + (32 - Math.clz32(Number.parseInt(hex[0]!, 16)))
}

function primesUpTo(max: number): number[] {
  const primes: number[] = []
  for (let candidate = 2; candidate <= max; candidate++) {
    if (primes.every(prime => candidate % prime !== 0)) primes.push(candidate)
  }
  return primes
}

function powersOf(base: number, modulus: number): Set<number> {
  const powers = new Set<number>()
  for (let power = 1; !powers.has(power); power = (power * base) % modulus) powers.add(power)
  return powers
}
