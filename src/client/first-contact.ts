/**
 * First contact: a device that has no file from its server yet comes to know it.
 *
 * The enrollment token carries the SHA-256 of the root's public key. The server is asked for its roots over a connection
 * that verifies nothing; of the answer only a root with that hash is believed, because only the operator who made the
 * token can have named it. Whoever sits in the middle can forge the answer, but not a key with the same hash. Nothing
 * secret is sent on this connection: the caller opens another, on which the server has to prove itself to the root.
 */
import { createHash, timingSafeEqual, X509Certificate } from 'node:crypto'
import { createSecureContext } from 'node:tls'
import { ChannelCredentials, Metadata } from '@grpc/grpc-js'
import { Fault } from '../fault.ts'
import { EnrollServiceClient, type GetTrustBundleResponse } from '../gen/edgemesh/v1/enroll.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import { answerOf, optionsFor, type Server } from './channel.ts'

const timeoutDefaultMs = 10_000

/** A bundle has two roots during a rotation, else one. What is longer is not worth hashing. */
const rootsMax = 16

/**
 * A bundle with the one root that is pinned, and nothing else: the rest of the answer was not verified. The whole bundle
 * comes with the identity.
 *
 * @param rootKeySha256 SHA-256 of the root's SubjectPublicKeyInfo, lower-case hex
 * @throws Fault UNAUTHENTICATED SERVER_NOT_PINNED when no root of the server's is the pinned one; a ServiceError when
 *   the server can't be reached
 */
export async function pinnedTrustBundle({
  server,
  rootKeySha256,
  timeoutMs = timeoutDefaultMs,
}: {
  server: Server
  rootKeySha256: string
  timeoutMs?: number
}): Promise<TrustBundle> {
  const { trustBundle } = await unverifiedTrustBundle(server, timeoutMs)
  const root = (trustBundle?.rootsPem ?? []).slice(0, rootsMax).find(pem => isPinned(pem, rootKeySha256))
  if (root === undefined) throw notPinned(server)
  return { rootsPem: [root], intermediatesPem: [], crlDer: Buffer.alloc(0), crlsDer: [], trustDomain: '', id: '' }
}

/**
 * What time it is at the server, as whoever answers there says: good for wording an error, and for nothing else.
 *
 * @throws ServiceError when the server can't be reached
 */
export async function unverifiedServerTime(
  server: Server,
  timeoutMs: number = timeoutDefaultMs,
): Promise<Date | undefined> {
  return (await unverifiedTrustBundle(server, timeoutMs)).serverTime
}

/** Without the roots of the world, which take a megabyte in each context: nothing is verified here. */
const withoutRoots = createSecureContext({ ca: [] })

async function unverifiedTrustBundle(server: Server, timeoutMs: number): Promise<GetTrustBundleResponse> {
  const unverified = ChannelCredentials.createFromSecureContext(withoutRoots, {
    rejectUnauthorized: false,
    checkServerIdentity: () => undefined,
  })
  const client = new EnrollServiceClient(server, unverified, optionsFor(server))
  try {
    return await answerOf<GetTrustBundleResponse>(done =>
      client.getTrustBundle({}, new Metadata(), { deadline: Date.now() + timeoutMs }, done),
    )
  } finally {
    client.close()
  }
}

function isPinned(pem: string, rootKeySha256: string): boolean {
  const root = readCertificate(pem)
  // The pinned key has to have signed the certificate, so that its dates and constraints are the operator's as well.
  if (!root?.ca || !root.verify(root.publicKey)) return false
  const spki = root.publicKey.export({ format: 'der', type: 'spki' })
  return timingSafeEqual(createHash('sha256').update(spki).digest(), Buffer.from(rootKeySha256, 'hex'))
}

function readCertificate(pem: string): X509Certificate | undefined {
  try {
    return new X509Certificate(pem)
  } catch {
    return undefined
  }
}

function notPinned(server: Server): Fault {
  return new Fault(
    'UNAUTHENTICATED',
    'SERVER_NOT_PINNED',
    `${server} is not the server that the enrollment token is for, or somebody is in the middle; nothing was sent to ` +
      'it. Check the address, or ask for a token of this server',
    { metadata: { server } },
  )
}
