/**
 * A private key and its certificate in a folder, as PEM files that openssl, grpcurl and curl take as they are.
 *
 * Key and certificate have to change together, though they are two files. So the new key waits under another name, the
 * certificate decides, and only then the key takes its place. Whatever the moment of a crash, `loadKeyPair` finds one
 * pair that fits.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { everyoneReads, moveWhole, ownerOnly, readIfThere, writeWhole } from './whole-file.ts'

/** What the files are called: `newKey` is where a key waits for its certificate. */
export type KeyPairNames = { key: string; newKey: string; certificate: string }

export type KeyPair = { keyPem: string; certificatePem: string }

/** Both, or what was there before. */
export async function saveKeyPair(folder: string, names: KeyPairNames, pair: KeyPair): Promise<void> {
  await writeWhole(join(folder, names.newKey), pair.keyPem, ownerOnly)
  await writeWhole(join(folder, names.certificate), pair.certificatePem, everyoneReads)
  await takePlace(folder, names)
}

/**
 * The certificate, if there is one, with its key. Where no key fits, `keyPem` is what has the name of the key, if
 * anything: whether they `belongTogether` is for the caller to ask.
 */
export async function loadKeyPair(
  folder: string,
  names: KeyPairNames,
): Promise<{ keyPem: string | undefined; certificatePem: string } | undefined> {
  const [keyPem, newKeyPem, certificatePem] = await Promise.all(
    [names.key, names.newKey, names.certificate].map(name => readIfThere(join(folder, name))),
  )
  if (certificatePem === undefined) return undefined
  if (belongTogether({ keyPem, certificatePem }) || !belongTogether({ keyPem: newKeyPem, certificatePem })) {
    return { keyPem, certificatePem }
  }
  // A crash came before the new key took its place: that is made up for.
  await takePlace(folder, names)
  return { keyPem: newKeyPem, certificatePem }
}

export function belongTogether(pair: { keyPem: string | undefined; certificatePem: string }): pair is KeyPair {
  if (pair.keyPem === undefined) return false
  try {
    return new X509Certificate(pair.certificatePem).checkPrivateKey(createPrivateKey(pair.keyPem))
  } catch {
    return false // not PEM: left behind by something else
  }
}

function takePlace(folder: string, names: KeyPairNames): Promise<void> {
  return moveWhole(join(folder, names.newKey), join(folder, names.key))
}
