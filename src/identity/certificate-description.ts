/**
 * Certificates read back: what a peer's certificate says of its holder, and a CA's of what it may do. It says so only if
 * its signature has been verified, which is done elsewhere: by TLS for peers, by `openAuthorityFiles` for authorities.
 */
import { hash } from 'node:crypto'
import { DerError, type DerNode, decodeDer, oidText, readTime, tags } from './der.ts'
import { parseSpiffeId, type SpiffeId } from './spiffe-id.ts'

export type CertificateDescription = {
  /** Lower-case hex, 32 characters for every certificate of ours. */
  serialHex: string
  /** `undefined` unless the certificate has exactly one URI, and that one is a SPIFFE ID of ours. */
  spiffeId: SpiffeId | undefined
  notBefore: Date
  notAfter: Date
  /** SHA-256 of the SubjectPublicKeyInfo, lower-case hex. */
  publicKeySha256: string
  /** The operator's role; `undefined` when there is none, or more than one. */
  organizationalUnit: string | undefined
  /** Key identifier of the authority that issued it, lower-case hex; empty where the certificate does not say. */
  issuerKeyId: string
  /** False also when the certificate does not say what it is for. */
  hasClientAuth: boolean
}

/** Object identifiers of what a certificate has in it. */
export const oids = {
  commonName: '2.5.4.3',
  organizationalUnit: '2.5.4.11',
  subjectKeyIdentifier: '2.5.29.14',
  keyUsage: '2.5.29.15',
  subjectAltName: '2.5.29.17',
  basicConstraints: '2.5.29.19',
  crlDistributionPoints: '2.5.29.31',
  authorityKeyIdentifier: '2.5.29.35',
  extendedKeyUsage: '2.5.29.37',
  serverAuth: '1.3.6.1.5.5.7.3.1',
  clientAuth: '1.3.6.1.5.5.7.3.2',
}

/** Tag of the GeneralName choice for URIs (RFC 5280 section 4.2.1.6). */
export const uriTag = 0x86

/** Of a serial number of ours. */
export const serialBytes = 16

/**
 * What a peer's certificate says, read once for its connection. It says so only if the chain has been verified: that
 * is done by TLS, before this is called.
 *
 * @param der such as `raw` of what `tlsSocket.getPeerCertificate()` gives
 * @throws DerError when it is not a certificate
 */
export function describeCertificate(der: Uint8Array): CertificateDescription {
  const certificate = readCertificate(der)
  return {
    serialHex: certificate.serialHex,
    spiffeId: soleSpiffeId(certificate),
    notBefore: certificate.notBefore,
    notAfter: certificate.notAfter,
    publicKeySha256: hash('sha256', certificate.spki.der, 'hex'),
    organizationalUnit: soleAttribute(certificate.subject, oids.organizationalUnit),
    issuerKeyId: issuerKeyIdOf(certificate),
    hasClientAuth: extendedKeyUsage(certificate).includes(oids.clientAuth),
  }
}

/** What a CA certificate says of what it may do (RFC 5280 sections 4.2.1.9 and 4.2.1.3). */
export type CaDescription = {
  isCa: boolean
  /** How many CAs may stand between it and a leaf; `undefined`: any number. */
  pathLength: number | undefined
  /** False also when the key usage is not stated, which section 4.2.1.3 forbids for a CA. */
  signsCertificates: boolean
  signsLists: boolean
  /** DER Name. */
  subject: Buffer
  /** DER SubjectPublicKeyInfo. */
  spki: Buffer
  /** Lower-case hex; empty where there is none. */
  keyId: string
  notBefore: Date
  notAfter: Date
}

/** @throws DerError when it is not a certificate */
export function describeCa(der: Uint8Array): CaDescription {
  const { extensions, subject, spki, notBefore, notAfter } = readCertificate(der)
  const inside = (id: string) => {
    const value = extensions.get(id)?.value
    return value && decodeDer(value)
  }
  const constraints = inside(oids.basicConstraints)?.children ?? []
  const pathLength = constraints.find(({ tag }) => tag === tags.integer)?.contents
  // The first byte counts unused bits; keyCertSign is bit 5 and cRLSign bit 6 of what follows.
  const usage = inside(oids.keyUsage)?.contents[1] ?? 0
  return {
    isCa: constraints.some(({ tag, contents }) => tag === tags.boolean && contents[0] === 0xff),
    pathLength: pathLength && Number.parseInt(pathLength.toString('hex'), 16),
    signsCertificates: (usage & 0x04) !== 0,
    signsLists: (usage & 0x02) !== 0,
    subject: subject.der,
    spki: spki.der,
    keyId: inside(oids.subjectKeyIdentifier)?.contents.toString('hex') ?? '',
    notBefore,
    notAfter,
  }
}

/** RFC 5280 section 4.2.1.1: keyIdentifier is [0]. */
function issuerKeyIdOf({ extensions }: ParsedCertificate): string {
  const value = extensions.get(oids.authorityKeyIdentifier)?.value
  const keyId = value && decodeDer(value).children.find(({ tag }) => tag === 0x80)
  return keyId ? keyId.contents.toString('hex') : ''
}

