/**
 * The certificate authority: root → issuing intermediate → leaf.
 *
 * `createAuthority` makes one, once in the life of a deployment; what it gives is text, to be kept in the database or
 * in files, its keys sealed under a passphrase. `openAuthority` makes of such text the authority that every instance
 * holds in memory. The root's key is needed again only to replace the intermediate, so no instance opens it.
 */
import { createPrivateKey, generateKeyPair, hash, type KeyObject, X509Certificate } from 'node:crypto'
import { promisify } from 'node:util'
import {
  type IssuedCertificate,
  type Issuer,
  issueLeaf,
  keyIdentifier,
  type LeafTemplate,
  newSerial,
  openIssuer,
  signed,
} from './certificates.ts'
import { type CrlTemplate, issueCrl } from './crl.ts'
import { oid, sequence } from './der.ts'
import { decodePem, encodePem } from './pem.ts'
import { isTrustDomain } from './spiffe-id.ts'

export type AuthorityMaterial = {
  rootPem: string
  /** Sealed PKCS#8, as `sealKey` makes it. */
  rootKeyPem: string
  intermediatePem: string
  /** Sealed likewise. */
  intermediateKeyPem: string
}

export type Authority = {
  /** Every root that is trusted, PEM. After a rotation the old ones are among them until their last leaf has expired. */
  roots: string[]
  /** What a server sends below its leaf, PEM. Empty when the issuing CA is itself a root. */
  intermediates: string[]
  issuer: Issuer
  /** SHA-256 of the SubjectPublicKeyInfo of the root above the issuer, lower-case hex: what tokens pin. */
  rootKeySha256: string
  issueLeaf(template: LeafTemplate): IssuedCertificate
  issueCrl(template: CrlTemplate): Buffer
}

const generateKeyPairAsync = promisify(generateKeyPair)

const dayMs = 24 * 60 * 60 * 1000

/** Clocks of devices run behind; a CA that is not valid yet for them would shut them out on the first day. */
const backdateMs = 60 * 60 * 1000

const passphraseCharactersMin = 16

/**
 * A new root and intermediate, both ECDSA P-256 and both valid for `validityDays` from `now`.
 *
 * Names tell nothing of the machine or the organisation: `EdgeMesh Root CA` with the beginning of the key's identifier,
 * so that two roots side by side during a rotation have two names.
 */
export async function createAuthority({
  trustDomain,
  validityDays,
  now,
  passphrase,
}: {
  trustDomain: string
  validityDays: number
  now: Date
  passphrase: string
}): Promise<AuthorityMaterial> {
  if (!isTrustDomain(trustDomain)) throw new RangeError(`${JSON.stringify(trustDomain)} is not a SPIFFE trust domain`)
  // Fractions of a second have no place in a certificate (RFC 5280 section 4.1.2.5.2).
  const startMs = Math.floor(now.getTime() / 1000) * 1000
  const notBefore = new Date(startMs - backdateMs)
  const notAfter = new Date(startMs + validityDays * dayMs)

  const rootKey = await generateKeyPairAsync('ec', { namedCurve: 'P-256' })
  const root = caName('EdgeMesh Root CA', rootKey.publicKey)
  const rootDer = await issueCa({
    subject: root,
    issuer: { ...root, privateKey: rootKey.privateKey },
    pathLength: 1,
    trustDomain,
    notBefore,
    notAfter,
  })

  const intermediateKey = await generateKeyPairAsync('ec', { namedCurve: 'P-256' })
  const intermediateDer = await issueCa({
    subject: caName('EdgeMesh Issuing CA', intermediateKey.publicKey),
    issuer: { ...root, privateKey: rootKey.privateKey },
    pathLength: 0,
    trustDomain,
    notBefore,
    notAfter,
  })

  return {
    rootPem: encodePem('CERTIFICATE', rootDer),
    rootKeyPem: sealKey(rootKey.privateKey, passphrase),
    intermediatePem: encodePem('CERTIFICATE', intermediateDer),
    intermediateKeyPem: sealKey(intermediateKey.privateKey, passphrase),
  }
}

