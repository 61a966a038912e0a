import { execFile } from 'node:child_process'
import { join } from 'node:path'
import test from 'ava'
import { soak } from './soak.ts'

test('half a minute of everything at once breaks nothing that must hold', async t => {
  t.timeout(240_000)
  const summary = await soak({
    durationMs: 20_000,
    seed: 20_260_000,
    devices: 10,
    // How fast a withdrawal is says nothing while other tests share the machine.
    reachMs: 15_000,
    quietMs: { least: 500, most: 1_500 },
    awayMs: { least: 500, most: 1_500 },
    onProgress: () => {},
    signal: new AbortController().signal,
  })
  t.deepEqual(summary.broken, [])
  t.true(summary.answers.allowed > 0 && summary.answers.denied > 0, 'something was asked')
  t.true(summary.reach.connections > 0, 'something was taken back')
  t.true(Object.keys(summary.faults).length >= 3, 'something went wrong')
  t.true(summary.acknowledged.allows > 0 && summary.acknowledged.reports > 0)
  t.true(summary.audit.ok && summary.audit.rows > 0)
})

test('a command that is not understood is told with what is right, and exit code 2', async t => {
  for (const [args, says] of [
    [['--minutes', 'many'], /--minutes has to be 0\.1 to/],
    [['--hours', '1'], /--hours/],
  ] as const) {
    const { code, said } = await new Promise<{ code: unknown; said: string }>(resolve => {
      execFile(process.execPath, [join(import.meta.dirname, 'run.ts'), ...args], (error, _, stderr) =>
        resolve({ code: error?.code, said: stderr }),
      )
    })
    t.is(code, 2)
    t.regex(said, says)
    t.regex(said, /usage: npm run soak/)
  }
})
