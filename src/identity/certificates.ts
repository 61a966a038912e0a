/**
 * The certificates of devices, operators, services and of our own instances: X.509 version 3 as RFC 5280 profiles it,
 * each an X509-SVID whose one URI is the holder's SPIFFE ID.
 *
 * `issueLeaf` makes one. What goes into a certificate comes from the template alone; of the holder's request only the public key is used. A serial number is to be stored
 * before `issueLeaf` is called with it, so that no certificate can exist that could not be revoked.
 */
import { createPublicKey, hash, type KeyObject, randomBytes, sign, X509Certificate } from 'node:crypto'
import { isIPv4, isIPv6 } from 'node:net'
import { Fault } from '../fault.ts'
import { oids, readCertificate, serialBytes, soleSpiffeId, uriTag } from './certificate-description.ts'
import {
  bitString,
  boolean,
  contextConstructed,
  contextPrimitive,
  decodeDer,
  integer,
  nullValue,
  octetString,
  oid,
  sequence,
  setOf,
  time,
  utf8String,
} from './der.ts'
import { encodePem } from './pem.ts'
import { isSafeId, parseSpiffeId } from './spiffe-id.ts'

/** An issuing CA held in memory, with what every certificate and list of it repeats already encoded. */
export type Issuer = {
  certificateDer: Buffer
  /** Absent where only another instance has it: then nothing can be issued here. */
  privateKey: KeyObject | undefined
  publicKey: KeyObject
  /** The subject key identifier, which what it issues names as authority key identifier. */
  keyId: Buffer
  /** DER Name. */
  subject: Buffer
  notBefore: Date
  notAfter: Date
  signature: SignatureAlgorithm
  /** DER Extension. */
  authorityKeyIdentifier: Buffer
}

export type SignatureAlgorithm = {
  /** DER AlgorithmIdentifier. */
  algorithm: Buffer
  /** The name that node:crypto has for it; `null` where the signature brings its own. */
  digest: string | null
}

export type LeafTemplate = {
  /** From `newSerial`, and stored already. */
  serial: Buffer
  /** DER SubjectPublicKeyInfo that `checkCsr` has let through. */
  spki: Buffer
  spiffeId: string
  /** `client` for devices, operators and services; `server` for instances of EdgeMesh. */
  purpose: 'client' | 'server'
  /** For people to read, 64 characters at most. Nothing is decided by it. */
  commonName: string
  /** An operator's role, an id as `isSafeId` has it. */
  organizationalUnit?: string
  /** Both are moved inside the issuer's own validity, and cut to whole seconds. */
  notBefore: Date
  notAfter: Date
  dnsNames?: string[]
  ipAddresses?: string[]
  /** Where the issuer's revocation list can be had. */
  crlUrl?: string
}

export type IssuedCertificate = {
  der: Buffer
  pem: string
  serialHex: string
  /** Of the whole certificate, lower-case hex. */
  fingerprintSha256: string
  notBefore: Date
  notAfter: Date
}

/** Tags of further GeneralName choices (RFC 5280 section 4.2.1.6). */
const dnsNameTag = 0x82
const ipAddressTag = 0x87

/** RFC 5280 appendix A.1, ub-common-name. */
const commonNameCharactersMax = 64

/** By then a balancer may have found an instance that has been given the key. */
const keyMissingRetryMs = 5_000

/** By the type of the issuer's key. Our own authorities are P-256; one from a file may be any of these. */
const issuerSignatures: Record<string, SignatureAlgorithm> = {
  prime256v1: { algorithm: sequence(oid('1.2.840.10045.4.3.2')), digest: 'sha256' },
  secp384r1: { algorithm: sequence(oid('1.2.840.10045.4.3.3')), digest: 'sha384' },
  ed25519: { algorithm: sequence(oid('1.3.101.112')), digest: null },
  rsa: { algorithm: sequence(oid('1.2.840.113549.1.1.11'), nullValue()), digest: 'sha256' },
}

/** What all leaves share, encoded once: RFC 5280 sections 4.2.1.9, 4.2.1.3 and 4.2.1.12. */
const version3 = contextConstructed(0, integer(2))
const notAnAuthority = extension(oids.basicConstraints, { critical: true }, sequence())
const digitalSignatureOnly = extension(oids.keyUsage, { critical: true }, bitString(Buffer.of(0x80), 7))
const extendedKeyUsages = {
  client: extension(oids.extendedKeyUsage, { critical: false }, sequence(oid(oids.clientAuth))),
  server: extension(oids.extendedKeyUsage, { critical: false }, sequence(oid(oids.serverAuth))),
}

