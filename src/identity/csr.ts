/**
 * Checks a certificate request (PKCS#10, RFC 2986) and takes from it the one thing that is believed: the public key.
 *
 * Who the certificate will name is known from the token or from the certificate being renewed. The request's subject
 * and its attributes are read only so far as to know that they are well-formed, and then forgotten; all but the
 * challenge, which shows that the request is new and goes into no certificate either.
 */
import { createPublicKey, hash, type KeyObject, verify } from 'node:crypto'
import { Fault } from '../fault.ts'
import { DerError, type DerNode, decodeDer, nullValue, oid, oidText, sequence, tags } from './der.ts'
import { decodePem } from './pem.ts'
import { weaknessOfModulus } from './rsa-modulus.ts'

export type KeyType = 'P-256' | 'P-384' | 'Ed25519' | 'RSA'

export type CheckedCsr = {
  publicKey: KeyObject
  /** DER SubjectPublicKeyInfo, byte for byte as the request had it. */
  spki: Buffer
  /** SHA-256 of `spki`, lower-case hex: the key's name in the database. */
  publicKeySha256: string
  keyType: KeyType
  /** Its challengePassword (RFC 2985 section 5.4.1), not judged here: `challenge.ts` does. */
  challenge: string | undefined
  /**
   * SHA-256 of what the request has signed, lower-case hex: its name among the requests that have been used. Not of the whole,
   * because of an ECDSA signature anybody can make a second one that is as good.
   */
  sha256: string
}

/** The largest that is honest, RSA 4096 with a few names and extensions, is 2 kB in PEM. */
const csrBytesMax = 8 * 1024

/** Below 2048 is breakable (NIST SP 800-131A); above 4096 the gain is nil and each handshake pays for it. */
const rsaBitsMin = 2048
const rsaBitsMax = 4096

/** 65537 is what everyone uses. Smaller ones have a history of forgeries, larger than 32 bits only slow us down. */
const rsaExponentMin = 65537n
const rsaExponentMax = 0xffffffffn

/**
 * Keys, by the AlgorithmIdentifier that their SubjectPublicKeyInfo must have to the byte. So a curve is named, never
 * spelled out (RFC 5480 section 2.1.1), and there is one way to write each key. `spkiBytes` is the size where that is
 * fixed; for curves it admits the uncompressed point only (RFC 5480 section 2.2).
 */
const allowedKeys: { keyType: KeyType; algorithm: Buffer; spkiBytes?: number }[] = [
  { keyType: 'P-256', algorithm: sequence(oid('1.2.840.10045.2.1'), oid('1.2.840.10045.3.1.7')), spkiBytes: 91 },
  { keyType: 'P-384', algorithm: sequence(oid('1.2.840.10045.2.1'), oid('1.3.132.0.34')), spkiBytes: 120 },
  { keyType: 'Ed25519', algorithm: sequence(oid('1.3.101.112')), spkiBytes: 44 },
  { keyType: 'RSA', algorithm: sequence(oid('1.2.840.113549.1.1.1'), nullValue()) },
]

/** Signatures, likewise. `digest` is the name that node:crypto has for it; Ed25519 brings its own. */
const allowedSignatures: { keyTypes: KeyType[]; algorithm: Buffer; digest: string | null }[] = [
  { keyTypes: ['P-256', 'P-384'], algorithm: sequence(oid('1.2.840.10045.4.3.2')), digest: 'sha256' },
  { keyTypes: ['P-256', 'P-384'], algorithm: sequence(oid('1.2.840.10045.4.3.3')), digest: 'sha384' },
  { keyTypes: ['P-256', 'P-384'], algorithm: sequence(oid('1.2.840.10045.4.3.4')), digest: 'sha512' },
  { keyTypes: ['Ed25519'], algorithm: sequence(oid('1.3.101.112')), digest: null },
  { keyTypes: ['RSA'], algorithm: sequence(oid('1.2.840.113549.1.1.11'), nullValue()), digest: 'sha256' },
  { keyTypes: ['RSA'], algorithm: sequence(oid('1.2.840.113549.1.1.12'), nullValue()), digest: 'sha384' },
  { keyTypes: ['RSA'], algorithm: sequence(oid('1.2.840.113549.1.1.13'), nullValue()), digest: 'sha512' },
]

