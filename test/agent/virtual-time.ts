/** Time that passes as soon as somebody waits for it, and no sooner. */
import { setImmediate as nextTurn } from 'node:timers/promises'
import type { Timer } from '../../src/client/waiting.ts'
import type { Clock } from '../../src/clock.ts'

export type VirtualTime = {
  timer: Timer
  /** Goes with the timer, from now. */
  clock: Clock
}

export function virtualTime(): VirtualTime {
  const startMs = Date.now()
  let passedMs = 0
  return {
    clock: () => startMs + passedMs,
    timer: {
      uptime: () => passedMs,
      async sleep(ms, signal) {
        await nextTurn()
        if (!signal.aborted) passedMs += ms
      },
    },
  }
}
