/**
 * Ids of decisions and of the connections that they allow. A decision's is a UUIDv7 (RFC 9562, section 5.7) that ends in 00. A
 * connection's is that of its decision but for the last byte, which is the place of the question in its message: the first
 * connection has the id of its decision.
 */
import { randomFillSync } from 'node:crypto'

const idLength = 36
const bytes = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, '0'))

const digits = Uint8Array.from(Buffer.from('0123456789abcdef'))
/** The id that was made last: over its time and its random digits the next one is written. */
const text = Buffer.from('00000000-0000-7000-8000-000000000000')
let textMs = 0
/** But for the one that has the variant in it, and the last two. */
const randomPlaces = [15, 16, 17, 20, 21, 22, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33]
const variantPlace = 19
/** A byte for each of these digits, drawn for many ids at a time. */
const random = Buffer.alloc(128 * (randomPlaces.length + 1))
let randomUsed = random.length

/**
 * For a row of decisions. One piece in memory, made in a third of the time that `randomUUIDv7` takes, which leaves a tree of two
 * dozen parts.
 */
export function newDecisionId(nowMs = Date.now()): string {
  if (randomUsed === random.length) {
    randomFillSync(random)
    randomUsed = 0
  }
  if (nowMs !== textMs) {
    const time = nowMs.toString(16).padStart(12, '0')
    text.write(`${time.slice(0, 8)}-${time.slice(8)}`)
    textMs = nowMs
  }
  for (const place of randomPlaces) text[place] = digits[(random[randomUsed++] as number) & 0xf] as number
  text[variantPlace] = digits[0x8 | ((random[randomUsed++] as number) & 0x3)] as number
  return text.toString('latin1')
}

/** @param decisionId by `newDecisionId` @param place below 256 */
export function connectionIdOf(decisionId: string, place: number): string {
  return place === 0 ? decisionId : decisionId.slice(0, -2) + bytes[place]
}

/** The decision that a connection has its id from. @param connectionId for which `placeOf` knows a place */
export function decisionIdOf(connectionId: string): string {
  return `${connectionId.slice(0, -2)}00`
}

/**
 * The answer that allowed a connection last: the id of a decision, and its place there.
 *
 * @param decisionId absent where it is the one that the connection has its id from
 */
export function decisionOf({ id, decisionId }: { id: string; decisionId: string | undefined }): string {
  return decisionId ?? `${decisionIdOf(id)}.${placeOf(id)}`
}

/** @returns -1 where it is no id */
export function placeOf(id: string): number {
  if (id.length !== idLength) return -1
  const [high, low] = [hexDigit(id.charCodeAt(idLength - 2)), hexDigit(id.charCodeAt(idLength - 1))]
  return high < 0 || low < 0 ? -1 : high * 16 + low
}

/**
 * A number of 32 bits that tells most ids apart: FNV-1a of the last ten digits, which are random in UUIDv7 but for the place.
 * What is no id has one, too.
 */
export function hashOf(id: string): number {
  let hash = 0x811c9dc5
  for (let at = Math.max(0, id.length - 10); at < id.length; at++) {
    hash = Math.imul(hash ^ id.charCodeAt(at), 0x01000193)
  }
  return hash
}

/** There is one spelling of each. */
function hexDigit(code: number): number {
  if (code >= 48 && code <= 57) return code - 48
  return code >= 97 && code <= 102 ? code - 87 : -1
}
