/** What must hold whatever the bytes: a few of the runs that `npm run fuzz` makes by the thousand. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
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

function fuzz(...args: string[]): Promise<{ code: unknown; said: string }> {
  return new Promise(resolve => {
    execFile(process.execPath, [join(import.meta.dirname, 'fuzz/run.ts'), ...args], (error, stdout, stderr) =>
      resolve({ code: error ? error.code : 0, said: stdout + stderr }),
    )
  })
}

test('npm run fuzz tells what it did, looks at given bytes alone, and does not guess at what it is not told', async t => {
  const run = await fuzz('token', '--seconds', '0.1', '--seed', '7')
  t.is(run.code, 0, run.said)
  t.regex(run.said, /seed 7, 0\.1 s for token/)
  t.regex(run.said, /token: [1-9]\d* runs in .* s, [1-9]\d*\/s\n +\d+ {2}TOKEN_MALFORMED/)
  t.regex(run.said, /nothing found/)

  const replayed = await fuzz('csr', '--replay', Buffer.from('no request').toString('base64'))
  t.deepEqual([replayed.code, replayed.said], [0, 'csr: CSR_MALFORMED\nnothing found\n'])

  const unknown = await fuzz('tokens')
  t.is(unknown.code, 2)
  t.regex(unknown.said, /there is no target tokens\nusage: .*\ntargets: csr, /)
})
