import test from 'ava'
import { AdminServiceService, AuthorityRotationStage } from '../../src/gen/edgemesh/v1/admin.ts'
import { authority, operator } from './operator.ts'

test('every method has a handler', async t => {
  const { admin, streams } = await operator(t)
  const handlers = [...Object.keys(admin), ...Object.keys(streams)]
  const declared = Object.keys(AdminServiceService)
  t.deepEqual(handlers.sort(), declared.sort())
})

test('the authority is shown with what enrollment tokens pin', async t => {
  const { admin, call } = await operator(t)
  const asking = call()
  t.like(await admin.getAuthority({}, asking), {
    rootKeySha256: authority.current().issuing.rootKeySha256,
    rotationStage: AuthorityRotationStage.STABLE,
    rootNotAfter: authority.current().issuing.rootNotAfter,
    trustBundle: { trustDomain: 'test', rootsPem: ['root'] },
  })
  t.is(asking.audit.target, 'authority')
  t.false(asking.audit.written)
})
