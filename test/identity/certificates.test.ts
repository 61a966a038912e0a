/** Outside judges: the `openssl` command, node's own X509Certificate and TLS, and pkijs. */
import { execFile } from 'node:child_process'
import { createHash, generateKeyPairSync, type KeyObject, randomBytes, X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import tls from 'node:tls'
import { promisify } from 'node:util'
import test from 'ava'
import fc from 'fast-check'
import * as pkijs from 'pkijs'
import { type Authority, createAuthority, openAuthority } from '../../src/identity/certificate-authority.ts'
import { describeCertificate } from '../../src/identity/certificate-description.ts'
import {
  extension,
  type IssuedCertificate,
  type LeafTemplate,
  lintLeaf,
  newSerial,
  signed,
} from '../../src/identity/certificates.ts'
import {
  bitString,
  boolean,
  contextConstructed,
  contextPrimitive,
  DerError,
  decodeDer,
  integer,
  octetString,
  oid,
  sequence,
} from '../../src/identity/der.ts'
import { encodePem } from '../../src/identity/pem.ts'

const run = promisify(execFile)

const passphrase = 'a passphrase of the tests'
const dayMs = 24 * 60 * 60 * 1000
const now = new Date()
const inDays = (days: number) => new Date(now.getTime() + days * dayMs)

const material = await createAuthority({ trustDomain: 'edgemesh.test', validityDays: 365, now, passphrase })
const authority: Authority = openAuthority({ ...material, passphrase })

const keyPair = (): { spki: Buffer; privateKey: KeyObject } => {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  return { spki: publicKey.export({ format: 'der', type: 'spki' }), privateKey }
}

const template = (change: Partial<LeafTemplate> = {}): LeafTemplate => ({
  serial: Buffer.from(newSerial(), 'hex'),
  spki: keyPair().spki,
  spiffeId: 'spiffe://edgemesh.test/device/sensor-7',
  purpose: 'client',
  commonName: 'sensor-7',
  notBefore: now,
  notAfter: inDays(90),
  ...change,
})

const serverTemplate = (change: Partial<LeafTemplate> = {}): LeafTemplate =>
  template({
    spiffeId: 'spiffe://edgemesh.test/service/edgemesh',
    purpose: 'server',
    commonName: 'edgemesh',
    dnsNames: ['localhost', 'api.edgemesh.test'],
    ipAddresses: ['127.0.0.1', '2001:db8::1:0:ff', '::1', '::ffff:192.0.2.1'],
    crlUrl: 'http://crl.edgemesh.test/edgemesh.crl',
    ...change,
  })

/** Runs with a folder that holds `root.pem`, `intermediate.pem` and `leaf.pem`. */
async function withFiles<T>(leaf: IssuedCertificate, use: (file: (name: string) => string) => Promise<T>): Promise<T> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-certificates-'))
  const file = (name: string) => join(folder, name)
  try {
    await writeFile(file('root.pem'), authority.rootPem)
    await writeFile(file('intermediate.pem'), authority.intermediates.join(''))
    await writeFile(file('leaf.pem'), leaf.pem)
    return await use(file)
  } finally {
    await rm(folder, { recursive: true })
  }
}

async function opensslVerify(leaf: IssuedCertificate, purpose: string): Promise<boolean> {
  return withFiles(leaf, async file => {
    const chain = ['-CAfile', file('root.pem'), '-untrusted', file('intermediate.pem')]
    const command = ['verify', '-x509_strict', '-check_ss_sig', '-purpose', purpose, ...chain, file('leaf.pem')]
    return run('openssl', command).then(
      () => true,
      () => false,
    )
  })
}

test('openssl verifies a client for sslclient and for nothing else', async t => {
  const leaf = authority.issueLeaf(template())
  t.true(await opensslVerify(leaf, 'sslclient'))
  t.false(await opensslVerify(leaf, 'sslserver'))
})

test('openssl verifies a server for sslserver and for nothing else', async t => {
  const leaf = authority.issueLeaf(serverTemplate())
  t.true(await opensslVerify(leaf, 'sslserver'))
  t.false(await opensslVerify(leaf, 'sslclient'))
})

