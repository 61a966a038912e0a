import { setImmediate } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import test from 'ava'
import type { Journal, JournalEntry } from '../../src/audit/journal.ts'
import { countRefusals } from '../../src/audit/refusals.ts'
import type { Call } from '../../src/caller.ts'

setFlagsFromString('--expose-gc')
const collectGarbage: () => void = runInNewContext('gc')

const limited = { code: 'RESOURCE_EXHAUSTED', reason: 'RATE_LIMITED' }

/** As dispatch makes them: whoever holds the call holds all that the caller has sent. */
class HeldCall implements Call {
  readonly caller = { kind: 'anonymous' } as const
  readonly address = '192.0.2.1'
  readonly method = '/test'
  readonly startedAt = 0
  readonly instanceId = 'instance'
  readonly signal = new AbortController().signal
  readonly audit = { target: '', detail: {}, written: false }
  readonly #request = Buffer.alloc(256 * 1_024)

  bytes(): number {
    return this.#request.length
  }
}

test('refusals that are counted are on record as a number, and keep nothing of what the callers have sent', async t => {
  const entries: JournalEntry[] = []
  const journal = {
    append: async (given: JournalEntry[]) => void entries.push(...given),
    appendLater: (given: JournalEntry[]) => void entries.push(...given),
  } as unknown as Journal
  const refusals = countRefusals({ journal, clock: Date.now })
  const calls = await (async () => {
    const made = Array.from({ length: 3 }, () => new HeldCall())
    for (const call of made) await refusals.record(call, limited)
    return made.map(call => new WeakRef(call))
  })()
  await setImmediate()
  collectGarbage()
  t.deepEqual(
    calls.map(call => call.deref()?.bytes()),
    [undefined, undefined, undefined],
  )
  refusals.stop()
  t.deepEqual(
    entries.map(({ row }) => [row[5], row[8]]),
    [
      ['192.0.2.1', '{}'],
      ['192.0.2.1', '{"refused":2,"withinMs":60000}'],
    ],
  )
})
