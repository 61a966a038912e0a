/**
 * How long revocations take: from the moment at which a lease's ground went to the push, and to the acknowledgement of who
 * held it.
 */
import type { Clock } from '../clock.ts'

export type RevocationWatch = {
  ofStream(): PushedRevocations
  /** Pushed on streams that are open, and not acknowledged. */
  unacknowledged(): number
}

/** What was pushed on one stream. */
export type PushedRevocations = {
  /** @param sinceMs when the ground went; absent where that is not known: then it is not measured */
  add(connectionId: string, sinceMs: number | undefined): void
  /** Ids that were not pushed on the stream, or were acknowledged before, are ignored. */
  acknowledge(connectionIds: readonly string[]): void
  /** The stream is over: nobody will acknowledge what is left. */
  end(): void
}

/** Kept for one stream, about 100 bytes each; clients may be of before there were acknowledgements. The oldest go first. */
const unacknowledgedMax = 1_024

export function watchRevocations(options: {
  clock: Clock
  onPush: (seconds: number) => void
  onAcknowledge: (seconds: number) => void
}): RevocationWatch {
  const { clock, onPush, onAcknowledge } = options
  let unacknowledged = 0

  return {
    unacknowledged: () => unacknowledged,
    ofStream() {
      const pushed = new Map<string, number | undefined>()
      let ended = false
      function forget(connectionId: string): void {
        if (pushed.delete(connectionId)) unacknowledged--
      }
      return {
        add(connectionId, sinceMs) {
          if (ended) return
          // Clocks are estimates: what seems to have happened later is of this moment.
          if (sinceMs !== undefined) onPush(Math.max(0, clock() - sinceMs) / 1_000)
          forget(connectionId)
          const [oldest] = pushed.keys()
          if (pushed.size >= unacknowledgedMax && oldest !== undefined) forget(oldest)
          pushed.set(connectionId, sinceMs)
          unacknowledged++
        },
        acknowledge(connectionIds) {
          for (const id of connectionIds) {
            const sinceMs = pushed.get(id)
            if (sinceMs !== undefined) onAcknowledge(Math.max(0, clock() - sinceMs) / 1_000)
            forget(id)
          }
        },
        end() {
          ended = true
          for (const id of [...pushed.keys()]) forget(id)
        },
      }
    },
  }
}
