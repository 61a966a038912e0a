/**
 * The judge of what is right is `openssl req`, which made the files in `csr/` (see `csr/make.py`); each bad one is
 * named for the one thing that is wrong with it.
 */
import { createHash, X509Certificate } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import test from 'ava'
import fc from 'fast-check'
import { Fault } from '../../src/fault.ts'
import { type CheckedCsr, checkCsr, type KeyType } from '../../src/identity/csr.ts'
import { decodePem } from '../../src/identity/pem.ts'

const folder = new URL('csr/', import.meta.url)
const read = (name: string) => readFileSync(new URL(`${name}.pem`, folder))
const derOf = (name: string) => decodePem('CERTIFICATE REQUEST', read(name).toString())[0]!

const accepted: Record<string, KeyType> = {
  'valid-p256': 'P-256',
  'valid-p384': 'P-384',
  'valid-p384-signed-with-sha384': 'P-384',
  'valid-ed25519': 'Ed25519',
  'valid-rsa-2048': 'RSA',
  'valid-rsa-4096': 'RSA',
  'valid-with-subject-and-extensions': 'P-256',
  'valid-with-empty-subject': 'P-256',
  'valid-with-old-label': 'P-256',
}

const refused: Record<string, string> = {
  oversized: 'CSR_TOO_LARGE',

  'a-certificate': 'CSR_MALFORMED',
  'a-certificate-labelled-as-request': 'CSR_MALFORMED',
  'attribute-that-is-none': 'CSR_MALFORMED',
  'attribute-without-a-value': 'CSR_MALFORMED',
  'base64-with-blanks': 'CSR_MALFORMED',
  'base64-with-empty-lines': 'CSR_MALFORMED',
  'begins-within-a-line': 'CSR_MALFORMED',
  empty: 'CSR_MALFORMED',
  'indefinite-length': 'CSR_MALFORMED',
  'nested-too-deeply': 'CSR_MALFORMED',
  'no-attributes': 'CSR_MALFORMED',
  'no-end-line': 'CSR_MALFORMED',
  'not-pem': 'CSR_MALFORMED',
  'one-damaged-one-good': 'CSR_MALFORMED',
  'padded-length': 'CSR_MALFORMED',
  'padded-version': 'CSR_MALFORMED',
  'point-off-the-curve': 'CSR_MALFORMED',
  'subject-that-is-no-name': 'CSR_MALFORMED',
  'subject-that-is-not-utf8': 'CSR_MALFORMED',
  'subject-with-a-number-for-a-name': 'CSR_MALFORMED',
  'subject-with-an-empty-set': 'CSR_MALFORMED',
  'subject-with-half-a-character': 'CSR_MALFORMED',
  'trailing-bytes': 'CSR_MALFORMED',
  truncated: 'CSR_MALFORMED',
  'two-requests': 'CSR_MALFORMED',
  'version-1': 'CSR_MALFORMED',

  'brainpool-p256': 'CSR_KEY_UNSUPPORTED',
  'compressed-point': 'CSR_KEY_UNSUPPORTED',
  'curve-spelled-out': 'CSR_KEY_UNSUPPORTED',
  dsa: 'CSR_KEY_UNSUPPORTED',
  ed448: 'CSR_KEY_UNSUPPORTED',
  p521: 'CSR_KEY_UNSUPPORTED',
  'rsa-6144': 'CSR_KEY_UNSUPPORTED',
  'rsa-exponent-of-41-bits': 'CSR_KEY_UNSUPPORTED',
  'rsa-pss-key': 'CSR_KEY_UNSUPPORTED',
  secp256k1: 'CSR_KEY_UNSUPPORTED',

  'rsa-1024': 'CSR_KEY_WEAK',
  'rsa-close-primes': 'CSR_KEY_WEAK',
  'rsa-even-modulus': 'CSR_KEY_WEAK',
  'rsa-exponent-3': 'CSR_KEY_WEAK',
  'rsa-roca': 'CSR_KEY_WEAK',
  'rsa-same-prime-twice': 'CSR_KEY_WEAK',
  'rsa-small-factor': 'CSR_KEY_WEAK',

  'ecdsa-sha1-signature': 'CSR_ALGORITHM_WEAK',
  'rsa-md5-signature': 'CSR_ALGORITHM_WEAK',
  'rsa-sha1-signature': 'CSR_ALGORITHM_WEAK',

  'signature-algorithm-of-another-key-type': 'CSR_ALGORITHM_UNSUPPORTED',
  'signature-algorithm-with-parameters': 'CSR_ALGORITHM_UNSUPPORTED',

  'bad-signature': 'CSR_SIGNATURE_INVALID',
  'signed-by-another-key': 'CSR_SIGNATURE_INVALID',
}

