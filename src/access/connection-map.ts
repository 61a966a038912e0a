/**
 * A map by connection id. Of ids only a number is hashed (`hashOf`), and a whole id is looked at once, when it has been found: ids
 * are strings all over the heap, and fetching them is what a map of strings spends its time on.
 */
import { hashOf } from './connection-id.ts'

export type ConnectionMap<V extends { id: string }> = {
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

export function createConnectionMap<V extends { id: string }>(): ConnectionMap<V> {
  /** Those whose ids have the same hash are in one list. */
  const byHash = new Map<number, V | V[]>()
  let size = 0

  function get(id: string): V | undefined {
    const found = byHash.get(hashOf(id))
    if (found === undefined) return undefined
    if (Array.isArray(found)) return found.find(connection => connection.id === id)
    return found.id === id ? found : undefined
  }

  function remove(connection: V): boolean {
    const hash = hashOf(connection.id)
    const found = byHash.get(hash)
    if (found === undefined) return false
    if (found === connection) byHash.delete(hash)
    else if (Array.isArray(found) && found.includes(connection)) {
      const others = found.filter(other => other !== connection)
      byHash.set(hash, others.length === 1 ? (others[0] as V) : others)
    } else return false
    size--
    return true
  }

  function forEach(visit: (connection: V) => void): void {
    for (const found of byHash.values()) {
      if (Array.isArray(found)) found.forEach(visit)
      else visit(found)
    }
  }

  return {
    get,
    add(connection) {
      const hash = hashOf(connection.id)
      const found = byHash.get(hash)
      if (found === undefined) byHash.set(hash, connection)
      else {
        const all = Array.isArray(found) ? found : [found]
        const others = all.filter(({ id }) => id !== connection.id)
        size -= all.length - others.length
        byHash.set(hash, others.length === 0 ? connection : [...others, connection])
      }
      size++
    },
    remove,
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
