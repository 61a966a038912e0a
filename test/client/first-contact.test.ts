import { once } from 'node:events'
import { createServer, type Socket } from 'node:net'
import type { ServerUnaryCall, ServerWritableStream, sendUnaryData } from '@grpc/grpc-js'
import test from 'ava'
import { enrollDevice } from '../../src/client/enroll.ts'
import { pinnedTrustBundle } from '../../src/client/first-contact.ts'
import {
  type EnrollRequest,
  type EnrollResponse,
  EnrollServiceService,
  type GetChallengeResponse,
  type GetTrustBundleRequest,
  type GetTrustBundleResponse,
} from '../../src/gen/edgemesh/v1/enroll.ts'
import type { Authority } from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { checkCsr } from '../../src/identity/csr.ts'
import { encodePem } from '../../src/identity/pem.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { rootsOf, serve, smallAuthority } from '../agent/small-server.ts'

const authority = await smallAuthority()
const other = await smallAuthority()

const bundleOf = (...authorities: Authority[]) => ({
  rootsPem: authorities.flatMap(rootsOf),
  intermediatesPem: authority.intermediates,
  crlDer: Buffer.from('a list'),
  crlsDer: [],
  id: '',
  trustDomain: 'edgemesh.test',
})

/** Enrolls everybody as device alpha, and remembers the tokens that it was shown. */
function enrollService({ roots = [authority], issuer = authority } = {}) {
  const tokens: string[] = []
  const implementation = {
    getTrustBundle(
      _call: ServerUnaryCall<GetTrustBundleRequest, GetTrustBundleResponse>,
      done: sendUnaryData<GetTrustBundleResponse>,
    ) {
      done(null, { trustBundle: bundleOf(...roots), serverTime: new Date() })
    },
    enroll(call: ServerWritableStream<EnrollRequest, EnrollResponse>) {
      tokens.push(call.request.token)
      const spiffeId = 'spiffe://edgemesh.test/device/alpha'
      const leaf = issuer.issueLeaf({
        serial: Buffer.from(newSerial(), 'hex'),
        spki: checkCsr(call.request.csr).spki,
        spiffeId,
        purpose: 'client',
        commonName: 'alpha',
        notBefore: new Date(),
        notAfter: new Date(Date.now() + 60_000),
      })
      const certificateChainPem = [encodePem('CERTIFICATE', leaf.der), ...issuer.intermediates]
      const times = { notAfter: leaf.notAfter, renewAfter: leaf.notAfter }
      const identity = { deviceId: 'alpha', spiffeId, certificateChainPem, trustBundle: bundleOf(authority), ...times }
      call.write({ step: { $case: 'pendingApproval', value: { deviceId: 'alpha' } }, serverTime: new Date() })
      call.write({ step: { $case: 'identity', value: identity }, serverTime: new Date() })
      call.end()
    },
    renewCertificate() {},
    getChallenge(_call: unknown, done: sendUnaryData<GetChallengeResponse>) {
      done(null, { challenge: 'c1.0.0', expiresAt: new Date(), serverTime: new Date() })
    },
  }
  return { tokens, service: [EnrollServiceService, implementation] as Parameters<typeof serve>[2][number] }
}

test('of what an unknown server says, only the pinned root is believed', async t => {
  const server = await serve(t, authority, [enrollService({ roots: [other, authority] }).service])
  const bundle = await pinnedTrustBundle({ server, rootKeySha256: authority.rootKeySha256 })
  t.deepEqual(bundle, {
    rootsPem: rootsOf(authority),
    intermediatesPem: [],
    crlDer: Buffer.alloc(0),
    crlsDer: [],
    trustDomain: '',
    id: '',
  })
})

test('a server with another root is refused before it sees the token', async t => {
  const { tokens, service } = enrollService({ roots: [other] })
  const server = await serve(t, other, [service])
  const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text
  const error = await t.throwsAsync(enrollDevice({ server, token, device: {} }))
  t.like(error, { code: 'UNAUTHENTICATED', reason: 'SERVER_NOT_PINNED' })
  t.regex(error!.message, /somebody is in the middle/)
  t.deepEqual(tokens, [])
})

test('a server that shows the right root, but has no certificate from it, never sees the token', async t => {
  const { tokens, service } = enrollService()
  const server = await serve(t, other, [service])
  const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text
  await t.throwsAsync(enrollDevice({ server, token, device: {} }), { message: /certificate/ })
  t.deepEqual(tokens, [])
})

test('a device is told that an operator has to approve it, and then has its identity', async t => {
  const { tokens, service } = enrollService()
  const server = await serve(t, authority, [service])
  const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text
  const pending: string[] = []
  const credentials = await enrollDevice({ server, token, device: {}, onPendingApproval: id => pending.push(id) })
  t.deepEqual(pending, ['alpha'])
  t.deepEqual(tokens, [token])
  t.like(credentials, { deviceId: 'alpha', spiffeId: 'spiffe://edgemesh.test/device/alpha' })
  t.is(credentials.rootsPem, rootsOf(authority).join(''))
})

test('a certificate that does not lead to a trusted root is not taken', async t => {
  const server = await serve(t, authority, [enrollService({ issuer: other }).service])
  const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text
  const error = await t.throwsAsync(enrollDevice({ server, token, device: {} }), { message: /does not lead to/ })
  t.like(error, { reason: 'CERTIFICATE_UNUSABLE' })
})

test('a server that accepts connections and says nothing is given up', async t => {
  const sockets = new Set<Socket>()
  const silent = createServer(socket => sockets.add(socket)).listen(0, '127.0.0.1')
  await once(silent, 'listening')
  t.teardown(() => {
    silent.close()
    for (const socket of sockets) socket.destroy()
  })
  const { port } = silent.address() as { port: number }
  const contact = { server: `127.0.0.1:${port}`, rootKeySha256: authority.rootKeySha256, timeoutMs: 200 }
  await t.throwsAsync(pinnedTrustBundle(contact), { message: /DEADLINE_EXCEEDED|UNAVAILABLE/ })
})
