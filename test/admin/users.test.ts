import test from 'ava'
import { User } from '../../src/access/entities.ts'
import { Fault } from '../../src/fault.ts'
import {
  CreateUserRequest,
  GetUserRequest,
  ListUsersRequest,
  UpdateUserRequest,
  UserStatus,
} from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, invalid, operator, refused, start } from './operator.ts'

const alice = CreateUserRequest.fromPartial({
  id: 'alice',
  email: 'Alice@example.com',
  name: 'Alice',
  role: 'developer',
})
const aliceMessage = {
  id: 'alice',
  email: 'Alice@example.com',
  name: 'Alice',
  role: 'developer',
  status: UserStatus.ACTIVE,
  createdAt: new Date(start),
}

test('a user is created, announced and found by id and by e-mail address', async t => {
  const { admin, call, announcedDuring } = await operator(t)
  const keys = await announcedDuring(async () =>
    t.deepEqual(await admin.createUser(alice, call()), { user: aliceMessage }),
  )
  t.deepEqual(keys, ['user:alice'])
  t.deepEqual(await admin.getUser({ id: 'alice' }, call()), { user: aliceMessage })
  t.deepEqual(await admin.getUser({ id: 'aLICE@example.com' }, call()), { user: aliceMessage })
})

test('the server chooses an id where none is given', async t => {
  const { admin, call } = await operator(t)
  const { user } = await admin.createUser({ ...alice, id: '' }, call())
  t.regex(user!.id, /^user-[0-9a-f]{16}$/)
})

test('every wrong field is named at once', async t => {
  const { admin, call, auditEvents } = await operator(t)
  await invalid(t, admin.createUser({ id: 'Not Safe', email: 'nobody', name: 'x'.repeat(256), role: '1st' }, call()), [
    'id',
    'email',
    'name',
    'role',
  ])
  await invalid(t, admin.createUser({ ...alice, name: 'a\0b' }, call()), ['name'])
  await invalid(t, admin.createUser({ ...alice, email: `${'a'.repeat(250)}@b.de` }, call()), ['email'])
  await invalid(t, admin.getUser(GetUserRequest.fromPartial({}), call()), ['id'])
  await invalid(t, admin.updateUser({ id: 'alice', role: '', status: UserStatus.UNSPECIFIED }, call()), [
    'role',
    'status',
  ])
  await invalid(t, admin.updateUser({ id: 'alice', status: 9 as UserStatus }, call()), ['status'])
  await invalid(t, admin.deleteUser({ id: '../etc' }, call()), ['id'])
  t.is((await auditEvents()).length, 0)
})

test('neither the id nor the e-mail address is given twice', async t => {
  const { admin, call, auditEvents } = await operator(t)
  await admin.createUser(alice, call())
  const sameId = await refused(
    t,
    admin.createUser({ ...alice, email: 'b@b.de' }, call()),
    'ALREADY_EXISTS',
    'USER_EXISTS',
  )
  t.deepEqual(sameId.metadata, { field: 'id' })
  const again = call()
  const sameEmail = await refused(
    t,
    admin.createUser({ ...alice, id: 'bob', email: 'ALICE@example.com' }, again),
    'ALREADY_EXISTS',
    'USER_EXISTS',
  )
  t.deepEqual(sameEmail.metadata, { field: 'email' })
  t.false(again.audit.written, 'what was rolled back is left for the caller of the handler to record')
  t.is((await auditEvents()).length, 1)
})

test('of fifty who create the same user at once one does', async t => {
  const { admin, call, db, auditEvents } = await operator(t)
  const outcomes = await Promise.allSettled(Array.from({ length: 50 }, () => admin.createUser(alice, call())))
  const refusals = outcomes.flatMap(outcome => (outcome.status === 'rejected' ? [outcome.reason] : []))
  t.is(refusals.length, 49)
  t.true(refusals.every(error => error instanceof Fault && error.reason === 'USER_EXISTS'))
  t.is(await db.em().count(User), 1)
  t.is((await auditEvents()).length, 1)
})