/** Names for what is most likely to be tried in vain. */
const unsupportedKeys: Record<string, string> = {
  '1.2.840.10040.4.1': 'DSA',
  '1.2.840.113549.1.1.10': 'RSASSA-PSS',
  '1.3.101.113': 'Ed448',
  '1.3.132.0.10': 'secp256k1',
  '1.3.132.0.35': 'P-521',
}

/** Known and broken: told apart from the merely unknown, since the remedy is another. */
const weakSignatures: Record<string, string> = {
  '1.2.840.113549.1.1.2': 'RSA with MD2',
  '1.2.840.113549.1.1.4': 'RSA with MD5',
  '1.2.840.113549.1.1.5': 'RSA with SHA-1',
  '1.2.840.10040.4.3': 'DSA with SHA-1',
  '1.2.840.10045.4.1': 'ECDSA with SHA-1',
}

/**
 * Accepts DER, or PEM that holds exactly one request.
 *
 * @throws Fault INVALID_ARGUMENT for the field `csr`, and nothing else whatever the bytes. Its reason is one of
 *   CSR_TOO_LARGE, CSR_MALFORMED, CSR_KEY_UNSUPPORTED, CSR_KEY_WEAK, CSR_ALGORITHM_UNSUPPORTED, CSR_ALGORITHM_WEAK,
 *   CSR_SIGNATURE_INVALID.
 */
export function checkCsr(csr: Uint8Array): CheckedCsr {
  // Step 1: The size, before anything is done that takes time in proportion to it.
  if (csr.length > csrBytesMax) throw refusal('CSR_TOO_LARGE', `${csr.length} bytes, at most ${csrBytesMax} are read`)

  // Step 2: The form. All of it is read strictly, also what is not used, so that no second meaning can hide in it.
  const der = derOf(csr)
  const { info, spki, attributes, signatureAlgorithm, signature } = readRequest(der)

  // Step 3: The key, before it is given any work: a huge one would make step 4 slow.
  const { keyType, publicKey } = checkKey(spki)

  // Step 4: The signature, which proves that whoever asks holds the private key.
  const { digest } = checkSignatureAlgorithm(signatureAlgorithm, keyType)
  if (!verify(digest, info.der, publicKey, signature)) {
    throw refusal('CSR_SIGNATURE_INVALID', 'the signature does not match the key; sign the request with its own key')
  }
  // Copied out of the caller's bytes, so that what was checked is what will be certified.
  const checkedSpki = Buffer.from(spki.der)
  return {
    publicKey,
    spki: checkedSpki,
    publicKeySha256: hash('sha256', checkedSpki, 'hex'),
    keyType,
    challenge: challengeOf(attributes),
    sha256: hash('sha256', info.der, 'hex'),
  }
}

function derOf(csr: Uint8Array): Uint8Array {
  // DER begins with the tag of a SEQUENCE, which is the character `0`; PEM never does.
  if (csr[0] === tags.sequence) return csr
  const text = Buffer.from(csr).toString('latin1')
  // RFC 7468 section 7: generators write the first label, parsers may accept the older second.
  const requests = [...decodePem('CERTIFICATE REQUEST', text), ...decodePem('NEW CERTIFICATE REQUEST', text)]
  // Each that begins counts: other readers may take a damaged one for the one that is meant.
  const begun = text.match(/-----BEGIN (NEW )?CERTIFICATE REQUEST-----/g)?.length ?? 0
  if (begun !== 1) {
    throw refusal('CSR_MALFORMED', `${begun} requests found, want one PKCS#10 request in DER or PEM`)
  }
  if (requests.length !== 1) {
    throw refusal(
      'CSR_MALFORMED',
      'its PEM is damaged: want lines of base64 between a BEGIN and an END line, nothing else',
    )
  }
  return requests[0]!
}

