import test from 'ava'
import { RoleGrant } from '../../src/access/entities.ts'
import { CreateServiceRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, invalid, operator, refused } from './operator.ts'

const git = CreateServiceRequest.fromPartial({ id: 'git' })

test('a grant replaces what was granted before', async t => {
  const { admin, call, db, announcedDuring } = await operator(t)
  await admin.createService(git, call())
  await admin.setRoleGrant({ grant: { role: 'dev', service: 'git', actions: ['connect', 'push'] } }, call())
  const grant = { role: 'dev', service: 'git', actions: ['read'] }
  const keys = await announcedDuring(async () => t.deepEqual(await admin.setRoleGrant({ grant }, call()), { grant }))
  t.deepEqual(keys, ['grants:dev'])
  const rows = await db.em().find(RoleGrant, { role: 'dev' })
  t.deepEqual(
    rows.map(({ service, actions }) => [service, actions]),
    [['git', ['read']]],
  )
})

test('a grant may be for every service and every action', async t => {
  const { admin, call } = await operator(t)
  const grant = { role: 'ops', service: '*', actions: ['*'] }
  t.deepEqual(await admin.setRoleGrant({ grant }, call()), { grant })
})

test('every wrong field is named at once', async t => {
  const { admin, call } = await operator(t)
  await invalid(t, admin.setRoleGrant({ grant: undefined }, call()), ['grant'])
  await invalid(t, admin.setRoleGrant({ grant: { role: 'A', service: '**', actions: ['', 'ok', 'a b'] } }, call()), [
    'grant.role',
    'grant.service',
    'grant.actions[0]',
    'grant.actions[2]',
  ])
  await invalid(t, admin.setRoleGrant({ grant: { role: 'dev', service: '*', actions: [] } }, call()), ['grant.actions'])
  await invalid(t, admin.deleteRoleGrant({ role: '', service: '' }, call()), ['role', 'service'])
})

test('a grant needs its service', async t => {
  const { admin, call } = await operator(t)
  const grant = { role: 'dev', service: 'git', actions: ['connect'] }
  await refused(t, admin.setRoleGrant({ grant }, call()), 'NOT_FOUND', 'SERVICE_NOT_FOUND')
})

test('a grant made while its service is deleted does not outlive it', async t => {
  const { admin, call, db } = await operator(t)
  for (let round = 0; round < 20; round++) {
    await admin.createService(git, call())
    const grant = { role: 'dev', service: 'git', actions: ['connect'] }
    await Promise.allSettled([admin.setRoleGrant({ grant }, call()), admin.deleteService({ id: 'git' }, call())])
    t.is(await db.em().count(RoleGrant, { service: 'git' }), 0)
  }
})

test('a grant that is deleted is gone', async t => {
  const { admin, call, announcedDuring } = await operator(t)
  const keys = await announcedDuring(() => admin.deleteRoleGrant({ role: 'admin', service: '*' }, call()))
  t.deepEqual(keys, ['grants:admin'])
  await refused(t, admin.deleteRoleGrant({ role: 'admin', service: '*' }, call()), 'NOT_FOUND', 'GRANT_NOT_FOUND')
})

test('pages show each of 250 grants once', async t => {
  const { admin, call, db } = await operator(t)
  const grants = Array.from({ length: 249 }, (_, index) => ({
    role: `role${index % 5}`,
    service: `service-${index}`,
    actions: ['connect'],
    createdAt: new Date(),
  }))
  await db.em().insertMany(RoleGrant, grants)
  const seen = await allPages(async pageToken => {
    const { grants, nextPageToken } = await admin.listRoleGrants({ pageSize: 40, pageToken }, call())
    return { items: grants, next: nextPageToken }
  })
  t.is(seen.length, 250, 'with the one of the first migration')
  t.is(new Set(seen.map(grant => `${grant.role}/${grant.service}`)).size, 250)
})
