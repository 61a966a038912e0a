import test from 'ava'
import fc from 'fast-check'
import { type Answer, AuthorizeResponse } from '../../src/gen/edgemesh/v1/authorize.ts'
import { encoderOf } from '../../src/rpc/encoding.ts'

const answer = (questionId: string): Answer => ({
  questionId,
  allowed: true,
  reasons: [],
  policyRevision: 'r1',
  expiresAt: new Date(1_764_000_000_000),
  decisionId: `d-${questionId}`,
  connectionId: 'ä',
  retryAfter: undefined,
})
const response = (...answers: Answer[]): AuthorizeResponse => ({
  kind: { $case: 'answers', value: { answers } },
  serverTime: new Date(1_764_000_000_000),
  resumeWithin: undefined,
})
const encode = encoderOf(AuthorizeResponse)
const generated = (message: AuthorizeResponse) => Buffer.from(AuthorizeResponse.encode(message).finish())

test('messages are the bytes that generated code makes of them, short after long and long after short, and stay what they are', t => {
  const sizes = [1, 3_000, 1, 128, 0, 20]
  const messages = sizes.map(size => response(...Array.from({ length: size }, (_, at) => answer(`q${at}`))))
  const encoded = messages.map(encode)
  for (const [at, message] of messages.entries())
    t.true(encoded[at]?.equals(generated(message)), `${sizes[at]} answers`)
})

test('a message that can not be encoded leaves nothing behind in the next', t => {
  const broken = response(answer('a'), { ...answer('b'), reasons: undefined as unknown as [] })
  t.throws(() => encode(broken))
  t.true(encode(response(answer('c'))).equals(generated(response(answer('c')))))
})

test('whatever the texts and the times, they are the bytes that generated code makes of them', t => {
  const text = fc.oneof(
    fc.string({ maxLength: 40 }),
    fc.string({ unit: 'binary', maxLength: 40 }),
    // About where a length takes two bytes.
    fc.string({ unit: 'grapheme-ascii', minLength: 120, maxLength: 135 }),
    fc.string({ unit: 'grapheme', minLength: 30, maxLength: 135 }),
  )
  const time = fc.oneof(fc.date({ noInvalidDate: true }), fc.constantFrom(new Date(0), new Date(-1), new Date(8.64e15)))
  fc.assert(
    fc.property(text, text, text, time, fc.nat({ max: 3 }), (decisionId, connectionId, code, expiresAt, copies) => {
      const reason = { code, field: decisionId, actual: '', required: connectionId, message: code }
      const given = { ...answer(code), decisionId, connectionId, expiresAt, reasons: Array(copies).fill(reason) }
      const message = response(given, answer('after it'))
      t.true(encode(message).equals(generated(message)))
    }),
  )
})
