/**
 * Certificate requests to be checked: right ones, right ones that were spoiled, and ones that were put together freely
 * and then signed, so that only their form can be what is wrong with them.
 */
import { readdirSync, readFileSync } from 'node:fs'
import fc from 'fast-check'
import {
  bitString,
  contextConstructed,
  contextPrimitive,
  integer,
  octetString,
  oid,
  sequence,
  setOf,
  utf8String,
} from '../../../src/identity/der.ts'
import { decodePem } from '../../../src/identity/pem.ts'
import { byteEdits, editBytes, editValue, readValue, type ValueEdit, valueEdits, writeValue } from './edits.ts'
import { allowedKeyNames, keyNamed, quickKeyNames, signWith, slowKeyNames } from './keys.ts'

/** Every request of `../csr/` that can be taken out of its file at all, right or wrong, in DER. */
const folder = new URL('../csr/', import.meta.url)
const requestsOnFile = readdirSync(folder)
  .filter(name => name.endsWith('.pem') && name !== 'oversized.pem')
  .sort()
  .flatMap(name => decodePem('CERTIFICATE REQUEST', readFileSync(new URL(name, folder), 'latin1')))

const onFile = fc.constantFrom(...requestsOnFile)

const spoiledBytes = fc.tuple(onFile, onFile, byteEdits).map(([der, other, edits]) => editBytes(der, edits, other))

const readable = requestsOnFile.flatMap(der => {
  try {
    return [readValue(der)]
  } catch {
    return []
  }
})
const spoiledValues = fc
  .tuple(fc.constantFrom(...readable), fc.constantFrom(...readable), valueEdits)
  .map(([value, other, edits]) => writeValue(editValue(value, edits, other)))

// ── Put together ───────────────────────────────────────────────────────────────────────────────────────────────────

/** Common name, organisation and its unit, domain component, e-mail address. */
const nameType = fc.constantFrom(
  ...['2.5.4.3', '2.5.4.10', '2.5.4.11', '0.9.2342.19200300.100.1.25', '1.2.840.113549.1.9.1'],
)
const anyOid = fc.oneof(
  nameType,
  // challengePassword and extensionRequest.
  fc.constantFrom('1.2.840.113549.1.9.7', '1.2.840.113549.1.9.14'),
  fc.tuple(fc.nat(1), fc.nat(39), fc.array(fc.nat(0x7fffffff), { maxLength: 4 })).map(arcs => arcs.flat().join('.')),
)
const plainText = fc.string({ minLength: 1, maxLength: 20, unit: fc.constantFrom(...'abcXYZ 019.-') })
const anyText = fc.oneof(fc.string({ maxLength: 40 }), fc.string({ unit: 'binary', maxLength: 20 }))
export const stringTags = [0x0c, 0x12, 0x13, 0x14, 0x16, 0x1a, 0x1b, 0x1c, 0x1e]
/** UTF8String, PrintableString, TeletexString, IA5String. */
const plainString = fc
  .tuple(fc.constantFrom(0x0c, 0x13, 0x14, 0x16), plainText)
  .map(([tag, text]) => writeValue({ tag, contents: Buffer.from(text) }))
const anyValue: fc.Arbitrary<Buffer> = fc.oneof(
  anyText.map(utf8String),
  fc
    .tuple(fc.constantFrom(...stringTags), fc.uint8Array({ maxLength: 24 }))
    .map(([tag, bytes]) => writeValue({ tag, contents: Buffer.from(bytes) })),
  fc
    .tuple(fc.nat(0xff), fc.uint8Array({ maxLength: 12 }))
    .map(([tag, bytes]) => writeValue({ tag, contents: Buffer.from(bytes) })),
)
/** Nine in ten have nothing wrong: enough have to get through to be judged by others. */
const mostlyPlain = fc.oneof({ weight: 9, arbitrary: plainString }, { weight: 1, arbitrary: anyValue })
const nameAttribute = fc.tuple(anyOid, mostlyPlain).map(([type, value]) => sequence(oid(type), value))
const subject = fc
  .array(fc.array(nameAttribute, { minLength: 1, maxLength: 2 }), { maxLength: 3 })
  .map(names => sequence(...names.map(attributes => setOf(...attributes))))
const challenge = fc
  .oneof(plainText, anyText)
  .map(text => sequence(oid('1.2.840.113549.1.9.7'), setOf(utf8String(text))))
const anyAttribute = fc
  .tuple(anyOid, fc.array(mostlyPlain, { minLength: 1, maxLength: 3 }))
  .map(([type, values]) => sequence(oid(type), setOf(...values)))
const attributes = fc.oneof(
  fc.constant([]),
  challenge.map(one => [one]),
  fc.array(fc.oneof(challenge, anyAttribute), { maxLength: 3 }),
  // About as much as is read at all.
  fc.integer({ min: 7_000, max: 9_000 }).map(size => [sequence(oid('1.2.3'), setOf(octetString(Buffer.alloc(size))))]),
)

const noEdits = fc.constant<ValueEdit[]>([])
const fewEdits = fc.oneof({ weight: 2, arbitrary: noEdits }, { weight: 1, arbitrary: valueEdits })

