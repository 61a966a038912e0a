/** A user without our agent: openssl makes the key and the request, and judges what it gets for them. */
import { execFile, spawnSync } from 'node:child_process'
import { readFile, symlink } from 'node:fs/promises'
import { delimiter, dirname, join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import type { EnrollRequest, EnrollResponse, EnrollServiceClient, Identity } from '../../src/gen/edgemesh/v1/enroll.ts'
import type { DeviceDescription } from '../../src/gen/edgemesh/v1/types.ts'
import { heartbeats } from '../support/device.ts'
import { sharedEdgeMesh, unary } from '../support/edgemesh.ts'
import { findGrpcurl } from '../support/grpcurl.ts'
import { healthy } from '../support/healthy.ts'
import { type OpensslFolder, opensslFolder } from '../support/openssl.ts'

const mesh = sharedEdgeMesh(test)

const repository = join(import.meta.dirname, '../..')

/** By the type of key: what `openssl genpkey` is told, and what it says of the key afterwards. */
const keys: Record<string, { genpkey: string[]; printed: RegExp }> = {
  'P-256': { genpkey: ['EC', '-pkeyopt', 'ec_paramgen_curve:P-256'], printed: /NIST CURVE: P-256/ },
  'P-384': { genpkey: ['EC', '-pkeyopt', 'ec_paramgen_curve:P-384'], printed: /NIST CURVE: P-384/ },
  Ed25519: { genpkey: ['ED25519'], printed: /Public Key Algorithm: ED25519/ },
  'RSA 2048': { genpkey: ['RSA', '-pkeyopt', 'rsa_keygen_bits:2048'], printed: /Public-Key: \(2048 bit\)/ },
  'RSA 4096': { genpkey: ['RSA', '-pkeyopt', 'rsa_keygen_bits:4096'], printed: /Public-Key: \(4096 bit\)/ },
}

/** Asks for a name, for names and for powers that it must not get. */
const requestConfiguration = (challenge: string) => `
[req]
prompt = no
distinguished_name = subject
attributes = attributes
req_extensions = extensions
[subject]
O = Bank of Elsewhere
CN = root
[attributes]
challengePassword = ${challenge}
[extensions]
subjectAltName = URI:spiffe://elsewhere/operator/root, DNS:bank.example
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
`

async function requestMadeBy(folder: OpensslFolder, genpkey: string[], challenge: string): Promise<Buffer> {
  await folder.openssl('genpkey', '-algorithm', ...genpkey, '-out', 'device.key')
  await folder.write('request.cnf', requestConfiguration(challenge))
  await folder.openssl('req', '-new', '-config', 'request.cnf', '-key', 'device.key', '-out', 'device.csr')
  return Buffer.from(await folder.read('device.csr'))
}

function enrolled(client: EnrollServiceClient, request: EnrollRequest): Promise<Identity> {
  return new Promise((resolve, reject) => {
    const call = client.enroll(request)
    call.on('data', ({ step }: EnrollResponse) => step?.$case === 'identity' && resolve(step.value))
    call.on('error', reject)
    call.on('end', () => reject(new Error('the stream has ended without an identity')))
  })
}

for (const [keyType, { genpkey, printed }] of Object.entries(keys)) {
  test(`a request that openssl made for a ${keyType} key gives a device that openssl finds nothing wrong with`, async t => {
    const folder = await opensslFolder(t)
    const { enroll } = mesh().clients(mesh().anonymous)
    const { challenge } = await unary(enroll, 'getChallenge', {})
    const csr = await requestMadeBy(folder, genpkey, challenge)
    const id = `made-by-openssl-${keyType.toLowerCase().replace(' ', '-')}`
    const device: DeviceDescription = { id, type: 2, os: 'linux', osVersion: '', labels: {} }
    const identity = await enrolled(enroll, { token: await mesh().token(), csr, device, sentAt: undefined })

    const [leaf = '', ...intermediates] = identity.certificateChainPem
    await folder.write('leaf', leaf)
    await folder.write('intermediates', intermediates.join(''))
    await folder.write('roots', mesh().anonymous.rootsPem)
    const verify = (purpose: string) =>
      folder.openssl(
        ...['verify', '-x509_strict', '-check_ss_sig', '-purpose', purpose],
        ...['-CAfile', 'roots', '-untrusted', 'intermediates', 'leaf'],
      )
    const asClient = await verify('sslclient')
    t.true(asClient.ok, asClient.said)
    t.false((await verify('sslserver')).ok, 'a device is no server')

    const { said: ofKey } = await folder.openssl('pkey', '-in', 'device.key', '-pubout')
    const { said: ofLeaf } = await folder.openssl('x509', '-in', 'leaf', '-noout', '-pubkey')
    t.is(ofLeaf, ofKey, 'the certificate is for the key of the request')

    const { said } = await folder.openssl('x509', '-in', 'leaf', '-noout', '-text')
    const text = said.replace(/\s+/g, ' ')
    t.regex(text, printed)
    t.regex(text, new RegExp(`Subject: CN = ${id} `))
    t.deepEqual(text.match(/URI:\S+/g), [`URI:spiffe://edgemesh.local/device/${id}`], 'exactly one URI')
    t.notRegex(text, /elsewhere|bank|challenge/i, 'nothing is taken from the request but its key')
    t.notRegex(text, /DNS:|IP Address:/)
    t.regex(text, /X509v3 Basic Constraints: critical CA:FALSE X509v3/)
    t.regex(text, /X509v3 Key Usage: critical Digital Signature X509v3/)
    t.regex(text, /X509v3 Extended Key Usage: TLS Web Client Authentication X509v3/)
    t.regex(text, /Serial Number: ([0-9a-f]{2}:){15}[0-9a-f]{2} /)

    const identifier = async (file: string, name: string) => {
      const { said: extension } = await folder.openssl('x509', '-in', file, '-noout', '-ext', name)
      return /(?:[0-9A-F]{2}:){19}[0-9A-F]{2}/.exec(extension)?.[0]
    }
    t.truthy(await identifier('leaf', 'subjectKeyIdentifier'))
    t.is(
      await identifier('leaf', 'authorityKeyIdentifier'),
      await identifier('intermediates', 'subjectKeyIdentifier'),
      'the authority key identifier is the key identifier of its issuer',
    )

    const keyPem = await folder.read('device.key')
    const credentials = { ...mesh().anonymous, keyPem, certificatePem: identity.certificateChainPem.join('') }
    await heartbeats(t, mesh(), credentials).beat(healthy)
  })
}

const grpcurl = findGrpcurl()
const missing = [...(grpcurl ? [] : ['grpcurl']), ...(spawnSync('jq', ['--version']).status === 0 ? [] : ['jq'])]
const following = missing.length === 0 ? test : test.skip
if (missing.length > 0) test.skip(`not on this machine: ${missing.join(', ')}`, t => t.pass())

/** What a page has to be typed into a shell, one block after another. */
async function shellOf(page: string): Promise<string> {
  const text = await readFile(join(repository, page), 'utf8')
  return [...text.matchAll(/^```sh\n(.*?)^```$/gms)].map(([, block]) => block).join('')
}

async function follow(t: ExecutionContext, token: string) {
  const { path } = await opensslFolder(t)
  await symlink(join(repository, 'proto'), join(path, 'proto'))
  const PATH = `${dirname(grpcurl as string)}${delimiter}${process.env.PATH}`
  return sh(
    await shellOf('docs/enroll-with-openssl.md'),
    { PATH, TOKEN: token, SERVER: `localhost:${mesh().server.apiPort}` },
    path,
  )
}

function sh(script: string, env: NodeJS.ProcessEnv, cwd: string): Promise<{ code: number; said: string }> {
  return new Promise(resolve => {
    execFile('sh', ['-euc', script], { env, cwd }, (error, stdout, stderr) =>
      resolve({ code: error ? Number(error.code ?? 1) : 0, said: stdout + stderr }),
    )
  })
}

following('who follows docs/enroll-with-openssl.md to the letter has a device', async t => {
  const { code, said } = await follow(t, await mesh().token({ deviceId: 'by-the-book' }))
  t.is(code, 0, said)
  t.regex(said, /^my-device\/device\.crt: OK$/m)
  t.regex(said, /^edgemesh\.v1\.HeartbeatService$/m, 'what only those are shown who have a certificate')
  const { device } = await unary(mesh().admin, 'getDevice', { id: 'by-the-book' })
  t.is(device?.type, 2)
})

following('who follows it with the token of another server stops before the token is sent', async t => {
  const token = await mesh().token()
  const ofAnother = token.replace(/[^.]*$/, Buffer.alloc(32).toString('base64url'))
  const { code, said } = await follow(t, ofAnother)
  t.not(code, 0)
  t.regex(said, /localhost:\d+ is not the server that the token is for/)
  const [, id] = token.split('.')
  const { rows } = await mesh().pool.query("select from audit_events where method like '%/Enroll' and target = $1", [
    `token/${id}`,
  ])
  t.deepEqual(rows, [])
})