/**
 * A new serial number: 32 hex digits of which 126 bits are random. The top bit is clear, so that the number is
 * positive, and the next one set, so that it always has 16 bytes (RFC 5280 section 4.1.2.2 allows 20).
 */
export function newSerial(): string {
  const serial = randomBytes(serialBytes)
  serial[0] = (serial[0]! & 0x3f) | 0x40
  return serial.toString('hex')
}

/** The issuer of a CA certificate and its private key, if that is here. @throws Error when it can't issue anything */
export function openIssuer(certificateDer: Uint8Array, privateKey: KeyObject | undefined): Issuer {
  const certificate = readCertificate(certificateDer)
  const publicKey = createPublicKey({ key: certificate.spki.der, format: 'der', type: 'spki' })
  const keyId = certificate.extensions.get(oids.subjectKeyIdentifier)
  if (keyId === undefined)
    throw new Error('the CA certificate has no subject key identifier (RFC 5280 section 4.2.1.2)')
  const keyIdBytes = decodeDer(keyId.value).contents
  const { asymmetricKeyType = '', asymmetricKeyDetails } = publicKey
  const keyKind = asymmetricKeyType === 'ec' ? (asymmetricKeyDetails?.namedCurve ?? '') : asymmetricKeyType
  const signature = issuerSignatures[keyKind]
  if (signature === undefined) {
    throw new Error(`a CA key of type ${keyKind} is not supported; use P-256, P-384, Ed25519 or RSA`)
  }
  return {
    certificateDer: certificate.der,
    privateKey,
    publicKey,
    keyId: keyIdBytes,
    subject: certificate.subject.der,
    notBefore: certificate.notBefore,
    notAfter: certificate.notAfter,
    signature,
    // RFC 5280 section 4.2.1.1: keyIdentifier is [0]; name and serial of the issuer stay out, as they tell no more.
    authorityKeyIdentifier: extension(
      oids.authorityKeyIdentifier,
      { critical: false },
      sequence(contextPrimitive(0, keyIdBytes)),
    ),
  }
}

/**
 * Builds, signs and lints one leaf certificate.
 *
 * @throws RangeError when the template asks for what may not be in a certificate, or the issuer's time is over
 */
export function issueLeaf(issuer: Issuer, template: LeafTemplate): IssuedCertificate {
  // Step 1: The template. It is ours, so what is wrong with it is a bug or a setting, and nothing is repaired.
  checkTemplate(template)
  const { notBefore, notAfter } = clampValidity(issuer, template)

  // Step 2: The certificate (RFC 5280 section 4.1).
  const der = signed(
    issuer,
    sequence(
      version3,
      integer(template.serial),
      issuer.signature.algorithm,
      issuer.subject,
      sequence(time(notBefore), time(notAfter)),
      leafSubject(template),
      template.spki,
      contextConstructed(3, leafExtensions(issuer, template)),
    ),
  )

  // Step 3: The proof. Another implementation, OpenSSL's, reads the certificate and its signature before anyone else.
  lintLeaf(der, issuer)

  return {
    der,
    pem: encodePem('CERTIFICATE', der),
    serialHex: template.serial.toString('hex'),
    fingerprintSha256: hash('sha256', der, 'hex'),
    notBefore,
    notAfter,
  }
}

/** `SIGNED{ToBeSigned}` of X.509: what is signed, by which algorithm, and the signature over it. */
export function signed(
  { signature, privateKey }: Pick<Issuer, 'signature' | 'privateKey'>,
  toBeSigned: Buffer,
): Buffer {
  if (privateKey === undefined) {
    const message = 'the key of the certificate authority that issues is not on this instance; try another'
    throw new Fault('UNAVAILABLE', 'AUTHORITY_KEY_MISSING', message, { retryAfterMs: keyMissingRetryMs })
  }
  return sequence(toBeSigned, signature.algorithm, bitString(sign(signature.digest, toBeSigned, privateKey)))
}

/** Extension (RFC 5280 section 4.1): `critical` is written only when true, the default being false. */
export function extension(id: string, { critical }: { critical: boolean }, value: Uint8Array): Buffer {
  return critical ? sequence(oid(id), boolean(true), octetString(value)) : sequence(oid(id), octetString(value))
}

