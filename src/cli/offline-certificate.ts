/** Certificates that are made beside the database, with the server's settings: no server is asked. */
import { destination } from 'pino'
import { createKey, signingRequestFor } from '../client/csr.ts'
import type { CertifiedName } from '../identity/operator.ts'
import type { openOffline } from '../server.ts'
import { readSettings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { withSecretsIfKept } from './local-secrets.ts'
import { saveCredentials } from './operator-credentials.ts'

const dayMs = 86_400_000
/** See `operatorValidityMsMax`. */
export const daysMax = 825

type Offline = Awaited<ReturnType<typeof openOffline>>

/** A new key and a certificate for it, in a folder. @returns until when it is valid */
export async function certifyOffline(
  folder: string,
  holder: 'operator' | 'service',
  days: number,
  issue: (offline: Offline, request: { csr: Uint8Array; validityMs: number }) => Promise<CertifiedName>,
): Promise<Date> {
  const env = await withSecretsIfKept(process.env, process.env.DATA_DIR || '.edgemesh')
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...env })
  // Loaded here, since it takes a second that `--help` need not wait for.
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(settings, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    const keyPem = createKey()
    const csr = signingRequestFor(keyPem)
    const { certificatePem, rootsPem, notAfter } = await issue(offline, { csr, validityMs: days * dayMs })
    await saveCredentials(folder, { keyPem, certificatePem, rootsPem }, holder)
    return notAfter
  } finally {
    await offline.close()
  }
}
