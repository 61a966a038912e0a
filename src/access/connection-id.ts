/**
 * Ids of connections: the id of the decision that allowed it, but for the last byte, which is the place of the question in its
 * message. A decision's own ends in 00 (`newDecisionId`), so that is the id of the first connection, too.
 */

const idLength = 36
const bytes = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, '0'))

/** @param decisionId by `newDecisionId` @param place below 256 */
export function connectionIdOf(decisionId: string, place: number): string {
  return place === 0 ? decisionId : decisionId.slice(0, -2) + bytes[place]
}

/** The decision that a connection has its id from. @param connectionId for which `placeOf` knows a place */
export function decisionIdOf(connectionId: string): string {
  return `${connectionId.slice(0, -2)}00`
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
