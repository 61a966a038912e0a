/** The instance's own server certificate: made at start with a key that never leaves memory, renewed without a restart. */
import { createHash, generateKeyPairSync, type KeyObject } from 'node:crypto'
import { isIP } from 'node:net'
import type { Database } from '../db/orm.ts'
import type { Log } from '../telemetry/log.ts'
import type { Authority } from './certificate-authority.ts'
import type { CheckedCsr } from './csr.ts'
import { type Issuance, renewAfter } from './issuance.ts'

/** PEM: what the port needs to prove who it is, and what it verifies clients against. */
export type ServerCertificate = { key: string; cert: string; ca: string[]; notAfter: Date }

export type ServerCertificateKeeper = {
  current(): ServerCertificate
  stop(): void
}

/** All instances are one service. */
const serviceName = 'edgemesh'
const retryMs = 10_000
/** Longer timers overflow in Node. */
const timerMsMax = 2 ** 31 - 1

export async function keepServerCertificate(options: {
  db: Database
  authority: Authority
  issuance: Issuance
  names: readonly string[]
  validityMs: number
  log: Log
  /** Called with every certificate after the first. */
  onRenewed: (certificate: ServerCertificate) => void
}): Promise<ServerCertificateKeeper> {
  const { db, authority, issuance, names, validityMs, log } = options
  const subject = {
    kind: 'service' as const,
    id: serviceName,
    server: {
      dnsNames: names.filter(name => !isIP(name)),
      ipAddresses: ['127.0.0.1', '::1', ...names.filter(name => isIP(name))],
    },
  }
  let timer: NodeJS.Timeout | undefined

  async function issue(): Promise<ServerCertificate> {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const key = ownKey(publicKey)
    const reservation = await db.em().transactional(async em => issuance.reserve(em, subject, key, validityMs))
    const certificate = await issuance.sign(reservation)
    const renewAt = renewAfter(certificate).getTime()
    timer = setTimeout(renew, Math.min(Math.max(renewAt - Date.now(), 0), timerMsMax)).unref()
    return {
      key: privateKey.export({ type: 'pkcs8', format: 'pem' }).toString(),
      cert: [certificate.pem, ...authority.intermediates].join(''),
      ca: [...authority.roots, ...authority.intermediates],
      notAfter: certificate.notAfter,
    }
  }

  async function renew(): Promise<void> {
    try {
      current = await issue()
      options.onRenewed(current)
      log.info({ notAfter: current.notAfter }, 'server certificate renewed')
    } catch (error) {
      log.warn({ err: error }, 'the server certificate could not be renewed yet')
      timer = setTimeout(renew, retryMs).unref()
    }
  }

  let current = await issue()
  return { current: () => current, stop: () => clearTimeout(timer) }
}

function ownKey(publicKey: KeyObject): CheckedCsr {
  const spki = publicKey.export({ type: 'spki', format: 'der' })
  const publicKeySha256 = createHash('sha256').update(spki).digest('hex')
  return { publicKey, spki, publicKeySha256, keyType: 'P-256', challenge: undefined, sha256: '' }
}