test('openssl prints what the template says', async t => {
  const leaf = authority.issueLeaf(serverTemplate({ organizationalUnit: 'instance' }))
  const { stdout } = await withFiles(leaf, file => run('openssl', ['x509', '-in', file('leaf.pem'), '-noout', '-text']))
  const text = stdout.replace(/\s+/g, ' ')
  t.regex(text, /Version: 3 \(0x2\)/)
  t.regex(text, /Subject: OU = instance, CN = edgemesh/)
  t.regex(text, /Signature Algorithm: ecdsa-with-SHA256/)
  t.regex(text, /X509v3 Basic Constraints: critical CA:FALSE/)
  t.regex(text, /X509v3 Key Usage: critical Digital Signature X509v3/)
  t.regex(text, /X509v3 Extended Key Usage: TLS Web Server Authentication X509v3/)
  t.regex(text, /URI:spiffe:\/\/edgemesh.test\/service\/edgemesh, DNS:localhost, DNS:api.edgemesh.test,/)
  t.regex(text, /IP Address:127.0.0.1, IP Address:2001:DB8:0:0:0:1:0:FF, IP Address:0:0:0:0:0:0:0:1,/)
  t.regex(text, /IP Address:0:0:0:0:0:FFFF:C000:201/)
  t.regex(text, /X509v3 Subject Key Identifier: ([0-9A-F]{2}:){19}/)
  t.regex(text, /X509v3 CRL Distribution Points: Full Name: URI:http:\/\/crl.edgemesh.test\/edgemesh.crl/)
  t.true(
    text.includes(
      `Authority Key Identifier: ${authority.issuer.keyId.toString('hex').toUpperCase().match(/../g)!.join(':')}`,
    ),
  )
})

test('node reads the same certificate as we do', t => {
  const leaf = authority.issueLeaf(template())
  const node = new X509Certificate(leaf.pem)
  const described = describeCertificate(leaf.der)
  t.is(node.serialNumber.toLowerCase(), leaf.serialHex)
  t.is(node.fingerprint256.replaceAll(':', '').toLowerCase(), leaf.fingerprintSha256)
  t.is(node.subjectAltName, 'URI:spiffe://edgemesh.test/device/sensor-7')
  t.is(node.validToDate.getTime(), leaf.notAfter.getTime())
  t.deepEqual(described, {
    serialHex: leaf.serialHex,
    spiffeId: { trustDomain: 'edgemesh.test', kind: 'device', id: 'sensor-7' },
    notBefore: node.validFromDate,
    notAfter: node.validToDate,
    publicKeySha256: createHash('sha256')
      .update(node.publicKey.export({ format: 'der', type: 'spki' }))
      .digest('hex'),
    organizationalUnit: undefined,
    issuerKeyId: authority.issuerKeyId,
    hasClientAuth: true,
  })
})

test('pkijs writes the same bytes as it reads', t => {
  const { der } = authority.issueLeaf(serverTemplate())
  const certificate = pkijs.Certificate.fromBER(der)
  t.deepEqual(Buffer.from(certificate.toSchema(true).toBER()), der)
})

test("an operator's role is in the certificate, a server's certificate is no client's", t => {
  const operator = authority.issueLeaf(
    template({ spiffeId: 'spiffe://edgemesh.test/operator/ada', commonName: 'ada', organizationalUnit: 'admin' }),
  )
  t.like(describeCertificate(operator.der), { organizationalUnit: 'admin', hasClientAuth: true })
  t.false(describeCertificate(authority.issueLeaf(serverTemplate()).der).hasClientAuth)
})

test('validity is cut to whole seconds and kept inside that of the issuer', t => {
  const odd = new Date(Math.floor(now.getTime() / 1000) * 1000 + 789)
  const { notBefore } = authority.issueLeaf(template({ notBefore: odd }))
  t.is(notBefore.getTime(), odd.getTime() - 789)

  const endless = authority.issueLeaf(template({ notBefore: new Date(0), notAfter: inDays(10_000) }))
  t.deepEqual(endless.notBefore, authority.issuer.notBefore)
  t.deepEqual(endless.notAfter, authority.issuer.notAfter)
  t.throws(() => authority.issueLeaf(template({ notBefore: inDays(400), notAfter: inDays(490) })), {
    message: /none of its time is within the CA's/,
  })
})

