/**
 * What reads bytes of strangers, and what must hold whatever the bytes are.
 *
 * One definition, two uses: `../fuzz.test.ts` tries each a few hundred times with every run of the tests, and
 * `npm run fuzz` for as long as it is let.
 */
import { createHash, createPublicKey, hash, X509Certificate } from 'node:crypto'
import { fromBER } from 'asn1js'
import fc from 'fast-check'
import * as pkijs from 'pkijs'
import { Fault } from '../../../src/fault.ts'
import { createAuthority, openAuthority } from '../../../src/identity/certificate-authority.ts'
import { describeCertificate } from '../../../src/identity/certificate-description.ts'
import { newSerial } from '../../../src/identity/certificates.ts'
import { createChallenges } from '../../../src/identity/challenge.ts'
import { checkCsr } from '../../../src/identity/csr.ts'
import { DerError, type DerNode, decodeDer } from '../../../src/identity/der.ts'
import { decodePem, encodePem } from '../../../src/identity/pem.ts'
import { formatSpiffeId, parseSpiffeId } from '../../../src/identity/spiffe-id.ts'
import { mintToken, parseToken } from '../../../src/identity/token-text.ts'
import { byteEdits, editBytes, editValue, readValue, valueEdits, writeValue } from './edits.ts'
import { keyNamed } from './keys.ts'
import { opensslVerdicts } from './openssl-judge.ts'
import { goodRequests, requests, stringTags } from './requests.ts'

export type Target = {
  name: string
  /** Bytes to read; of what reads text, the text in UTF-8. `slow` adds what takes seconds to make. */
  inputs(options: { slow: boolean }): fc.Arbitrary<Buffer>
  /**
   * Reads the bytes and looks at what comes of it.
   *
   * @returns in a word or two what came of it, for counting
   * @throws when something does not hold
   */
  examine(bytes: Buffer): string
  /** Asks somebody else about a few at once. @returns what does not hold, with the bytes that show it */
  judge?: ((inputs: readonly Buffer[]) => Promise<{ bytes: Buffer; finding: string }[]>) | undefined
}

function demand(holds: boolean, rule: string): asserts holds {
  if (!holds) throw new Error(`does not hold: ${rule}`)
}

/** The reason of a refusal. Anything else that is thrown is a finding. */
function reasonOf(error: unknown, code: Fault['code'], reasons: RegExp, field: string): string {
  if (!(error instanceof Fault)) throw error
  demand(error.code === code && reasons.test(error.reason), `a refusal is ${code} ${reasons}, not ${error.reason}`)
  demand(error.violations[0]?.field === field, `a refusal names the field ${field}`)
  demand(error.message.length <= 300, 'a refusal is a sentence or two, however long what is refused')
  return error.reason
}

// ── Requests ───────────────────────────────────────────────────────────────────────────────────────────────────────

const csrReasons =
  /^CSR_(TOO_LARGE|MALFORMED|KEY_UNSUPPORTED|KEY_WEAK|ALGORITHM_UNSUPPORTED|ALGORITHM_WEAK|SIGNATURE_INVALID)$/
const csrBytesMax = 8 * 1024

/** `signatureAlgorithm` as pkijs reads it: ECDSA, Ed25519 and RSA with SHA-2. */
const goodSignatures = new Set([
  ...['1.2.840.10045.4.3.2', '1.2.840.10045.4.3.3', '1.2.840.10045.4.3.4', '1.3.101.112'],
  ...['1.2.840.113549.1.1.11', '1.2.840.113549.1.1.12', '1.2.840.113549.1.1.13'],
])

