import test from 'ava'
import fc from 'fast-check'
import { connectionEntry } from '../../src/access/connection-records.ts'
import type { Lease } from '../../src/access/leases.ts'
import { rowText } from '../../src/audit/journal-table.ts'

const name = fc.oneof(fc.string({ maxLength: 8 }), fc.string({ unit: 'binary', maxLength: 8 }), fc.constant('\ud800'))
const ms = fc.integer({ min: 0, max: 4_000_000_000_000 })
const reason = fc.record({ code: name, field: name, actual: name, required: name, message: name })

const lease = fc.record({
  id: fc.uuid(),
  questionId: name,
  question: fc.record({ deviceId: name, user: name, service: name, action: name }),
  userId: name,
  serviceId: name,
  role: name,
  state: fc.constantFrom('active', 'suspended', 'revoked', 'closed'),
  grantedAtMs: ms,
  expiresAtMs: ms,
  decisionId: fc.uuid().map(id => `${id}.0`),
  resumeBy: fc.option(
    ms.map(at => new Date(at)),
    { nil: undefined },
  ),
}) as fc.Arbitrary<Lease>

test('a connection is on record as its row says, whatever its names are', t => {
  fc.assert(
    fc.property(lease, name, ms, fc.array(reason, { maxLength: 2 }), (lease, instanceId, nowMs, reasons) => {
      const { table, row, text } = connectionEntry(lease, instanceId, nowMs, reasons)
      t.is(text, rowText(table, row))
    }),
    { numRuns: 2_000 },
  )
})
