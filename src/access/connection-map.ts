/**
 * Maps by connection id. The connections of one message share an entry, since their ids differ in the last byte alone: what a
 * message of many does to a map costs about what a message of one does.
 */
import { type ConnectionPlace, messageOf, placeOf } from './connection-id.ts'

export type ConnectionMap<V extends ConnectionPlace> = {
  get(connectionId: string): V | undefined
  /** Takes the place of the one with the same id. */
  add(connection: V): void
  /** @returns whether it was there, and not another one with the same id */
  remove(connection: V): boolean
  readonly size: number
  /** None may be added or removed meanwhile. */
  forEach(visit: (connection: V) => void): void
  values(): V[]
}

export function createConnectionMap<V extends ConnectionPlace>(): ConnectionMap<V> {
  const messages = new Map<string, { places: (V | undefined)[]; count: number }>()
  let size = 0

  function forEach(visit: (connection: V) => void): void {
    for (const { places } of messages.values()) {
      for (const connection of places) if (connection !== undefined) visit(connection)
    }
  }

  return {
    get(connectionId) {
      return messages.get(messageOf(connectionId))?.places[placeOf(connectionId)]
    },
    add(connection) {
      const { message, place } = connection
      let entry = messages.get(message)
      if (entry === undefined) {
        entry = { places: [], count: 0 }
        messages.set(message, entry)
      }
      if (entry.places[place] === undefined) {
        entry.count++
        size++
      }
      entry.places[place] = connection
    },
    remove(connection) {
      const { message, place } = connection
      const entry = messages.get(message)
      if (entry === undefined || entry.places[place] !== connection) return false
      entry.places[place] = undefined
      size--
      if (--entry.count === 0) messages.delete(message)
      return true
    },
    get size() {
      return size
    },
    forEach,
    values() {
      const values: V[] = []
      forEach(connection => values.push(connection))
      return values
    },
  }
}
