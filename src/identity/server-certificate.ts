/**
 * The instance's own server certificate: made at start with a key that never leaves memory, renewed without a restart,
 * made anew when another authority issues. Open connections keep the one that they were made with.
 */
import { createHash, generateKeyPairSync, type KeyObject } from 'node:crypto'
import { isIP } from 'node:net'
import type { Database } from '../db/orm.ts'
import type { Log } from '../telemetry/log.ts'
import type { Authorities } from './authorities.ts'
import type { CheckedCsr } from './csr.ts'
import type { Issuance } from './issuance.ts'

/** PEM: what the port needs to prove who it is, and what it verifies clients against. */
export type ServerCertificate = { key: string; cert: string; ca: string[]; notAfter: Date }

export type ServerCertificateKeeper = {
  current(): ServerCertificate
  stop(): void
}

/** All instances are one service. */
export const instancesName = 'edgemesh'
const retryMs = 10_000
/** Longer timers overflow in Node. */
const timerMsMax = 2 ** 31 - 1

export async function keepServerCertificate(options: {
  db: Database
  authorities: Authorities
  issuance: Issuance
  names: readonly string[]
  validityMs: number
  log: Log
  /** Called with every certificate after the first, and when clients are verified against other roots. */
  onChanged: (certificate: ServerCertificate) => void
}): Promise<ServerCertificateKeeper> {
  const { db, authorities, issuance, names, validityMs, log } = options
  const subject = {
    kind: 'service' as const,
    id: instancesName,
    server: {
      dnsNames: names.filter(name => !isIP(name)),
      ipAddresses: ['127.0.0.1', '::1', ...names.filter(name => isIP(name))],
    },
  }
  let timer: NodeJS.Timeout | undefined
  let stopped = false
  const clientAuthorities = () =>
    authorities.current().trusted.flatMap(({ rootPem, intermediates }) => [rootPem, ...intermediates])

  async function issue(): Promise<ServerCertificate> {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const key = ownKey(publicKey)
    await issuance.ready()
    const reservation = await db.transaction(async em => issuance.reserve(em, subject, key, validityMs))
    const certificate = await issuance.sign(reservation)
    clearTimeout(timer)
    const renewInMs = certificate.renewAfter.getTime() - Date.now()
    timer = setTimeout(renew, Math.min(Math.max(renewInMs, 0), timerMsMax)).unref()
    return {
      key: privateKey.export({ type: 'pkcs8', format: 'pem' }).toString(),
      cert: certificate.chainPem.join(''),
      ca: clientAuthorities(),
      notAfter: certificate.notAfter,
    }
  }

  async function renew(): Promise<void> {
    try {
      let issuer: string
      do {
        issuer = authorities.current().issuing.issuerKeyId
        current = await issue()
      } while (issuer !== authorities.current().issuing.issuerKeyId)
      if (stopped) return
      options.onChanged(current)
      log.info({ notAfter: current.notAfter }, 'server certificate renewed')
    } catch (error) {
      log.warn({ err: error }, 'the server certificate could not be renewed yet')
      timer = setTimeout(renew, retryMs).unref()
    }
  }

  const issuedUnder = authorities.current()
  let current = await issue()
  if (authorities.current() !== issuedUnder) await renew()
  authorities.onChange((now, before) => {
    if (stopped) return
    // At once, with the certificate that there is: whom to trust must not wait for a new one.
    current = { ...current, ca: clientAuthorities() }
    options.onChanged(current)
    const crosses = ({ issuing }: typeof now) => issuing.crosses.join('')
    if (now.issuing.issuerKeyId !== before.issuing.issuerKeyId || crosses(now) !== crosses(before)) void renew()
  })
  return {
    current: () => current,
    stop() {
      stopped = true
      clearTimeout(timer)
    },
  }
}

function ownKey(publicKey: KeyObject): CheckedCsr {
  const spki = publicKey.export({ type: 'spki', format: 'der' })
  const publicKeySha256 = createHash('sha256').update(spki).digest('hex')
  return { publicKey, spki, publicKeySha256, keyType: 'P-256', challenge: undefined, sha256: '' }
}
