/**
 * Ids of connections: the id of the decision that allowed it, but for the last byte, which is the place of the question in its
 * message. A decision's own ends in 00 (`newDecisionId`).
 */

export type ConnectionPlace = {
  /** What the ids of a decision and of its connections have in common. */
  message: string
  /** The last byte. */
  place: number
}

const idLength = 36
const bytes = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, '0'))

/** @param message by `messageOf` the decision @param place below 256 */
export function connectionIdOf(message: string, place: number): string {
  return message + bytes[place]
}

/** That of the id that was read last: the next one is mostly of the same message, which then is the same string. */
let lastMessage = '-'

/** @returns the empty string where it is no id */
export function messageOf(id: string): string {
  if (id.length !== idLength) return ''
  // A part of a string refers to the whole, and is slower to compare than a string of its own.
  if (!id.startsWith(lastMessage)) lastMessage = Buffer.from(id.slice(0, -2), 'latin1').toString('latin1')
  return lastMessage
}

/** @returns -1 where it is no id */
export function placeOf(id: string): number {
  if (id.length !== idLength) return -1
  const [high, low] = [hexDigit(id.charCodeAt(idLength - 2)), hexDigit(id.charCodeAt(idLength - 1))]
  return high < 0 || low < 0 ? -1 : high * 16 + low
}

/** @param id of a connection on record */
export function readConnectionId(id: string): ConnectionPlace {
  const [message, place] = [messageOf(id), placeOf(id)]
  if (place < 0) throw new RangeError(`${JSON.stringify(id)} is no id of a connection`)
  return { message, place }
}

/** There is one spelling of each. */
function hexDigit(code: number): number {
  if (code >= 48 && code <= 57) return code - 48
  return code >= 97 && code <= 102 ? code - 87 : -1
}