test('years from 2050 on are written as GeneralizedTime', async t => {
  const longLived = await createAuthority({ trustDomain: 'edgemesh.test', validityDays: 36_500, now, passphrase })
  const { der, notAfter } = openAuthority({ ...longLived, passphrase }).issueLeaf(
    template({ notAfter: new Date('2061-02-03T04:05:06Z') }),
  )
  t.is(new X509Certificate(der).validToDate.toISOString(), '2061-02-03T04:05:06.000Z')
  t.deepEqual(describeCertificate(der).notAfter, notAfter)
})

const impossible: Record<string, Partial<LeafTemplate>> = {
  'a serial of another length': { serial: Buffer.alloc(15, 0x40) },
  'a negative serial': { serial: Buffer.alloc(16, 0xff) },
  'no SPIFFE ID': { spiffeId: 'sensor-7' },
  'an empty common name': { commonName: '' },
  'a common name of 65 characters': { commonName: 'a'.repeat(65) },
  'a role that is not an id': { organizationalUnit: 'admin, CN=root' },
  'a DNS name with a wildcard': { dnsNames: ['*.edgemesh.test'] },
  'an IP address that is none': { ipAddresses: ['256.0.0.1'] },
  'an IP address with a zone': { ipAddresses: ['fe80::1%eth0'] },
  'a CRL that is a file': { crlUrl: 'file:///etc/passwd' },
  'no time at all': { notAfter: now },
  'a time that is none': { notAfter: new Date(Number.NaN) },
}

for (const [what, change] of Object.entries(impossible)) {
  test(`no certificate is made with ${what}`, t => {
    t.throws(() => authority.issueLeaf(template(change)), { instanceOf: RangeError })
  })
}

test('serials are positive, of one length, and differ', t => {
  const serials = Array.from({ length: 1000 }, newSerial)
  for (const serial of serials) t.regex(serial, /^[4-7][0-9a-f]{31}$/)
  t.is(new Set(serials).size, serials.length)
})

type Forgery = { parts?: Record<number, Buffer>; extensions?: Record<number, Buffer> }

/** Places in a certificate of ours: those of TBSCertificate, and those in its list of extensions. */
const [serialAt, issuerAt, subjectAt, extensionsAt] = [1, 3, 5, 7] as const
const [constraintsAt, usageAt, purposeAt, namesAt, keyIdAt, authorityKeyIdAt, oneMoreAt] = [
  0, 1, 2, 3, 4, 5, 6,
] as const

/** A leaf like ours with parts replaced, properly signed by our CA: what only `lintLeaf` can hold back. */
function forgedLeaf(forgery: Forgery): Buffer {
  const { children } = decodeDer(authority.issueLeaf(template()).der).children[0]!
  const extensions = children[extensionsAt]!.children[0]!.children.map(part => part.der)
  const changed = contextConstructed(3, sequence(...Object.assign(extensions, forgery.extensions)))
  const parts = children.map(part => part.der)
  return signed(authority.issuer, sequence(...Object.assign(parts, forgery.parts, { [extensionsAt]: changed })))
}

const plain = (id: string, value: Buffer) => extension(id, { critical: false }, value)
const critical = (id: string, value: Buffer) => extension(id, { critical: true }, value)
const subjectAltName = (...uris: string[]) =>
  plain('2.5.29.17', sequence(...uris.map(uri => contextPrimitive(6, Buffer.from(uri)))))
const purposes = (...ids: string[]) => plain('2.5.29.37', sequence(...ids.map(oid)))

const device = 'spiffe://edgemesh.test/device/a'
const [serverAuth, clientAuth, codeSigning] = ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2', '1.3.6.1.5.5.7.3.3'] as const

