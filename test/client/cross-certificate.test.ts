/**
 * While one authority takes the place of another, servers and devices show chains that go on: from the leaf over the
 * authority that issues to the new root, as the old root has certified it. All certificates here are made by openssl.
 */
import { execFileSync } from 'node:child_process'
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ServerWritableStream, sendUnaryData } from '@grpc/grpc-js'
import test from 'ava'
import { enrollDevice, fetchTrustBundle } from '../../src/client/enroll.ts'
import { leadsToRoot } from '../../src/client/issued-identity.ts'
import {
  type EnrollRequest,
  type EnrollResponse,
  EnrollServiceService,
  type GetChallengeResponse,
  type GetTrustBundleResponse,
} from '../../src/gen/edgemesh/v1/enroll.ts'
import { TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'
import { issueLeaf, newSerial, openIssuer } from '../../src/identity/certificates.ts'
import { checkCsr } from '../../src/identity/csr.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { keySha256 } from '../agent/fleet-server.ts'
import { serveAs } from '../agent/small-server.ts'

const folder = mkdtempSync(join(tmpdir(), 'edgemesh-cross-'))
test.after.always(() => rmSync(folder, { recursive: true }))

const openssl = (...args: string[]) => execFileSync('openssl', args, { cwd: folder, stdio: 'pipe', encoding: 'utf8' })
const read = (name: string) => readFileSync(join(folder, name), 'utf8')

const ca = 'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n'
const keyIds = 'subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n'
const serverLeaf = 'basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\nsubjectAltName=DNS:localhost\n'

function makeKey(name: string): void {
  openssl('genpkey', '-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256', '-out', `${name}.key`)
}

/** A certificate for a key, by the key of another or by its own. */
function certify(
  certificate: string,
  { key, subject, by, as, ids = keyIds }: { key: string; subject: string; by?: string; as: string; ids?: string },
) {
  writeFileSync(join(folder, `${certificate}.ext`), as + ids)
  openssl('req', '-new', '-key', `${key}.key`, '-subj', `/CN=${subject}`, '-out', `${certificate}.csr`)
  const issuer = by ? ['-CA', `${by}.crt`, '-CAkey', `${by}.key`] : ['-signkey', `${key}.key`]
  const paths = ['-in', `${certificate}.csr`, '-extfile', `${certificate}.ext`, '-out', `${certificate}.crt`]
  openssl('x509', '-req', '-days', '2', ...issuer, ...paths)
}

for (const key of ['old', 'new', 'issuing', 'server']) makeKey(key)
certify('old', { key: 'old', subject: 'old root', as: ca })
certify('new', { key: 'new', subject: 'new root', as: ca })
certify('cross', { key: 'new', subject: 'new root', by: 'old', as: ca })
certify('issuing', { key: 'issuing', subject: 'issuing', by: 'new', as: ca })
certify('server', { key: 'server', subject: 'server', by: 'issuing', as: serverLeaf })
// Another key, under the same name and the same key identifier.
makeKey('forged')
const [keyId] =
  /(?:[0-9A-F]{2}:){19}[0-9A-F]{2}/.exec(openssl('x509', '-in', 'new.crt', '-noout', '-ext', 'subjectKeyIdentifier')) ??
  []
certify('forged', { key: 'forged', subject: 'new root', as: ca, ids: `subjectKeyIdentifier=${keyId}\n` })

const chains: { chain: string; roots: string; leads: boolean; why: string }[] = [
  { chain: 'server issuing', roots: 'new', leads: true, why: 'as ever' },
  { chain: 'server issuing cross', roots: 'old', leads: true, why: 'over the cross certificate' },
  { chain: 'server issuing cross', roots: 'new', leads: true, why: 'the chain goes on beyond a root that is trusted' },
  { chain: 'server issuing cross', roots: 'old new', leads: true, why: 'by either' },
  { chain: 'server issuing cross old', roots: 'old', leads: true, why: 'the root itself is sent along' },
  { chain: 'server issuing new', roots: 'new', leads: true, why: 'likewise' },
  {
    chain: 'server issuing cross old',
    roots: 'new',
    leads: true,
    why: 'what comes after a trusted root does not matter',
  },
  { chain: 'server issuing', roots: 'old', leads: false, why: 'the cross certificate is missing' },
  { chain: 'server cross', roots: 'old', leads: false, why: 'a link is missing' },
  { chain: 'server', roots: 'new', leads: false, why: 'likewise' },
  { chain: 'server issuing new', roots: 'old', leads: false, why: 'the new root vouches for itself only' },
  { chain: 'server issuing cross', roots: 'forged', leads: false, why: 'a name is no key' },
  { chain: 'server issuing forged', roots: 'old', leads: false, why: 'likewise' },
  { chain: 'server issuing cross', roots: '', leads: false, why: 'nobody is trusted' },
]

const named = (names: string) => names.split(' ').filter(Boolean)

for (const { chain, roots, leads, why } of chains) {
  const what = `${chain} ${leads ? 'leads' : 'does not lead'} to ${roots || 'nobody'}`
  test(`${what}, here and for openssl: ${why}`, t => {
    const certificates = (names: string) => named(names).map(name => new X509Certificate(read(`${name}.crt`)))
    t.is(leadsToRoot(certificates(chain), certificates(roots)), leads)

    const [leaf, ...untrusted] = named(chain)
    const files = { roots: `${what}.roots`.replaceAll(' ', '-'), untrusted: `${what}.untrusted`.replaceAll(' ', '-') }
    writeFileSync(
      join(folder, files.roots),
      named(roots)
        .map(name => read(`${name}.crt`))
        .join(''),
    )
    writeFileSync(join(folder, files.untrusted), untrusted.map(name => read(`${name}.crt`)).join(''))
    const trusted = roots ? ['-CAfile', files.roots] : []
    const verify = ['verify', '-no-CAfile', '-no-CApath', '-no-CAstore', ...trusted]
    const judged = () =>
      openssl(...verify, ...(untrusted.length > 0 ? ['-untrusted', files.untrusted] : []), `${leaf}.crt`)
    if (leads) t.regex(judged(), /: OK/)
    else t.throws(judged)
  })
}

const chainOf = (...names: string[]) => names.map(name => read(`${name}.crt`))

/** Issues to devices under the new authority, and shows a chain that goes on to the old root. */
function changingServer(t: Parameters<typeof serveAs>[0], { bundle, chain }: { bundle: string[]; chain: string[] }) {
  const issuer = openIssuer(new X509Certificate(read('issuing.crt')).raw, createPrivateKey(read('issuing.key')))
  const trustBundle = TrustBundle.fromPartial({ id: 'changing', rootsPem: chainOf(...bundle) })
  const implementation = {
    getChallenge(_call: unknown, done: sendUnaryData<GetChallengeResponse>) {
      done(null, { challenge: 'c1.0.0', expiresAt: new Date(), serverTime: new Date() })
    },
    getTrustBundle(_call: unknown, done: sendUnaryData<GetTrustBundleResponse>) {
      done(null, { trustBundle, serverTime: new Date() })
    },
    renewCertificate() {},
    enroll(call: ServerWritableStream<EnrollRequest, EnrollResponse>) {
      const spiffeId = 'spiffe://edgemesh.test/device/alpha'
      const { pem, notAfter } = issueLeaf(issuer, {
        serial: Buffer.from(newSerial(), 'hex'),
        spki: checkCsr(call.request.csr).spki,
        spiffeId,
        purpose: 'client',
        commonName: 'alpha',
        notBefore: new Date(),
        notAfter: new Date(Date.now() + 3_600_000),
      })
      const certificateChainPem = [pem, ...chainOf(...chain)]
      const value = { deviceId: 'alpha', spiffeId, certificateChainPem, trustBundle, notAfter, renewAfter: undefined }
      call.write({ step: { $case: 'identity', value }, serverTime: new Date() })
      call.end()
    },
  }
  const shown = { keyPem: read('server.key'), certificateChainPem: chainOf('server', 'issuing', 'cross').join('') }
  return serveAs(t, shown, [[EnrollServiceService, implementation]])
}

for (const pinned of ['old', 'new']) {
  test(`a token that pins the ${pinned} root enrolls a device while one takes the place of the other`, async t => {
    const { address } = await changingServer(t, { bundle: ['old', 'new'], chain: ['issuing', 'cross'] })
    const token = mintToken({ rootKeySha256: keySha256(read(`${pinned}.key`)) }).text
    const credentials = await enrollDevice({ server: address, token, device: {} })
    t.is(credentials.trustBundleId, 'changing')
    // Nothing was said of when to renew: late in its life, then.
    const leftMs = credentials.notAfter.getTime() - credentials.renewAfter.getTime()
    t.true(leftMs > 0.29 * 3_600_000 && leftMs < 0.41 * 3_600_000, `${leftMs}`)
  })

  test(`a device that trusts the ${pinned} root alone believes the server then`, async t => {
    const { address } = await changingServer(t, { bundle: ['old', 'new'], chain: ['issuing', 'cross'] })
    const token = mintToken({ rootKeySha256: keySha256(read('old.key')) }).text
    const device = await enrollDevice({ server: address, token, device: {} })
    const bundle = await fetchTrustBundle(address, { ...device, rootsPem: read(`${pinned}.crt`) })
    t.is(bundle.id, 'changing')
  })
}

test('a device that is told of the old root only takes a chain that leads there over the new one', async t => {
  const { address } = await changingServer(t, { bundle: ['old'], chain: ['issuing', 'cross'] })
  const token = mintToken({ rootKeySha256: keySha256(read('old.key')) }).text
  t.is((await enrollDevice({ server: address, token, device: {} })).deviceId, 'alpha')
})

test('a chain without end is not followed', async t => {
  const endless = Array(8).fill('issuing')
  const { address } = await changingServer(t, { bundle: ['old', 'new'], chain: endless })
  const token = mintToken({ rootKeySha256: keySha256(read('old.key')) }).text
  const enrolling = enrollDevice({ server: address, token, device: {} })
  t.like(await t.throwsAsync(enrolling, { message: /more than 8 certificates/ }), { reason: 'CERTIFICATE_UNUSABLE' })
})
