/** What a heartbeat stream makes of its messages, without a database. */
import test from 'ava'
import fc from 'fast-check'
import type { Call } from '../../src/caller.ts'
import { Fault } from '../../src/fault.ts'
import { createHeartbeats } from '../../src/fleet/heartbeat.ts'
import type { Report } from '../../src/fleet/report-writer.ts'
import type { HeartbeatRequest, HeartbeatResponse } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { type Posture, TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'

const now = Date.parse('2026-11-24T12:00:00Z')

/** Serves a stream of these messages. @returns what would be written, and the call afterwards */
async function serve(requests: Partial<HeartbeatRequest>[]) {
  const reports: Report[] = []
  const sent: HeartbeatResponse[] = []
  const heartbeats = createHeartbeats({
    writer: { write: async report => void reports.push(report), drained: async () => {} },
    requirements: async () => ({
      patches_current: false,
      antivirus_enabled: false,
      disk_encrypted: false,
      firewall_enabled: false,
      cpu_percent_max: null,
      memory_percent_max: null,
      disk_percent_max: null,
    }),
    deviceStatus: async () => ({ status: 'active', reason: '' }),
    policyRevision: () => 'one',
    issuerKeyId: () => '',
    trustBundle: () => TrustBundle.fromPartial({}),
    limit: async () => {},
    intervalMs: 30_000,
    maxAgeMs: 300_000,
    isLateInLife: () => false,
    clock: () => now,
    random: () => 0.5,
    present: () => () => {},
    onHeartbeat: () => {},
  })
  const call = {
    caller: { kind: 'device', id: 'alpha', issuerKeyId: '', notAfter: now + 86_400_000 },
    audit: { target: '', detail: {}, written: false },
  } as unknown as Call
  const stream = {
    async receive(onMessage: (message: HeartbeatRequest) => void | Promise<void>) {
      for (const [at, request] of requests.entries()) {
        const whole = { sequence: at + 1, posture, openConnectionIds: [], sentAt: undefined, trustBundleId: '' }
        await onMessage({ ...whole, ...request })
      }
    },
    send: (message: HeartbeatResponse) => void sent.push(message),
  }
  await heartbeats.serve(stream, call)
  return { reports, sent, call }
}

const posture = { attributes: {}, measuredAt: undefined } as unknown as Posture
const bundle = 'ab'.repeat(32)

test('whatever a device believes the time to be, its heartbeats are taken, and its ages are its own', async t => {
  const dates = fc.date({ noInvalidDate: false })
  await fc.assert(
    fc.asyncProperty(dates, fc.nat({ max: 3_600_000 }), async (sentAt, ageMs) => {
      const measuredAt = new Date(sentAt.getTime() - ageMs)
      const { reports, sent } = await serve([{ sentAt, posture: { ...posture, measuredAt } }])
      t.is(sent[0]?.acknowledgedSequence, 1)
      const [report] = reports
      if (Number.isNaN(sentAt.getTime())) {
        t.is(report?.clockOffsetMs, undefined)
      } else {
        const offsetMs = sentAt.getTime() - now
        if (Math.abs(offsetMs) < 99 * 365 * 86_400_000) t.is(report?.clockOffsetMs, offsetMs)
        else t.is(Math.sign(report?.clockOffsetMs ?? 0), Math.sign(offsetMs))
        if (!Number.isNaN(measuredAt.getTime())) t.is(report?.measuredAtMs, now - ageMs)
      }
    }),
  )
})

test('what a device has said of its clock and its trust holds for the rest of the stream', async t => {
  const other = 'cd'.repeat(32)
  const { reports, call } = await serve([
    {},
    { sentAt: new Date(now - 7_200_000), trustBundleId: bundle },
    {},
    { sentAt: new Date(now + 1), trustBundleId: other },
  ])
  t.deepEqual(
    reports.map(({ clockOffsetMs, trustBundleId }) => [clockOffsetMs, trustBundleId]),
    [
      [undefined, ''],
      [-7_200_000, bundle],
      [-7_200_000, bundle],
      [1, other],
    ],
  )
  t.is(call.clockOffsetMs, 1)
})

for (const [what, trustBundleId] of [
  ['too short', bundle.slice(1)],
  ['too long', `${bundle}0`],
  ['no hex', 'z'.repeat(64)],
  ['in capital letters', bundle.toUpperCase()],
  ['followed by something', `${bundle}\n`],
] as const) {
  test(`a trust bundle id that is ${what} is refused by its name`, async t => {
    const error = await t.throwsAsync(serve([{ trustBundleId }]), { instanceOf: Fault })
    t.is(error.code, 'INVALID_ARGUMENT')
    t.deepEqual(
      error.violations.map(({ field }) => field),
      ['trust_bundle_id'],
    )
  })
}