/** @param slow also keys that take seconds to make */
function signedRequests(slow: boolean): fc.Arbitrary<Buffer> {
  const parts = fc.record({
    key: fc.oneof(
      { weight: 2, arbitrary: fc.constantFrom(...allowedKeyNames) },
      { weight: 1, arbitrary: fc.constantFrom(...quickKeyNames, ...(slow ? slowKeyNames : [])) },
    ),
    way: fc.nat(7),
    subject,
    attributes,
    edits: fewEdits,
    other: fc.constantFrom(...readable),
    outerEdits: fc.oneof({ weight: 6, arbitrary: noEdits }, { weight: 1, arbitrary: valueEdits }),
  })
  return parts.map(({ key: name, way, subject, attributes, edits, other, outerEdits }) => {
    const key = keyNamed(name)
    const whole = sequence(integer(0), subject, key.spki, contextConstructed(0, ...attributes))
    const info = edits.length === 0 ? whole : spoiled(whole, edits, other)
    const { algorithm, signature } = signWith(key, way, info)
    const request = sequence(info, algorithm, bitString(signature))
    return outerEdits.length === 0 ? request : spoiled(request, outerEdits, other)
  })
}

/** As any tool makes them: whoever refuses one of these is too strict. */
export const goodRequests: fc.Arbitrary<Buffer> = fc
  .record({
    key: fc.constantFrom(...allowedKeyNames),
    // The first three of each key's ways are those with SHA-2.
    way: fc.nat(2),
    names: fc.array(fc.array(fc.tuple(nameType, plainString), { minLength: 1, maxLength: 2 }), { maxLength: 4 }),
    challenge: fc.option(plainText),
    alternativeName: fc.option(plainText),
  })
  .map(({ key: name, way, names, challenge, alternativeName }) => {
    const key = keyNamed(name)
    const subject = names.map(attributes => setOf(...attributes.map(([type, value]) => sequence(oid(type), value))))
    const attributes = [
      ...(challenge === null ? [] : [sequence(oid('1.2.840.113549.1.9.7'), setOf(utf8String(challenge)))]),
      ...(alternativeName === null ? [] : [extensionRequest(alternativeName)]),
    ]
    const info = sequence(integer(0), sequence(...subject), key.spki, contextConstructed(0, ...attributes))
    const { algorithm, signature } = signWith(key, way, info)
    return sequence(info, algorithm, bitString(signature))
  })

/** RFC 2985 section 5.4.2, with a DNS name. */
function extensionRequest(dnsName: string): Buffer {
  const names = sequence(contextPrimitive(2, Buffer.from(dnsName)))
  return sequence(oid('1.2.840.113549.1.9.14'), setOf(sequence(sequence(oid('2.5.29.17'), octetString(names)))))
}

/** What is not DER already, since its attributes were not, stays as it is. */
function spoiled(der: Buffer, edits: readonly ValueEdit[], other: ReturnType<typeof readValue>): Buffer {
  try {
    return writeValue(editValue(readValue(der), edits, other))
  } catch {
    return der
  }
}

// ── In PEM ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const labels = ['CERTIFICATE REQUEST', 'NEW CERTIFICATE REQUEST', 'CERTIFICATE', 'certificate request']

const wrapping = fc.record({
  label: fc.constantFrom(...labels),
  endLabel: fc.option(fc.constantFrom(...labels), { freq: 8 }),
  // Not less than 4: OpenSSL takes base64 in quarters and stumbles over a line that ends within the last.
  columns: fc.constantFrom(64, 64, 64, 76, 16, 4),
  lineEnd: fc.constantFrom('\n', '\r\n', '\n', '\n', '\r', '\n\n'),
  around: fc.oneof(fc.constant(''), fc.string({ maxLength: 40 })),
  blocks: fc.constantFrom(1, 1, 1, 1, 0, 2),
  edits: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: byteEdits }),
})

function wrapped(requests: fc.Arbitrary<Buffer>): fc.Arbitrary<Buffer> {
  return fc.tuple(requests, wrapping).map(([der, { label, endLabel, columns, lineEnd, around, blocks, edits }]) => {
    const lines = der.toString('base64').match(new RegExp(`.{1,${columns}}`, 'g')) ?? []
    const block = [`-----BEGIN ${label}-----`, ...lines, `-----END ${endLabel ?? label}-----`, ''].join(lineEnd)
    const text = Buffer.from(`${around}${around && '\n'}${block.repeat(blocks)}`)
    return edits.length === 0 ? text : editBytes(text, edits, text)
  })
}

// ── All ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** @param slow also requests for keys that take seconds to make */
export function requests({ slow }: { slow: boolean }): fc.Arbitrary<Buffer> {
  const signed = signedRequests(slow)
  return fc.oneof(
    { weight: 3, arbitrary: spoiledBytes },
    { weight: 3, arbitrary: spoiledValues },
    { weight: 8, arbitrary: signed },
    { weight: 3, arbitrary: wrapped(fc.oneof(onFile, signed, spoiledValues)) },
    { weight: 1, arbitrary: fc.uint8Array({ maxLength: 300 }).map(bytes => Buffer.from(bytes)) },
    // Too large, or nearly.
    { weight: 1, arbitrary: fc.integer({ min: 8_000, max: 9_000 }).map(size => Buffer.alloc(size, 0x30)) },
  )
}
