import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { openOffline } from '../../src/server.ts'
import { readSettings } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import type { Credentials } from './edgemesh.ts'

/**
 * An operator of a server, made beside its database.
 *
 * @param env the server's settings by their variables
 */
export async function operatorOf(env: Record<string, string>): Promise<Required<Credentials>> {
  const settings = readSettings(env)
  const offline = await openOffline(settings, createLog({ level: 'fatal' }))
  try {
    const keyPem = createKey()
    const csr = signingRequestFor(keyPem)
    const issued = await offline.issueOperator({ name: 'tester', role: 'admin', csr, validityMs: 30 * 86_400_000 })
    return { ...issued, keyPem }
  } finally {
    await offline.close()
  }
}
