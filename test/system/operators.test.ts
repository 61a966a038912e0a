/** Operators who are taken back: at every instance at once, also while they renew. */
import test from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  type Refusal,
  refusal,
  refused,
  shared,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'

const instances = shared(test, async file => {
  const one = await startEdgeMesh(file)
  return { one, two: await startSecondInstance(file, one) }
})

async function operator({ server, anonymous }: EdgeMesh, name: string, role = 'admin'): Promise<Credentials> {
  const keyPem = createKey()
  const csr = signingRequestFor(keyPem)
  const { certificatePem } = await server.issueOperator({ name, role, csr, validityMs: 3_600_000 })
  return { ...anonymous, certificatePem, keyPem }
}

const look = (mesh: EdgeMesh, who: Credentials) =>
  unary(mesh.clients(who).admin, 'listDevices', { pageSize: 1, pageToken: '', status: 0, labels: {} })

async function renewed(mesh: EdgeMesh, who: Credentials): Promise<Credentials> {
  const { enroll } = mesh.clients(who)
  const keyPem = createKey()
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
  return { rootsPem: who.rootsPem, certificatePem: identity!.certificateChainPem.join(''), keyPem }
}

const seen = ({ code, reason }: Refusal) => [code, reason]
const out = ['UNAUTHENTICATED', 'CERTIFICATE_REVOKED']

test.serial(
  'an operator who is revoked is out at every instance, with all certificates, and can not renew',
  async t => {
    const { one, two } = instances()
    const first = await operator(one, 'grace')
    const second = await renewed(two, first)
    const namesake = await operator(one, 'grace2')
    const { admin } = two.clients(second)
    const ask = () => unary(admin, 'listDevices', { pageSize: 1, pageToken: '', status: 0, labels: {} })
    await ask()
    const answer = await unary(one.admin, 'revokeOperator', { name: 'grace', reason: 'has left' })
    t.is(answer.certificatesRevoked, 2)

    // On the connection that is open at the other instance, too, and on new ones of both.
    const cut = await eventually('the other instance has heard of it', () => ask().then(() => false as const, refusal))
    t.deepEqual(seen(cut), out)
    for (const mesh of [one, two]) {
      for (const who of [first, second]) {
        t.deepEqual(seen(await refused(look(mesh, who))), out)
        t.deepEqual(seen(await refused(renewed(mesh, who))), out)
      }
    }
    await look(two, namesake)

    const { rows: certificates } = await one.pool.query(
      "select distinct revocation_reason from certificates where subject_kind = 'operator' and subject_id = 'grace'",
    )
    t.deepEqual(certificates, [{ revocation_reason: 'privilegeWithdrawn' }])
    const { rows: events } = await one.pool.query(
      "select code, detail from audit_events where target = 'operator/grace' and method like '%/RevokeOperator'",
    )
    t.deepEqual(events, [{ code: 'OK', detail: { reason: 'has left', certificates_revoked: 2 } }])
    const { trustBundle } = await unary(one.clients(one.anonymous).enroll, 'getTrustBundle', {})
    t.true((trustBundle?.crlDer.length ?? 0) > 0)

    // Once more changes nothing; whoever is made anew is in.
    const again = await unary(one.admin, 'revokeOperator', { name: 'grace', reason: 'has left' })
    t.is(again.certificatesRevoked, 0)
    await look(one, await operator(one, 'grace'))
  },
)

test.serial('nobody revokes themselves, nor one whom nobody has made, nor without being an administrator', async t => {
  const { one } = instances()
  const revoke = (who: Credentials, name: string) =>
    refused(unary(one.clients(who).admin, 'revokeOperator', { name, reason: '' }))
  t.deepEqual(seen(await revoke(one.operator, 'tester')), ['FAILED_PRECONDITION', 'OPERATOR_IS_CALLER'])
  t.deepEqual(seen(await revoke(one.operator, 'nobody')), ['NOT_FOUND', 'OPERATOR_NOT_FOUND'])
  t.deepEqual((await revoke(one.operator, 'no name')).fields, ['name'])
  for (const role of ['operator', 'auditor']) {
    const who = await operator(one, `a-${role}`, role)
    t.deepEqual(seen(await revoke(who, 'tester')), ['PERMISSION_DENIED', 'OPERATOR_NOT_PERMITTED'])
  }
  await look(one, one.operator)
})

test.serial('an operator who renews while being revoked keeps nothing that is good', async t => {
  const { one, two } = instances()
  const who = await operator(one, 'racer')
  await look(two, who)
  const waiting = async () => {
    const { rows } = await one.pool.query<{ count: number }>(
      `select count(*)::int from pg_locks join pg_database on pg_database.oid = database
       where datname = current_database() and not granted`,
    )
    return rows[0]?.count
  }
  // Nothing is written to the table for a while: the renewal stops where it has found that the operator stands.
  const holder = await one.pool.connect()
  await holder.query('begin; lock table certificates in share mode')
  try {
    const renewal = renewed(two, who)
    await eventually('the renewal is about to write', async () => (await waiting()) === 1)
    const revocation = unary(one.admin, 'revokeOperator', { name: 'racer', reason: 'raced' })
    await eventually('the revocation is, too, or waits for it', async () => (await waiting()) === 2)
    await holder.query('commit')
    await renewal.then(
      () => undefined,
      error => t.deepEqual(seen(refusal(error)), out),
    )
    t.is((await revocation).certificatesRevoked, 2)
  } finally {
    holder.release(true)
  }
})

test.serial('of two administrators who revoke each other one stays', async t => {
  const { one, two } = instances()
  for (let round = 0; round < 8; round++) {
    const names = [`left-${round}`, `right-${round}`] as const
    const [left, right] = [await operator(one, names[0]), await operator(two, names[1])]
    await look(one, left)
    await look(two, right)
    const outcomes = await Promise.all([
      unary(one.clients(left).admin, 'revokeOperator', { name: names[1], reason: '' }).then(() => 'OK', refusal),
      unary(two.clients(right).admin, 'revokeOperator', { name: names[0], reason: '' }).then(() => 'OK', refusal),
    ])
    const [lost] = outcomes.filter(outcome => outcome !== 'OK')
    t.deepEqual([outcomes.filter(outcome => outcome === 'OK').length, lost && seen(lost as Refusal)], [1, out])
  }
})