test('every file is either to be accepted or to be refused', t => {
  const files = readdirSync(folder).filter(name => name.endsWith('.pem'))
  t.deepEqual(files.sort(), [...Object.keys(accepted), ...Object.keys(refused)].map(name => `${name}.pem`).sort())
})

for (const [name, keyType] of Object.entries(accepted)) {
  test(`accepted: ${name}`, t => {
    const checked = checkCsr(read(name))
    t.is(checked.keyType, keyType)
    t.deepEqual(checked.publicKey.export({ format: 'der', type: 'spki' }), checked.spki)
    t.is(checked.publicKeySha256, createHash('sha256').update(checked.spki).digest('hex'))
  })
}

for (const [name, reason] of Object.entries(refused)) {
  test(`refused: ${name}`, t => {
    const fault = t.throws(() => checkCsr(read(name)), { instanceOf: Fault })!
    t.like(fault, { code: 'INVALID_ARGUMENT', reason })
    t.is(fault.violations[0]?.field, 'csr')
  })
}

const weaknesses: Record<string, RegExp> = {
  'rsa-close-primes': /close to each other/,
  'rsa-even-modulus': /even modulus/,
  'rsa-roca': /CVE-2017-15361/,
  'rsa-same-prime-twice': /close to each other/,
  'rsa-small-factor': /divisible by 751/,
}

for (const [name, sentence] of Object.entries(weaknesses)) {
  test(`whoever sends ${name} is told what is wrong with the key`, t => {
    t.regex(t.throws(() => checkCsr(read(name)), { instanceOf: Fault })?.message ?? '', sentence)
  })
}

test('DER is as good as PEM', t => {
  const fromDer = checkCsr(derOf('valid-p256'))
  t.is(fromDer.publicKeySha256, checkCsr(read('valid-p256')).publicKeySha256)
})

test('what was checked does not change with the bytes of the caller', t => {
  const der = Buffer.from(derOf('valid-p256'))
  const { spki, publicKeySha256 } = checkCsr(der)
  der.fill(0)
  t.is(createHash('sha256').update(spki).digest('hex'), publicKeySha256)
})

/** The result, or `undefined` after a Fault; anything else that is thrown fails the test. */
function checkedOrRefused(bytes: Uint8Array): CheckedCsr | undefined {
  try {
    return checkCsr(bytes)
  } catch (error) {
    if (error instanceof Fault && error.code === 'INVALID_ARGUMENT') return undefined
    throw error
  }
}

test('any bytes are refused with a Fault', t => {
  const sequenceOfAnything = fc.uint8Array({ maxLength: 100 }).map(bytes => Buffer.from([0x30, bytes.length, ...bytes]))
  const pemOfAnything = fc
    .uint8Array({ maxLength: 300 })
    .map(bytes => `-----BEGIN CERTIFICATE REQUEST-----\n${Buffer.from(bytes).toString('base64')}\n`)
    .map(text => Buffer.from(`${text}-----END CERTIFICATE REQUEST-----\n`))
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 9000 }), sequenceOfAnything, pemOfAnything), bytes => {
      t.is(checkedOrRefused(bytes), undefined)
    }),
    { numRuns: 2000 },
  )
})

for (const name of ['valid-p256', 'valid-p384', 'valid-ed25519', 'valid-rsa-2048']) {
  test(`a changed ${name} is never accepted with another key`, t => {
    const original = derOf(name)
    const { publicKeySha256 } = checkCsr(original)
    const changes = fc.array(
      fc.record({ at: fc.nat(original.length - 1), remove: fc.nat(3), insert: fc.uint8Array({ maxLength: 3 }) }),
      { minLength: 1, maxLength: 4 },
    )
    fc.assert(
      fc.property(changes, edits => {
        let bytes = original
        for (const { at, remove, insert } of edits) {
          bytes = Buffer.concat([bytes.subarray(0, at), insert, bytes.subarray(at + remove)])
        }
        const checked = checkedOrRefused(bytes)
        t.true(checked === undefined || checked.publicKeySha256 === publicKeySha256)
      }),
      { numRuns: 1000 },
    )
  })
}

test('no single flipped bit is let through', t => {
  const original = derOf('valid-p256')
  for (let bit = 0; bit < original.length * 8; bit++) {
    const bytes = Buffer.from(original)
    bytes[bit >> 3]! ^= 1 << (bit & 7)
    if (checkedOrRefused(bytes) !== undefined) t.fail(`bit ${bit} of the request means nothing`)
  }
  t.pass()
})

test('the file that is a certificate really is one', t => {
  t.notThrows(() => new X509Certificate(read('a-certificate')))
})
