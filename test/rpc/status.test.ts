import test from 'ava'
import { Fault } from '../../src/fault.ts'
import { namingClock } from '../../src/rpc/status.ts'

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