/**
 * A name for a public key, for the key identifiers: the leftmost 160 bits of the SHA-256 of the BIT STRING's value
 * (RFC 7093 section 2, method 1; RFC 5280 section 4.2.1.2 has the same with SHA-1).
 */
export function keyIdentifier(spki: Uint8Array): Buffer {
  const key = decodeDer(spki).children[1]!
  return hash('sha256', key.contents.subarray(1), 'buffer').subarray(0, 20)
}

function checkTemplate(template: LeafTemplate): void {
  const { serial, spiffeId, commonName, organizationalUnit, dnsNames = [], crlUrl } = template
  const require = (holds: boolean, rule: string) => {
    if (!holds) throw new RangeError(`no certificate can be made: ${rule}`)
  }
  require(serial.length === serialBytes && serial[0]! >> 6 === 1, 'the serial is not one of newSerial')
  require(parseSpiffeId(spiffeId) !== undefined, `${JSON.stringify(spiffeId)} is not a SPIFFE ID`)
  require(commonName.length > 0 &&
    commonName.length <= commonNameCharactersMax, 'the common name has not 1 to 64 characters')
  require(organizationalUnit === undefined || isSafeId(organizationalUnit), 'the organizational unit is not a safe id')
  for (const name of dnsNames) require(isDnsName(name), `${JSON.stringify(name)} is not a DNS name`)
  require(crlUrl === undefined || isHttpUrl(crlUrl), `${JSON.stringify(crlUrl)} is not an http or https URL`)
}

/** RFC 1034 section 3.5 as RFC 1123 section 2.1 relaxed it, in lower case. Wildcards have no place in a mesh. */
function isDnsName(name: string): boolean {
  return name.length <= 253 && /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$/.test(name)
}

function isHttpUrl(url: string): boolean {
  return /^https?:\/\/[!-~]+$/.test(url) && URL.canParse(url)
}

function clampValidity(issuer: Issuer, template: LeafTemplate): { notBefore: Date; notAfter: Date } {
  const notBefore = wholeSeconds(Math.max(template.notBefore.getTime(), issuer.notBefore.getTime()))
  const notAfter = wholeSeconds(Math.min(template.notAfter.getTime(), issuer.notAfter.getTime()))
  if (!(notBefore < notAfter)) {
    throw new RangeError(
      `no certificate can be made: none of its time is within the CA's, which ends ${issuer.notAfter.toISOString()}`,
    )
  }
  return { notBefore, notAfter }
}

function wholeSeconds(timeMs: number): Date {
  return new Date(Math.floor(timeMs / 1000) * 1000)
}

function leafSubject({ organizationalUnit, commonName }: LeafTemplate): Buffer {
  const named = (id: string, text: string) => setOf(sequence(oid(id), utf8String(text)))
  return organizationalUnit === undefined
    ? sequence(named(oids.commonName, commonName))
    : sequence(named(oids.organizationalUnit, organizationalUnit), named(oids.commonName, commonName))
}

function leafExtensions(issuer: Issuer, template: LeafTemplate): Buffer {
  const { spki, purpose, crlUrl } = template
  const extensions = [
    notAnAuthority,
    digitalSignatureOnly,
    extendedKeyUsages[purpose],
    extension(oids.subjectAltName, { critical: false }, subjectAltNames(template)),
    extension(oids.subjectKeyIdentifier, { critical: false }, octetString(keyIdentifier(spki))),
    issuer.authorityKeyIdentifier,
  ]
  if (crlUrl !== undefined) {
    extensions.push(extension(oids.crlDistributionPoints, { critical: false }, crlDistributionPoint(crlUrl)))
  }
  return sequence(...extensions)
}

/** RFC 5280 section 4.2.1.6. The SPIFFE ID is the only URI (X509-SVID section 2). */
function subjectAltNames({ spiffeId, dnsNames = [], ipAddresses = [] }: LeafTemplate): Buffer {
  return sequence(
    derText(uriTag, spiffeId),
    ...dnsNames.map(name => derText(dnsNameTag, name)),
    ...ipAddresses.map(address => contextPrimitive(ipAddressTag & 0x1f, ipAddressBytes(address))),
  )
}

/** RFC 5280 section 4.2.1.13: one point, whose distributionPoint [0] is a fullName [0] of one URI. */
function crlDistributionPoint(url: string): Buffer {
  return sequence(sequence(contextConstructed(0, contextConstructed(0, derText(uriTag, url)))))
}

