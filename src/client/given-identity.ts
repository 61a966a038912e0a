/** An identity that comes from elsewhere than `enroll`: PEM, or files of it, as `edgemesh service create-identity` makes them. */
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { invalidField } from '../fault.ts'
import { decodePem, encodePem } from '../identity/pem.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import { withTypedErrors } from './error.ts'
import { type IssuedIdentity, lateInLife } from './issued-identity.ts'

/**
 * Reads a key, its certificate and the roots to trust.
 *
 * @param pem.key PKCS#8 or SEC1, without a passphrase
 * @param pem.certificate leaf first, then intermediates
 * @param pem.bundle the root certificates of the server's authority
 * @throws Fault INVALID_ARGUMENT with the field `key`, `certificate` or `bundle`
 */
export function givenIdentity(pem: { key: string; certificate: string; bundle: string }): IssuedIdentity {
  const [leaf, ...intermediates] = certificatesIn('certificate', pem.certificate)
  const roots = certificatesIn('bundle', pem.bundle)
  const spiffeId = (leaf?.subjectAltName ?? '')
    .split(', ')
    .map(name => name.replace(/^URI:/, ''))
    .find(parseSpiffeId)
  if (!leaf || !spiffeId)
    throw invalidField('certificate', 'names no identity of EdgeMesh: its URI SAN has no SPIFFE ID')
  if (!leaf.checkPrivateKey(keyIn(pem.key))) throw invalidField('key', 'is not the key of the certificate')
  return {
    spiffeId,
    keyPem: pem.key,
    certificateChainPem: pemOf([leaf, ...intermediates]),
    rootsPem: pemOf(roots),
    trustBundleId: '',
    notAfter: leaf.validToDate,
    renewAfter: lateInLife(leaf, Math.random),
  }
}

/**
 * The same, of files.
 *
 * @throws EdgeMeshError INVALID_ARGUMENT for what is in them; the error of `node:fs` where one can't be read
 */
export function readIdentity(files: { key: string; certificate: string; bundle: string }): Promise<IssuedIdentity> {
  return withTypedErrors(async () => {
    const [key, certificate, bundle] = await Promise.all([
      readFile(files.key, 'utf8'),
      readFile(files.certificate, 'utf8'),
      readFile(files.bundle, 'utf8'),
    ])
    return givenIdentity({ key, certificate, bundle })
  })
}

function keyIn(pem: string) {
  try {
    return createPrivateKey(pem)
  } catch {
    // Its message may quote what it was given.
    throw invalidField('key', 'is no private key in PEM, or is encrypted')
  }
}

function certificatesIn(field: string, pem: string): X509Certificate[] {
  try {
    const certificates = decodePem('CERTIFICATE', pem).map(der => new X509Certificate(der))
    if (certificates.length > 0) return certificates
  } catch {
    // Told in the same words.
  }
  throw invalidField(field, 'holds no certificate in PEM that can be read')
}

function pemOf(certificates: X509Certificate[]): string {
  return certificates.map(({ raw }) => encodePem('CERTIFICATE', raw)).join('')
}
