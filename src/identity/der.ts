/**
 * The Distinguished Encoding Rules (ITU-T X.690, section 10 and 11): exactly one sequence of bytes for every value.
 *
 * Certificates, requests and revocation lists are trees of such values. `decodeDer` reads one and accepts nothing but
 * the one right encoding; the functions named for the ASN.1 types write. Certificates are issued on a hot path, where
 * a general ASN.1 library costs ten times the signature; these few functions cost a tenth of it.
 */
import { isUtf8 } from 'node:buffer'

/** A value in its place among others. What it gives are views of the input, made when they are asked for. */
export class DerNode {
  readonly tag: number
  /** Of a constructed value, its parts; of a primitive one, none. */
  readonly children: readonly DerNode[]
  readonly #input: Buffer
  readonly #start: number
  readonly #contentsStart: number
  readonly end: number

  constructor(tag: number, input: Buffer, place: readonly [number, number, number], children: readonly DerNode[]) {
    this.tag = tag
    this.#input = input
    this.#start = place[0]
    this.#contentsStart = place[1]
    this.end = place[2]
    this.children = children
  }

  /** The whole encoding: tag, length, contents. */
  get der(): Buffer {
    return this.#input.subarray(this.#start, this.end)
  }

  get contents(): Buffer {
    return this.#input.subarray(this.#contentsStart, this.end)
  }
}

const none: readonly DerNode[] = []

export class DerError extends Error {
  override readonly name = 'DerError'
}

/** Identifier octets (X.690 section 8.1.2) of the types that occur in certificates. */
export const tags = {
  boolean: 0x01,
  integer: 0x02,
  bitString: 0x03,
  octetString: 0x04,
  null: 0x05,
  oid: 0x06,
  enumerated: 0x0a,
  utf8String: 0x0c,
  printableString: 0x13,
  teletexString: 0x14,
  ia5String: 0x16,
  utcTime: 0x17,
  generalizedTime: 0x18,
  universalString: 0x1c,
  bmpString: 0x1e,
  sequence: 0x30,
  set: 0x31,
} as const

const constructedBit = 0x20
const constructedOnly: ReadonlySet<number> = new Set([tags.sequence & ~constructedBit, tags.set & ~constructedBit])
const universalTagMax = 0x3f

/** A certificate of ours is 9 levels deep. The bound keeps hostile input from recursing without end. */
const depthMax = 16

/** Reads the one value that `bytes` holds. @throws DerError when it is not DER, or when anything follows it */
export function decodeDer(bytes: Uint8Array): DerNode {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const node = readNode(buffer, 0, buffer.length, depthMax)
  if (node.end !== buffer.length) throw new DerError('bytes follow the value')
  return node
}

/** @param limit where what it is in ends */
function readNode(buffer: Buffer, start: number, limit: number, depthLeft: number): DerNode {
  if (depthLeft === 0) throw new DerError('nested too deeply')
  if (start + 2 > limit) throw cutShort()
  const tag = buffer[start] as number
  if ((tag & 0x1f) === 0x1f) throw new DerError('a tag number above 30')

  let contentsStart = start + 2
  let length = buffer[start + 1] as number
  if (length >= 0x80) {
    // X.690 section 10.1: the definite form, in the fewest octets. Three octets of length are 16 MB, more than enough.
    const lengthOctets = length & 0x7f
    if (lengthOctets === 0) throw new DerError('an indefinite length')
    if (lengthOctets > 3) throw new DerError('a length beyond 16 MB')
    contentsStart += lengthOctets
    if (contentsStart > limit) throw cutShort()
    length = buffer.readUIntBE(start + 2, lengthOctets)
    if (length < (lengthOctets === 1 ? 0x80 : 1 << (8 * (lengthOctets - 1)))) throw new DerError('a padded length')
  }
  const end = contentsStart + length
  if (end > limit) throw cutShort()

  const children = (tag & constructedBit) === 0 ? none : readNodes(buffer, contentsStart, end, depthLeft - 1)
  const node = new DerNode(tag, buffer, [start, contentsStart, end], children)
  if (tag <= universalTagMax) assertCanonical(node)
  return node
}

function readNodes(buffer: Buffer, start: number, end: number, depthLeft: number): DerNode[] {
  const nodes: DerNode[] = []
  for (let at = start; at < end; ) {
    const node = readNode(buffer, at, end, depthLeft)
    nodes.push(node)
    at = node.end
  }
  return nodes
}

const cutShort = () => new DerError('the value is cut short')