/** RFC 2986 section 4: CertificationRequest and the CertificationRequestInfo in it. */
function readRequest(der: Uint8Array): {
  info: DerNode
  spki: DerNode
  attributes: DerNode
  signatureAlgorithm: DerNode
  signature: Buffer
} {
  const request = decodeRequest(der)
  const [info, signatureAlgorithm, signature] = parts(request, tags.sequence, tags.sequence, tags.bitString)
  const [version, subject, spki, attributes] = parts(info, tags.integer, tags.sequence, tags.sequence, 0xa0)
  if (version.contents.length !== 1 || version.contents[0] !== 0) {
    throw refusal('CSR_MALFORMED', 'the version is not 0, the only one that PKCS#10 has')
  }
  assertName(subject)
  for (const attribute of attributes.children) {
    const [, values] = parts(attribute, tags.oid, tags.set)
    if (values.children.length === 0) throw refusal('CSR_MALFORMED', 'one of its attributes has no value')
  }
  return { info, spki, attributes, signatureAlgorithm, signature: bytesOf(signature) }
}

/** What the attributes of a name are written in (RFC 5280 section 4.1.2.4; BIT STRING is for x500UniqueIdentifier). */
const nameValueTags: ReadonlySet<number> = new Set([
  tags.utf8String,
  tags.printableString,
  tags.ia5String,
  tags.teletexString,
  tags.bmpString,
  tags.bitString,
])

/** A name is a sequence of sets of attributes. It may be empty, and the sets may not. */
function assertName(name: DerNode): void {
  const sets = name.children
  const wellFormed = sets.every(({ tag, children }) => tag === tags.set && children.length > 0)
  if (!wellFormed) throw refusal('CSR_MALFORMED', 'its subject is not a name as in RFC 5280 section 4.1.2.4')
  for (const attribute of sets.flatMap(({ children }) => children)) {
    const [type, value] = attribute.children
    const fits = attribute.tag === tags.sequence && attribute.children.length === 2 && type?.tag === tags.oid
    if (!fits || !nameValueTags.has(value!.tag)) {
      throw refusal('CSR_MALFORMED', 'its subject has an attribute that is not a type and a text')
    }
  }
}

const challengePassword = oid('1.2.840.113549.1.9.7')
const challengeBytesMax = 255

/** RFC 2985 section 5.4.1: one value, a DirectoryString; of its kinds the two that are still written. */
function challengeOf(attributes: DerNode): string | undefined {
  const found = attributes.children.filter(({ children: [type] }) => type?.der.equals(challengePassword))
  if (found.length === 0) return undefined
  const values = found[0]?.children[1]?.children ?? []
  const [value] = values
  if (found.length > 1 || values.length !== 1 || value === undefined) {
    throw refusal('CSR_MALFORMED', 'more than one challengePassword, want one value')
  }
  if (
    (value.tag !== tags.utf8String && value.tag !== tags.printableString) ||
    value.contents.length > challengeBytesMax
  ) {
    throw refusal('CSR_MALFORMED', 'the challengePassword is not a UTF8String or PrintableString of at most 255 bytes')
  }
  return value.contents.toString('utf8')
}

function decodeRequest(der: Uint8Array): DerNode {
  try {
    return decodeDer(der)
  } catch (error) {
    if (!(error instanceof DerError)) throw error
    throw refusal('CSR_MALFORMED', `not a PKCS#10 request in DER: ${error.message}`)
  }
}

/** The children of a SEQUENCE, which must be exactly these. */
function parts<Tags extends number[]>(node: DerNode, ...wanted: Tags): { [Index in keyof Tags]: DerNode } {
  const fits = node.tag === tags.sequence && node.children.length === wanted.length
  if (!fits || !wanted.every((tag, index) => node.children[index]!.tag === tag)) {
    throw refusal('CSR_MALFORMED', 'not a PKCS#10 request: its parts are not those of RFC 2986 section 4')
  }
  return node.children as { [Index in keyof Tags]: DerNode }
}

function bytesOf(node: DerNode): Buffer {
  if (node.contents[0] !== 0) throw refusal('CSR_MALFORMED', 'a key or a signature is not a whole number of bytes')
  return node.contents.subarray(1)
}

