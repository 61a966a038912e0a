/**
 * Refusals of those who show no certificate and call too often: counted, so that a flood does not fill the audit log.
 *
 * Of a source network and a method the first is on record before it is answered, as every refusal is; those that follow
 * within the minute are one event at its end, which says how many they were. A process that is killed takes that number
 * with it, and nothing else.
 */
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { networkOf } from '../network.ts'
import { type CallOutcome, callEntry, type Journal } from './journal.ts'

export type Refusals = {
  /** Whether such a refusal is counted. All others are on record each for itself. */
  areCounted(call: Call, outcome: CallOutcome): boolean
  /** Resolves when it is on record, or counted. @throws as `Journal.append` */
  record(call: Call, outcome: CallOutcome): Promise<void>
  /** Puts on record what was counted. */
  stop(): void
}

const windowMs = 60_000
/** Networks and methods, at about 1 kB each. The refusals of those beyond are on record each for itself. */
const countedMax = 10_000

type Counted = { last: Recorded; outcome: CallOutcome; refused: number }

/** What goes on record of a call. The call itself holds its request and its stream, of a size that the caller chooses. */
type Recorded = Omit<Call, 'signal'>

function recordedOf({ caller, address, method, startedAt, instanceId, audit }: Call): Recorded {
  return { caller, address, method, startedAt, instanceId, audit }
}

export function countRefusals(options: { journal: Journal; clock: Clock }): Refusals {
  const { journal, clock } = options
  const counted = new Map<string, Counted>()

  function writeAll(): void {
    for (const { last, outcome, refused } of counted.values()) {
      if (refused === 0) continue
      const audit = { ...last.audit, target: '', detail: { refused, withinMs: windowMs } }
      journal.appendLater([callEntry({ ...last, audit, startedAt: clock() }, outcome)])
    }
    counted.clear()
  }

  const writing = setInterval(writeAll, windowMs)
  writing.unref()
  return {
    areCounted: ({ caller }, { reason }) => caller.kind === 'anonymous' && reason === 'RATE_LIMITED',
    async record(call, outcome) {
      const key = `${networkOf(call.address)} ${call.method}`
      const before = counted.get(key)
      if (before) {
        before.refused++
        before.last = recordedOf(call)
        return
      }
      const first = { last: recordedOf(call), outcome, refused: 0 }
      if (counted.size < countedMax) counted.set(key, first)
      try {
        await journal.append([callEntry(call, outcome)])
      } catch (error) {
        first.refused++
        throw error
      }
    },
    stop() {
      clearInterval(writing)
      writeAll()
    },
  }
}
