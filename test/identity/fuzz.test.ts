/** What must hold whatever the bytes: a few of the runs that `npm run fuzz` makes by the thousand. */
import test from 'ava'
import fc from 'fast-check'
import { targets } from './fuzz/targets.ts'

const runs = 400
/** Each takes a process of its own. */
const judgedMax = 40

for (const { name, inputs, examine, judge } of targets) {
  test(`whatever is to be read as ${name} is read, or refused in order`, async t => {
    const outcomes = new Map<string, number>()
    const accepted: Buffer[] = []
    fc.assert(
      fc.property(inputs({ slow: false }), bytes => {
        const outcome = examine(bytes)
        outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
        if (outcome.startsWith('accepted')) accepted.push(bytes)
      }),
      { numRuns: runs },
    )
    t.true(outcomes.size > 1, `more than one thing came of it: ${[...outcomes].join(' ')}`)
    t.deepEqual((await judge?.(accepted.slice(0, judgedMax))) ?? [], [])
  })
}
