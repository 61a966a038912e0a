/**
 * Facts read from the database and kept in memory for exactly as long as the change feed vouches for them.
 *
 * A fact is loaded on the first miss (racing misses share one query) and dropped when the feed says that it has changed.
 * Each loaded fact has a version of its own, so `version` names what a decision rested on: as long as `isCurrent` holds,
 * nothing that this instance could know of has changed.
 */
import DataLoader from 'dataloader'
import { LRUCache } from 'lru-cache'
import { type Clock, systemClock } from '../clock.ts'
import type { ChangeFeed } from './change-feed.ts'

export type Fact<V> = { version: number; loadedAt: number; value: V }

export type KeptFacts<V> = {
  /** The fact if it is in memory, a promise of it otherwise. The feed has to be live: `ChangeFeed.caughtUp`. */
  get(id: string): Fact<V> | Promise<Fact<V>>
  peek(id: string): Fact<V> | undefined
  /** Whether `fact` is still what is known of `id`. */
  isCurrent(id: string, fact: Fact<V>): boolean
  forget(id: string): void
}

/** Facts that one query loads. */
const loadedTogetherMax = 500

/**
 * For facts of which many may be missed at once: when an instance dies, its devices come to the others by the thousand. What is
 * asked for within a turn of the event loop is loaded by one query.
 *
 * @param load the facts of these ids, in any order, by id; none of those that there are not
 * @returns `load` for `keepFacts`
 */
export function loadedTogether<V>(
  load: (ids: string[]) => Promise<Map<string, V>>,
): (id: string) => Promise<V | undefined> {
  const loader = new DataLoader<string, V | undefined>(
    async ids => {
      const found = await load([...new Set(ids)])
      return ids.map(id => found.get(id))
    },
    // What is kept is for `keepFacts` to say.
    { cache: false, maxBatchSize: loadedTogetherMax, batchScheduleFn: setImmediate },
  )
  return id => loader.load(id)
}

let versions = 0

export function keepFacts<V>(options: {
  feed: Pick<ChangeFeed, 'onChange' | 'onReset'>
  /** The part of the feed's keys before the colon, such as `device`. */
  kind: string
  /** Facts kept at most; the least recently used go first. */
  max: number
  load: (id: string) => Promise<V>
  /** For facts that are kept under other names than the feed's: whether a change of `changed` concerns them. */
  concerns?: (changed: string, value: V) => boolean
  clock?: Clock
}): KeptFacts<V> {
  const { feed, kind, max, load, concerns, clock = systemClock } = options
  const kept = new LRUCache<string, Fact<V>>({ max })
  const loading = new Map<string, Promise<Fact<V>>>()
  /** What was asked for last, if it is kept: the questions of one message mostly ask for the same again. */
  let lastId: string | undefined
  let last: Fact<V> | undefined

  function forget(id: string): void {
    lastId = undefined
    kept.delete(id)
    // Who asked before the change gets what there was; nobody after it does.
    loading.delete(id)
  }

  feed.onReset(() => {
    lastId = undefined
    kept.clear()
    loading.clear()
  })
  feed.onChange(keys => {
    for (const key of keys) {
      if (!key.startsWith(kind) || key[kind.length] !== ':') continue
      const changed = key.slice(kind.length + 1)
      forget(changed)
      if (!concerns) continue
      lastId = undefined
      loading.clear()
      for (const [id, fact] of kept.entries()) if (concerns(changed, fact.value)) kept.delete(id)
    }
  })

  function start(id: string): Promise<Fact<V>> {
    const started: Promise<Fact<V>> = load(id).then(
      value => {
        const fact = { version: ++versions, loadedAt: clock(), value }
        if (loading.get(id) === started) {
          loading.delete(id)
          lastId = undefined
          kept.set(id, fact)
        }
        return fact
      },
      error => {
        if (loading.get(id) === started) loading.delete(id)
        throw error
      },
    )
    loading.set(id, started)
    return started
  }

  function get(id: string): Fact<V> | Promise<Fact<V>> {
    if (id === lastId && last !== undefined) return last
    const fact = kept.get(id)
    if (fact === undefined) return loading.get(id) ?? start(id)
    lastId = id
    last = fact
    return fact
  }

  return {
    get,
    peek: id => kept.peek(id),
    isCurrent: (id, fact) => kept.peek(id) === fact,
    forget,
  }
}
