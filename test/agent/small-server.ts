/** The smallest server that a device would believe: a CA of its own, and the services that a test gives it. */
import { createPrivateKey, createPublicKey, type X509Certificate } from 'node:crypto'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:tls'
import { Server, ServerCredentials, type ServiceDefinition, type UntypedServiceImplementation } from '@grpc/grpc-js'
import type { ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import type { DeviceCredentials } from '../../src/client/enroll.ts'
import { type Authority, createAuthority, openAuthority } from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'

const passphrase = 'a passphrase of the tests'
const hourMs = 3_600_000

/** @param now when it is made; what it issues is of that time */
export async function smallAuthority(now = new Date()): Promise<Authority> {
  return openAuthority({
    ...(await createAuthority({ trustDomain: 'edgemesh.test', validityDays: 365, now, passphrase })),
    passphrase,
  })
}

/** Whom those trust who belong to it, PEM. */
export function rootsOf(authority: Authority): string[] {
  return [authority.rootPem]
}

/** @param keyPem default: a new key */
export function deviceCredentials(authority: Authority, deviceId: string, keyPem?: string): DeviceCredentials {
  const spiffeId = `spiffe://edgemesh.test/device/${deviceId}`
  const leaf = issue(authority, { purpose: 'client', spiffeId, keyPem })
  const renewAfter = new Date(leaf.notAfter.getTime() - hourMs / 3)
  const names = { deviceId, spiffeId, tokenId: '0123456789ab', trustBundleId: 'first' }
  return { ...leaf, ...names, rootsPem: rootsOf(authority).join(''), renewAfter }
}

/** A certificate of an hour before to an hour after `now`. */
export function issue(
  authority: Authority,
  options: { purpose: 'client' | 'server'; spiffeId: string; keyPem?: string | undefined; now?: Date },
) {
  const { purpose, spiffeId, keyPem = createKey(), now = new Date() } = options
  const { pem, notAfter } = authority.issueLeaf({
    serial: Buffer.from(newSerial(), 'hex'),
    spki: createPublicKey(createPrivateKey(keyPem)).export({ type: 'spki', format: 'der' }),
    spiffeId,
    purpose,
    commonName: 'a test',
    notBefore: new Date(now.getTime() - hourMs),
    notAfter: new Date(now.getTime() + hourMs),
    ...(purpose === 'server' && { dnsNames: ['localhost'] }),
  })
  return { keyPem, certificateChainPem: [pem, ...authority.intermediates].join(''), notAfter }
}

/** What a server shows: its key, and its chain in PEM. */
export type Shown = { keyPem: string; certificateChainPem: string }

export function serverCertificate(authority: Authority, now?: Date): Shown {
  const spiffeId = 'spiffe://edgemesh.test/service/small'
  return issue(authority, { purpose: 'server', spiffeId, ...(now && { now }) })
}

/** Serves on a free port until the test is over. @returns host:port, by address */
export async function serve(
  t: ExecutionContext,
  authority: Authority,
  services: [ServiceDefinition, UntypedServiceImplementation][],
): Promise<string> {
  return (await serveAs(t, serverCertificate(authority), services)).address
}

export type SmallServer = {
  /** host:port, by address. */
  address: string
  /** The certificate that a caller has shown, whatever it is worth. */
  shownBy(call: { getPeer(): string }): X509Certificate | undefined
  /** From the next connection on. */
  show(other: Shown): void
  /** Cuts every connection, and takes no more. */
  stop(): void
}

/** The same, with what it shows; it asks for clients' certificates and verifies none. */
export async function serveAs(
  t: Pick<ExecutionContext, 'teardown'>,
  shown: Shown,
  services: [ServiceDefinition, UntypedServiceImplementation][],
): Promise<SmallServer> {
  const server = new Server()
  for (const [definition, implementation] of services) server.addService(definition, implementation)
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure())
  const certificates = new Map<string, X509Certificate | undefined>()
  const tls = createServer({
    key: shown.keyPem,
    cert: shown.certificateChainPem,
    requestCert: true,
    rejectUnauthorized: false,
    ALPNProtocols: ['h2'],
  })
  tls.on('secureConnection', socket => {
    certificates.set(`${socket.remoteAddress}:${socket.remotePort}`, socket.getPeerX509Certificate())
    socket.on('error', () => {}) // the client was content with less
    injector.injectConnection(socket)
  })
  tls.on('tlsClientError', () => {}) // the client does not like what it is shown
  await new Promise<void>(resolve => tls.listen(0, '127.0.0.1', resolve))
  const stop = () => {
    tls.close()
    injector.destroy()
    server.forceShutdown()
  }
  t.teardown(stop)
  return {
    address: `127.0.0.1:${(tls.address() as AddressInfo).port}`,
    show: ({ keyPem, certificateChainPem }) => tls.setSecureContext({ key: keyPem, cert: certificateChainPem }),
    shownBy: call => certificates.get(call.getPeer()),
    stop,
  }
}
