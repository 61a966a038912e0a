import test from 'ava'
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
