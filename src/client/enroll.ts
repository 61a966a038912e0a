/**
 * How a device comes by its identity and keeps it.
 *
 *     const credentials = await enrollDevice({ server: 'localhost:8000', token, device: { id: 'alpha' } })
 *     const renewed = await renewCredentials('localhost:8000', credentials)
 *
 * The private key is made here and stays here. What the server sends is checked before it is used: the certificate is
 * for our key and leads to a root that we trust.
 */
import { type Channel, Metadata } from '@grpc/grpc-js'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import {
  EnrollServiceClient,
  type GetChallengeResponse,
  type GetTrustBundleResponse,
  type Identity,
  type RenewCertificateResponse,
} from '../gen/edgemesh/v1/enroll.ts'
import { DeviceDescription, type TrustBundle } from '../gen/edgemesh/v1/types.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import { parseToken } from '../identity/token-text.ts'
import {
  answerOf,
  type ChannelTarget,
  type Credentials,
  channelTo,
  clientTarget,
  type DescribedError,
  type Server,
} from './channel.ts'
import { createKey, signingRequestFor } from './csr.ts'
import { pinnedTrustBundle } from './first-contact.ts'
import { checkedIdentity, type IssuedIdentity, unusable } from './issued-identity.ts'
import { comparingClocks } from './server-clock.ts'

export type DeviceCredentials = IssuedIdentity & {
  deviceId: string
  /** The token that it was enrolled with, so that another is known for another; empty where that was not kept. */
  tokenId: string
}

/** A server under a storm of enrollments answers within seconds; approval by an operator may take days. */
const firstAnswerTimeoutMs = 30_000
const answerTimeoutMs = 30_000

/** While an operator thinks, the server says so every half minute: one that has missed four of these is gone. */
const silenceTimeoutMsDefault = 120_000

/** Refusals of a request for an identity that stay the same however often it is made. */
const finalCodes: ReadonlySet<string> = new Set([
  'INVALID_ARGUMENT',
  'UNAUTHENTICATED',
  'PERMISSION_DENIED',
  'ALREADY_EXISTS',
  'FAILED_PRECONDITION',
  'UNIMPLEMENTED',
])
/** Of those codes, what passes: the next request is signed anew, and an operator decides some time. */
const passing: ReadonlySet<string> = new Set(['CSR_CHALLENGE_STALE', 'CSR_REPLAYED', 'RECOVERY_NEEDS_APPROVAL'])
/** Of the other codes, what does not. */
const notPassing: ReadonlySet<string> = new Set(['TOKEN_USED_UP'])

/** Whether a request for an identity was refused for good. */
export function isFinal({ code, reason }: DescribedError): boolean {
  return notPassing.has(reason) || (finalCodes.has(code) && !passing.has(reason))
}

/**
 * Redeems an enrollment token.
 *
 * A call whose answer was lost is repeated with the same token and the same `keyPem`, and gives the same device; one
 * that broke while it waited for approval goes on waiting. So whoever wants to survive a crash keeps the key before
 * calling.
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
  silenceTimeoutMs = silenceTimeoutMsDefault,
  clock = systemClock,
}: {
  server: Server
  token: string
  /** How the device describes itself. Without an id the server chooses one. */
  device: Partial<DeviceDescription>
  /** A P-256 key, PKCS#8 in PEM. Default: a new one. */
  keyPem?: string
  signal?: AbortSignal
  /** The token asks for an operator's approval; the promise stays pending until one decides. Called again and again. */
  onPendingApproval?: (deviceId: string) => void
  /** How long the server may say nothing while approval is pending. */
  silenceTimeoutMs?: number
  clock?: Clock
}): Promise<DeviceCredentials> {
  signal?.throwIfAborted()

  // Step 1: The server, before it is told anything. The token names the root that its certificate has to lead to.
  const { id: tokenId, rootKeySha256 } = parseToken(token)
  const { rootsPem } = await pinnedTrustBundle({ server, rootKeySha256 })
  signal?.throwIfAborted()

  // Step 2: The token and the request, on a connection on which the server has proved itself.
  const target = channelTo({ server, rootsPem: rootsPem.join('') })
  const description = DeviceDescription.fromPartial(device)
  const enrollment = { token: token.trim(), keyPem, description, signal, onPendingApproval, silenceTimeoutMs, clock }
  const identity = await comparingClocks(server, enrolledIdentity(target, enrollment), clock)

  // Step 3: What came back, before anything relies on it.
  const issued = checkedIdentity(identity, keyPem)
  const { deviceId } = identity
  const named = parseSpiffeId(issued.spiffeId)
  if (named?.kind !== 'device' || named.id !== deviceId) throw unusable('the certificate is not for this device')
  return { ...issued, deviceId, tokenId }
}

