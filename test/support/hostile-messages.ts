/**
 * Messages that no honest client sends, made from the contract itself: for each field of a request, what its type lets
 * go wrong on the wire. A method that is added to the proto files is covered from then on.
 */
import { join } from 'node:path'
import { loadSync } from '@grpc/proto-loader'

type Field = { name: string; number: number; label: string; type: string; typeName: string }
type Shape = { name: string; field: Field[]; nestedType: Shape[] }
type Loaded = Record<string, { type: Shape } & Record<string, { requestType: { type: Shape } }>>

export type HostileMessage = { what: string; bytes: Buffer }

const root = join(import.meta.dirname, '../..')
const files = ['enroll', 'authorize', 'heartbeat', 'admin'].map(name => `edgemesh/v1/${name}.proto`)
const loaded = loadSync(files, {
  includeDirs: [join(root, 'proto'), join(root, 'node_modules/protobufjs')],
  keepCase: true,
}) as unknown as Loaded

/** The request of a method, such as `/edgemesh.v1.EnrollService/Enroll`. */
export function requestShape(path: string): Shape {
  const [service = '', method = ''] = path.slice(1).split('/')
  const shape = loaded[service]?.[method]?.requestType.type
  if (!shape) throw new Error(`the contract has no ${path}`)
  return shape
}

/** A message in which every field has a value that its type can have; whether it makes sense is another matter. */
export function plausible(shape: Shape, depth = 0): Buffer {
  return Buffer.concat(shape.field.map(field => plausibleField(field, shape, depth)))
}

/** Plausible messages with one thing wrong in each. */
export function hostile(shape: Shape): HostileMessage[] {
  return shape.field.flatMap(field => {
    const others = Buffer.concat(
      shape.field.filter(other => other !== field).map(other => plausibleField(other, shape, 0)),
    )
    return hostileField(field, shape).map(({ what, bytes }) => ({ what, bytes: Buffer.concat([others, bytes]) }))
  })
}

/** Whether a refusal names a field that the request has: `questions.questions[0].user`, `labels.site`. */
export function hasField(shape: Shape, path: string): boolean {
  const [first = '', ...rest] = path.replace(/\[\d+\]/g, '').split('.')
  const field = shape.field.find(({ name }) => name === first)
  if (!field) return false
  if (rest.length === 0) return true
  const inner = innerShape(field, shape)
  if (!inner) return false
  // A map's keys are the caller's.
  return isMap(field, shape) || hasField(inner, rest.join('.'))
}

const depthMax = 4

function plausibleField(field: Field, shape: Shape, depth: number): Buffer {
  switch (field.type) {
    case 'TYPE_STRING':
      return bytesField(field.number, 'no-such-name')
    case 'TYPE_BYTES':
      return bytesField(field.number, 'bytes')
    case 'TYPE_DOUBLE':
      return doubleField(field.number, 50)
    case 'TYPE_MESSAGE': {
      const inner = innerShape(field, shape)
      return inner && depth < depthMax ? bytesField(field.number, plausible(inner, depth + 1)) : Buffer.alloc(0)
    }
    default:
      return varintField(field.number, 1n)
  }
}