function checkKey(spki: DerNode): { keyType: KeyType; publicKey: KeyObject } {
  const [algorithm, key] = parts(spki, tags.sequence, tags.bitString)
  const keyBytes = bytesOf(key)
  const allowed = allowedKeys.find(row => row.algorithm.equals(algorithm.der))
  if (allowed === undefined) {
    const name = nameOf(algorithm)
    throw refusal(
      'CSR_KEY_UNSUPPORTED',
      `a key of type ${unsupportedKeys[name] ?? name}; make one of P-256, P-384, Ed25519 or RSA ${rsaBitsMin} to ${rsaBitsMax}`,
    )
  }
  if (allowed.spkiBytes !== undefined && allowed.spkiBytes !== spki.der.length) {
    throw refusal('CSR_KEY_UNSUPPORTED', `a ${allowed.keyType} key in another form than the plain one (uncompressed)`)
  }
  const publicKey = importKey(spki)
  if (allowed.keyType === 'RSA') checkRsaKey(publicKey, spki, keyBytes)
  return { keyType: allowed.keyType, publicKey }
}

function importKey(spki: DerNode): KeyObject {
  try {
    return createPublicKey({ key: spki.der, format: 'der', type: 'spki' })
  } catch {
    // OpenSSL's reasons (a point off the curve, a negative modulus) would mean nothing to the caller.
    throw refusal('CSR_MALFORMED', 'the public key is not a valid one of its type')
  }
}

function checkRsaKey(publicKey: KeyObject, spki: DerNode, keyBytes: Buffer): void {
  const { modulusLength = 0, publicExponent = 0n } = publicKey.asymmetricKeyDetails ?? {}
  if (modulusLength < rsaBitsMin) {
    throw refusal('CSR_KEY_WEAK', `an RSA key of ${modulusLength} bits; make one of at least ${rsaBitsMin}, or P-256`)
  }
  if (modulusLength > rsaBitsMax) {
    throw refusal('CSR_KEY_UNSUPPORTED', `an RSA key of ${modulusLength} bits; at most ${rsaBitsMax}, or P-256`)
  }
  if (publicExponent < rsaExponentMin || publicExponent % 2n === 0n) {
    throw refusal('CSR_KEY_WEAK', `an RSA key with the public exponent ${publicExponent}; make one with 65537`)
  }
  if (publicExponent > rsaExponentMax) {
    throw refusal('CSR_KEY_UNSUPPORTED', 'an RSA key with a public exponent of more than 32 bits; make one with 65537')
  }
  // The inside of the key is a BIT STRING that `decodeDer` did not look into: nothing may trail in it either.
  if (!publicKey.export({ format: 'der', type: 'spki' }).equals(spki.der)) {
    throw refusal('CSR_MALFORMED', 'the RSA public key is not in DER')
  }
  // RFC 8017 appendix A.1.1: RSAPublicKey is the modulus and the exponent.
  const [modulus] = decodeDer(keyBytes).children
  const weakness = weaknessOfModulus(BigInt(`0x${modulus!.contents.toString('hex')}`))
  if (weakness !== undefined) throw refusal('CSR_KEY_WEAK', `an RSA key ${weakness}; make another, or P-256`)
}

function checkSignatureAlgorithm(algorithm: DerNode, keyType: KeyType): { digest: string | null } {
  const allowed = allowedSignatures.find(row => row.algorithm.equals(algorithm.der))
  if (allowed?.keyTypes.includes(keyType)) return allowed
  const name = nameOf(algorithm)
  const weakness = weakSignatures[name]
  if (weakness !== undefined) {
    throw refusal('CSR_ALGORITHM_WEAK', `signed by ${weakness}, which can be forged; sign with SHA-256 or better`)
  }
  throw refusal('CSR_ALGORITHM_UNSUPPORTED', `signed by ${name}, which a ${keyType} key is not expected to use`)
}

/** What an AlgorithmIdentifier is about, as dotted numbers: its curve for a curve, else its algorithm. */
function nameOf(algorithm: DerNode): string {
  const [type, parameters] = algorithm.children
  if (type?.tag !== tags.oid) return 'no known name'
  return parameters?.tag === tags.oid ? oidText(parameters.contents) : oidText(type.contents)
}

function refusal(reason: string, description: string): Fault {
  return new Fault('INVALID_ARGUMENT', reason, `csr: ${description}`, { violations: [{ field: 'csr', description }] })
}
