/**
 * What a device keeps between two runs: its key, its certificate, whom it trusts.
 *
 *     device.key      the private key (PKCS#8), readable by its owner alone
 *     device.key.new  the key of a renewal that has not been finished
 *     device.crt      the certificate and its intermediates
 *     ca.crt          the roots that are trusted
 *     identity.json   who the device is, when to renew, and the names of its token and of its trust bundle
 *
 * Each file is replaced as a whole, and is on the disk before the next is touched. Key and certificate have to change
 * together, though they are two files: the new key waits under another name, the certificate's rename decides, and
 * only then does the key take its place. Whatever the moment of a crash, `loadState` finds one pair that fits.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { chmod, mkdir, open, readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { Fault } from '../fault.ts'
import { createKey } from './csr.ts'
import type { DeviceCredentials } from './enroll.ts'

const keyFile = 'device.key'
const newKeyFile = 'device.key.new'
const certificateFile = 'device.crt'
const rootsFile = 'ca.crt'
const identityFile = 'identity.json'

const folderMode = 0o700
const secretMode = 0o600
const publicMode = 0o644

/** What the device is, or nothing if it has not been enrolled. @throws Fault FAILED_PRECONDITION STATE_BROKEN */
export async function loadState(directory: string): Promise<DeviceCredentials | undefined> {
  const [keyPem, newKeyPem, certificateChainPem, rootsPem, identity] = await Promise.all(
    [keyFile, newKeyFile, certificateFile, rootsFile, identityFile].map(name => readIfThere(join(directory, name))),
  )
  // The certificate is the last of the files that a first enrollment needs, so without it there was none.
  if (certificateChainPem === undefined) return undefined
  if (rootsPem === undefined || identity === undefined) throw broken(directory, 'files are missing')
  const leaf = readOr(directory, certificateFile, () => new X509Certificate(certificateChainPem))
  const fits = (pem: string | undefined): pem is string => pem !== undefined && isKeyOf(leaf, pem)
  const known = readOr(directory, identityFile, () => readIdentity(identity))
  const rest = { ...known, certificateChainPem, rootsPem, notAfter: leaf.validToDate }
  if (fits(keyPem)) return { ...rest, keyPem }
  if (!fits(newKeyPem)) throw broken(directory, `${keyFile} is not the key of ${certificateFile}`)
  // A crash came between the two renames: the second is made up for.
  await replaceKey(directory)
  return { ...rest, keyPem: newKeyPem }
}

/** Keeps what a device has become, by its enrollment or by a renewal. Makes the folder if it is not there. */
export async function saveState(directory: string, credentials: DeviceCredentials): Promise<void> {
  await makeFolder(directory)
  await replaceFile(directory, newKeyFile, credentials.keyPem, secretMode)
  // The roots and the identity fit the old certificate too: roots are only added before the old ones are of no more
  // use, and a later `renewAfter` than the old certificate's is put right by the server, which asks for the renewal.
  await saveTrust(directory, credentials)
  await replaceFile(directory, certificateFile, credentials.certificateChainPem, publicMode)
  await replaceKey(directory)
}

/** Keeps whom a device trusts since its trust bundle has changed. */
export async function saveTrust(directory: string, credentials: DeviceCredentials): Promise<void> {
  const { deviceId, spiffeId, notAfter, renewAfter, tokenId, trustBundleId } = credentials
  const identity = JSON.stringify({ deviceId, spiffeId, notAfter, renewAfter, tokenId, trustBundleId }, null, 2)
  // The roots go first: the name of the bundle is told to the server, and must not promise what is not there.
  await replaceFile(directory, rootsFile, credentials.rootsPem, publicMode)
  await replaceFile(directory, identityFile, `${identity}\n`, publicMode)
}

/**
 * The key to enroll with, kept before the token is redeemed: a device that crashes between its enrollment and the
 * answer asks again with the same key, and is given the same identity instead of a second use of the token.
 */
export async function keyForEnrollment(directory: string): Promise<string> {
  const kept = await readIfThere(join(directory, keyFile))
  if (kept === undefined) return keepNewKey(directory, keyFile)
  readOr(directory, keyFile, () => createPrivateKey(kept))
  return kept
}

/**
 * The key to renew with, likewise kept before it is certified: a device that comes back with a certificate that has
 * expired is let in once, and asks again with the same key where it has lost the answer.
 */
export async function keyForRenewal(directory: string): Promise<string> {
  const kept = await readIfThere(join(directory, newKeyFile))
  // Nothing rests on it yet, so what can't be read is replaced.
  return kept !== undefined && isKey(kept) ? kept : keepNewKey(directory, newKeyFile)
}

async function keepNewKey(directory: string, name: string): Promise<string> {
  const keyPem = createKey()
  await makeFolder(directory)
  await replaceFile(directory, name, keyPem, secretMode)
  return keyPem
}

async function makeFolder(directory: string): Promise<void> {
  await mkdir(directory, { recursive: true, mode: folderMode })
}

/** Readers see the old file or the new one; once this resolves, a power cut leaves the new one. */
async function replaceFile(directory: string, name: string, text: string, mode: number): Promise<void> {
  const path = join(directory, name)
  const temporary = `${path}.${process.pid}.tmp`
  const file = await open(temporary, 'w', mode)
  try {
    // The mode at opening is narrowed by the umask, and ignored where a crash has left the file behind.
    await chmod(temporary, mode)
    await file.writeFile(text)
    await file.sync()
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  } finally {
    await file.close()
  }
  await rename(temporary, path)
  await syncFolder(directory)
}

async function replaceKey(directory: string): Promise<void> {
  await rename(join(directory, newKeyFile), join(directory, keyFile))
  await syncFolder(directory)
}

/** A rename is durable when the folder is. */
async function syncFolder(directory: string): Promise<void> {
  const folder = await open(directory, 'r')
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw error
  }
}

function isKey(pem: string): boolean {
  try {
    return createPrivateKey(pem).type === 'private'
  } catch {
    return false
  }
}

function isKeyOf(certificate: X509Certificate, keyPem: string): boolean {
  try {
    return certificate.checkPrivateKey(createPrivateKey(keyPem))
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
