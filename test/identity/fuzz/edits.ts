/**
 * Ways to spoil what was right: of bytes, and of the tree of values that they encode.
 *
 * An edit is made of numbers, so that fast-check can make it smaller until as little as possible is left of a finding.
 * Places are numbers up to `placeMax`, taken modulo what there is.
 */
import fc from 'fast-check'
import { type DerNode, decodeDer, tags } from '../../../src/identity/der.ts'

const placeMax = 0xffff
const place = fc.nat(placeMax)
const fewBytes = fc.uint8Array({ maxLength: 6 })

// ── Bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

export type ByteEdit =
  | { kind: 'flip'; at: number; bit: number }
  | { kind: 'replace'; at: number; remove: number; bytes: Uint8Array }
  | { kind: 'cut'; at: number }
  | { kind: 'repeat'; at: number; length: number }
  /** The beginning of this, then the end of the other. */
  | { kind: 'splice'; at: number; otherAt: number }

export const byteEdits: fc.Arbitrary<ByteEdit[]> = fc.array(
  fc.oneof(
    fc.record({ kind: fc.constant('flip' as const), at: place, bit: fc.nat(7) }),
    fc.record({ kind: fc.constant('replace' as const), at: place, remove: fc.nat(6), bytes: fewBytes }),
    fc.record({ kind: fc.constant('cut' as const), at: place }),
    fc.record({ kind: fc.constant('repeat' as const), at: place, length: fc.nat(64) }),
    fc.record({ kind: fc.constant('splice' as const), at: place, otherAt: place }),
  ),
  { minLength: 1, maxLength: 4 },
)

export function editBytes(bytes: Buffer, edits: readonly ByteEdit[], other: Buffer): Buffer {
  return edits.reduce((current, edit) => editOnce(current, edit, other), bytes)
}

function editOnce(bytes: Buffer, edit: ByteEdit, other: Buffer): Buffer {
  const at = edit.at % (bytes.length + 1)
  const before = bytes.subarray(0, at)
  switch (edit.kind) {
    case 'flip': {
      const flipped = Buffer.from(bytes)
      if (at < flipped.length) flipped[at]! ^= 1 << edit.bit
      return flipped
    }
    case 'replace':
      return Buffer.concat([before, edit.bytes, bytes.subarray(at + edit.remove)])
    case 'cut':
      return before
    case 'repeat':
      return Buffer.concat([bytes.subarray(0, at + edit.length), bytes.subarray(at)])
    case 'splice':
      return Buffer.concat([before, other.subarray(edit.otherAt % (other.length + 1))])
  }
}

// ── Values ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A value that can be written as it should be, or not. */
export type Value = { tag: number; contents: Buffer | Value[]; length?: WrongLength }

type WrongLength = { kind: 'padded' } | { kind: 'indefinite' } | { kind: 'off'; by: number }

/** Extensions are values within octet strings; these are opened, so that edits reach what is in them. */
export function readValue(der: Uint8Array): Value {
  return fromNode(decodeDer(der))
}

function fromNode({ tag, contents, children }: DerNode): Value {
  if ((tag & 0x20) !== 0) return { tag, contents: children.map(fromNode) }
  if (tag !== tags.octetString) return { tag, contents }
  try {
    return { tag, contents: [readValue(contents)] }
  } catch {
    return { tag, contents }
  }
}

export function writeValue({ tag, contents, length }: Value): Buffer {
  const body = Buffer.isBuffer(contents) ? contents : Buffer.concat(contents.map(writeValue))
  if (length?.kind === 'indefinite') return Buffer.concat([Buffer.of(tag, 0x80), body, Buffer.of(0, 0)])
  const stated = Math.max(0, body.length + (length?.kind === 'off' ? length.by : 0))
  const octets = stated < 0x80 && length?.kind !== 'padded' ? [] : octetsOf(stated)
  if (length?.kind === 'padded' && stated >= 0x80) octets.unshift(0)
  const header = octets.length === 0 ? [tag, stated] : [tag, 0x80 | octets.length, ...octets]
  return Buffer.concat([Buffer.from(header), body])
}

function octetsOf(length: number): number[] {
  const hex = length.toString(16)
  return [...Buffer.from(hex.length % 2 === 0 ? hex : `0${hex}`, 'hex')]
}

