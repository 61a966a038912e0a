import { execFile } from 'node:child_process'
import { createHash, createPrivateKey, generateKeyPairSync, X509Certificate } from 'node:crypto'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import test from 'ava'
import {
  type AuthorityMaterial,
  createAuthority,
  openAuthority,
  openKey,
  sealKey,
} from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { encodePem } from '../../src/identity/pem.ts'

const run = promisify(execFile)

const passphrase = 'a passphrase of the tests'
const now = new Date('2030-01-02T03:04:05Z')
const trustDomain = 'edgemesh.test'
const create = (): Promise<AuthorityMaterial> => createAuthority({ trustDomain, validityDays: 365, now, passphrase })

const material = await create()
const other = await create()

test('root and intermediate are what RFC 5280 wants of them', async t => {
  for (const [pem, pathLength] of [
    [material.rootPem, 2],
    [material.intermediatePem, 0],
  ] as const) {
    const printing = run('openssl', ['x509', '-noout', '-text'])
    printing.child.stdin!.end(pem)
    const text = (await printing).stdout.replace(/\s+/g, ' ')
    t.true(text.includes(`X509v3 Basic Constraints: critical CA:TRUE, pathlen:${pathLength}`))
    t.true(text.includes('X509v3 Key Usage: critical Certificate Sign, CRL Sign X509v3'))
    t.true(text.includes('ASN1 OID: prime256v1'))
    t.true(text.includes('Signature Algorithm: ecdsa-with-SHA256'))
    t.true(text.includes('URI:spiffe://edgemesh.test '))
    t.true(text.includes('Not After : Jan 2 03:04:05 2031 GMT'))
    t.regex(text, /X509v3 Subject Key Identifier: .*X509v3 Authority Key Identifier: /)
  }
})

test('openssl verifies the chain strictly', async t => {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-authority-'))
  try {
    await writeFile(join(folder, 'root.pem'), material.rootPem)
    await writeFile(join(folder, 'intermediate.pem'), material.intermediatePem)
    const at = String(now.getTime() / 1000)
    const options = ['verify', '-x509_strict', '-check_ss_sig', '-attime', at, '-CAfile', join(folder, 'root.pem')]
    await t.notThrowsAsync(run('openssl', [...options, join(folder, 'intermediate.pem')]))
  } finally {
    await rm(folder, { recursive: true })
  }
})

test('an opened authority knows its root by the hash that tokens pin', t => {
  const authority = openAuthority({ ...material, passphrase })
  const root = new X509Certificate(material.rootPem)
  const spki = root.publicKey.export({ format: 'der', type: 'spki' })
  t.is(authority.rootKeySha256, createHash('sha256').update(spki).digest('hex'))
  t.is(authority.rootPem, material.rootPem)
  t.deepEqual(authority.intermediates, [material.intermediatePem])
  t.is(encodePem('CERTIFICATE', authority.issuer.certificateDer), material.intermediatePem)
})

test('keys are sealed by PBES2 with AES-256', async t => {
  for (const pem of [material.rootKeyPem, material.intermediateKeyPem]) {
    t.regex(pem, /^-----BEGIN ENCRYPTED PRIVATE KEY-----\n/)
    const printing = run('openssl', ['asn1parse'])
    printing.child.stdin!.end(pem)
    t.regex((await printing).stdout, /PBES2.*PBKDF2.*hmacWithSHA256.*aes-256-cbc/s)
  }
})

test("the root's sealed key is the root's", t => {
  t.true(new X509Certificate(material.rootPem).checkPrivateKey(openKey(material.rootKeyPem, passphrase)))
})

test('a sealed key is opened by its passphrase alone, and what is wrong is said', t => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const sealed = sealKey(privateKey, passphrase)
  t.true(openKey(sealed, passphrase).equals(privateKey))
  t.throws(() => openKey(sealed, 'another passphrase of the tests'), { message: /^CA_KEY_PASSPHRASE does not open/ })
  t.throws(() => openKey(sealed), { message: /set CA_KEY_PASSPHRASE/ })
  t.throws(() => openKey(sealed, ''), { message: /set CA_KEY_PASSPHRASE/ })
  t.throws(() => openKey('nonsense', passphrase), { message: /not a private key in PEM/ })
  t.throws(() => sealKey(privateKey, 'short'), { message: /CA_KEY_PASSPHRASE has 5 characters/ })
})

