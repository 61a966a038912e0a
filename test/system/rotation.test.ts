/** The change from one certificate authority to the next, as a fleet on two instances lives through it. */
import { X509Certificate } from 'node:crypto'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import fc from 'fast-check'
import { createKey } from '../../src/client/csr.ts'
import { AuthorityRole, AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import type { TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'
import { endOf, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  refused,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { openssl } from '../support/openssl.ts'

const rotate = (mesh: EdgeMesh, stage: Stage, force = true) => unary(mesh.admin, 'rotateAuthority', { stage, force })

const authorityOf = (mesh: EdgeMesh) => unary(mesh.admin, 'getAuthority', {})

/** Waits until an instance has followed. */
async function reached(meshes: EdgeMesh[], stage: Stage): Promise<void> {
  for (const mesh of meshes) {
    await eventually(`stage ${stage}`, async () => (await authorityOf(mesh)).rotationStage === stage)
  }
}

async function bundleOf(mesh: EdgeMesh): Promise<TrustBundle> {
  const { trustBundle } = await unary(mesh.clients(mesh.anonymous).enroll, 'getTrustBundle', {})
  return trustBundle!
}

/** The chain that an instance shows, judged by openssl for a client that trusts `rootPem` alone. */
async function serverBelieved(t: ExecutionContext, mesh: EdgeMesh, rootPem: string): Promise<boolean> {
  const address = `127.0.0.1:${mesh.server.apiPort}`
  const args = ['s_client', '-connect', address, '-servername', 'localhost', '-alpn', 'h2', '-verify_return_error']
  const { said } = await openssl(t, [...args, '-verify_hostname', 'localhost', '-CAfile', 'root'], { root: rootPem })
  return said.includes('Verify return code: 0 (ok)')
}

const issuerOf = (pem: string) => new X509Certificate(pem).issuer

/** A device whose heartbeat stream says what it is told. */
async function beating(t: ExecutionContext, mesh: EdgeMesh, device: Credentials) {
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const told = <Case extends string>(kind: Case) =>
    heart.responses.flatMap(({ directives }) => directives.filter(directive => directive.kind?.$case === kind))
  return { ...heart, told }
}

async function renewed(mesh: EdgeMesh, who: Credentials): Promise<Credentials & { bundle: TrustBundle }> {
  const keyPem = createKey()
  const { enroll } = mesh.clients(who)
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
  const bundle = identity!.trustBundle!
  return { rootsPem: bundle.rootsPem.join(''), certificatePem: identity!.certificateChainPem.join(''), keyPem, bundle }
}

test('a fleet on two instances changes its authority with its streams up, and who did not renew is out at the end', async t => {
  const one = await startEdgeMesh(t)
  const two = await startSecondInstance(t, one)
  const both = [one, two]
  const [oldRoot] = (await bundleOf(one)).rootsPem as [string]
  const keen = await one.enroll({ device: { id: 'keen' } })
  const lazy = await one.enroll({ device: { id: 'lazy' } })
  const hearts = [await beating(t, one, keen), await beating(t, two, lazy)] as const

  // Published: both roots are in every bundle, devices are told, nothing new is issued.
  await rotate(one, Stage.PUBLISHED)
  await reached(both, Stage.PUBLISHED)
  const published = await bundleOf(two)
  t.is(published.rootsPem.length, 2)
  const newRoot = published.rootsPem.find(pem => pem !== oldRoot)!
  for (const heart of hearts) {
    const [directive] = await eventually('the bundle is pushed', () => {
      const told = heart.told('trustBundle')
      return told.length > 0 && told
    })
    const pushed = directive?.kind?.$case === 'trustBundle' ? directive.kind.value.trustBundle : undefined
    t.deepEqual(new Set(pushed?.rootsPem), new Set([oldRoot, newRoot]))
    t.is(pushed?.id, published.id)
  }
  for (const mesh of both) {
    t.true(await serverBelieved(t, mesh, oldRoot))
    t.true(await eventually('the cross certificate is shown', () => serverBelieved(t, mesh, newRoot)))
  }
  const between = await two.enroll({ device: { id: 'between' } })
  t.is(issuerOf(between.identity.certificateChainPem[0]!), issuerOf(keen.identity.certificateChainPem[0]!))

  // Issuing: the next one issues, at every instance; who trusts either root alone knows the servers.
  await rotate(two, Stage.ISSUING)
  await reached(both, Stage.ISSUING)
  for (const mesh of both) {
    t.true(await eventually('the new chain is shown', () => serverBelieved(t, mesh, newRoot)))
    t.true(await serverBelieved(t, mesh, oldRoot))
  }
  for (const heart of hearts) await eventually('renewal is asked for', () => heart.told('renewCertificate')[0])
  t.is(hearts[0].told('renewCertificate').length, 1, 'once')
  const keenAnew = await renewed(two, keen)
  t.not(issuerOf(keenAnew.certificatePem!), issuerOf(keen.certificatePem))
  const keenHeart = await beating(t, one, keenAnew)
  const late = await one.enroll({ device: { id: 'late' } })
  t.is(issuerOf(late.identity.certificateChainPem[0]!), issuerOf(keenAnew.certificatePem!))
  // A client that knows only the old root: a token made long ago, a device that was off all the time.
  await unary(one.clients({ ...lazy, rootsPem: oldRoot }).authorize, 'check', {
    question: { id: '1', user: 'nobody', service: 'nothing', action: '' },
    deviceId: '',
  })
  for (const heart of hearts) await heart.beat()

  // Retiring: the old one's certificates are refused everywhere, on open streams too; the others go on.
  const operator = await renewed(one, one.operator)
  await rotate(one, Stage.RETIRING)
  const admin = one.clients(operator).admin
  await eventually('stage', async () => (await unary(admin, 'getAuthority', {})).rotationStage === Stage.RETIRING)
  t.deepEqual((await bundleOf(one)).rootsPem, [newRoot])
  const cut = await endOf(hearts[1])
  t.deepEqual([cut?.code, cut?.reason], ['UNAUTHENTICATED', 'CERTIFICATE_RETIRED'])
  await keenHeart.beat()
  for (const mesh of both) {
    const refusedNow = await eventually('refused', async () => {
      const heart = heartbeats(t, mesh, { ...lazy, rootsPem: oldRoot + newRoot })
      heart.send({})
      const end = await endOf(heart)
      return end?.code === 'UNAUTHENTICATED' && end
    })
    t.is(refusedNow.code, 'UNAUTHENTICATED')
  }

  // Back once more, and the one who was out is in again; then on to the end.
  await unary(admin, 'rotateAuthority', { stage: Stage.ISSUING, force: true })
  const again = await eventually('the old certificate counts again', async () => {
    const heart = heartbeats(t, two, { ...lazy, rootsPem: oldRoot + newRoot })
    return heart.beat(healthy).then(
      () => heart,
      () => undefined,
    )
  })
  await again.beat()
  await unary(admin, 'rotateAuthority', { stage: Stage.RETIRING, force: true })
  const gone = await endOf(again)
  t.is(gone?.reason, 'CERTIFICATE_RETIRED')
  await unary(admin, 'rotateAuthority', { stage: Stage.STABLE, force: false })
  const { authorities, rotationStage, progress } = await eventually('stable', async () => {
    const seen = await unary(admin, 'getAuthority', {})
    return seen.rotationStage === Stage.STABLE && seen
  })
  t.deepEqual(
    [rotationStage, progress, authorities.map(({ generation, role }) => [generation, role])],
    [Stage.STABLE, undefined, [[2, AuthorityRole.ISSUING]]],
  )
  await keenHeart.beat()
})

test('a step that would leave somebody behind is refused and says who and how to go on; no way leads further than one stage', async t => {
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll({ device: { id: 'slow' } })
  const far = await refused(rotate(mesh, Stage.ISSUING, true))
  t.deepEqual([far.code, far.reason], ['FAILED_PRECONDITION', 'ROTATION_STAGE'])
  t.regex(far.message, /at stable: it can go on to published/)

  t.is((await rotate(mesh, Stage.PUBLISHED, false)).stage, Stage.PUBLISHED)
  await reached([mesh], Stage.PUBLISHED)
  const untold = await refused(rotate(mesh, Stage.ISSUING, false))
  t.deepEqual([untold.code, untold.reason], ['FAILED_PRECONDITION', 'ROTATION_NOT_READY'])
  t.regex(untold.message, /1 of 1 devices have not reported yet/)

  const heart = heartbeats(t, mesh, device)
  const behind = async () =>
    (await unary(mesh.admin, 'listRotationProgress', { pageSize: 10, pageToken: '', behindOnly: true })).holders.map(
      ({ spiffeId }) => spiffeId,
    )
  t.deepEqual(await behind(), ['spiffe://edgemesh.local/device/slow'], 'operators need not report')
  heart.send({
    posture: { attributes: {}, measuredAt: undefined, ...healthy } as never,
    trustBundleId: (await bundleOf(mesh)).id,
  })
  await eventually('the report counts', async () => (await authorityOf(mesh)).progress?.devicesTrusting === 1)
  t.deepEqual(await behind(), [])
  await rotate(mesh, Stage.ISSUING, false)
  await reached([mesh], Stage.ISSUING)

  const uncertified = await refused(rotate(mesh, Stage.RETIRING, false))
  t.regex(uncertified.message, /1 of 1 devices do not report with a certificate of the new authority/)
  const { holders } = await unary(mesh.admin, 'listRotationProgress', { pageSize: 1, pageToken: '', behindOnly: true })
  t.like(holders[0], { spiffeId: 'spiffe://edgemesh.local/device/slow', trusting: true, certified: false })
  const deviceAnew = await renewed(mesh, device)
  // Issued is not in use.
  await unary(mesh.admin, 'getAuthority', {}).then(({ progress }) => t.is(progress?.devicesCertified, 0))
  await heartbeats(t, mesh, deviceAnew).beat(healthy)
  const operators = await refused(rotate(mesh, Stage.RETIRING, false))
  t.regex(operators.message, /1 of 1 operators hold no certificate/)
  const operator = await renewed(mesh, mesh.operator)
  const { admin } = mesh.clients(operator)
  await unary(admin, 'rotateAuthority', { stage: Stage.RETIRING, force: false })

  const events = await mesh.pool.query(
    "select code, detail from audit_events where method like '%RotateAuthority' order by at, id",
  )
  t.is(events.rows.filter(({ code }) => code === 'OK').length, 3)
  t.true(
    events.rows.some(({ code, detail }) => code === 'OK' && detail.before === 'issuing' && detail.after === 'retiring'),
  )
})

test('of ten calls for the same step that race on two instances, one takes it', async t => {
  const one = await startEdgeMesh(t)
  const two = await startSecondInstance(t, one)
  const outcomes = await Promise.allSettled(
    Array.from({ length: 10 }, (_, at) => rotate(at % 2 ? one : two, Stage.PUBLISHED)),
  )
  t.is(outcomes.filter(({ status }) => status === 'fulfilled').length, 1)
  const { rows } = await one.pool.query('select id, stage from authorities order by id')
  t.deepEqual(rows, [
    { id: 1, stage: 'issuing' },
    { id: 2, stage: 'trusted' },
  ])
})

test('whatever is asked in whatever order, one authority issues, and the service knows its own devices', async t => {
  const mesh = await startEdgeMesh(t)
  const ways: Record<number, Stage[]> = {
    [Stage.STABLE]: [Stage.PUBLISHED],
    [Stage.PUBLISHED]: [Stage.ISSUING, Stage.STABLE],
    [Stage.ISSUING]: [Stage.RETIRING, Stage.PUBLISHED],
    [Stage.RETIRING]: [Stage.STABLE, Stage.ISSUING],
  }
  let stage: Stage = Stage.STABLE
  let { admin } = mesh
  let operator = mesh.operator
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(Stage.STABLE, Stage.PUBLISHED, Stage.ISSUING, Stage.RETIRING), async to => {
      // The operator's own certificate must survive the step.
      if (stage === Stage.ISSUING || stage === Stage.PUBLISHED) {
        operator = await renewed(mesh, operator)
        admin = mesh.clients(operator).admin
      }
      const allowed = ways[stage]!.includes(to)
      const call = unary(admin, 'rotateAuthority', { stage: to, force: true })
      if (allowed) {
        await call
        stage = to
      } else t.is((await refused(call)).reason, 'ROTATION_STAGE')
      const seen = await eventually('the instance follows', async () => {
        const now = await unary(admin, 'getAuthority', {})
        return now.rotationStage === stage && now
      })
      t.is(seen.authorities.filter(({ role }) => role === AuthorityRole.ISSUING).length, 1)
      t.is(seen.trustBundle?.rootsPem.length, stage === Stage.PUBLISHED || stage === Stage.ISSUING ? 2 : 1)
      const { rows } = await mesh.pool.query("select count(*)::int as n from authorities where stage = 'issuing'")
      t.is(rows[0].n, 1)
    }),
    { numRuns: 40, endOnFailure: true, includeErrorInReport: true },
  )
})

test('the revocation lists of both authorities are had over HTTP, and openssl finds each signed by its issuer', async t => {
  const mesh = await startEdgeMesh(t, { CRL_URL: 'http://crl.example.com/crl/' })
  const old = await mesh.enroll({ device: { id: 'old' } })
  await rotate(mesh, Stage.PUBLISHED)
  await reached([mesh], Stage.PUBLISHED)
  await rotate(mesh, Stage.ISSUING)
  await reached([mesh], Stage.ISSUING)
  const young = await mesh.enroll({ device: { id: 'young' } })
  await unary(mesh.admin, 'revokeDevice', { id: 'old', reason: '' })
  await unary(mesh.admin, 'revokeDevice', { id: 'young', reason: '' })
  for (const device of [old, young]) {
    const [leafPem, issuerPem] = device.identity.certificateChainPem as [string, string]
    const { said } = await openssl(t, ['x509', '-in', 'leaf', '-noout', '-ext', 'crlDistributionPoints'], {
      leaf: leafPem,
    })
    const [, url = ''] = /URI:(\S+)/.exec(said) ?? []
    t.regex(url, /^http:\/\/crl\.example\.com\/crl\/[0-9a-f]{40}\.crl$/)
    const path = new URL(url).pathname
    const serial = new X509Certificate(leafPem).serialNumber
    const list = await eventually('the list names the certificate', async () => {
      const response = await fetch(`http://127.0.0.1:${mesh.server.metricsPort}${path}`)
      t.is(response.headers.get('content-type'), 'application/pkix-crl')
      const der = Buffer.from(await response.arrayBuffer())
      const text = await openssl(t, ['crl', '-inform', 'DER', '-in', 'list', '-noout', '-text'], { list: der })
      return text.said.includes(serial) && der
    })
    const judged = await openssl(t, ['crl', '-inform', 'DER', '-in', 'list', '-noout', '-CAfile', 'issuer'], {
      list,
      issuer: issuerPem,
    })
    t.regex(judged.said, /verify OK/)
  }
})

test('metrics tell when each authority and the server certificate expire', async t => {
  const mesh = await startEdgeMesh(t)
  const scraped = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
  const { authorities } = await authorityOf(mesh)
  const seconds = authorities[0]!.rootNotAfter!.getTime() / 1_000
  t.true(scraped.includes(`edgemesh_ca_expiry_timestamp_seconds{ca="root",generation="1",stage="issuing"} ${seconds}`))
  t.regex(scraped, /edgemesh_ca_expiry_timestamp_seconds\{ca="issuer",generation="1",stage="issuing"\} \d{10}/)
  t.regex(scraped, /edgemesh_server_certificate_expiry_timestamp_seconds \d{10}/)
})
