import type { ServiceError } from '@grpc/grpc-js'
import test from 'ava'
import { Fault } from '../../src/fault.ts'
import { namingClock, statusOf } from '../../src/rpc/status.ts'
import { refusal } from '../support/edgemesh.ts'

const expired = new Fault('UNAUTHENTICATED', 'CERTIFICATE_EXPIRED', 'it has expired', {
  retryAfterMs: 1_000,
  violations: [{ field: 'csr', description: 'no' }],
  metadata: { status: 'active' },
})

test('a refusal that a wrong clock may be behind says how wrong it is, and loses nothing', t => {
  const named = namingClock(expired, -10_800_000)
  t.true(named instanceof Fault)
  t.like(named, {
    code: 'UNAUTHENTICATED',
    reason: 'CERTIFICATE_EXPIRED',
    message: 'it has expired; your clock is 3 h behind',
    retryAfterMs: 1_000,
    violations: expired.violations,
    metadata: { status: 'active' },
  })
  t.is(expired.message, 'it has expired', 'others are told the same fault')
})

test('a clock that is right, or not known, or has nothing to do with it is not spoken of', t => {
  const other = new Fault('NOT_FOUND', 'DEVICE_NOT_FOUND', 'no')
  const internal = { code: 'INTERNAL', reason: 'INTERNAL', message: 'no' } as const
  for (const offset of [undefined, 0, 60_000, -60_000]) t.is(namingClock(expired, offset), expired)
  t.is(namingClock(other, 10_800_000), other)
  t.is(namingClock(internal, 10_800_000), internal)
})

test('of an outage each client is told another time to come back, of its own limit the time when it ends', t => {
  const told = (code: 'UNAVAILABLE' | 'RESOURCE_EXHAUSTED', random: number) =>
    refusal(statusOf(new Fault(code, 'SOME', 'no', { retryAfterMs: 1_000 }), undefined, () => random) as ServiceError)
      .retryAfterMs
  t.deepEqual(
    [0, 0.25, 0.999].map(random => told('UNAVAILABLE', random)),
    [1_000, 1_250, 1_999],
  )
  t.is(told('RESOURCE_EXHAUSTED', 0.5), 1_000)
})