test('a key that is not sealed needs no passphrase', t => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const pem = privateKey.export({ format: 'pem', type: 'pkcs8' })
  t.true(openKey(pem).equals(privateKey))
  t.true(openKey(pem, passphrase).equals(createPrivateKey(pem)))
})

const mixedUp: Record<string, [RegExp, Partial<AuthorityMaterial>]> = {
  'the key of another CA': [/key does not belong/, { intermediateKeyPem: other.intermediateKeyPem }],
  'the root of another CA': [/not issued by any root/, { rootPem: other.rootPem }],
  'no root': [/no root certificate found/, { rootPem: '' }],
  'no intermediate': [/no intermediate certificate found/, { intermediatePem: 'nonsense' }],
  'an intermediate in place of the root': [/not issued by any root/, { rootPem: material.intermediatePem }],
  'a certificate that is no certificate': [
    /the root certificate can't be read/,
    { rootPem: '-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n' },
  ],
}

for (const [what, [message, change]] of Object.entries(mixedUp)) {
  test(`not opened with ${what}`, t => {
    t.throws(() => openAuthority({ ...material, ...change, passphrase }), { message })
  })
}

test('a leaf is no CA', t => {
  const authority = openAuthority({ ...material, passphrase })
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const leaf = authority.issueLeaf({
    serial: Buffer.from(newSerial(), 'hex'),
    spki: publicKey.export({ format: 'der', type: 'spki' }),
    spiffeId: 'spiffe://edgemesh.test/device/a',
    purpose: 'client',
    commonName: 'a',
    notBefore: now,
    notAfter: new Date(now.getTime() + 1000),
  })
  const intermediateKeyPem = sealKey(privateKey, passphrase)
  t.throws(() => openAuthority({ ...material, intermediatePem: leaf.pem, intermediateKeyPem, passphrase }), {
    message: /is not that of a CA/,
  })
})

test('authorities side by side have names of their own', t => {
  t.not(new X509Certificate(material.rootPem).subject, new X509Certificate(other.rootPem).subject)
})

test('a trust domain that could not be in a SPIFFE ID is refused', async t => {
  await t.throwsAsync(createAuthority({ trustDomain: 'a/b', validityDays: 1, now, passphrase }), {
    message: /trust domain/,
  })
})

for (const [keyType, arguments_] of Object.entries({
  'rsa:2048': [],
  'P-384': ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-384'],
  ed25519: ['-newkey', 'ed25519'],
})) {
  test(`a CA that openssl made issues too: a self-signed one, ${keyType}`, async t => {
    const folder = await mkdtemp(join(tmpdir(), 'edgemesh-foreign-'))
    try {
      const [key, certificate] = [join(folder, 'key.pem'), join(folder, 'ca.pem')]
      const newKey = arguments_.length > 0 ? arguments_ : ['-newkey', keyType]
      const output = ['-nodes', '-keyout', key, '-out', certificate, '-subj', '/O=Example/CN=CA', '-days', '30']
      const usage = ['-addext', 'keyUsage=critical,keyCertSign,cRLSign']
      await run('openssl', ['req', '-x509', ...newKey, ...output, ...usage])
      const pem = await readFile(certificate, 'utf8')
      const authority = openAuthority({
        rootPem: pem,
        intermediatePem: pem,
        intermediateKeyPem: await readFile(key, 'utf8'),
      })
      t.deepEqual(authority.intermediates, [])
      const { publicKey } = generateKeyPairSync('ed25519')
      const leaf = authority.issueLeaf({
        serial: Buffer.from(newSerial(), 'hex'),
        spki: publicKey.export({ format: 'der', type: 'spki' }),
        spiffeId: 'spiffe://edgemesh.test/device/a',
        purpose: 'client',
        commonName: 'a',
        notBefore: new Date(),
        notAfter: new Date(Date.now() + 60_000),
      })
      const verified = join(folder, 'leaf.pem')
      await writeFile(verified, leaf.pem)
      await t.notThrowsAsync(run('openssl', ['verify', '-purpose', 'sslclient', '-CAfile', certificate, verified]))
    } finally {
      await rm(folder, { recursive: true })
    }
  })
}