async function enrolledIdentity(
  { address, credentials, options }: ChannelTarget,
  enrollment: {
    token: string
    keyPem: string
    description: DeviceDescription
    signal: AbortSignal | undefined
    onPendingApproval: ((deviceId: string) => void) | undefined
    silenceTimeoutMs: number
    clock: Clock
  },
): Promise<Identity> {
  const { token, keyPem, description, signal, onPendingApproval, silenceTimeoutMs, clock } = enrollment
  const client = new EnrollServiceClient(address, credentials, options)
  const challenge = await challengeOf(client).catch(error => {
    client.close()
    throw error
  })
  const csr = signingRequestFor(keyPem, challenge)
  const call = client.enroll({ token, csr, device: description, sentAt: new Date(clock()) })
  const cancel = () => call.cancel()
  signal?.addEventListener('abort', cancel)

  let silent: Fault | undefined
  let silence: NodeJS.Timeout | undefined
  const expectAnswerWithin = (ms: number) => {
    clearTimeout(silence)
    silence = setTimeout(() => {
      silent = serverSilent(ms)
      call.cancel()
    }, ms)
  }
  expectAnswerWithin(firstAnswerTimeoutMs)

  const identity = new Promise<Identity>((resolve, reject) => {
    call.on('data', ({ step }) => {
      expectAnswerWithin(silenceTimeoutMs)
      if (step?.$case === 'pendingApproval') onPendingApproval?.(step.value.deviceId)
      if (step?.$case === 'identity') resolve(step.value)
    })
    call.on('error', error => reject(silent ?? signal?.reason ?? error))
    call.on('end', () => reject(endedWithoutCertificate()))
  })
  return identity.finally(() => {
    clearTimeout(silence)
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
 * A new certificate for a new key, of the same identity: a device's or an operator's. The old credentials stay good
 * until they expire.
 *
 * @param options.channel a connection to share; left open. Default: one of its own, which shows `credentials`
 * @param options.keyPem a P-256 key, PKCS#8 in PEM. Default: a new one
 */
export async function renewCredentials<Holder extends Credentials & { spiffeId: string }>(
  server: Server,
  credentials: Holder,
  options: { channel?: Channel; keyPem?: string; clock?: Clock } = {},
): Promise<Holder & IssuedIdentity> {
  const { channel, keyPem = createKey(), clock = systemClock } = options
  const { identity } = await withClient(server, credentials, channel, async client => {
    const csr = signingRequestFor(keyPem, await challengeOf(client))
    return answerOf<RenewCertificateResponse>(done =>
      client.renewCertificate({ csr, sentAt: new Date(clock()) }, new Metadata(), { deadline: deadline() }, done),
    )
  })
  const renewed = checkedIdentity(identity, keyPem)
  if (renewed.spiffeId !== credentials.spiffeId) throw unusable(`the certificate names another: ${renewed.spiffeId}`)
  return { ...credentials, ...renewed }
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

async function withClient<T>(
  server: Server,
  credentials: Credentials,
  channel: Channel | undefined,
  use: (client: EnrollServiceClient) => Promise<T>,
): Promise<T> {
  const target = clientTarget(server, credentials, channel)
  const client = new EnrollServiceClient(target.address, target.credentials, target.options)
  try {
    return await use(client)
  } finally {
    if (!channel) client.close()
  }
}

function deadline(): number {
  return Date.now() + answerTimeoutMs
}

/** The next call, perhaps to another instance, takes up where this one was. */
function endedWithoutCertificate(): Fault {
  return new Fault('UNAVAILABLE', 'STREAM_ENDED', 'the server ended the enrollment without a certificate')
}

function serverSilent(ms: number): Fault {
  return new Fault('UNAVAILABLE', 'SERVER_SILENT', `the server has said nothing for ${ms / 1_000} s`)
}