const csr: Target = {
  name: 'csr',
  inputs: requests,
  examine(bytes) {
    const before = createHash('sha256').update(bytes).digest('hex')
    const checked = attempt(() => checkCsr(bytes))
    demand(createHash('sha256').update(bytes).digest('hex') === before, "the caller's bytes are left as they were")
    if ('error' in checked) return reasonOf(checked.error, 'INVALID_ARGUMENT', csrReasons, 'csr')
    demand(bytes.length <= csrBytesMax, 'nothing is accepted that is too large')

    const { spki, keyType, publicKeySha256, publicKey } = checked.value
    demand(createHash('sha256').update(spki).digest('hex') === publicKeySha256, 'the hash is that of the key')
    demand(publicKey.export({ format: 'der', type: 'spki' }).equals(spki), 'the key is the one that was written')
    demand(kindOf(spki) === keyType, `a key of ${kindOf(spki)} is not accepted as ${keyType}`)

    // pkijs does not know every type that an attribute may have.
    const request = attempt(() => pkijs.CertificationRequest.fromBER(derOf(bytes)))
    if ('error' in request) return `accepted ${keyType}, not by pkijs`
    const theirSpki = Buffer.from(request.value.subjectPublicKeyInfo.toSchema().toBER())
    demand(theirSpki.equals(spki), 'pkijs finds the same key in it')
    demand(goodSignatures.has(request.value.signatureAlgorithm.algorithmId), 'only good signatures are accepted')
    return `accepted ${keyType}`
  },
  async judge(inputs) {
    const verdicts = await opensslVerdicts(inputs)
    return inputs.flatMap((bytes, at) => {
      const ours = attempt(() => checkCsr(bytes))
      const { accepted, spki, said } = verdicts[at]!
      if ('error' in ours) return []
      if (!accepted) return [{ bytes, finding: `accepted, but openssl says: ${said.trim()}` }]
      if (!spki?.equals(ours.value.spki)) return [{ bytes, finding: 'accepted, but openssl has read another key' }]
      return []
    })
  },
}

const goodCsr: Target = {
  name: 'good-csr',
  inputs: () => goodRequests,
  examine(bytes) {
    const { keyType, challenge } = checkCsr(bytes)
    return `accepted ${keyType} ${challenge === undefined ? 'without' : 'with'} a challenge`
  },
  judge: csr.judge,
}

/** What node says of the key, against the table of those that are allowed. */
function kindOf(spki: Buffer): string {
  const { asymmetricKeyType, asymmetricKeyDetails = {} } = createPublicKey({ key: spki, format: 'der', type: 'spki' })
  const { namedCurve, modulusLength = 0, publicExponent = 0n } = asymmetricKeyDetails
  if (asymmetricKeyType === 'ed25519') return 'Ed25519'
  if (asymmetricKeyType === 'ec' && namedCurve === 'prime256v1') return 'P-256'
  if (asymmetricKeyType === 'ec' && namedCurve === 'secp384r1') return 'P-384'
  const goodRsa =
    modulusLength >= 2048 && modulusLength <= 4096 && publicExponent >= 65537n && publicExponent < 1n << 32n
  return asymmetricKeyType === 'rsa' && goodRsa ? 'RSA' : `${asymmetricKeyType} ${namedCurve ?? modulusLength}`
}

function derOf(request: Buffer): Buffer {
  if (request[0] === 0x30) return request
  const text = request.toString('latin1')
  return [...decodePem('CERTIFICATE REQUEST', text), ...decodePem('NEW CERTIFICATE REQUEST', text)][0]!
}

function attempt<T>(work: () => T): { value: T } | { error: unknown } {
  try {
    return { value: work() }
  } catch (error) {
    return { error }
  }
}

// ── DER ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const depthMax = 16

/** What is inside of UTCTime, GeneralizedTime and RELATIVE-OID is not read here; and asn1js knows no [UNIVERSAL 15]. */
const readOtherwise: ReadonlySet<number> = new Set([0x17, 0x18, 0x0d, 0x0f])

