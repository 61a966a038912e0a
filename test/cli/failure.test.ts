import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Metadata, type ServiceError, status } from '@grpc/grpc-js'
import test from 'ava'
import { describeFailure } from '../../src/cli/failure.ts'
import { createProgram } from '../../src/cli/program.ts'
import { Fault } from '../../src/fault.ts'
import { statusOf } from '../../src/rpc/status.ts'

const folder = join(import.meta.dirname, '../../proto/edgemesh/v1')

/** What the contract's comments name as reasons: `CODE: REASON, REASON (explained), REASON.` and `CODE REASON`. */
function reasonsOfTheContract(): string[] {
  const codes = new Set(Object.keys(status))
  const others = new Set([
    'UPPER_SNAKE_CASE',
    'CERT_RECOVERY_DAYS',
    'CA_KEY_FILE',
    'DISK_NOT_ENCRYPTED',
    'USER_ASSERTION',
  ])
  const comments = readdirSync(folder)
    .flatMap(name => readFileSync(join(folder, name), 'utf8').split('\n'))
    .filter(line => /^\s*\/\//.test(line))
    .join('\n')
  const words = comments.match(/\b[A-Z]+(_[A-Z]+)+\b/g) ?? []
  return [...new Set(words)].filter(word => !codes.has(word) && !others.has(word))
}

const refusal = (reason: string) => new Fault('FAILED_PRECONDITION', reason, 'It is not possible')

test('the contract names reasons', t => {
  const reasons = reasonsOfTheContract()
  for (const known of ['TOKEN_SECRET_WRONG', 'DEVICE_DELETED', 'ROTATION_NOT_READY']) t.true(reasons.includes(known))
})

for (const reason of reasonsOfTheContract()) {
  test(`who is refused with ${reason} is told what to do`, t => {
    const [told] = describeFailure(refusal(reason))
    t.is(told?.message, 'it is not possible')
    t.truthy(told?.hint)
  })
}

const agentReasons = [
  'CERTIFICATE_EXPIRED',
  'CERTIFICATE_REVOKED',
  'CERTIFICATE_RETIRED',
  'CERTIFICATE_MISSING',
  'CERTIFICATE_UNTRUSTED',
  'CERTIFICATE_UNKNOWN',
  'CERTIFICATE_NOT_YET_VALID',
  'RECOVERY_SUPERSEDED',
  'SERVER_NOT_PINNED',
  'SERVER_UNTRUSTED',
  'SERVER_NAME_WRONG',
  'SERVER_CERTIFICATE_EXPIRED',
  'SERVER_CERTIFICATE_NOT_YET_VALID',
  'CLOCK_WRONG',
  'STATE_BROKEN',
  'TOKEN_MISSING',
  'TOKEN_MALFORMED',
  'CSR_KEY_WEAK',
  'CSR_KEY_UNSUPPORTED',
  'CSR_ALGORITHM_WEAK',
  'CSR_ALGORITHM_UNSUPPORTED',
  'CSR_MALFORMED',
  'CSR_TOO_LARGE',
  'CSR_SIGNATURE_INVALID',
  'CSR_CHALLENGE_MISSING',
  'CSR_CHALLENGE_UNKNOWN',
]
for (const reason of agentReasons) {
  test(`${reason} is told with what to do`, t => t.truthy(describeFailure(refusal(reason))[0]?.hint))
}

test('every command that a hint names can be typed', t => {
  const program = createProgram()
  const hints = [...reasonsOfTheContract(), ...agentReasons].map(reason => describeFailure(refusal(reason))[0]?.hint)
  const named = hints.flatMap(hint => [...(hint ?? '').matchAll(/edgemesh ([a-z]+)(?: ([a-z]+))?/g)])
  t.true(named.length > 20)
  for (const [text, noun, verb] of named) {
    const command = program.commands.find(command => command.name() === noun)
    const isThere = command?.commands.length ? command.commands.some(child => child.name() === verb) : command
    t.true(Boolean(isThere), text)
  }
})

test('where a server names a time, and nothing better is known, that is the hint', t => {
  const limited = new Fault('RESOURCE_EXHAUSTED', 'RATE_LIMITED', 'slower', { retryAfterMs: 1_200 })
  t.is(describeFailure(limited)[0]?.hint, 'try again in 2 s')
  t.regex(describeFailure(new Fault('RESOURCE_EXHAUSTED', 'RATE_LIMITED', 'slower'))[0]?.hint ?? '', /wait a minute/)
})

/** What a client gets of a fault from a server whose clock is so far ahead. */
function received(fault: Fault, serverAheadMs: number): ServiceError {
  const { code, details } = statusOf(fault)
  const metadata = new Metadata()
  metadata.set('edgemesh-server-time', new Date(Date.now() + serverAheadMs).toISOString())
  return Object.assign(new Error('x'), { code, details, metadata }) as ServiceError
}

test('an error tells how wrong the clock is, when it is', t => {
  const fault = new Fault('UNAUTHENTICATED', 'CERTIFICATE_NOT_YET_VALID', 'The client certificate is not valid yet')
  t.is(
    describeFailure(received(fault, 3 * 3_600_000))[0]?.message,
    'the client certificate is not valid yet; your clock is 3 h behind',
  )
  t.is(describeFailure(received(fault, 30_000))[0]?.message, 'the client certificate is not valid yet')
})