test('an update changes what is given and leaves the rest', async t => {
  const { admin, call, announcedDuring } = await operator(t)
  await admin.createUser(alice, call())
  const keys = await announcedDuring(async () => {
    const { user } = await admin.updateUser({ id: 'alice', status: UserStatus.DISABLED }, call())
    t.deepEqual(user, { ...aliceMessage, status: UserStatus.DISABLED })
  })
  t.deepEqual(keys, ['user:alice'])
  const { user } = await admin.updateUser({ id: 'alice', name: 'A.', role: 'admin' }, call())
  t.deepEqual(user, { ...aliceMessage, name: 'A.', role: 'admin', status: UserStatus.DISABLED })
})

test('updates of different fields at once are both kept', async t => {
  const { admin, call } = await operator(t)
  await admin.createUser(alice, call())
  await Promise.all([
    admin.updateUser({ id: 'alice', name: 'Other' }, call()),
    admin.updateUser({ id: 'alice', role: 'other' }, call()),
  ])
  const { user } = await admin.getUser({ id: 'alice' }, call())
  t.deepEqual([user?.name, user?.role], ['Other', 'other'])
})

test('a user who is deleted is gone', async t => {
  const { admin, call, announcedDuring } = await operator(t)
  await admin.createUser(alice, call())
  const keys = await announcedDuring(async () => t.deepEqual(await admin.deleteUser({ id: 'alice' }, call()), {}))
  t.deepEqual(keys, ['user:alice'])
  await refused(t, admin.getUser({ id: 'alice' }, call()), 'NOT_FOUND', 'USER_NOT_FOUND')
  await refused(t, admin.getUser({ id: 'alice@example.com' }, call()), 'NOT_FOUND', 'USER_NOT_FOUND')
  await refused(
    t,
    admin.updateUser(UpdateUserRequest.fromPartial({ id: 'alice' }), call()),
    'NOT_FOUND',
    'USER_NOT_FOUND',
  )
  await refused(t, admin.deleteUser({ id: 'alice' }, call()), 'NOT_FOUND', 'USER_NOT_FOUND')
})

test('pages show each of 250 users once, in order', async t => {
  const { admin, call, db } = await operator(t)
  const ids = Array.from({ length: 250 }, (_, index) => `user-${String(index).padStart(3, '0')}`)
  await db.em().insertMany(
    User,
    ids.map(id => ({
      id,
      email: `${id}@a.de`,
      name: '',
      role: 'dev',
      status: 'active' as const,
      createdAt: new Date(),
    })),
  )
  const pages: number[] = []
  const users = await allPages(async pageToken => {
    const { users, nextPageToken } = await admin.listUsers({ pageSize: 0, pageToken }, call())
    pages.push(users.length)
    return { items: users, next: nextPageToken }
  })
  t.deepEqual(
    users.map(user => user.id),
    ids,
  )
  t.deepEqual(pages, [100, 100, 50])
  const whole = await admin.listUsers({ pageSize: 250, pageToken: '' }, call())
  t.is(whole.nextPageToken, '', 'a full last page is the last')
})

test('sizes and tokens of pages are checked', async t => {
  const { admin, call } = await operator(t)
  await invalid(t, admin.listUsers({ pageSize: 1_001, pageToken: 'garbage!' }, call()), ['page_size', 'page_token'])
  await invalid(t, admin.listUsers({ pageSize: -1, pageToken: '' }, call()), ['page_size'])
  const wrong = ['"', '[]', '{}', '[1]', '["a","b"]', '["../.."]', `["${'a'.repeat(600)}"]`, 'null']
  for (const text of wrong) {
    const request = ListUsersRequest.fromPartial({ pageToken: Buffer.from(text).toString('base64url') })
    await invalid(t, admin.listUsers(request, call()), ['page_token'])
  }
})