const der: Target = {
  name: 'der',
  inputs: ({ slow }) => fc.oneof(requests({ slow }), spoiledCertificates, freeDer),
  examine(bytes) {
    const decoded = attempt(() => decodeDer(bytes))
    if ('error' in decoded) {
      if (!(decoded.error instanceof DerError)) throw decoded.error
      return decoded.error.message.replace(/ \d+$/, '')
    }
    const work: Work = { values: 0, depth: 0, tags: new Set() }
    const written = rewritten(decoded.value, work, 1)
    demand(written.equals(bytes), 'what is read is written again to the byte, so it has no second spelling')
    demand(work.depth <= depthMax, `no deeper than ${depthMax} levels`)
    demand(2 * work.values <= bytes.length, 'no more values than two bytes each allow')
    if (!work.tags.isDisjointFrom(readOtherwise)) return 'accepted, not compared'
    const theirs = fromBER(new Uint8Array(bytes))
    demand(theirs.offset === bytes.length, `asn1js can read it, too: ${theirs.result.error}`)
    return 'accepted'
  },
}

type Work = { values: number; depth: number; tags: Set<number> }

/** Written anew from nothing but tags and primitive contents, counting what there is. */
function rewritten({ tag, contents, children }: DerNode, work: Work, depth: number): Buffer {
  work.values++
  work.tags.add(tag)
  work.depth = Math.max(work.depth, depth)
  const constructed = (tag & 0x20) !== 0
  const body = constructed ? Buffer.concat(children.map(child => rewritten(child, work, depth + 1))) : contents
  return writeValue({ tag, contents: body })
}

/** Strings most of the time, in ASCII: what goes wrong is to be their tags and their lengths. */
const freeLeaf = fc
  .tuple(
    fc.oneof({ weight: 3, arbitrary: fc.constantFrom(...stringTags) }, { weight: 1, arbitrary: fc.nat(0xdf) }),
    fc.array(fc.nat(0x7f), { maxLength: 12 }),
  )
  .map(([tag, bytes]) => writeValue({ tag: tag & ~0x20, contents: Buffer.from(bytes) }))
const freeValue: fc.Memo<Buffer> = fc.memo(depth =>
  depth <= 1
    ? freeLeaf
    : fc
        .tuple(fc.constantFrom(0x30, 0x31, 0xa0, 0xbe), fc.array(freeValue(depth - 1), { maxLength: 3 }))
        .map(([tag, parts]) => writeValue({ tag, contents: Buffer.concat(parts) })),
)
const freeDer = fc
  .tuple(freeValue(3), fc.oneof(fc.constant([]), byteEdits))
  .map(([bytes, edits]) => (edits.length === 0 ? bytes : editBytes(bytes, edits, bytes)))

// ── Certificates ───────────────────────────────────────────────────────────────────────────────────────────────────

const passphrase = 'a passphrase of the tests'
const madeAt = new Date('2030-01-02T03:04:05Z')
const validUntil = new Date('2030-02-01T00:00:00Z')
const authority = openAuthority({
  ...(await createAuthority({ trustDomain: 'edgemesh.test', validityDays: 365, now: madeAt, passphrase })),
  passphrase,
})
const certificates = [
  ...[authority.rootPem, ...authority.intermediates].flatMap(pem => decodePem('CERTIFICATE', pem)),
  ...(['client', 'server'] as const).map(
    purpose =>
      authority.issueLeaf({
        serial: Buffer.from(newSerial(), 'hex'),
        spki: keyNamed('P-256').spki,
        spiffeId: 'spiffe://edgemesh.test/device/sensor-7',
        purpose,
        commonName: 'sensor-7',
        organizationalUnit: 'admin',
        notBefore: madeAt,
        notAfter: validUntil,
        dnsNames: ['localhost'],
        ipAddresses: ['127.0.0.1'],
        crlUrl: 'http://crl.edgemesh.test/a.crl',
      }).der,
  ),
]

const anyCertificate = fc.constantFrom(...certificates)
const spoiledCertificates = fc.oneof(
  anyCertificate,
  fc.tuple(anyCertificate, anyCertificate, byteEdits).map(([one, other, edits]) => editBytes(one, edits, other)),
  fc
    .tuple(anyCertificate, anyCertificate, valueEdits)
    .map(([one, other, edits]) => writeValue(editValue(readValue(one), edits, readValue(other)))),
)