const lintFindings: Record<string, [RegExp, Forgery]> = {
  'a CA': [/not a CA/, { extensions: { [constraintsAt]: critical('2.5.29.19', sequence(boolean(true))) } }],
  'basic constraints that are not critical': [
    /basic constraints critical/,
    { extensions: { [constraintsAt]: plain('2.5.29.19', sequence()) } },
  ],
  'a key usage beyond signatures': [
    /digitalSignature/,
    { extensions: { [usageAt]: critical('2.5.29.15', bitString(Buffer.of(0x86), 1)) } },
  ],
  'a key usage that is not critical': [
    /key usage critical/,
    { extensions: { [usageAt]: plain('2.5.29.15', bitString(Buffer.of(0x80), 7)) } },
  ],
  'two purposes': [/one purpose/, { extensions: { [purposeAt]: purposes(serverAuth, clientAuth) } }],
  'another purpose': [/clientAuth or serverAuth/, { extensions: { [purposeAt]: purposes(codeSigning) } }],
  'no URI': [/exactly one URI/, { extensions: { [namesAt]: subjectAltName() } }],
  'two URIs': [/exactly one URI/, { extensions: { [namesAt]: subjectAltName(device, device) } }],
  "someone else's key identifier": [
    /4\.2\.1\.2/,
    { extensions: { [keyIdAt]: plain('2.5.29.14', octetString(randomBytes(20))) } },
  ],
  'an authority key identifier of another CA': [
    /4\.2\.1\.1/,
    { extensions: { [authorityKeyIdAt]: plain('2.5.29.35', sequence(contextPrimitive(0, randomBytes(20)))) } },
  ],
  'an extension twice': [/twice/, { extensions: { [oneMoreAt]: subjectAltName(device) } }],
  'a short serial': [/serial/, { parts: { [serialAt]: integer(5) } }],
  'the name of another issuer': [/4\.1\.2\.4/, { parts: { [issuerAt]: sequence() } }],
  'no subject': [/4\.1\.2\.6/, { parts: { [subjectAt]: sequence() } }],
}

for (const [what, [finding, forgery]] of Object.entries(lintFindings)) {
  test(`the lint finds ${what}`, t => {
    t.throws(() => lintLeaf(forgedLeaf(forgery), authority.issuer), { message: finding })
  })
}

test("the lint finds a signature that is not the issuer's, and lets pass what is right", t => {
  t.notThrows(() => lintLeaf(forgedLeaf({}), authority.issuer))
  const der = Buffer.from(authority.issueLeaf(template()).der)
  der[der.length - 1]! ^= 1
  t.throws(() => lintLeaf(der, authority.issuer), { message: /signature/ })
})

test('a certificate with two URIs, or with a foreign one, names nobody', t => {
  const withNames = (...uris: string[]) =>
    describeCertificate(forgedLeaf({ extensions: { [namesAt]: subjectAltName(...uris) } }))
  t.is(withNames(device, 'spiffe://edgemesh.test/operator/root').spiffeId, undefined)
  t.is(withNames(device, 'https://elsewhere.test').spiffeId, undefined)
  t.is(withNames('https://elsewhere.test').spiffeId, undefined)
  t.is(withNames(`${device}\0`).spiffeId, undefined)
  t.deepEqual(withNames(device).spiffeId, { trustDomain: 'edgemesh.test', kind: 'device', id: 'a' })
})

test('bytes that are not a certificate are told apart by a DerError', t => {
  const original = authority.issueLeaf(template()).der
  const changed = fc
    .tuple(fc.nat(original.length - 1), fc.uint8Array({ minLength: 1, maxLength: 4 }))
    .map(([at, insert]) => Buffer.concat([original.subarray(0, at), insert, original.subarray(at + 1)]))
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array(), changed), bytes => {
      try {
        t.is(describeCertificate(bytes).publicKeySha256.length, 64)
      } catch (error) {
        t.true(error instanceof DerError, String(error))
      }
    }),
    { numRuns: 2000 },
  )
})

for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
  test(`a server and a client meet over ${version} and each knows the other`, async t => {
    const serverKey = keyPair()
    const clientKey = keyPair()
    const serverLeaf = authority.issueLeaf(serverTemplate({ spki: serverKey.spki }))
    const clientLeaf = authority.issueLeaf(template({ spki: clientKey.spki }))
    const credentials = (leaf: IssuedCertificate, key: KeyObject) => ({
      ca: [authority.rootPem],
      cert: [leaf.pem, ...authority.intermediates].join(''),
      key: key.export({ format: 'pem', type: 'pkcs8' }),
      minVersion: version,
      maxVersion: version,
    })

    const server = tls.createServer({
      ...credentials(serverLeaf, serverKey.privateKey),
      requestCert: true,
      rejectUnauthorized: true,
    })
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const accepted = once(server, 'secureConnection')
    const { port } = server.address() as AddressInfo
    const client = tls.connect({ host: '127.0.0.1', port, ...credentials(clientLeaf, clientKey.privateKey) })
    try {
      await once(client, 'secureConnect')
      const [atServer] = (await accepted) as [tls.TLSSocket]
      t.true(client.authorized)
      t.true(atServer.authorized)
      t.is(describeCertificate(atServer.getPeerCertificate().raw).spiffeId?.id, 'sensor-7')
      t.is(describeCertificate(client.getPeerCertificate().raw).spiffeId?.kind, 'service')
    } finally {
      client.destroy()
      server.close()
      await once(server, 'close')
    }
  })
}

