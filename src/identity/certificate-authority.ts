/**
 * The certificate authority: root → issuing intermediate → leaf.
 *
 * `createAuthority` makes one, once in the life of a deployment; what it gives is text, to be kept in the database or
 * in files, its keys sealed under a passphrase. `openAuthority` makes of such text the authority that every instance
 * holds in memory. The root's key is needed again only when authorities change, so no instance keeps it open.
 */
import { createPrivateKey, generateKeyPair, hash, type KeyObject, X509Certificate } from 'node:crypto'
import { promisify } from 'node:util'
import { describeCa } from './certificate-description.ts'
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

/** One authority in memory: a root, what issues under it, and the chain between. */
export type Authority = {
  /** PEM. */
  rootPem: string
  rootNotAfter: Date
  /** SHA-256 of the root's SubjectPublicKeyInfo, lower-case hex: what tokens pin. */
  rootKeySha256: string
  /** The issuing CA and what is between it and the root, in that order, PEM. Empty when the root itself issues. */
  intermediates: string[]
  /** Certificates for this root by other roots, PEM, for those who trust only the other (see `cross-certificate.ts`). */
  crosses: string[]
  issuer: Issuer
  /** Key identifier of the issuing CA, lower-case hex: what its leaves name as their issuer. */
  issuerKeyId: string
  /** @throws Fault UNAVAILABLE AUTHORITY_KEY_MISSING where the key is not on this instance; so does `issueCrl` */
  issueLeaf(template: LeafTemplate): IssuedCertificate
  issueCrl(template: CrlTemplate): Buffer
  /** Whether a certificate is signed by the issuing CA. Nothing is said of dates, purpose or revocation. */
  hasIssued(certificate: X509Certificate): boolean
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
    // The issuing CA, and the root of the authority that follows, while it is certified by this one.
    pathLength: 2,
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
 * The authority that the given texts describe, after checking that they belong together: the chain is followed from the
 * CA that issues to a root that is signed by its own key, and every CA on the way may sign what is below it (RFC 5280
 * sections 4.2.1.3 and 4.2.1.9). Dates are left to who knows the time.
 *
 * @param texts.intermediatePem the issuing CA, then what is above it; a root that issues by itself is given as both
 * @param texts.intermediateKeyPem absent where the key is on other instances only
 * @throws Error naming what does not fit
 */
export function openAuthority(texts: {
  rootPem: string
  intermediatePem: string
  intermediateKeyPem?: string | null | undefined
  crossPem?: string
  passphrase?: string
}): Authority {
  const privateKey = texts.intermediateKeyPem ? openKey(texts.intermediateKeyPem, texts.passphrase) : undefined
  const given = [...readCas('intermediate', texts.intermediatePem), ...readCas('root', texts.rootPem)]
  const issuing = given[0]!
  if (privateKey && !issuing.checkPrivateKey(privateKey)) {
    throw new Error('the CA key does not belong to the CA certificate')
  }
  return authorityOf(chainFrom(issuing, given), privateKey, decodePem('CERTIFICATE', texts.crossPem ?? ''))
}

/**
 * The authorities in CA_CERT and CA_KEY: one for each key, its chain found among all the certificates, in any order.
 *
 * @throws Error naming what does not fit: a key without a certificate, a chain that does not end in a root, a certificate
 *   that is part of none
 */
export function openAuthorityFiles(files: { certPem: string; keyPem: string; passphrase: string }): Authority[] {
  const given = readCas('CA_CERT', files.certPem)
  const keys = files.keyPem.match(/-----BEGIN ((?:[A-Z]+ )*PRIVATE KEY)-----[^-]*-----END \1-----/g) ?? []
  if (keys.length === 0) throw new Error('CA_KEY holds no private key in PEM')
  const chains = keys.map(pem => {
    const privateKey = openKey(pem, files.passphrase)
    const issuing = given.find(candidate => candidate.checkPrivateKey(privateKey))
    if (!issuing) throw new Error('CA_KEY holds a key that belongs to no certificate in CA_CERT')
    return { chain: chainFrom(issuing, given), privateKey }
  })
  const idle = given.find(({ raw }) => !chains.some(({ chain }) => chain.some(used => used.raw.equals(raw))))
  if (idle) throw new Error(`CA_CERT holds ${nameOf(idle)}, which is part of no chain that CA_KEY has a key for`)
  return chains.map(({ chain, privateKey }) => authorityOf(chain, privateKey, []))
}

/** From the CA that issues up to and with the root, each link checked. */
function chainFrom(issuing: X509Certificate, given: readonly X509Certificate[]): X509Certificate[] {
  const chain = [issuing]
  for (let below = 0; ; below++) {
    const ca = chain[below]!
    checkCa(ca, below)
    if (ca.checkIssued(ca) && ca.verify(ca.publicKey)) return chain
    const above = given.find(
      candidate => !chain.includes(candidate) && ca.checkIssued(candidate) && ca.verify(candidate.publicKey),
    )
    if (above === undefined) throw new Error(`the CA ${nameOf(ca)} was not issued by any root that is given`)
    if (chain.length === chainMax) throw new Error(`the chain of ${nameOf(issuing)} is longer than ${chainMax}`)
    chain.push(above)
  }
}

/** Root, two levels of policy CAs and one that issues are what the largest organisations have. */
const chainMax = 4

/** @param below how many CAs stand between it and a leaf */
function checkCa(certificate: X509Certificate, below: number): void {
  const { isCa, pathLength, signsCertificates, signsLists, keyId } = describeCa(certificate.raw)
  const name = nameOf(certificate)
  if (!isCa) throw new Error(`the certificate ${name} is not that of a CA`)
  if (!signsCertificates) throw new Error(`the key usage of the CA ${name} does not let it sign certificates`)
  if (below === 0 && !signsLists)
    throw new Error(`the key usage of the CA ${name} does not let it sign revocation lists`)
  if (pathLength !== undefined && pathLength < below) {
    throw new Error(`the CA ${name} allows ${pathLength} CAs below it, and there are ${below}`)
  }
  if (keyId === '') throw new Error(`the CA ${name} has no subject key identifier (RFC 5280 section 4.2.1.2)`)
  const { modulusLength } = certificate.publicKey.asymmetricKeyDetails ?? {}
  if (modulusLength !== undefined && modulusLength < rsaBitsMin) {
    throw new Error(`the RSA key of the CA ${name} has ${modulusLength} bits, want at least ${rsaBitsMin}`)
  }
}

const rsaBitsMin = 2048

function authorityOf(chain: X509Certificate[], privateKey: KeyObject | undefined, crosses: Buffer[]): Authority {
  const root = chain.at(-1)!
  const issuer = openIssuer(chain[0]!.raw, privateKey)
  return {
    rootPem: pemOf(root),
    rootNotAfter: root.validToDate,
    rootKeySha256: hash('sha256', root.publicKey.export({ format: 'der', type: 'spki' }), 'hex'),
    intermediates: chain.slice(0, -1).map(pemOf),
    crosses: crosses.map(der => encodePem('CERTIFICATE', der)),
    issuer,
    issuerKeyId: issuer.keyId.toString('hex'),
    issueLeaf: template => issueLeaf(issuer, template),
    issueCrl: template => issueCrl(issuer, template),
    hasIssued: certificate => certificate.checkIssued(chain[0]!) && certificate.verify(chain[0]!.publicKey),
  }
}

function readCas(what: string, pem: string): X509Certificate[] {
  const certificates = decodePem('CERTIFICATE', pem).map(der => readX509(what, der))
  if (certificates.length === 0) throw new Error(`no ${what} certificate found, want PEM`)
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
