import { createHash } from 'node:crypto'
import test from 'ava'
import fc from 'fast-check'
import { Fault } from '../../src/fault.ts'
import { hashSecret, mintToken, parseToken, secretMatches } from '../../src/identity/token-text.ts'

const rootKeySha256 = createHash('sha256').update('a root key').digest('hex')
const key = 'an ENROLLMENT_TOKEN_SECRET of the tests'

test('a minted token is read back whole', t => {
  const { text, id, secret } = mintToken({ rootKeySha256 })
  t.regex(text, /^em1\.[0-9a-f]{12}\.[\w-]{43}\.[\w-]{43}$/)
  t.deepEqual(parseToken(text), { id, secret, rootKeySha256 })
  t.is(secret.length, 32)
})

test('blanks around a pasted token are forgiven', t => {
  const { text, id } = mintToken({ rootKeySha256 })
  t.is(parseToken(`  ${text}\r\n`).id, id)
})

test('two tokens share neither id nor secret', t => {
  const [one, other] = [mintToken({ rootKeySha256 }), mintToken({ rootKeySha256 })]
  t.not(one.id, other.id)
  t.notDeepEqual(one.secret, other.secret)
})

test('a token is minted only for what can be the hash of a key', t => {
  t.throws(() => mintToken({ rootKeySha256: 'abc' }), { instanceOf: RangeError })
})

const minted = mintToken({ rootKeySha256 })
const valid = minted.text.replace(minted.id, 'abcdefabcdef')
const [, , secretText = '', pinText = ''] = valid.split('.')

const malformed = {
  nothing: '',
  'another version': valid.replace('em1', 'em2'),
  'no pin': `em1.abcdefabcdef.${secretText}`,
  'a fifth part': `${valid}.more`,
  'a short id': `em1.abc.${secretText}.${pinText}`,
  'an upper-case id': valid.replace('abcdef', 'ABCDEF'),
  'a short secret': `em1.abcdefabcdef.${secretText.slice(1)}.${pinText}`,
  'a padded secret': `em1.abcdefabcdef.${secretText}=.${pinText}`,
  'a secret in the other alphabet': `em1.abcdefabcdef.${'+'.repeat(43)}.${pinText}`,
  'a secret with loose bits at its end': `em1.abcdefabcdef.${'A'.repeat(42)}B.${pinText}`,
  'a secret with blanks inside': `em1.abcdefabcdef.${secretText.slice(0, 20)} ${secretText.slice(20)}.${pinText}`,
  'a cut pin': valid.slice(0, -1),
  'a megabyte': valid.padEnd(1 << 20),
}

for (const [what, text] of Object.entries(malformed)) {
  test(`refused as a token: ${what}`, t => {
    const fault = t.throws(() => parseToken(text), { instanceOf: Fault })!
    t.like(fault, { code: 'INVALID_ARGUMENT', reason: 'TOKEN_MALFORMED' })
    t.deepEqual(
      fault.violations.map(violation => violation.field),
      ['token'],
    )
    t.false(JSON.stringify({ ...fault, message: fault.message }).includes(secretText.slice(0, 8)))
  })
}

test('any text is refused with a Fault or is a token', t => {
  const parts = fc.array(fc.oneof(fc.string(), fc.constantFrom(...valid.split('.'))), { maxLength: 6 })
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        parts.map(some => some.join('.')),
      ),
      text => {
        try {
          t.is(parseToken(text).secret.length, 32)
        } catch (error) {
          t.true(error instanceof Fault)
        }
      },
    ),
  )
})

test('only the right secret under the right key matches', t => {
  const { secret } = mintToken({ rootKeySha256 })
  const stored = hashSecret(secret, key)
  t.is(stored.length, 32)
  t.true(secretMatches(secret, key, stored))
  t.false(secretMatches(mintToken({ rootKeySha256 }).secret, key, stored))
  t.false(secretMatches(secret, `${key}.`, stored))
  t.false(secretMatches(secret, key, stored.subarray(1)))
  t.false(secretMatches(secret, key, Buffer.alloc(0)))
})

test('the hash is HMAC-SHA256, RFC 4231 test case 2', t => {
  t.is(
    hashSecret(Buffer.from('what do ya want for nothing?'), 'Jefe').toString('hex'),
    '5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843',
  )
})
