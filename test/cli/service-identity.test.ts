import { execFile } from 'node:child_process'
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { refused, sharedEdgeMesh, testEnvironment, unary } from '../support/edgemesh.ts'

const mesh = sharedEdgeMesh(test)
const bin = join(import.meta.dirname, '../../src/main.ts')

async function emptyFolder(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-service-identity-'))
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

function create(...args: string[]): Promise<{ exitCode: number; stdout: string; stderr: string }> {
  return new Promise(resolve => {
    const env = { PATH: process.env.PATH, ...testEnvironment, DATABASE_URL: mesh().databaseUrl }
    execFile(process.execPath, [bin, 'service-identity', 'create', ...args], { env }, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

const question = { id: '1', user: 'ada', service: 'payroll', action: '' }

test('a service gets a key and a certificate with which it asks about any device, and does nothing else', async t => {
  const folder = await emptyFolder(t)
  const { exitCode, stdout, stderr } = await create('edge-proxy', '--out', folder, '--days', '30', '--json')
  t.deepEqual([exitCode, stderr], [0, ''])
  t.deepEqual((await readdir(folder)).sort(), ['ca.crt', 'service.crt', 'service.key'])
  t.is((await stat(join(folder, 'service.key'))).mode & 0o777, 0o600)
  const read = (name: string) => readFile(join(folder, name), 'utf8')
  const [keyPem, certificatePem, rootsPem] = await Promise.all(['service.key', 'service.crt', 'ca.crt'].map(read))
  const certificate = new X509Certificate(certificatePem ?? '')
  t.true(certificate.checkPrivateKey(createPrivateKey(keyPem ?? '')))
  t.is(certificate.subjectAltName, 'URI:spiffe://edgemesh.local/service/edge-proxy')
  t.deepEqual(certificate.keyUsage, ['1.3.6.1.5.5.7.3.2'], 'for clients only')
  t.deepEqual(JSON.parse(stdout), { name: 'edge-proxy', folder, notAfter: certificate.validToDate.toISOString() })

  const clients = mesh().clients({
    rootsPem: rootsPem ?? '',
    certificatePem: certificatePem ?? '',
    keyPem: keyPem ?? '',
  })
  const { answer } = await unary(clients.authorize, 'check', { question, deviceId: 'nobody' })
  t.false(answer?.allowed)
  t.is((await refused(unary(clients.admin, 'getPolicyState', {}))).reason, 'WRONG_CALLER')
})

test('a certificate that was issued for a service before stays good beside the new one', async t => {
  const folder = await emptyFolder(t)
  t.is((await create('twice', '--out', folder)).exitCode, 0)
  const before = await readFile(join(folder, 'service.crt'), 'utf8')
  const keyBefore = await readFile(join(folder, 'service.key'), 'utf8')
  t.regex((await create('twice', '--out', folder)).stdout, /^the identity of service twice is in \S+, valid until 20/)
  t.not(await readFile(join(folder, 'service.crt'), 'utf8'), before)
  const { authorize } = mesh().clients({ ...mesh().anonymous, certificatePem: before, keyPem: keyBefore })
  await t.notThrowsAsync(unary(authorize, 'check', { question, deviceId: 'nobody' }))
})

for (const [name, why] of [
  ['edgemesh', /name edgemesh is the name of the server itself/],
  ['Edge Proxy', /name has to be of 1 to 64 characters of a-z/],
] as const) {
  test(`no identity is made for a service called ${name}, and nothing is left in the folder`, async t => {
    const folder = await emptyFolder(t)
    const { exitCode, stderr } = await create(name, '--out', folder)
    t.is(exitCode, 1)
    t.regex(stderr, why)
    t.deepEqual(await readdir(folder), [])
  })
}
