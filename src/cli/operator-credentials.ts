/**
 * The credentials of an operator, or of a service: a folder of PEM files that openssl, grpcurl, curl and Envoy take as
 * they are. Those of a service are called service.key and so on.
 *
 *     operator.key      private key, PKCS#8; readable by its owner only
 *     operator.key.new  the key of a renewal that has not been finished
 *     operator.crt      certificate, then the intermediates
 *     ca.crt            the roots to trust
 *     server            host:port, where there is a server that these are for
 */
import { X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { belongTogether, type KeyPair, loadKeyPair, saveKeyPair } from '../credential-files.ts'
import { everyoneReads, readIfThere, writeWhole } from '../whole-file.ts'
import { CommandFailure } from './failure.ts'
import { startTyped } from './typed.ts'

export type OperatorCredentials = KeyPair & { rootsPem: string; server?: string }

const pairFilesOf = (holder: 'operator' | 'service') => ({
  key: `${holder}.key`,
  newKey: `${holder}.key.new`,
  certificate: `${holder}.crt`,
})
const rootsFile = 'ca.crt'
const serverFile = 'server'

/** All of it, or what was there before. */
export async function saveCredentials(
  folder: string,
  credentials: OperatorCredentials,
  holder: 'operator' | 'service' = 'operator',
): Promise<void> {
  // The roots fit the certificate before this one too: they are only added to before the old ones are of no more use.
  await writeWhole(join(folder, rootsFile), credentials.rootsPem, everyoneReads)
  await saveKeyPair(folder, pairFilesOf(holder), credentials)
  if (credentials.server) await writeWhole(join(folder, serverFile), `${credentials.server}\n`, everyoneReads)
}

/** `undefined` when any of the three PEM files is missing. */
export async function findCredentials(folder: string): Promise<OperatorCredentials | undefined> {
  const [pair, rootsPem, server] = await Promise.all([
    loadKeyPair(folder, pairFilesOf('operator')),
    readIfThere(join(folder, rootsFile)),
    readIfThere(join(folder, serverFile)),
  ])
  if (!pair?.keyPem || !pair.certificatePem || !rootsPem) return undefined
  const { keyPem, certificatePem } = pair
  return { keyPem, certificatePem, rootsPem, ...(server && { server: server.trim() }) }
}

/** @throws CommandFailure with what to do about it */
export async function loadCredentials(folder: string): Promise<OperatorCredentials> {
  const found = await findCredentials(folder)
  if (found) return found
  throw new CommandFailure(
    `there are no operator credentials in ${folder}`,
    `start a server with: ${startTyped}, or name the folder with --credentials, or make them: edgemesh operator create --help`,
  )
}

/** Whether these can be used at least until `until` with a server that has these roots. */
export function areGood(credentials: OperatorCredentials, rootsPem: string, until: Date): boolean {
  if (!belongTogether(credentials) || credentials.rootsPem !== rootsPem) return false
  return new X509Certificate(credentials.certificatePem).validToDate > until
}
