/**
 * An operator's credentials: a folder of PEM files that openssl, grpcurl and curl take as they are.
 *
 *     operator.key    private key, PKCS#8; readable by its owner only
 *     operator.crt    certificate, then the intermediates
 *     ca.crt          the roots to trust
 *     server          host:port, where there is a server that these are for
 */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { CommandFailure } from './failure.ts'
import { everyoneReads, ownerOnly, readIfThere, writeWhole } from './whole-file.ts'

export type OperatorCredentials = { keyPem: string; certificatePem: string; rootsPem: string; server?: string }

/** The key goes first: a certificate without its key is of no use, and is replaced at the next start. */
export async function saveCredentials(folder: string, credentials: OperatorCredentials): Promise<void> {
  await writeWhole(join(folder, 'operator.key'), credentials.keyPem, ownerOnly)
  await writeWhole(join(folder, 'operator.crt'), credentials.certificatePem, everyoneReads)
  await writeWhole(join(folder, 'ca.crt'), credentials.rootsPem, everyoneReads)
  if (credentials.server) await writeWhole(join(folder, 'server'), `${credentials.server}\n`, everyoneReads)
}

/** `undefined` when any of the three PEM files is missing. */
export async function findCredentials(folder: string): Promise<OperatorCredentials | undefined> {
  const names = ['operator.key', 'operator.crt', 'ca.crt', 'server']
  const [keyPem, certificatePem, rootsPem, server] = await Promise.all(
    names.map(name => readIfThere(join(folder, name))),
  )
  if (!keyPem || !certificatePem || !rootsPem) return undefined
  return { keyPem, certificatePem, rootsPem, ...(server && { server: server.trim() }) }
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
  try {
    const certificate = new X509Certificate(credentials.certificatePem)
    const belongTogether = certificate.checkPrivateKey(createPrivateKey(credentials.keyPem))
    return belongTogether && credentials.rootsPem === rootsPem && certificate.validToDate > until
  } catch {
    return false // not PEM: left behind by something else
  }
}
