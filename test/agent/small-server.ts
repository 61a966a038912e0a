/** The smallest server that a device would believe: a CA of its own, and the services that a test gives it. */
import { createPrivateKey, createPublicKey } from 'node:crypto'
import { Server, ServerCredentials, type ServiceDefinition, type UntypedServiceImplementation } from '@grpc/grpc-js'
import type { ExecutionContext } from 'ava'
import { createKey } from '../../src/agent/csr.ts'
import type { DeviceCredentials } from '../../src/agent/enroll.ts'
import { type Authority, createAuthority, openAuthority } from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'

const passphrase = 'a passphrase of the tests'
const hourMs = 3_600_000

export async function smallAuthority(): Promise<Authority> {
  const now = new Date()
  return openAuthority({
    ...(await createAuthority({ trustDomain: 'edgemesh.test', validityDays: 365, now, passphrase })),
    passphrase,
  })
}

/** @param keyPem default: a new key */
export function deviceCredentials(authority: Authority, deviceId: string, keyPem?: string): DeviceCredentials {
  const spiffeId = `spiffe://edgemesh.test/device/${deviceId}`
  const leaf = issue(authority, 'client', spiffeId, keyPem)
  const renewAfter = new Date(leaf.notAfter.getTime() - hourMs / 3)
  const names = { deviceId, spiffeId, tokenId: '0123456789ab', trustBundleId: 'first' }
  return { ...leaf, ...names, rootsPem: authority.rootPem, renewAfter }
}

function issue(authority: Authority, purpose: 'client' | 'server', spiffeId: string, keyPem = createKey()) {
  const { pem, notAfter } = authority.issueLeaf({
    serial: Buffer.from(newSerial(), 'hex'),
    spki: createPublicKey(createPrivateKey(keyPem)).export({ type: 'spki', format: 'der' }),
    spiffeId,
    purpose,
    commonName: 'a test',
    notBefore: new Date(Date.now() - hourMs),
    notAfter: new Date(Date.now() + hourMs),
    ...(purpose === 'server' && { dnsNames: ['localhost'] }),
  })
  return { keyPem, certificateChainPem: [pem, ...authority.intermediates].join(''), notAfter }
}

/** Serves on a free port until the test is over. @returns host:port, by address */
export async function serve(
  t: ExecutionContext,
  authority: Authority,
  services: [ServiceDefinition, UntypedServiceImplementation][],
): Promise<string> {
  const { keyPem, certificateChainPem } = issue(authority, 'server', 'spiffe://edgemesh.test/service/small')
  const server = new Server()
  for (const [definition, implementation] of services) server.addService(definition, implementation)
  const pair = { private_key: Buffer.from(keyPem), cert_chain: Buffer.from(certificateChainPem) }
  const credentials = ServerCredentials.createSsl(null, [pair])
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync('127.0.0.1:0', credentials, (error, bound) => (error ? reject(error) : resolve(bound)))
  })
  t.teardown(() => server.forceShutdown())
  return `127.0.0.1:${port}`
}