type CaName = { commonName: string; spki: Buffer; keyId: Buffer }

function caName(title: string, publicKey: KeyObject): CaName {
  const spki = publicKey.export({ format: 'der', type: 'spki' })
  const keyId = keyIdentifier(spki)
  return { commonName: `${title} ${keyId.toString('hex', 0, 4)}`, spki, keyId }
}

/** One CA certificate (RFC 5280 sections 4.1 and 4.2.1), and a signing certificate by X509-SVID section 3.2. */
async function issueCa(template: {
  subject: CaName
  issuer: CaName & { privateKey: KeyObject }
  pathLength: number
  trustDomain: string
  notBefore: Date
  notAfter: Date
}): Promise<Buffer> {
  const { subject, issuer, pathLength, trustDomain, notBefore, notAfter } = template
  // Loaded here, since it takes a tenth of a second that only whoever makes a CA has to spend.
  const [pki, asn1] = await Promise.all([import('pkijs'), import('asn1js')])

  const name = (commonName: string) =>
    new pki.RelativeDistinguishedNames({
      typesAndValues: [
        new pki.AttributeTypeAndValue({ type: '2.5.4.3', value: new asn1.Utf8String({ value: commonName }) }),
      ],
    })
  // RFC 5280 section 4.1.2.5: UTCTime through 2049.
  const timeOf = (value: Date) => new pki.Time({ type: value.getUTCFullYear() < 2050 ? 0 : 1, value })
  const extension = (extnID: string, critical: boolean, value: { toBER(): ArrayBuffer }) =>
    new pki.Extension({ extnID, critical, extnValue: value.toBER() })
  const ecdsaWithSha256 = new pki.AlgorithmIdentifier({ algorithmId: '1.2.840.10045.4.3.2' })
  const keyCertSignAndCrlSign = new asn1.BitString({ valueHex: Uint8Array.of(0x06), unusedBits: 1 })

  const certificate = new pki.Certificate({
    version: 2,
    serialNumber: new asn1.Integer({ valueHex: Buffer.from(newSerial(), 'hex') }),
    signature: ecdsaWithSha256,
    issuer: name(issuer.commonName),
    notBefore: timeOf(notBefore),
    notAfter: timeOf(notAfter),
    subject: name(subject.commonName),
    subjectPublicKeyInfo: pki.PublicKeyInfo.fromBER(subject.spki),
    extensions: [
      extension('2.5.29.19', true, new pki.BasicConstraints({ cA: true, pathLenConstraint: pathLength }).toSchema()),
      extension('2.5.29.15', true, keyCertSignAndCrlSign),
      extension('2.5.29.14', false, new asn1.OctetString({ valueHex: subject.keyId })),
      extension(
        '2.5.29.35',
        false,
        new pki.AuthorityKeyIdentifier({ keyIdentifier: new asn1.OctetString({ valueHex: issuer.keyId }) }).toSchema(),
      ),
      // The trust domain's own SPIFFE ID, which has no path.
      extension(
        '2.5.29.17',
        false,
        new pki.GeneralNames({
          names: [new pki.GeneralName({ type: 6, value: `spiffe://${trustDomain}` })],
        }).toSchema(),
      ),
    ],
  })
  const toBeSigned = Buffer.from(certificate.encodeTBS().toBER())
  const signature = { algorithm: sequence(oid('1.2.840.10045.4.3.2')), digest: 'sha256' }
  return signed({ signature, privateKey: issuer.privateKey }, toBeSigned)
}

/**
 * PKCS#8 encrypted with AES-256-CBC under PBKDF2-HMAC-SHA256 (PBES2, RFC 8018 section 6.2), PEM.
 *
 * OpenSSL, which does this, iterates 2048 times. That is enough for a passphrase that is random, as CA_KEY_PASSPHRASE
 * is told to be, and would not be for one that a person made up: hence the least length.
 */
