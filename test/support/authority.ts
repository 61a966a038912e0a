/** The certificate authority of a running EdgeMesh, for certificates that the service itself would not issue. */
import { createPrivateKey, createPublicKey } from 'node:crypto'
import { createKey } from '../../src/client/csr.ts'
import { systemClock } from '../../src/clock.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { openAuthorities } from '../../src/identity/authorities.ts'
import { describeCertificate } from '../../src/identity/certificate-description.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { entities } from '../../src/server.ts'
import { type Credentials, type EdgeMesh, secrets } from './edgemesh.ts'

export type SpecialLeaf = {
  spiffeId: string
  purpose?: 'client' | 'server'
  /** Offsets from now. */
  validFromMs?: number
  validForMs?: number
  /** Puts it on record, as an issued certificate is. */
  recordedFor?: string
}

const trustDomain = 'edgemesh.local'
const minuteMs = 60_000

/** @returns a function that issues leaves, with new keys, as the server would */
export async function specialLeaves(
  mesh: EdgeMesh,
): Promise<(leaf: SpecialLeaf) => Promise<Required<Credentials> & { serial: string }>> {
  const db = await openDatabase({ url: mesh.databaseUrl, poolMax: 1, entities })
  const { set } = await openAuthorities({
    db,
    trustDomain,
    validityDays: 1,
    passphrase: secrets.CA_KEY_PASSPHRASE,
    files: undefined,
    clock: systemClock,
  })
  const authority = set.issuing
  await db.close()
  return async ({ spiffeId, purpose = 'client', validFromMs = -minuteMs, validForMs = minuteMs, recordedFor }) => {
    const keyPem = createKey()
    const [notBefore, notAfter] = [new Date(Date.now() + validFromMs), new Date(Date.now() + validForMs)]
    const issued = authority.issueLeaf({
      serial: Buffer.from(newSerial(), 'hex'),
      spki: createPublicKey(createPrivateKey(keyPem)).export({ type: 'spki', format: 'der' }),
      spiffeId,
      purpose,
      commonName: 'special',
      notBefore,
      notAfter,
      ...(purpose === 'server' && { dnsNames: ['localhost'] }),
    })
    if (recordedFor) {
      await mesh.pool.query(
        `insert into certificates
           (serial, subject_kind, subject_id, public_key_sha256, fingerprint_sha256, not_before, not_after, created_at)
         values ($1, 'device', $2, $3, $4, $5, $6, now())`,
        [
          issued.serialHex,
          recordedFor,
          describeCertificate(issued.der).publicKeySha256,
          issued.fingerprintSha256,
          issued.notBefore,
          issued.notAfter,
        ],
      )
    }
    const certificatePem = [issued.pem, ...authority.intermediates].join('')
    return { rootsPem: mesh.anonymous.rootsPem, certificatePem, keyPem, serial: issued.serialHex }
  }
}
