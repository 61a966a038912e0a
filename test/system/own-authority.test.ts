/** An operator brings an authority of its own: a root and an issuing CA that openssl made, in files. */
import { execFileSync } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import { AuthorityRole, AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import { heartbeats } from '../support/device.ts'
import { eventually, secrets, startEdgeMesh, startSecondInstance, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { openssl } from '../support/openssl.ts'

type Own = { root: string; issuing: string; chain: string; key: string; sealedKey: string; rootKey: string }

/** Made as an operator would, by openssl. */
async function ownAuthority(
  t: ExecutionContext,
  { days = 30, constraints = 'critical,CA:TRUE,pathlen:0', usage = 'critical,keyCertSign,cRLSign' } = {},
): Promise<Own> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-own-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const run = (...args: string[]) => execFileSync('openssl', args, { cwd: folder, stdio: 'pipe' })
  const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-384', '-nodes']
  await writeFile(join(folder, 'config'), '[req]\ndistinguished_name=dn\n[dn]\n')
  const config = ['-config', 'config']
  run(
    ...['req', '-x509', ...config, ...newKey, '-keyout', 'root.key', '-out', 'root.pem', '-days', String(days)],
    ...['-subj', '/O=Example/CN=Example Root', '-addext', 'basicConstraints=critical,CA:TRUE'],
    ...['-addext', 'keyUsage=critical,keyCertSign,cRLSign', '-addext', 'subjectKeyIdentifier=hash'],
  )
  run('req', ...config, ...newKey, '-keyout', 'issuing.key', '-out', 'issuing.csr', '-subj', '/O=Example/CN=Issuing')
  const extensions = `basicConstraints=${constraints}\nkeyUsage=${usage}\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n`
  await writeFile(join(folder, 'extensions'), extensions)
  run(
    ...['x509', '-req', '-in', 'issuing.csr', '-CA', 'root.pem', '-CAkey', 'root.key', '-CAcreateserial'],
    ...['-days', String(days), '-extfile', 'extensions', '-out', 'issuing.pem'],
  )
  const passphrase = `pass:${secrets.CA_KEY_PASSPHRASE}`
  run('pkcs8', '-topk8', '-in', 'issuing.key', '-out', 'sealed.key', '-passout', passphrase)
  const [root, issuing, key, sealedKey, rootKey] = await Promise.all(
    ['root.pem', 'issuing.pem', 'issuing.key', 'sealed.key', 'root.key'].map(name =>
      readFile(join(folder, name), 'utf8'),
    ),
  )
  return {
    root: root!,
    issuing: issuing!,
    chain: issuing! + root!,
    key: key!,
    sealedKey: sealedKey!,
    rootKey: rootKey!,
  }
}

const verified = async (t: ExecutionContext, chain: string[], root: string) => {
  const [leaf = '', ...above] = chain
  const untrusted = above.length > 0 ? ['-untrusted', 'above'] : []
  const files = { root, above: above.join(''), leaf }
  return openssl(t, ['verify', '-x509_strict', '-CAfile', 'root', ...untrusted, 'leaf'], files)
}

test('devices get certificates of the authority in the files, whose key is kept nowhere else', async t => {
  const own = await ownAuthority(t)
  // In any order, and sealed.
  const mesh = await startEdgeMesh(t, { CA_CERT: own.root + own.issuing, CA_KEY: own.sealedKey })
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const judged = await verified(t, device.identity.certificateChainPem, own.root)
  t.true(judged.ok, judged.said)
  await heartbeats(t, mesh, device).beat(healthy)

  const { rows } = await mesh.pool.query('select root_pem, root_key_pem, intermediate_key_pem from authorities')
  t.is(rows.length, 1)
  t.is(rows[0].root_pem.replace(/\s/g, ''), own.root.replace(/\s/g, ''))
  t.deepEqual([rows[0].root_key_pem, rows[0].intermediate_key_pem], [null, null])

  // The token pins the root of the files, and another instance with the files issues too.
  const other = await startSecondInstance(t, mesh, { CA_CERT: own.chain, CA_KEY: own.key })
  await other.enroll({ device: { id: 'beta' } })
  const error = await t.throwsAsync(startSecondInstance(t, mesh))
  t.regex(error.message, /give CA_CERT_FILE and CA_KEY_FILE to this instance too/)
})

test('a root that issues by itself will do', async t => {
  const own = await ownAuthority(t)
  const mesh = await startEdgeMesh(t, { CA_CERT: own.root, CA_KEY: own.rootKey })
  const { identity } = await mesh.enroll()
  t.is(identity.certificateChainPem.length, 1)
  const judged = await verified(t, identity.certificateChainPem, own.root)
  t.true(judged.ok, judged.said)
})

test('what does not fit together is refused at the start, by the name of the setting', async t => {
  const [own, other] = [await ownAuthority(t), await ownAuthority(t)]
  const noCa = await ownAuthority(t, { constraints: 'critical,CA:FALSE' })
  const noLists = await ownAuthority(t, { usage: 'critical,keyCertSign' })
  for (const [env, message] of [
    [{ CA_CERT: own.chain, CA_KEY: other.key }, /CA_KEY holds a key that belongs to no certificate in CA_CERT/],
    [{ CA_CERT: own.issuing, CA_KEY: own.key }, /was not issued by any root that is given/],
    [{ CA_CERT: own.issuing + other.root, CA_KEY: own.key }, /was not issued by any root that is given/],
    [{ CA_CERT: own.chain + other.root, CA_KEY: own.key }, /part of no chain that CA_KEY has a key for/],
    [{ CA_CERT: noCa.chain, CA_KEY: noCa.key }, /is not that of a CA/],
    [{ CA_CERT: noLists.chain, CA_KEY: noLists.key }, /does not let it sign revocation lists/],
    [{ CA_CERT: own.chain }, /CA_KEY: is missing: CA_CERT is of no use without it/],
    [{ CA_CERT: own.chain, CA_KEY: own.key.replace(/\n[^-]{20}/, '\n') }, /not a private key in PEM/],
    [{ CA_CERT: 'nonsense', CA_KEY: own.key }, /CA_CERT: must be PEM/],
  ] as const) {
    const error = await t.throwsAsync(startEdgeMesh(t, env))
    t.regex(error.message, message)
  }
})

test('a service changes from its own authority to the one in the files, and takes the step back and on', async t => {
  const own = await ownAuthority(t)
  const first = await startEdgeMesh(t)
  const old = await first.enroll({ device: { id: 'old' } })
  // A rolling restart with the files: registered, and trusted by nobody yet.
  const mesh = await startSecondInstance(t, first, { CA_CERT: own.chain, CA_KEY: own.key })
  const roles = async () =>
    (await unary(mesh.admin, 'getAuthority', {})).authorities.map(({ generation, role, keyInFile }) => [
      generation,
      role,
      keyInFile,
    ])
  t.deepEqual(await roles(), [
    [1, AuthorityRole.ISSUING, false],
    [2, AuthorityRole.PREPARED, true],
  ])
  const to = async (stage: Stage) => {
    await unary(mesh.admin, 'rotateAuthority', { stage, force: true })
    await eventually(`stage ${stage}`, async () => {
      const seen = await unary(mesh.admin, 'getAuthority', {})
      return seen.rotationStage === stage
    })
  }
  for (const stage of [Stage.PUBLISHED, Stage.STABLE, Stage.PUBLISHED, Stage.ISSUING]) await to(stage)
  t.deepEqual(await roles(), [
    [2, AuthorityRole.ISSUING, true],
    [1, AuthorityRole.TRUSTED, false],
  ])
  const young = await mesh.enroll({ device: { id: 'young' } })
  const judged = await verified(t, young.identity.certificateChainPem, own.root)
  t.true(judged.ok, judged.said)
  await heartbeats(t, mesh, old).beat(healthy)
  // The old root has certified the new one, so who knows only the old one follows the chain to it.
  const crossed = await verified(t, young.identity.certificateChainPem, old.rootsPem)
  t.true(crossed.ok, crossed.said)
  // The other instance has no key of the authority that issues now, and says so.
  const token = await mesh.token()
  const error = await t.throwsAsync(first.enroll({ token }))
  t.regex(error.message, /UNAVAILABLE.*key of the certificate authority/)
})