function derText(generalNameTag: number, ascii: string): Buffer {
  return contextPrimitive(generalNameTag & 0x1f, Buffer.from(ascii, 'latin1'))
}

/** Four bytes or sixteen (RFC 5280 section 4.2.1.6). */
function ipAddressBytes(address: string): Buffer {
  if (isIPv4(address)) return Buffer.from(address.split('.').map(Number))
  if (!isIPv6(address) || address.includes('%')) throw new RangeError(`${JSON.stringify(address)} is not an IP address`)
  // The URL parser spells the address in groups alone, also where it ended in the dotted form.
  const groups = new URL(`http://[${address}]`).hostname.slice(1, -1)
  const [head = '', tail] = groups.split('::')
  const left = head === '' ? [] : head.split(':')
  const right = tail === undefined || tail === '' ? [] : tail.split(':')
  const zeros = Array<string>(8 - left.length - right.length).fill('0')
  return Buffer.from([...left, ...zeros, ...right].map(group => group.padStart(4, '0')).join(''), 'hex')
}

/**
 * Reads a finished leaf as a stranger would and holds it against RFC 5280 and the X509-SVID standard. Cheap enough,
 * 0.15 ms, to stand between every signature and whoever receives it.
 *
 * @throws Error naming the rule that is broken
 */
export function lintLeaf(der: Uint8Array, issuer: Issuer): void {
  const certificate = readCertificate(der)
  const openssl = new X509Certificate(der)
  const require = (holds: boolean, rule: string) => {
    if (!holds) throw new Error(`the certificate breaks ${rule}`)
  }
  const critical = (id: string) => certificate.extensions.get(id)?.critical
  const valueHex = (id: string) => certificate.extensions.get(id)?.value.toString('hex')

  require(certificate.version === 2, 'RFC 5280 section 4.1.2.1: version 3')
  require(/^[4-7][0-9a-f]{31}$/.test(
    certificate.serialHex,
  ), 'RFC 5280 section 4.1.2.2: positive serial of fixed length')
  require(certificate.algorithms.every(it =>
    it.equals(issuer.signature.algorithm),
  ), 'RFC 5280 section 4.1.1.2: algorithm')
  require(certificate.issuer.der.equals(issuer.subject), 'RFC 5280 section 4.1.2.4: issuer is the name of its issuer')
  require(certificate.notBefore < certificate.notAfter, 'RFC 5280 section 4.1.2.5: validity')
  require(certificate.notBefore >= issuer.notBefore &&
    certificate.notAfter <= issuer.notAfter, "RFC 5280 section 6.1.3: validity inside the issuer's")
  require(certificate.subject.children.length > 0, 'RFC 5280 section 4.1.2.6: subject')

  require(critical(oids.basicConstraints) === true, 'RFC 5280 section 4.2.1.9: basic constraints critical')
  require(valueHex(oids.basicConstraints) === '3000' && !openssl.ca, 'X509-SVID section 4.1: not a CA')
  require(critical(oids.keyUsage) === true, 'X509-SVID section 4.3: key usage critical')
  require(valueHex(oids.keyUsage) === '03020780', 'X509-SVID section 4.3: digitalSignature alone')
  const usages = openssl.keyUsage ?? []
  require(usages.length === 1, 'the rule of one purpose')
  require(usages[0] === oids.clientAuth ||
    usages[0] === oids.serverAuth, 'X509-SVID section 4.4: clientAuth or serverAuth')

  require(soleSpiffeId(certificate) !== undefined, 'X509-SVID section 2: exactly one URI, a SPIFFE ID')
  require(openssl.subjectAltName?.split(', ').filter(name => name.startsWith('URI:')).length ===
    1, 'X509-SVID section 2')

  const keyId = octetString(keyIdentifier(certificate.spki.der))
  require(valueHex(oids.subjectKeyIdentifier) === keyId.toString('hex'), 'RFC 5280 section 4.2.1.2: key identifier')
  require(valueHex(oids.authorityKeyIdentifier) ===
    sequence(contextPrimitive(0, issuer.keyId)).toString(
      'hex',
    ), "RFC 5280 section 4.2.1.1: the issuer's key identifier")
  require(openssl.verify(issuer.publicKey), "RFC 5280 section 6.1.3: the issuer's signature")
}
