/**
 * What a device keeps between two runs: its key, its certificate, whom it trusts.
 *
 *     device.key      the private key (PKCS#8), readable by its owner alone
 *     device.key.new  the key of a renewal that has not been finished
 *     device.crt      the certificate and its intermediates
 *     ca.crt          the roots that are trusted
 *     identity.json   who the device is, when to renew, and the names of its token and of its trust bundle
 *
 * Each file is replaced as a whole, and is on the disk before the next is touched; key and certificate change together
 * (`credential-files.ts`). Whatever the moment of a crash, `loadState` finds one pair that fits.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { belongTogether, loadKeyPair, saveKeyPair } from '../credential-files.ts'
import { Fault } from '../fault.ts'
import { everyoneReads, ownerOnly, readIfThere, writeWhole } from '../whole-file.ts'
import { createKey } from './csr.ts'
import type { DeviceCredentials } from './enroll.ts'

const pairFiles = { key: 'device.key', newKey: 'device.key.new', certificate: 'device.crt' }
const rootsFile = 'ca.crt'
const identityFile = 'identity.json'

const folderMode = 0o700

/** What the device is, or nothing if it has not been enrolled. @throws Fault FAILED_PRECONDITION STATE_BROKEN */
export async function loadState(directory: string): Promise<DeviceCredentials | undefined> {
  const [pair, rootsPem, identity] = await Promise.all([
    loadKeyPair(directory, pairFiles),
    readIfThere(join(directory, rootsFile)),
    readIfThere(join(directory, identityFile)),
  ])
  // The certificate is the last of the files that a first enrollment needs, so without it there was none.
  if (!pair) return undefined
  if (rootsPem === undefined || identity === undefined) throw broken(directory, 'files are missing')
  const leaf = readOr(directory, pairFiles.certificate, () => new X509Certificate(pair.certificatePem))
  const known = readOr(directory, identityFile, () => readIdentity(identity))
  if (!belongTogether(pair)) throw broken(directory, `${pairFiles.key} is not the key of ${pairFiles.certificate}`)
  const { keyPem, certificatePem } = pair
  return { ...known, keyPem, certificateChainPem: certificatePem, rootsPem, notAfter: leaf.validToDate }
}

/** Keeps what a device has become, by its enrollment or by a renewal. Makes the folder if it is not there. */
export async function saveState(directory: string, credentials: DeviceCredentials): Promise<void> {
  await makeFolder(directory)
  // The roots and the identity fit the old certificate too: roots are only added before the old ones are of no more
  // use, and a later `renewAfter` than the old certificate's is put right by the server, which asks for the renewal.
  await saveTrust(directory, credentials)
  const { keyPem, certificateChainPem } = credentials
  await saveKeyPair(directory, pairFiles, { keyPem, certificatePem: certificateChainPem })
}

/** Keeps whom a device trusts since its trust bundle has changed. */
export async function saveTrust(directory: string, credentials: DeviceCredentials): Promise<void> {
  const { deviceId, spiffeId, notAfter, renewAfter, tokenId, trustBundleId } = credentials
  const identity = JSON.stringify({ deviceId, spiffeId, notAfter, renewAfter, tokenId, trustBundleId }, null, 2)
  // The roots go first: the name of the bundle is told to the server, and must not promise what is not there.
  await writeWhole(join(directory, rootsFile), credentials.rootsPem, everyoneReads)
  await writeWhole(join(directory, identityFile), `${identity}\n`, everyoneReads)
}

/**
 * The key to enroll with, kept before the token is redeemed: a device that crashes between its enrollment and the
 * answer asks again with the same key, and is given the same identity instead of a second use of the token.
 */
export async function keyForEnrollment(directory: string): Promise<string> {
  const kept = await readIfThere(join(directory, pairFiles.key))
  if (kept === undefined) return keepNewKey(directory, pairFiles.key)
  readOr(directory, pairFiles.key, () => createPrivateKey(kept))
  return kept
}

/**
 * The key to renew with, likewise kept before it is certified: a device that comes back with a certificate that has
 * expired is let in once, and asks again with the same key where it has lost the answer.
 */
export async function keyForRenewal(directory: string): Promise<string> {
  const kept = await readIfThere(join(directory, pairFiles.newKey))
  // Nothing rests on it yet, so what can't be read is replaced.
  return kept !== undefined && isKey(kept) ? kept : keepNewKey(directory, pairFiles.newKey)
}

async function keepNewKey(directory: string, name: string): Promise<string> {
  const keyPem = createKey()
  await makeFolder(directory)
  await writeWhole(join(directory, name), keyPem, ownerOnly)
  return keyPem
}

async function makeFolder(directory: string): Promise<void> {
  await mkdir(directory, { recursive: true, mode: folderMode })
}

function isKey(pem: string): boolean {
  try {
    return createPrivateKey(pem).type === 'private'
  } catch {
    return false
  }
}

type KnownIdentity = Pick<DeviceCredentials, 'deviceId' | 'spiffeId' | 'renewAfter' | 'tokenId' | 'trustBundleId'>

/** Agents before this one kept neither the token's name nor the bundle's: they are unknown then. */
function readIdentity(json: string): KnownIdentity {
  const {
    deviceId,
    spiffeId,
    renewAfter,
    tokenId = '',
    trustBundleId = '',
  } = JSON.parse(json) as Record<string, unknown>
  const renewal = new Date(String(renewAfter))
  if (typeof deviceId !== 'string' || typeof spiffeId !== 'string' || Number.isNaN(renewal.getTime())) {
    throw new RangeError('deviceId, spiffeId or renewAfter is missing')
  }
  if (typeof tokenId !== 'string' || typeof trustBundleId !== 'string') throw new RangeError('not a name')
  return { deviceId, spiffeId, renewAfter: renewal, tokenId, trustBundleId }
}

function readOr<T>(directory: string, name: string, read: () => T): T {
  try {
    return read()
  } catch (cause) {
    throw broken(directory, `${name} can not be read`, cause)
  }
}

function broken(directory: string, what: string, cause?: unknown): Fault {
  const message = `${what} in ${directory}: put the files back, or empty the folder and enroll with a new token`
  return new Fault('FAILED_PRECONDITION', 'STATE_BROKEN', message, { cause })
}