export function sealKey(privateKey: KeyObject, passphrase: string): string {
  if (passphrase.length < passphraseCharactersMin) {
    throw new Error(
      `CA_KEY_PASSPHRASE has ${passphrase.length} characters, want at least ${passphraseCharactersMin};` +
        ' make one with: openssl rand -base64 32',
    )
  }
  return privateKey.export({ format: 'pem', type: 'pkcs8', cipher: 'aes-256-cbc', passphrase }) as string
}

/** A private key in PEM, sealed or plain. @throws Error naming CA_KEY_PASSPHRASE when that is missing or wrong */
export function openKey(pem: string, passphrase?: string): KeyObject {
  const isSealed = pem.includes('-----BEGIN ENCRYPTED PRIVATE KEY-----') || pem.includes('Proc-Type: 4,ENCRYPTED')
  if (isSealed && (passphrase === undefined || passphrase === '')) {
    throw new Error('the CA key is encrypted: set CA_KEY_PASSPHRASE to the passphrase that it was sealed with')
  }
  try {
    return createPrivateKey(isSealed ? { key: pem, passphrase: passphrase! } : pem)
  } catch (cause) {
    // The cause is OpenSSL's and may be about padding or about ASN.1: under a wrong key the plain text is noise.
    throw isSealed
      ? new Error('CA_KEY_PASSPHRASE does not open the CA key: it is not the one that the key was sealed with', {
          cause,
        })
      : new Error('the CA key is not a private key in PEM', { cause })
  }
}

/**
 * The authority that the given texts describe, after checking that they belong together.
 *
 * `rootPem` and `intermediatePem` may hold more than one certificate, those of earlier authorities whose leaves are
 * still about. Which is the issuing one is told by its key, which is the root above it by its signature. A root that
 * issues by itself is given as both.
 *
 * @throws Error naming what does not fit
 */
export function openAuthority({
  rootPem,
  intermediatePem,
  intermediateKeyPem,
  passphrase,
}: {
  rootPem: string
  intermediatePem: string
  intermediateKeyPem: string
  passphrase?: string
}): Authority {
  const privateKey = openKey(intermediateKeyPem, passphrase)
  const roots = readCas('root', rootPem)
  const intermediates = readCas('intermediate', intermediatePem)

  const issuing = intermediates.find(intermediate => intermediate.checkPrivateKey(privateKey))
  if (issuing === undefined) throw new Error('the CA key does not belong to the CA certificate')
  for (const root of roots) {
    if (!root.verify(root.publicKey)) throw new Error(`the root ${nameOf(root)} is not signed by its own key`)
  }
  const root = roots.find(candidate => issuing.checkIssued(candidate) && issuing.verify(candidate.publicKey))
  if (root === undefined) throw new Error(`the CA ${nameOf(issuing)} was not issued by any root that is given`)

  const issuer = openIssuer(issuing.raw, privateKey)
  return {
    roots: roots.map(pemOf),
    intermediates: intermediates.filter(ca => !roots.some(trusted => trusted.raw.equals(ca.raw))).map(pemOf),
    issuer,
    rootKeySha256: hash('sha256', root.publicKey.export({ format: 'der', type: 'spki' }), 'hex'),
    issueLeaf: template => issueLeaf(issuer, template),
    issueCrl: template => issueCrl(issuer, template),
  }
}

/** OpenSSL's judgement of `ca` includes that the key usage, if stated, allows signing certificates. */
function readCas(what: string, pem: string): X509Certificate[] {
  const certificates = decodePem('CERTIFICATE', pem).map(der => readX509(what, der))
  if (certificates.length === 0) throw new Error(`no ${what} certificate found, want PEM`)
  for (const certificate of certificates) {
    if (!certificate.ca) throw new Error(`the ${what} certificate ${nameOf(certificate)} is not that of a CA`)
  }
  return certificates
}

function readX509(what: string, der: Buffer): X509Certificate {
  try {
    return new X509Certificate(der)
  } catch (cause) {
    throw new Error(`the ${what} certificate can't be read`, { cause })
  }
}

function pemOf(certificate: X509Certificate): string {
  return encodePem('CERTIFICATE', certificate.raw)
}

function nameOf(certificate: X509Certificate): string {
  return certificate.subject.replaceAll('\n', ', ')
}