/** The restrictions of X.690 sections 8 and 11 that leave every universal type one encoding. */
function assertCanonical(node: DerNode): void {
  const { tag, children } = node
  switch (tag) {
    case tags.boolean: {
      const { contents } = node
      if (contents.length !== 1 || (contents[0] !== 0x00 && contents[0] !== 0xff)) throw new DerError('a loose BOOLEAN')
      return
    }
    case tags.integer:
    case tags.enumerated: {
      const { contents } = node
      const [first, second] = [contents[0], contents[1]]
      if (first === undefined) throw new DerError('an empty INTEGER')
      if (second !== undefined && ((first === 0x00 && second < 0x80) || (first === 0xff && second >= 0x80))) {
        throw new DerError('a padded INTEGER')
      }
      return
    }
    case tags.bitString: {
      const { contents } = node
      const unused = contents[0]
      if (unused === undefined || unused > 7 || (unused > 0 && contents.length === 1)) {
        throw new DerError('a malformed BIT STRING')
      }
      if ((contents.at(-1)! & ((1 << unused) - 1)) !== 0 && unused > 0) throw new DerError('a loose BIT STRING')
      return
    }
    case tags.null:
      if (node.contents.length !== 0) throw new DerError('a NULL with contents')
      return
    case tags.oid:
      assertCanonicalOid(node.contents)
      return
    case tags.utf8String:
      if (!isUtf8(node.contents)) throw new DerError('a UTF8String that is not UTF-8')
      return
    case tags.bmpString:
      // X.690 section 8.23.9: two octets a character, and none that UTF-16 would take for half of one.
      if (node.contents.length % 2 !== 0 || hasSurrogates(node.contents))
        throw new DerError('a BMPString with half a character')
      return
    case tags.universalString:
      if (node.contents.length % 4 !== 0) throw new DerError('a UniversalString with a part of a character')
      return
    case tags.set:
      for (let i = 1; i < children.length; i++) {
        if (Buffer.compare(children[i - 1]!.der, children[i]!.der) > 0) throw new DerError('a SET out of order')
      }
      return
    case tags.sequence:
      return
    default:
      // Strings and times are primitive (X.690 section 10.2), SEQUENCE and SET are not, and the end-of-contents mark
      // belongs to indefinite lengths.
      if (tag === 0 || (tag & constructedBit) !== 0 || constructedOnly.has(tag)) {
        throw new DerError(`an unexpected tag ${tag}`)
      }
  }
}

function hasSurrogates(twoOctetsEach: Buffer): boolean {
  for (let at = 0; at < twoOctetsEach.length; at += 2) {
    if ((twoOctetsEach[at]! & 0xf8) === 0xd8) return true
  }
  return false
}

function assertCanonicalOid(contents: Buffer): void {
  let startsArc = true
  for (const byte of contents) {
    if (startsArc && byte === 0x80) throw new DerError('a padded OBJECT IDENTIFIER')
    startsArc = byte < 0x80
  }
  if (contents.length === 0 || !startsArc) throw new DerError('a malformed OBJECT IDENTIFIER')
}

/** The dotted text of an OBJECT IDENTIFIER's contents, for comparing with constants and for messages. */
export function oidText(contents: Buffer): string {
  let text = ''
  let arc = 0
  for (const byte of contents) {
    if (arc >= longArcMin) return longOidText(contents)
    arc = arc * 128 + (byte & 0x7f)
    if (byte >= 0x80) continue
    // X.690 section 8.19.4: the first two arcs share one number.
    if (text === '') {
      const top = arc < 80 ? Math.floor(arc / 40) : 2
      text = `${top}.${arc - top * 40}`
    } else text += `.${arc}`
    arc = 0
  }
  return text
}

/** From here on one more octet may be more than a number holds exactly. Nothing that certificates name gets here. */
const longArcMin = 2 ** 46

function longOidText(contents: Buffer): string {
  const arcs: bigint[] = []
  let arc = 0n
  for (const byte of contents) {
    arc = (arc << 7n) | BigInt(byte & 0x7f)
    if (byte >= 0x80) continue
    if (arcs.length === 0) {
      const top = arc < 80n ? arc / 40n : 2n
      arcs.push(top, arc - top * 40n)
    } else arcs.push(arc)
    arc = 0n
  }
  return arcs.join('.')
}

/** The time that a UTCTime or GeneralizedTime names, in the only forms that RFC 5280 section 4.1.2.5 allows. */
export function readTime({ tag, contents }: DerNode): Date {
  const yearDigits = tag === tags.utcTime ? 2 : 4
  const isLoose = contents.length !== yearDigits + 11 || contents[yearDigits + 10] !== 0x5a /* Z */
  if ((tag !== tags.utcTime && tag !== tags.generalizedTime) || isLoose) throw new DerError('a loose time')
  const yearRead = decimal(contents, 0, yearDigits)
  const year = yearDigits === 4 ? yearRead : yearRead + (yearRead < 50 ? 2000 : 1900)
  const two = (place: number) => decimal(contents, yearDigits + 2 * place, 2)
  const [month, day, hour, minute, second] = [two(0), two(1), two(2), two(3), two(4)] as const
  const time = new Date(0)
  time.setUTCFullYear(year, month - 1, day)
  // What is too much goes into the next larger unit: then it is not what was said.
  const exists =
    time.getUTCMonth() === month - 1 && time.getUTCDate() === day && hour < 24 && minute < 60 && second < 60
  if (!exists) throw new DerError('a time that does not exist')
  return new Date(time.getTime() + ((hour * 60 + minute) * 60 + second) * 1_000)
}

