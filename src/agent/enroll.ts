/**
 * How a device comes by its identity and keeps it.
 *
 *     const credentials = await enrollDevice({ server: 'localhost:8000', token, device: { id: 'alpha' } })
 *     const renewed = await renewCredentials('localhost:8000', credentials)
 *
 * The private key is made here and stays here. What the server sends is checked before it is used: the certificate is
 * for our key and leads to a root that we trust.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { type Channel, Metadata } from '@grpc/grpc-js'
import { Fault } from '../fault.ts'
import {
  EnrollServiceClient,
  type GetChallengeResponse,
  type GetTrustBundleResponse,
  type Identity,
  type RenewCertificateResponse,
} from '../gen/edgemesh/v1/enroll.ts'
import { DeviceDescription, type TrustBundle } from '../gen/edgemesh/v1/types.ts'
import { decodePem, encodePem } from '../identity/pem.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import { parseToken } from '../identity/tokens.ts'
import { answerOf, type ChannelTarget, type Credentials, channelTo, type Server } from './channel.ts'
import { createKey, signingRequestFor } from './csr.ts'
import { pinnedTrustBundle } from './first-contact.ts'

export type DeviceCredentials = Credentials & {
  deviceId: string
  /** Such as `spiffe://edgemesh.local/device/alpha`. */
  spiffeId: string
  notAfter: Date
  renewAfter: Date
}

/** A server under a storm of enrollments answers within seconds; approval by an operator may take days. */
const firstAnswerTimeoutMs = 30_000
const answerTimeoutMs = 30_000

/**
 * Redeems an enrollment token.
 *
 * A call whose answer was lost is repeated with the same token and the same `keyPem`, and gives the same device. So
 * whoever wants to survive a crash keeps the key before calling.
 *
 * @throws Fault or ServiceError; `describeCallError` tells either
 */
export async function enrollDevice({
  server,
  token,
  device,
  keyPem = createKey(),
  signal,
  onPendingApproval,
}: {
  server: Server
  token: string
  /** How the device describes itself. Without an id the server chooses one. */
  device: Partial<DeviceDescription>
  /** A P-256 key, PKCS#8 in PEM. Default: a new one. */
  keyPem?: string
  signal?: AbortSignal
  /** The token asks for an operator's approval; the promise stays pending until one decides. */
  onPendingApproval?: (deviceId: string) => void
}): Promise<DeviceCredentials> {
  signal?.throwIfAborted()

  // Step 1: The server, before it is told anything. The token names the root that its certificate has to lead to.
  const { rootKeySha256 } = parseToken(token)
  const { rootsPem } = await pinnedTrustBundle({ server, rootKeySha256 })
  signal?.throwIfAborted()

  // Step 2: The token and the request, on a connection on which the server has proved itself.
  const target = channelTo({ server, rootsPem: rootsPem.join('') })
  const description = DeviceDescription.fromPartial(device)
  const identity = await enrolledIdentity(
    target,
    { token: token.trim(), keyPem, device: description },
    signal,
    onPendingApproval,
  )

  // Step 3: What came back, before anything relies on it.
  return checkedCredentials(identity, keyPem)
}

async function enrolledIdentity(
  { address, credentials, options }: ChannelTarget,
  { token, keyPem, device }: { token: string; keyPem: string; device: DeviceDescription },
  signal: AbortSignal | undefined,
  onPendingApproval: ((deviceId: string) => void) | undefined,
): Promise<Identity> {
  const client = new EnrollServiceClient(address, credentials, options)
  const challenge = await challengeOf(client).catch(error => {
    client.close()
    throw error
  })
  const call = client.enroll({ token, csr: signingRequestFor(keyPem, challenge), device, sentAt: new Date() })
  const cancel = () => call.cancel()
  signal?.addEventListener('abort', cancel)
  let timedOut = false
  const timeout = setTimeout(() => {
    timedOut = true
    call.cancel()
  }, firstAnswerTimeoutMs)

  const identity = new Promise<Identity>((resolve, reject) => {
    call.on('data', ({ step }) => {
      clearTimeout(timeout)
      if (step?.$case === 'pendingApproval') onPendingApproval?.(step.value.deviceId)
      if (step?.$case === 'identity') resolve(step.value)
    })
    call.on('error', error => reject(timedOut ? unanswered(error) : (signal?.reason ?? error)))
    call.on('end', () => reject(unusable('the server ended the enrollment without a certificate')))
  })
  return identity.finally(() => {
    clearTimeout(timeout)
    signal?.removeEventListener('abort', cancel)
    client.close()
  })
}

/** What the server wants to see signed. */
async function challengeOf(client: EnrollServiceClient): Promise<string> {
  const { challenge } = await answerOf<GetChallengeResponse>(done =>
    client.getChallenge({}, new Metadata(), { deadline: deadline() }, done),
  )
  return challenge
}

/**
 * A new certificate for a new key, of the same identity. The old credentials stay good until they expire.
 *
 * @param channel a connection to share; left open
 */