export type ValueEdit =
  | { kind: 'remove' | 'double' | 'reverse' | 'empty'; at: number }
  | { kind: 'tag'; at: number; tag: number }
  | { kind: 'contents'; at: number; bytes: Uint8Array }
  | { kind: 'length'; at: number; length: WrongLength }
  | { kind: 'nest'; at: number; tag: number; levels: number }
  /** In place of a value, one of another tree. */
  | { kind: 'graft'; at: number; otherAt: number }

const tagsWorthTrying = [
  0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x0a, 0x0c, 0x13, 0x14, 0x16, 0x17, 0x18, 0x1e, 0x1f, 0x24, 0x30, 0x31,
  0x80, 0xa0, 0xa1, 0xbf,
]
const anyTag = fc.oneof(fc.constantFrom(...tagsWorthTrying), fc.nat(0xff))
const constructedTag = fc.constantFrom(0x30, 0x31, 0xa0, 0xa3)
const wrongLength = fc.oneof(
  fc.constant<WrongLength>({ kind: 'padded' }),
  fc.constant<WrongLength>({ kind: 'indefinite' }),
  fc.record({
    kind: fc.constant('off' as const),
    by: fc.oneof(fc.integer({ min: -3, max: 3 }), fc.constantFrom(0x7f, 0x100, 0xffff, 0xffffff, 0xffffffff)),
  }),
)
const nestLevelsMax = 20

export const valueEdits: fc.Arbitrary<ValueEdit[]> = fc.array(
  fc.oneof(
    fc.record({ kind: fc.constantFrom('remove' as const, 'double' as const, 'reverse' as const), at: place }),
    fc.record({ kind: fc.constant('empty' as const), at: place }),
    fc.record({ kind: fc.constant('tag' as const), at: place, tag: anyTag }),
    fc.record({ kind: fc.constant('contents' as const), at: place, bytes: fc.uint8Array({ maxLength: 40 }) }),
    fc.record({ kind: fc.constant('length' as const), at: place, length: wrongLength }),
    fc.record({
      kind: fc.constant('nest' as const),
      at: place,
      tag: constructedTag,
      levels: fc.integer({ min: 1, max: nestLevelsMax }),
    }),
    fc.record({ kind: fc.constant('graft' as const), at: place, otherAt: place }),
  ),
  { minLength: 1, maxLength: 3 },
)

export function editValue(root: Value, edits: readonly ValueEdit[], other: Value): Value {
  return edits.reduce((current, edit) => {
    const [whole = current] = replaceAt(current, edit.at % sizeOf(current), value => edited(value, edit, other))
    return whole
  }, root)
}

/** What stands in its place. */
function edited(value: Value, edit: ValueEdit, other: Value): Value[] {
  switch (edit.kind) {
    case 'remove':
      return []
    case 'double':
      return [value, value]
    case 'reverse':
      return [{ ...value, contents: Buffer.isBuffer(value.contents) ? value.contents : value.contents.toReversed() }]
    case 'empty':
      return [{ ...value, contents: Buffer.alloc(0) }]
    case 'tag':
      return [{ ...value, tag: edit.tag }]
    case 'contents':
      return [{ ...value, contents: Buffer.from(edit.bytes) }]
    case 'length':
      return [{ ...value, length: edit.length }]
    case 'nest': {
      let nested = value
      for (let level = 0; level < edit.levels; level++) nested = { tag: edit.tag, contents: [nested] }
      return [nested]
    }
    case 'graft':
      return [valueAt(other, edit.otherAt % sizeOf(other))]
  }
}

/** Values are numbered from the root, 0, each before its contents. */
function sizeOf({ contents }: Value): number {
  return Buffer.isBuffer(contents) ? 1 : contents.reduce((sum, child) => sum + sizeOf(child), 1)
}

function valueAt(root: Value, at: number): Value {
  if (at === 0 || Buffer.isBuffer(root.contents)) return root
  let left = at - 1
  for (const child of root.contents) {
    const size = sizeOf(child)
    if (left < size) return valueAt(child, left)
    left -= size
  }
  return root
}

function replaceAt(root: Value, at: number, replace: (value: Value) => Value[]): Value[] {
  if (at === 0) return replace(root)
  if (Buffer.isBuffer(root.contents)) return [root]
  let left = at - 1
  const contents = root.contents.flatMap(child => {
    const size = sizeOf(child)
    const inHere = left >= 0 && left < size
    const replaced = inHere ? replaceAt(child, left, replace) : [child]
    left -= size
    return replaced
  })
  return [{ ...root, contents }]
}