function decimal(contents: Buffer, start: number, digits: number): number {
  let value = 0
  for (let at = start; at < start + digits; at++) {
    const digit = (contents[at] as number) - 0x30
    if (digit < 0 || digit > 9) throw new DerError('a loose time')
    value = value * 10 + digit
  }
  return value
}

/** Any value: its tag, the length of its contents, and its contents from `parts`. */
function derValue(tag: number, ...parts: Uint8Array[]): Buffer {
  const length = parts.reduce((sum, part) => sum + part.length, 0)
  return Buffer.concat([header(tag, length), ...parts])
}

function header(tag: number, length: number): Buffer {
  if (length < 0x80) return Buffer.of(tag, length)
  if (length < 0x100) return Buffer.of(tag, 0x81, length)
  if (length < 0x10000) return Buffer.of(tag, 0x82, length >> 8, length & 0xff)
  if (length < 0x1000000) return Buffer.of(tag, 0x83, length >> 16, (length >> 8) & 0xff, length & 0xff)
  return Buffer.of(tag, 0x84, length >>> 24, (length >> 16) & 0xff, (length >> 8) & 0xff, length & 0xff)
}

export function sequence(...parts: Uint8Array[]): Buffer {
  return derValue(tags.sequence, ...parts)
}

/** A SET OF, whose members the encoding sorts (X.690 section 11.6). */
export function setOf(...members: Buffer[]): Buffer {
  return derValue(tags.set, ...members.toSorted(Buffer.compare))
}

/** An INTEGER that is not negative, from its big-endian bytes or a small number. */
export function integer(value: Uint8Array | number): Buffer {
  const bytes = typeof value === 'number' ? Buffer.from(evenHex(value), 'hex') : value
  let start = 0
  while (start < bytes.length - 1 && bytes[start] === 0) start++
  const magnitude = bytes.subarray(start)
  return magnitude[0]! >= 0x80 ? derValue(tags.integer, Buffer.of(0), magnitude) : derValue(tags.integer, magnitude)
}

function evenHex(value: number): string {
  if (!Number.isSafeInteger(value) || value < 0) throw new RangeError(`not a natural number: ${value}`)
  const hex = value.toString(16)
  return hex.length % 2 === 0 ? hex : `0${hex}`
}

export function enumerated(value: number): Buffer {
  return derValue(tags.enumerated, Buffer.of(value))
}

export function boolean(value: boolean): Buffer {
  return derValue(tags.boolean, Buffer.of(value ? 0xff : 0x00))
}

export function nullValue(): Buffer {
  return derValue(tags.null)
}

export function bitString(bytes: Uint8Array, unusedBits = 0): Buffer {
  return derValue(tags.bitString, Buffer.of(unusedBits), bytes)
}

export function octetString(bytes: Uint8Array): Buffer {
  return derValue(tags.octetString, bytes)
}

export function utf8String(text: string): Buffer {
  return derValue(tags.utf8String, Buffer.from(text, 'utf8'))
}

/** Encodings of all the identifiers that were ever written: a few dozen, since only constants are. */
const encodedOids = new Map<string, Buffer>()

export function oid(dotted: string): Buffer {
  const known = encodedOids.get(dotted)
  if (known !== undefined) return known
  const [top = 0, second = 0, ...rest] = dotted.split('.').map(Number)
  const bytes: number[] = []
  for (const arc of [top * 40 + second, ...rest]) {
    const groups = [arc & 0x7f]
    for (let left = Math.floor(arc / 128); left > 0; left = Math.floor(left / 128)) groups.unshift((left & 0x7f) | 0x80)
    bytes.push(...groups)
  }
  const encoded = derValue(tags.oid, Buffer.from(bytes))
  encodedOids.set(dotted, encoded)
  return encoded
}

/** UTCTime through the year 2049, GeneralizedTime from 2050 on (RFC 5280 section 4.1.2.5); fractions are cut off. */
export function time(date: Date): Buffer {
  const digits = date.toISOString().replace(/[-T:]|\.\d+/g, '')
  const inUtcTime = date.getUTCFullYear() >= 1950 && date.getUTCFullYear() < 2050
  return inUtcTime
    ? derValue(tags.utcTime, Buffer.from(digits.slice(2), 'latin1'))
    : derValue(tags.generalizedTime, Buffer.from(digits, 'latin1'))
}

/** `[number]` around whole values: explicit tagging, or implicit tagging of a constructed type. */
export function contextConstructed(number: number, ...parts: Uint8Array[]): Buffer {
  return derValue(0xa0 | number, ...parts)
}

/** `[number]` in place of a primitive type's own tag: implicit tagging. */
export function contextPrimitive(number: number, contents: Uint8Array): Buffer {
  return derValue(0x80 | number, contents)
}