async function opensslCrl(crl: Buffer): Promise<string> {
  return withFiles(authority.issueLeaf(template()), async file => {
    await writeFile(file('crl.pem'), encodePem('X509 CRL', crl))
    // -CAfile makes it check the signature, and say so on stderr.
    const command = ['crl', '-in', file('crl.pem'), '-CAfile', file('intermediate.pem'), '-noout', '-text']
    const { stdout, stderr } = await run('openssl', command, { maxBuffer: 1 << 24 })
    return `${stderr} ${stdout}`.replace(/\s+/g, ' ')
  })
}

test('openssl reads a revocation list and its signature', async t => {
  const serials = [newSerial(), newSerial()] as const
  const text = await opensslCrl(
    authority.issueCrl({
      number: 4711,
      thisUpdate: new Date('2030-01-02T03:04:05Z'),
      nextUpdate: new Date('2030-01-03T03:04:05Z'),
      revoked: [
        { serialHex: serials[0], revokedAt: new Date('2030-01-01T00:00:00Z'), reason: 'keyCompromise' },
        { serialHex: serials[1], revokedAt: new Date('2030-01-01T00:00:00Z') },
      ],
    }),
  )
  t.regex(text, /^verify OK/)
  t.regex(text, /Version 2 \(0x1\)/)
  t.regex(text, /Last Update: Jan 2 03:04:05 2030 GMT Next Update: Jan 3 03:04:05 2030 GMT/)
  t.regex(text, /X509v3 CRL Number: 4711/)
  t.true(text.includes('X509v3 Authority Key Identifier'))
  t.true(text.includes(`Serial Number: ${serials[0].toUpperCase()} Revocation Date: Jan 1 00:00:00 2030 GMT CRL entry`))
  t.true(text.includes('X509v3 CRL Reason Code: Key Compromise'))
  t.regex(text, new RegExp(`Serial Number: ${serials[1].toUpperCase()} Revocation Date: Jan 1 00:00:00 2030 GMT Sig`))
})

test('a list of nothing says that nothing is revoked', async t => {
  const crl = authority.issueCrl({ number: 1, thisUpdate: now, nextUpdate: inDays(1), revoked: [] })
  t.regex(await opensslCrl(crl), /^verify OK .*No Revoked Certificates/)
})

test('openssl refuses a leaf that the list names', async t => {
  const revoked = authority.issueLeaf(template())
  const spared = authority.issueLeaf(template())
  const crl = authority.issueCrl({
    number: 2,
    thisUpdate: new Date(now.getTime() - 1000),
    nextUpdate: inDays(1),
    revoked: [{ serialHex: revoked.serialHex, revokedAt: now, reason: 'superseded' }],
  })
  const verifies = (leaf: IssuedCertificate) =>
    withFiles(leaf, async file => {
      await writeFile(file('crl.pem'), encodePem('X509 CRL', crl))
      const chain = ['-CAfile', file('root.pem'), '-untrusted', file('intermediate.pem'), '-CRLfile', file('crl.pem')]
      return run('openssl', ['verify', '-crl_check', ...chain, file('leaf.pem')]).then(
        () => 'verified',
        error => String(error.stderr),
      )
    })
  t.is(await verifies(spared), 'verified')
  t.regex(await verifies(revoked), /certificate revoked/)
})

test('a list of ten thousand is made, and one that is over before it begins is not', async t => {
  const revoked = Array.from({ length: 10_000 }, () => ({ serialHex: newSerial(), revokedAt: now }))
  const crl = authority.issueCrl({ number: 3, thisUpdate: now, nextUpdate: inDays(1), revoked })
  t.is((await opensslCrl(crl)).match(/Serial Number: /g)?.length, 10_000)
  t.throws(() => authority.issueCrl({ number: 3, thisUpdate: now, nextUpdate: now, revoked: [] }), {
    instanceOf: RangeError,
  })
  t.throws(
    () =>
      authority.issueCrl({
        number: 3,
        thisUpdate: now,
        nextUpdate: inDays(1),
        revoked: [{ serialHex: 'x', revokedAt: now }],
      }),
    {
      instanceOf: RangeError,
    },
  )
})