export type ParsedCertificate = {
  der: Buffer
  version: number
  serialHex: string
  /** DER AlgorithmIdentifier, as stated inside and outside of what is signed. */
  algorithms: [Buffer, Buffer]
  issuer: DerNode
  notBefore: Date
  notAfter: Date
  subject: DerNode
  spki: DerNode
  extensions: Map<string, { critical: boolean; value: Buffer }>
}

/** RFC 5280 section 4.1, version 3 with extensions; the unique identifiers of section 4.1.2.8 are refused. */
export function readCertificate(bytes: Uint8Array): ParsedCertificate {
  // A copy, since the description may outlive the socket's buffer.
  const der = Buffer.from(bytes)
  const [toBeSigned, outerAlgorithm, signature] = children(decodeDer(der), tags.sequence, tags.sequence, tags.bitString)
  const [version, serial, innerAlgorithm, issuer, validity, subject, spki, extensions] = children(
    toBeSigned,
    0xa0,
    tags.integer,
    tags.sequence,
    tags.sequence,
    tags.sequence,
    tags.sequence,
    tags.sequence,
    0xa3,
  )
  const [notBefore, notAfter] = validity.children
  const [, keyBits] = children(spki, tags.sequence, tags.bitString)
  if (!notBefore || !notAfter || keyBits.contents.length < 2 || signature.contents[0] !== 0) throw notACertificate()
  return {
    der,
    version: version.children[0]?.contents[0] ?? 0,
    // The byte that only keeps the number positive is not part of it.
    serialHex: serial.contents
      .toString('hex')
      .replace(/^00(?=.)/, '')
      .padStart(2 * serialBytes, '0'),
    algorithms: [innerAlgorithm.der, outerAlgorithm.der],
    issuer,
    notBefore: readTime(notBefore),
    notAfter: readTime(notAfter),
    subject,
    spki,
    extensions: readExtensions(extensions.children[0]),
  }
}

function readExtensions(list: DerNode | undefined): ParsedCertificate['extensions'] {
  const extensions: ParsedCertificate['extensions'] = new Map()
  for (const { children: parts } of list?.children ?? []) {
    const id = parts[0]
    const value = parts.at(-1)
    const critical = parts.length === 3 && parts[1]!.tag === tags.boolean
    if (id?.tag !== tags.oid || value?.tag !== tags.octetString || parts.length !== (critical ? 3 : 2)) {
      throw notACertificate()
    }
    const name = oidText(id.contents)
    // RFC 5280 section 4.2: no extension twice, or two readers could believe two different ones.
    if (extensions.has(name)) throw new DerError(`the extension ${name} twice`)
    extensions.set(name, { critical, value: value.contents })
  }
  return extensions
}

function children<Tags extends number[]>(node: DerNode, ...wanted: Tags): { [Index in keyof Tags]: DerNode } {
  const fits = node.children.length === wanted.length && node.tag === tags.sequence
  if (!fits || !wanted.every((tag, index) => node.children[index]!.tag === tag)) throw notACertificate()
  return node.children as { [Index in keyof Tags]: DerNode }
}

function notACertificate(): DerError {
  return new DerError('not a certificate as in RFC 5280 section 4.1')
}

export function soleSpiffeId({ extensions }: ParsedCertificate): SpiffeId | undefined {
  const names = extensions.get(oids.subjectAltName)
  if (names === undefined) return undefined
  const list = decodeDer(names.value)
  // A GeneralName is context-specific, whatever it is (RFC 5280 section 4.2.1.6).
  if (list.tag !== tags.sequence || list.children.some(({ tag }) => (tag & 0xc0) !== 0x80)) throw notACertificate()
  const uris = list.children.filter(name => name.tag === uriTag)
  return uris.length === 1 ? parseSpiffeId(uris[0]!.contents.toString('latin1')) : undefined
}

function extendedKeyUsage({ extensions }: ParsedCertificate): string[] {
  const usages = extensions.get(oids.extendedKeyUsage)
  if (usages === undefined) return []
  const list = decodeDer(usages.value)
  if (list.tag !== tags.sequence || list.children.some(({ tag }) => tag !== tags.oid)) throw notACertificate()
  return list.children.map(usage => oidText(usage.contents))
}

/** The text of an attribute that the name has exactly once. With two, which one counts would be anyone's guess. */
function soleAttribute(name: DerNode, id: string): string | undefined {
  const values = name.children
    .flatMap(relativeName => relativeName.children)
    .filter(attribute => attribute.children[0]?.tag === tags.oid && oidText(attribute.children[0].contents) === id)
    .map(attribute => attribute.children[1])
  const [value] = values
  if (values.length !== 1 || (value?.tag !== tags.utf8String && value?.tag !== tags.printableString)) return undefined
  return value.contents.toString('utf8')
}
