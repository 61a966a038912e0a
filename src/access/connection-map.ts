/**
 * A map by connection id: a hash table whose chains go through the connections themselves, so that adding one makes nothing, and
 * finding it fetches little. Ids are strings all over the heap, and a plain map of ten thousands spends its time on fetching them.
 */
import { hashOf } from './connection-id.ts'

/** What a connection has to be in one of these maps; it can be in one at a time. Both fields are the map's. */
export type Chained = { id: string; idHash: number; nextInChain: Chained | undefined }

export type ConnectionMap<V> = {
  get(connectionId: string): V | undefined
  /** @returns the one with the same id whose place it takes */
  add(connection: V): V | undefined
  /** @returns whether it was there, and not another one with the same id */
  remove(connection: V): boolean
  readonly size: number
  /** As they are now, in no order. */
  values(): V[]
}

/** A power of two, as all numbers of chains. */
const chainsMin = 1_024
/** With fewer connections than chains by this factor there are half as many chains. */
const sparseFactor = 8

export function createConnectionMap<V extends Chained>(): ConnectionMap<V> {
  /** By the last bits of the hash: the first one of each chain. */
  let chains = emptyChains<V>(chainsMin)
  let size = 0

  const next = (connection: V) => connection.nextInChain as V | undefined

  function get(id: string): V | undefined {
    const hash = hashOf(id)
    let found = chains[hash & (chains.length - 1)]
    while (found !== undefined && (found.idHash !== hash || found.id !== id)) found = next(found)
    return found
  }

  function add(connection: V): V | undefined {
    const { id } = connection
    const hash = hashOf(id)
    const at = hash & (chains.length - 1)
    const first = chains[at]
    let before = first
    while (before !== undefined && (before.idHash !== hash || before.id !== id)) before = next(before)
    if (before !== undefined) unlink(before)
    connection.idHash = hash
    connection.nextInChain = before === undefined ? first : chains[at]
    chains[at] = connection
    if (++size > chains.length) rehash(chains.length * 2)
    return before
  }

  function remove(connection: V): boolean {
    if (!unlink(connection)) return false
    if (size * sparseFactor < chains.length && chains.length > chainsMin) rehash(chains.length / 2)
    return true
  }

  function unlink(connection: V): boolean {
    const at = connection.idHash & (chains.length - 1)
    let previous: V | undefined
    let found = chains[at]
    while (found !== undefined && found !== connection) {
      previous = found
      found = next(found)
    }
    if (found === undefined) return false
    if (previous === undefined) chains[at] = next(connection)
    else previous.nextInChain = connection.nextInChain
    connection.nextInChain = undefined
    size--
    return true
  }

  function rehash(count: number): void {
    const all = values()
    chains = emptyChains(count)
    for (const connection of all) {
      const at = connection.idHash & (count - 1)
      connection.nextInChain = chains[at]
      chains[at] = connection
    }
  }

  function values(): V[] {
    const all: V[] = []
    for (const first of chains) {
      for (let connection = first; connection !== undefined; connection = next(connection)) all.push(connection)
    }
    return all
  }

  return {
    get,
    add,
    remove,
    get size() {
      return size
    },
    values,
  }
}

function emptyChains<V>(count: number): (V | undefined)[] {
  return new Array<V | undefined>(count).fill(undefined)
}