export async function renewCredentials(
  server: Server,
  credentials: DeviceCredentials,
  channel?: Channel,
): Promise<DeviceCredentials> {
  const keyPem = createKey()
  const { identity } = await withClient(server, credentials, channel, async client => {
    const csr = signingRequestFor(keyPem, await challengeOf(client))
    return answerOf<RenewCertificateResponse>(done =>
      client.renewCertificate({ csr, sentAt: new Date() }, new Metadata(), { deadline: deadline() }, done),
    )
  })
  if (identity === undefined) throw unusable('the server answered without a certificate')
  if (identity.spiffeId !== credentials.spiffeId) throw unusable(`the certificate names another: ${identity.spiffeId}`)
  return checkedCredentials(identity, keyPem)
}

/** Whom the server's side trusts now, told on a verified connection. */
export async function fetchTrustBundle(
  server: Server,
  credentials: Credentials,
  channel?: Channel,
): Promise<TrustBundle> {
  const { trustBundle } = await withClient(server, credentials, channel, client =>
    answerOf<GetTrustBundleResponse>(done => client.getTrustBundle({}, new Metadata(), { deadline: deadline() }, done)),
  )
  if (trustBundle === undefined) throw unusable('the server answered without a trust bundle')
  return trustBundle
}

/** The same identity that trusts the roots of `bundle` from now on. A bundle without a root that can be read is ignored. */
export function trusting<Trusting extends Credentials>(credentials: Trusting, bundle: TrustBundle): Trusting {
  const rootsPem = rootsOf(bundle)
  return rootsPem === '' ? credentials : { ...credentials, rootsPem }
}

async function withClient<T>(
  server: Server,
  { rootsPem, certificateChainPem, keyPem }: Credentials,
  channel: Channel | undefined,
  use: (client: EnrollServiceClient) => Promise<T>,
): Promise<T> {
  const target = channelTo({ server, rootsPem, certificatePem: certificateChainPem, keyPem })
  const options = channel ? { ...target.options, channelOverride: channel } : target.options
  const client = new EnrollServiceClient(target.address, target.credentials, options)
  try {
    return await use(client)
  } finally {
    if (!channel) client.close()
  }
}

function deadline(): number {
  return Date.now() + answerTimeoutMs
}

/** @throws Fault UNAUTHENTICATED CERTIFICATE_UNUSABLE for what would only fail later, and less clearly */
function checkedCredentials(identity: Identity, keyPem: string): DeviceCredentials {
  const { deviceId, spiffeId, trustBundle, notAfter, renewAfter } = identity
  const rootsPem = rootsOf(trustBundle)
  const chain = identity.certificateChainPem.map(readCertificate)
  const [leaf] = chain
  if (leaf === undefined || !notAfter || !renewAfter) throw unusable('the answer is not complete')
  if (!leaf.checkPrivateKey(createPrivateKey(keyPem))) throw unusable('the certificate is for another key')
  const named = parseSpiffeId(spiffeId)
  if (
    named?.kind !== 'device' ||
    named.id !== deviceId ||
    !leaf.subjectAltName?.split(', ').includes(`URI:${spiffeId}`)
  ) {
    throw unusable('the certificate does not carry the SPIFFE ID that the server names')
  }
  // The bundle came from a server that was verified by a root that we trusted already, so its roots are trusted too:
  // during a rotation the new certificate may lead to the newer one.
  if (!leadsToRoot(chain, decodePem('CERTIFICATE', rootsPem).map(readCertificate))) {
    throw unusable('the certificate does not lead to a trusted root')
  }
  return { deviceId, spiffeId, keyPem, certificateChainPem: pemOf(chain), rootsPem, notAfter, renewAfter }
}

/** Each certificate is issued by the next, and the last by a root. Dates are left to those who know the right time. */
function leadsToRoot(chain: X509Certificate[], roots: X509Certificate[]): boolean {
  return chain.every((certificate, index) => {
    const issuers = index + 1 < chain.length ? [chain[index + 1]!] : roots
    return issuers.some(issuer => issuer.ca && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey))
  })
}

/** The roots of a bundle, one after another, as text without anything around them. */
function rootsOf(bundle: TrustBundle | undefined): string {
  return pemOf((bundle?.rootsPem ?? []).flatMap(pem => decodePem('CERTIFICATE', pem)).map(readCertificate))
}

function pemOf(certificates: X509Certificate[]): string {
  return certificates.map(({ raw }) => encodePem('CERTIFICATE', raw)).join('')
}

function readCertificate(encoded: string | Buffer): X509Certificate {
  try {
    return new X509Certificate(encoded)
  } catch (cause) {
    throw unusable('a certificate in the answer can not be read', cause)
  }
}

function unusable(what: string, cause?: unknown): Fault {
  return new Fault('UNAUTHENTICATED', 'CERTIFICATE_UNUSABLE', `${what}; nothing was changed`, { cause })
}

function unanswered(cause: unknown): Fault {
  const message = `the server has not answered within ${firstAnswerTimeoutMs / 1_000} s`
  return new Fault('UNAVAILABLE', 'SERVER_SILENT', message, { cause })
}