const clientAuth = '1.3.6.1.5.5.7.3.2'

const certificate: Target = {
  name: 'certificate',
  inputs: () => spoiledCertificates,
  examine(bytes) {
    const described = attempt(() => describeCertificate(bytes))
    if ('error' in described) {
      if (!(described.error instanceof DerError)) throw described.error
      return 'refused'
    }
    // TLS has read the certificate before we do. What it can't read never comes to us.
    const theirs = attempt(() => new X509Certificate(bytes))
    if ('error' in theirs) return 'read by us alone'
    const { spiffeId, publicKeySha256, notBefore, notAfter, hasClientAuth, serialHex } = described.value
    const node = theirs.value
    // An extension that OpenSSL finds malformed makes it refuse the chain.
    if ((spiffeId && !node.subjectAltName) || (hasClientAuth && !node.keyUsage)) return 'read by us alone'
    const key = attempt(() => node.publicKey.export({ type: 'spki', format: 'der' }))
    if ('value' in key) demand(hash('sha256', key.value, 'hex') === publicKeySha256, 'the same key')
    if (spiffeId === undefined) return 'names nobody'
    const uri = `URI:${formatSpiffeId(spiffeId)}`
    const names = node.subjectAltName?.split(', ') ?? []
    demand(names.filter(name => /^"?URI:/.test(name)).join() === uri, `node reads the same one URI, not ${names}`)
    demand(node.validFromDate.getTime() === notBefore.getTime(), 'the same beginning')
    demand(node.validToDate.getTime() === notAfter.getTime(), 'the same end')
    demand((node.keyUsage ?? []).includes(clientAuth) === hasClientAuth, 'the same purpose')
    // No authority may give a serial that is negative (RFC 5280 section 4.1.2.2).
    const negative = node.serialNumber.startsWith('-')
    demand(negative || BigInt(`0x${node.serialNumber}`) === BigInt(`0x${serialHex}`), 'the same serial')
    return 'names somebody'
  },
}

// ── Text ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const anyText = fc.oneof(fc.string({ maxLength: 200 }), fc.string({ unit: 'binary', maxLength: 100 }))

/** Texts like `samples`: spoiled, cut at `separator` and put together otherwise, or anything at all. */
function textsLike(samples: readonly string[], separator: string): fc.Arbitrary<Buffer> {
  const sample = fc.constantFrom(...samples)
  const part = fc.oneof(fc.constantFrom(...samples.flatMap(text => text.split(separator))), fc.string({ maxLength: 8 }))
  const spoiled = fc
    .tuple(sample, sample, byteEdits)
    .map(([one, other, edits]) => editBytes(Buffer.from(one), edits, Buffer.from(other)))
  const otherwise = fc.array(part, { maxLength: 7 }).map(parts => Buffer.from(parts.join(separator)))
  return fc.oneof(
    { weight: 1, arbitrary: sample.map(text => Buffer.from(text)) },
    { weight: 5, arbitrary: spoiled },
    { weight: 3, arbitrary: otherwise },
    { weight: 1, arbitrary: anyText.map(text => Buffer.from(text)) },
  )
}

const tokens = [0, 1].map(() => mintToken({ rootKeySha256: authority.rootKeySha256 }).text)

const token: Target = {
  name: 'token',
  inputs: () => textsLike([...tokens, ` ${tokens[0]}\n`, `${tokens[0]}.more`], '.'),
  examine(bytes) {
    const text = bytes.toString('utf8')
    const parsed = attempt(() => parseToken(text))
    if ('error' in parsed) {
      const reason = reasonOf(parsed.error, 'INVALID_ARGUMENT', /^TOKEN_MALFORMED$/, 'token')
      const said = `${parsed.error}${JSON.stringify(parsed.error)}`
      const pieces = text.match(/[\w-]{8}/g) ?? []
      demand(!pieces.some(piece => tokens.join().includes(piece) && said.includes(piece)), 'no piece of it is repeated')
      return reason
    }
    const { id, secret, rootKeySha256 } = parsed.value
    const pin = Buffer.from(rootKeySha256, 'hex').toString('base64url')
    const written = `em1.${id}.${secret.toString('base64url')}.${pin}`
    demand(written === text.trim(), 'a token has one spelling, but for the blanks around it')
    return 'accepted'
  },
}

const nowMs = Date.parse('2030-01-02T03:04:05Z')
const givenBy = (secret: string, clock: number) => createChallenges({ secret, clock: () => clock }).give().challenge
const fresh = givenBy('our secret', nowMs)
const stale = givenBy('our secret', nowMs - 3_600_000)
const challenges = createChallenges({ secret: 'our secret', clock: () => nowMs })

const challenge: Target = {
  name: 'challenge',
  inputs: () => textsLike([fresh, stale, givenBy('the secret of others', nowMs)], '.'),
  examine(bytes) {
    const text = bytes.toString('utf8')
    const demanded = attempt(() => challenges.demand({ challenge: text }))
    if (!('error' in demanded)) {
      demand(text === fresh, 'nothing passes but what was given out, to the letter')
      return 'accepted'
    }
    if (text === stale) {
      demand(demanded.error instanceof Fault && demanded.error.reason === 'CSR_CHALLENGE_STALE', 'stale is told apart')
      return 'CSR_CHALLENGE_STALE'
    }
    return reasonOf(demanded.error, 'INVALID_ARGUMENT', /^CSR_CHALLENGE_UNKNOWN$/, 'csr')
  },
}

const spiffeIds = ['device/sensor-7', 'operator/ada', 'service/edgemesh'].map(path => `spiffe://edgemesh.test/${path}`)

const spiffeId: Target = {
  name: 'spiffe-id',
  inputs: () => textsLike([...spiffeIds, 'spiffe://a/device/b?c#d', 'spiffe://u@H:1/device/a'], '/'),
  examine(bytes) {
    const text = bytes.toString('utf8')
    const parsed = parseSpiffeId(text)
    if (parsed === undefined) return 'refused'
    demand(formatSpiffeId(parsed) === text, 'a SPIFFE ID has one spelling')
    const { protocol, host, pathname, search, hash, username } = new URL(text)
    const same = protocol === 'spiffe:' && host === parsed.trustDomain && pathname === `/${parsed.kind}/${parsed.id}`
    demand(same && search + hash + username === '', 'a URL parser finds the same parts and no others')
    return 'accepted'
  },
}

const pemSamples = [
  encodePem('CERTIFICATE', certificates[0]!),
  `before\n${encodePem('CERTIFICATE', certificates[1]!)}${encodePem('CERTIFICATE REQUEST', Buffer.alloc(90))}after`,
  '-----BEGIN CERTIFICATE-----\n'.repeat(2_000),
  `-----BEGIN CERTIFICATE-----\n${'AAAA\n'.repeat(10_000)}`,
]

const pem: Target = {
  name: 'pem',
  inputs: () => textsLike(pemSamples, '-----'),
  examine(bytes) {
    const text = bytes.toString('latin1')
    const found = decodePem('CERTIFICATE', text)
    demand(found.length <= text.split('-----BEGIN CERTIFICATE-----').length - 1, 'a block for each of its beginnings')
    const joined = text.replace(/[\r\n]/g, '')
    demand(
      found.every(block => joined.includes(`-----${block.toString('base64')}-----`)),
      'what is taken stands there in its one spelling',
    )
    const again = decodePem('CERTIFICATE', found.map(block => encodePem('CERTIFICATE', block)).join('between\n'))
    demand(again.length === found.length && again.every((block, at) => block.equals(found[at]!)), 'read as written')
    return found.length === 0 ? 'nothing found' : 'found'
  },
}

export const targets: readonly Target[] = [csr, goodCsr, der, certificate, token, challenge, spiffeId, pem]
