import test from 'ava'
import { RoleGrant, Service } from '../../src/access/entities.ts'
import { CreateServiceRequest, ServiceStatus } from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, invalid, operator, refused, start } from './operator.ts'

const git = CreateServiceRequest.fromPartial({
  id: 'git',
  name: 'Git',
  labels: { tier: 'gold' },
  owner: 'platform',
  roles: ['ops', 'developer', 'ops'],
})
const gitMessage = {
  id: 'git',
  name: 'Git',
  labels: { tier: 'gold' },
  owner: 'platform',
  status: ServiceStatus.ACTIVE,
  createdAt: new Date(start),
}

test('a service is created with the grants of its roles', async t => {
  const { admin, call, db, announcedDuring } = await operator(t)
  const keys = await announcedDuring(async () =>
    t.deepEqual(await admin.createService(git, call()), { service: gitMessage }),
  )
  t.deepEqual(keys, ['service:git', 'grants:developer', 'grants:ops'])
  const grants = await db.em().find(RoleGrant, { service: 'git' }, { orderBy: { role: 'asc' } })
  t.deepEqual(
    grants.map(({ role, actions }) => [role, actions]),
    [
      ['developer', ['connect']],
      ['ops', ['connect']],
    ],
  )
  t.deepEqual(await admin.getService({ id: 'git' }, call()), { service: gitMessage })
})

test('every wrong field is named at once', async t => {
  const { admin, call } = await operator(t)
  const wrong = { id: '', name: 'x'.repeat(256), labels: { site: 'x'.repeat(256) }, owner: '\n', roles: ['ok', 'Not'] }
  await invalid(t, admin.createService(wrong, call()), ['id', 'name', 'labels.site', 'owner', 'roles[1]'])
  await invalid(t, admin.createService({ ...git, labels: { ['k'.repeat(64)]: '' } }, call()), ['labels'])
  const many = Object.fromEntries(Array.from({ length: 33 }, (_, index) => [`k${index}`, '']))
  await invalid(t, admin.createService({ ...git, labels: many }, call()), ['labels'])
  await invalid(t, admin.updateService({ id: 'git', status: 7 as ServiceStatus }, call()), ['status'])
  await invalid(t, admin.getService({ id: 'a b' }, call()), ['id'])
  await invalid(t, admin.deleteService({ id: '' }, call()), ['id'])
})

test('a service is created once, however many try', async t => {
  const { admin, call, db, auditEvents } = await operator(t)
  const outcomes = await Promise.allSettled(Array.from({ length: 20 }, () => admin.createService(git, call())))
  t.is(outcomes.filter(outcome => outcome.status === 'fulfilled').length, 1)
  await refused(t, admin.createService(git, call()), 'ALREADY_EXISTS', 'SERVICE_EXISTS')
  t.is(await db.em().count(Service), 1)
  t.is((await auditEvents()).length, 1)
})

test('an update changes what is given and leaves the rest', async t => {
  const { admin, call } = await operator(t)
  await admin.createService(git, call())
  await admin.updateService({ id: 'git', owner: 'security' }, call())
  const { service } = await admin.updateService({ id: 'git', status: ServiceStatus.DISABLED }, call())
  t.deepEqual(service, { ...gitMessage, owner: 'security', status: ServiceStatus.DISABLED })
  await refused(t, admin.updateService({ id: 'svn' }, call()), 'NOT_FOUND', 'SERVICE_NOT_FOUND')
})

test('a service that is deleted takes its grants with it', async t => {
  const { admin, call, db, announcedDuring } = await operator(t)
  await admin.createService(git, call())
  const keys = await announcedDuring(() => admin.deleteService({ id: 'git' }, call()))
  t.deepEqual(keys, ['service:git', 'grants:developer', 'grants:ops'])
  t.is(await db.em().count(RoleGrant, { service: 'git' }), 0)
  await refused(t, admin.getService({ id: 'git' }, call()), 'NOT_FOUND', 'SERVICE_NOT_FOUND')
  await refused(t, admin.deleteService({ id: 'git' }, call()), 'NOT_FOUND', 'SERVICE_NOT_FOUND')
})

test('pages show each of 250 services once', async t => {
  const { admin, call, db } = await operator(t)
  const ids = Array.from({ length: 250 }, (_, index) => `service-${String(index).padStart(3, '0')}`)
  const row = { name: '', labels: {}, owner: '', status: 'active' as const, createdAt: new Date() }
  await db.em().insertMany(
    Service,
    ids.map(id => ({ ...row, id })),
  )
  const services = await allPages(async pageToken => {
    const { services, nextPageToken } = await admin.listServices({ pageSize: 33, pageToken }, call())
    return { items: services, next: nextPageToken }
  })
  t.deepEqual(
    services.map(service => service.id),
    ids,
  )
})
