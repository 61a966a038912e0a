import test from 'ava'
import fc from 'fast-check'
import { Fault } from '../../src/fault.ts'
import {
  checkPosture,
  failingPosture,
  measuredAtMs,
  mergePosture,
  type PostureRequirements,
  postureGround,
} from '../../src/fleet/posture.ts'
import type { Posture } from '../../src/gen/edgemesh/v1/types.ts'

const requirements: PostureRequirements = {
  patches_current: true,
  antivirus_enabled: true,
  disk_encrypted: true,
  firewall_enabled: false,
  cpu_percent_max: 90,
  memory_percent_max: 90,
  disk_percent_max: null,
}

const percent = fc.option(fc.double({ min: 0, max: 100, noNaN: true }), { nil: undefined })
const flag = fc.option(fc.boolean(), { nil: undefined })
const posture: fc.Arbitrary<Posture> = fc.record({
  cpuPercent: percent,
  memoryPercent: percent,
  diskPercent: percent,
  patchesCurrent: flag,
  antivirusEnabled: flag,
  diskEncrypted: flag,
  firewallEnabled: flag,
  attributes: fc.dictionary(fc.string({ minLength: 1, maxLength: 8 }), fc.string({ maxLength: 8 }), { maxKeys: 4 }),
  measuredAt: fc.constant(undefined),
})
const nothing: Posture = {
  cpuPercent: undefined,
  memoryPercent: undefined,
  diskPercent: undefined,
  patchesCurrent: undefined,
  antivirusEnabled: undefined,
  diskEncrypted: undefined,
  firewallEnabled: undefined,
  attributes: {},
  measuredAt: undefined,
}

test('a message that says nothing changes nothing', t => {
  fc.assert(
    fc.property(posture, said => {
      const before = mergePosture(undefined, said)
      t.deepEqual(mergePosture(before, nothing), before)
    }),
  )
})

test('what a message says wins over what was said before, and the rest stays', t => {
  fc.assert(
    fc.property(posture, posture, (first, second) => {
      const merged = mergePosture(mergePosture(undefined, first), second)
      t.is(merged.cpuPercent, second.cpuPercent ?? first.cpuPercent)
      t.is(merged.diskEncrypted, second.diskEncrypted ?? first.diskEncrypted)
    }),
  )
})

test('a requirement is missed by false, by unknown, and by a value at its limit', t => {
  const healthy = {
    cpuPercent: 89.9,
    memoryPercent: 0,
    patchesCurrent: true,
    antivirusEnabled: true,
    diskEncrypted: true,
  }
  t.deepEqual(failingPosture({ ...healthy, attributes: {} }, requirements), [])
  t.deepEqual(failingPosture({ ...healthy, diskEncrypted: false, attributes: {} }, requirements), ['disk_encrypted'])
  t.deepEqual(failingPosture({ ...healthy, cpuPercent: 90, attributes: {} }, requirements), ['cpu_percent'])
  t.deepEqual(failingPosture({ attributes: {} }, requirements), [
    'antivirus_enabled',
    'cpu_percent',
    'disk_encrypted',
    'memory_percent',
    'patches_current',
  ])
})

test('load that stays on its side of the limit is no news; crossing it, or any flag or attribute, is', t => {
  const ground = (said: Posture) => {
    const merged = mergePosture(undefined, said)
    return postureGround(merged, failingPosture(merged, requirements))
  }
  const calm = { ...nothing, cpuPercent: 10, memoryPercent: 10, attributes: { site: 'berlin' } }
  t.is(ground(calm), ground({ ...calm, cpuPercent: 80 }))
  t.not(ground(calm), ground({ ...calm, cpuPercent: 95 }))
  t.not(ground(calm), ground({ ...calm, firewallEnabled: true }))
  t.not(ground(calm), ground({ ...calm, attributes: { site: 'paris' } }))
  t.is(ground({ ...calm, attributes: { a: '1', b: '2' } }), ground({ ...calm, attributes: { b: '2', a: '1' } }))
})

test('the age of a measurement is right on a device whose clock is decades off', t => {
  const now = Date.UTC(2030, 0, 1)
  const measured = (measuredAt: number, sentAt: number) =>
    measuredAtMs({ ...nothing, measuredAt: new Date(measuredAt) }, new Date(sentAt), now)
  t.is(measured(1_000, 4_000), now - 3_000)
  t.is(measured(now + 50_000, now + 60_000), now - 10_000)
  t.is(measured(9_000, 4_000), now, 'from the future: now')
  t.is(measuredAtMs(nothing, undefined, now), now)
})

test('values out of bounds are refused by the name of their field', t => {
  const refusedFields = (said: Partial<Posture>) => {
    const fault = t.throws(() => checkPosture({ ...nothing, ...said }), { instanceOf: Fault })
    return fault?.violations.map(({ field }) => field)
  }
  t.deepEqual(refusedFields({ cpuPercent: 100.1 }), ['posture.cpu_percent'])
  t.deepEqual(refusedFields({ cpuPercent: Number.NaN, diskPercent: -1 }), [
    'posture.cpu_percent',
    'posture.disk_percent',
  ])
  t.deepEqual(refusedFields({ attributes: { '': 'x' } }), ['posture.attributes'])
  t.deepEqual(refusedFields({ attributes: { nul: 'a\0b' } }), ['posture.attributes'])
  t.notThrows(() => checkPosture({ ...nothing, cpuPercent: 0, diskPercent: 100 }))
})
