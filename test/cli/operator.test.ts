import { execFile } from 'node:child_process'
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { findCredentials, saveCredentials } from '../../src/cli/operator-credentials.ts'
import { bundleOf, fleetServer, keySha256, unauthenticated } from '../agent/fleet-server.ts'
import { issue, rootsOf, smallAuthority } from '../agent/small-server.ts'

const authority = await smallAuthority()
const newer = await smallAuthority()
const bin = join(import.meta.dirname, '../../src/main.ts')

function credentialsOf(spiffeId = 'spiffe://edgemesh.test/operator/ada') {
  const { keyPem, certificateChainPem } = issue(authority, { purpose: 'client', spiffeId })
  return { keyPem, certificatePem: certificateChainPem, rootsPem: rootsOf(authority).join('') }
}

async function folderWith(t: ExecutionContext, credentials = credentialsOf()): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-operator-'))
  t.teardown(() => rm(folder, { recursive: true }))
  await saveCredentials(folder, credentials)
  return folder
}

function renew(...args: string[]): Promise<{ exitCode: number; stdout: string; stderr: string }> {
  return new Promise(resolve => {
    const options = { env: { PATH: process.env.PATH } }
    execFile(process.execPath, [bin, 'operator', 'renew', ...args], options, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

test('an operator is renewed with the certificate that is there, and its folder has a new key, certificate and roots', async t => {
  const before = credentialsOf()
  const folder = await folderWith(t, before)
  const server = await fleetServer(t, authority, { bundle: () => bundleOf(authority, 'both', newer) })
  const { exitCode, stdout, stderr } = await renew('--credentials', folder, '--server', server.address, '--json')
  t.deepEqual([exitCode, stderr], [0, ''])

  t.is(server.renewals[0]?.shown.serialNumber, new X509Certificate(before.certificatePem).serialNumber)
  const after = await findCredentials(folder)
  const certificate = new X509Certificate(after?.certificatePem ?? '')
  t.true(certificate.checkPrivateKey(createPrivateKey(after?.keyPem ?? '')))
  t.is(certificate.subjectAltName, 'URI:spiffe://edgemesh.test/operator/ada')
  t.not(after?.keyPem, before.keyPem)
  t.is(server.renewals[0]?.keySha256, keySha256(after?.keyPem ?? ''))
  t.is(after?.rootsPem, [authority, newer].flatMap(rootsOf).join(''))
  t.is((await stat(join(folder, 'operator.key'))).mode & 0o777, 0o600)
  t.deepEqual((await readdir(folder)).sort(), ['ca.crt', 'operator.crt', 'operator.key'])
  const notAfter = certificate.validToDate.toISOString()
  t.deepEqual(JSON.parse(stdout), { name: 'ada', folder, notAfter, trustBundleId: 'both' })
})

test('without --json a person is told who was renewed, where, and until when', async t => {
  const folder = await folderWith(t)
  const server = await fleetServer(t, authority)
  const { stdout } = await renew('--credentials', folder, '--server', server.address)
  t.regex(stdout, /^operator ada is renewed in \S+, valid until 20\d\d-/)
})

test('an operator whose certificate has expired is told how to make another, and keeps the folder as it is', async t => {
  const before = credentialsOf()
  const folder = await folderWith(t, before)
  const server = await fleetServer(t, authority, { renewal: () => unauthenticated('CERTIFICATE_EXPIRED') })
  const { exitCode, stderr } = await renew('--credentials', folder, '--server', server.address)
  t.is(exitCode, 1)
  t.regex(stderr, /^error: refused: CERTIFICATE_EXPIRED$/m)
  t.regex(stderr, /^hint: .*edgemesh operator create/m)
  t.deepEqual(await findCredentials(folder), before)
})

test('a certificate that names another, or nobody here, is not taken for an operator', async t => {
  for (const spiffeId of ['spiffe://edgemesh.test/device/ada', 'spiffe://edgemesh.test/service/ada']) {
    const folder = await folderWith(t, credentialsOf(spiffeId))
    const server = await fleetServer(t, authority)
    const { exitCode, stderr } = await renew('--credentials', folder, '--server', server.address)
    t.is(exitCode, 1)
    t.regex(stderr, /^error: operator.crt in \S+ is not the certificate of an operator$/m)
    t.is(server.renewals.length, 0)
  }
})

test('a renewal that crashed at any moment leaves one key and one certificate that belong together', async t => {
  const [before, after] = [credentialsOf(), credentialsOf()]
  const folder = await folderWith(t, before)

  // Before the certificate is replaced, the new key counts for nothing.
  await writeFile(join(folder, 'operator.key.new'), after.keyPem)
  await writeFile(join(folder, 'ca.crt'), after.rootsPem)
  t.is((await findCredentials(folder))?.keyPem, before.keyPem)

  // After that it takes its place, for everybody.
  await writeFile(join(folder, 'operator.crt'), after.certificatePem)
  t.deepEqual(await findCredentials(folder), after)
  t.is(await readFile(join(folder, 'operator.key'), 'utf8'), after.keyPem)
  t.deepEqual((await readdir(folder)).sort(), ['ca.crt', 'operator.crt', 'operator.key'])
})
