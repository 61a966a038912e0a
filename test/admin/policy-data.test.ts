import test from 'ava'
import { type BusinessHours, PolicyData as PolicyDataMessage } from '../../src/gen/edgemesh/v1/admin.ts'
import { invalid, operator } from './operator.ts'

const hours: BusinessHours = {
  timezone: 'Europe/Berlin',
  days: ['mon', 'sat'],
  startMinute: 0,
  endMinute: 1_440,
  exemptRoles: ['admin', 'on-call'],
}
const requirements = { patchesCurrent: true, antivirusEnabled: false, diskEncrypted: true, firewallEnabled: false }

test('the shipped policy data is there from the start', async t => {
  const { admin, call } = await operator(t)
  const { revision, engine, data } = await admin.getPolicyState({}, call())
  t.deepEqual([revision, engine], ['revision-1', 'in-process'])
  t.like(data?.requirements, { patchesCurrent: true, cpuPercentMax: 90, diskPercentMax: undefined })
  t.like(data?.hours, { timezone: 'UTC', startMinute: 480, endMinute: 1_080, exemptRoles: ['admin'] })
})

test('policy data is replaced whole and announced', async t => {
  const { admin, call, announcedDuring, auditEvents } = await operator(t)
  const data = {
    requirements: { ...requirements, cpuPercentMax: 0, memoryPercentMax: undefined, diskPercentMax: 99.5 },
    hours,
  }
  const keys = await announcedDuring(async () => t.deepEqual(await admin.updatePolicyData({ data }, call()), { data }))
  t.deepEqual(keys, ['policy:data'])
  t.deepEqual((await admin.getPolicyState({}, call())).data, data)
  t.is((await auditEvents())[0]?.target, 'policy/data')
})

test('no hours are no restriction', async t => {
  const { admin, call } = await operator(t)
  await admin.updatePolicyData({ data: { requirements, hours: undefined } }, call())
  t.is((await admin.getPolicyState({}, call())).data?.hours, undefined)
})

test('every wrong field is named at once', async t => {
  const { admin, call, auditEvents } = await operator(t)
  await invalid(t, admin.updatePolicyData({ data: undefined }, call()), ['data'])
  await invalid(t, admin.updatePolicyData({ data: PolicyDataMessage.fromPartial({}) }, call()), ['data.requirements'])
  const wrong = {
    requirements: { ...requirements, cpuPercentMax: -1, memoryPercentMax: 100.1, diskPercentMax: Number.NaN },
    hours: { timezone: 'Mars/Olympus', days: ['mon', 'Tue'], startMinute: 600, endMinute: 600, exemptRoles: ['Ok?'] },
  }
  await invalid(t, admin.updatePolicyData({ data: wrong }, call()), [
    'data.requirements.cpu_percent_max',
    'data.requirements.memory_percent_max',
    'data.requirements.disk_percent_max',
    'data.hours.timezone',
    'data.hours.days[1]',
    'data.hours.end_minute',
    'data.hours.exempt_roles[0]',
  ])
  for (const [change, field] of [
    [{ endMinute: 1_441 }, 'end_minute'],
    [{ days: [] }, 'days'],
    [{ timezone: '+01:00' }, 'timezone'],
    [{ timezone: '' }, 'timezone'],
  ] as const) {
    const data = { requirements, hours: { ...hours, ...change, days: 'days' in change ? [] : hours.days } }
    await invalid(t, admin.updatePolicyData({ data }, call()), [`data.hours.${field}`])
  }
  t.is((await auditEvents()).length, 0)
})
