/**
 * An operator's credentials: a folder of PEM files that openssl, grpcurl and curl take as they are.
 *
 *     operator.key      private key, PKCS#8; readable by its owner only
 *     operator.key.new  the key of a renewal that has not been finished
 *     operator.crt      certificate, then the intermediates
 *     ca.crt            the roots to trust
 *     server            host:port, where there is a server that these are for
 *
 * Key and certificate have to change together, though they are two files. So the new key waits under another name, the
 * certificate decides, and only then the key takes its place; whoever reads the folder in between makes up for that.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { CommandFailure } from './failure.ts'
import { everyoneReads, moveWhole, ownerOnly, readIfThere, writeWhole } from './whole-file.ts'

export type OperatorCredentials = { keyPem: string; certificatePem: string; rootsPem: string; server?: string }

const files = {
  key: 'operator.key',
  newKey: 'operator.key.new',
  certificate: 'operator.crt',
  roots: 'ca.crt',
  server: 'server',
}

/** All of it, or what was there before. */
export async function saveCredentials(folder: string, credentials: OperatorCredentials): Promise<void> {
  await writeWhole(join(folder, files.newKey), credentials.keyPem, ownerOnly)
  // The roots fit the certificate before this one too: they are only added to before the old ones are of no more use.
  await writeWhole(join(folder, files.roots), credentials.rootsPem, everyoneReads)
  await writeWhole(join(folder, files.certificate), credentials.certificatePem, everyoneReads)
  await moveWhole(join(folder, files.newKey), join(folder, files.key))
  if (credentials.server) await writeWhole(join(folder, files.server), `${credentials.server}\n`, everyoneReads)
}

/** `undefined` when any of the three PEM files is missing. */
export async function findCredentials(folder: string): Promise<OperatorCredentials | undefined> {
  const names = [files.key, files.newKey, files.certificate, files.roots, files.server]
  const [keyPem, newKeyPem, certificatePem, rootsPem, server] = await Promise.all(
    names.map(name => readIfThere(join(folder, name))),
  )
  if (!certificatePem || !rootsPem) return undefined
  const rest = { certificatePem, rootsPem, ...(server && { server: server.trim() }) }
  if (newKeyPem && belongTogether(certificatePem, newKeyPem)) {
    // A crash came before the new key took its place.
    await moveWhole(join(folder, files.newKey), join(folder, files.key))
    return { ...rest, keyPem: newKeyPem }
  }
  return keyPem ? { ...rest, keyPem } : undefined
}

/** @throws CommandFailure with what to do about it */
export async function loadCredentials(folder: string): Promise<OperatorCredentials> {
  const found = await findCredentials(folder)
  if (found) return found
  throw new CommandFailure(
    `there are no operator credentials in ${folder}`,
    'start a server with: npm start, or name the folder with --credentials, or make them: edgemesh operator create --help',
  )
}

/** Whether these can be used at least until `until` with a server that has these roots. */
export function areGood(credentials: OperatorCredentials, rootsPem: string, until: Date): boolean {
  const { certificatePem, keyPem } = credentials
  if (!belongTogether(certificatePem, keyPem) || credentials.rootsPem !== rootsPem) return false
  return new X509Certificate(certificatePem).validToDate > until
}

function belongTogether(certificatePem: string, keyPem: string): boolean {
  try {
    return new X509Certificate(certificatePem).checkPrivateKey(createPrivateKey(keyPem))
  } catch {
    return false // not PEM: left behind by something else
  }
}