function hostileField(field: Field, shape: Shape, depth = 0): HostileMessage[] {
  const { number, name } = field
  const made = (what: string, ...bytes: Buffer[]) => ({ what: `${name}: ${what}`, bytes: Buffer.concat(bytes) })
  const wrong = [
    made('as a varint of ten bytes', varintField(number, 2n ** 64n - 1n)),
    made('as text', bytesField(number, 'text')),
    made('as 32 bits', tag(number, 5), Buffer.alloc(4, 0xff)),
    made('as a group that never ends', tag(number, 3)),
    made('of more bytes than there are', tag(number, 2), varint(2n ** 31n), Buffer.from('few')),
    made('of a negative number of bytes', tag(number, 2), varint(2n ** 64n - 5n)),
    made('absent'),
  ]
  if (field.label === 'LABEL_REPEATED') {
    const one = field.type === 'TYPE_MESSAGE' ? bytesField(number, '') : plausibleField(field, shape, 0)
    wrong.push(made('5,000 times', ...Array.from({ length: 5_000 }, () => one)))
    if (isMap(field, shape)) {
      const entries = Array.from({ length: 2_000 }, (_, at) =>
        bytesField(number, Buffer.concat([bytesField(1, `k${at}`), bytesField(2, 'v')])),
      )
      wrong.push(made('of 2,000 keys', ...entries))
      wrong.push(
        made(
          'with a key of objects',
          bytesField(number, Buffer.concat([bytesField(1, '__proto__'), bytesField(2, 'v')])),
        ),
      )
    }
  }
  switch (field.type) {
    case 'TYPE_STRING':
    case 'TYPE_BYTES':
      wrong.push(
        made('empty', bytesField(number, '')),
        made('with NUL', bytesField(number, 'a\0b')),
        made('of NUL', bytesField(number, '\0')),
        made('with control characters', bytesField(number, '\u001b[2J\r\n')),
        made('with a lone surrogate', bytesField(number, Buffer.from([0x61, 0xed, 0xa0, 0x80]))),
        made('that is no UTF-8', bytesField(number, Buffer.from([0xff, 0xfe, 0xc0, 0xaf, 0xf8]))),
        made('of 100,000 characters', bytesField(number, 'x'.repeat(100_000))),
        made('of 60,000 blanks', bytesField(number, ' '.repeat(60_000))),
        made('of SQL', bytesField(number, "'; drop table devices; --")),
        made('a page token of the year 0', bytesField(number, pageToken('0000-01-01T00:00:00Z'))),
        made('a page token of the year 9999', bytesField(number, pageToken('9999-12-31T23:59:59.999Z'))),
        made('a page token of a long second', bytesField(number, pageToken(`2026-01-01T00:00:00.${'1'.repeat(200)}Z`))),
        made('a page token of numbers', bytesField(number, Buffer.from('[1e999,-1]').toString('base64url'))),
      )
      break
    case 'TYPE_DOUBLE':
      for (const value of [Number.NaN, Infinity, -Infinity, -0.001, 100.001, Number.MAX_VALUE]) {
        wrong.push(made(String(value), doubleField(number, value)))
      }
      break
    case 'TYPE_MESSAGE': {
      const inner = innerShape(field, shape)
      if (inner && depth < depthMax) {
        for (const innerField of inner.field) {
          const others = inner.field
            .filter(other => other !== innerField)
            .map(other => plausibleField(other, inner, depth + 1))
          for (const { what, bytes } of hostileField(innerField, inner, depth + 1)) {
            wrong.push(made(what, bytesField(number, Buffer.concat([...others, bytes]))))
          }
        }
      }
      wrong.push(made('a hundred thousand deep', nested(number, 100_000)))
      break
    }
    default:
      for (const value of [0n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n, 99_999n]) {
        wrong.push(made(String(value), varintField(number, value)))
      }
  }
  return wrong
}

function innerShape(field: Field, shape: Shape): Shape | undefined {
  if (field.type !== 'TYPE_MESSAGE') return undefined
  const name = field.typeName.replace(/^\./, '')
  const nested = shape.nestedType.find(type => type.name === name.split('.').at(-1))
  const found = nested ?? (loaded[name] ?? loaded[`edgemesh.v1.${name}`] ?? loaded[`google.protobuf.${name}`])?.type
  if (!found) throw new Error(`the contract has no message ${field.typeName}`)
  return found
}

function isMap(field: Field, shape: Shape): boolean {
  const inner = innerShape(field, shape)
  return field.label === 'LABEL_REPEATED' && inner !== undefined && shape.nestedType.includes(inner)
}

/** What the pages of the audit log have for a token. */
function pageToken(time: string): string {
  return Buffer.from(JSON.stringify([time, '0199c0de-0000-7000-8000-000000000000'])).toString('base64url')
}

/** A field inside itself, inside itself … as unfinished groups, the shortest way to write depth. */
function nested(number: number, depth: number): Buffer {
  return Buffer.concat(Array.from({ length: depth }, () => tag(number, 3)))
}

function varint(value: bigint): Buffer {
  const bytes: number[] = []
  for (let rest = value; ; rest >>= 7n) {
    const low = Number(rest & 0x7fn)
    if (rest < 0x80n) return Buffer.from([...bytes, low])
    bytes.push(low | 0x80)
  }
}

const tag = (number: number, wireType: number) => varint(BigInt((number << 3) | wireType))
const varintField = (number: number, value: bigint) => Buffer.concat([tag(number, 0), varint(value)])
const bytesField = (number: number, value: string | Buffer) => {
  const bytes = Buffer.from(value as string)
  return Buffer.concat([tag(number, 2), varint(BigInt(bytes.length)), bytes])
}

function doubleField(number: number, value: number): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeDoubleLE(value)
  return Buffer.concat([tag(number, 1), bytes])
}
