import { execFile } from 'node:child_process'
import type { Profiler } from 'node:inspector'
import { join } from 'node:path'
import test from 'ava'
import { profileRows } from './profile.ts'
import { medianRate, rate } from './rates.ts'

test('a group that is not there is told with those that are, and exit code 2', async t => {
  const { code, said } = await new Promise<{ code: unknown; said: string }>(resolve => {
    execFile(process.execPath, [join(import.meta.dirname, 'run.ts'), 'enrol'], (error, _, stderr) =>
      resolve({ code: error?.code, said: stderr }),
    )
  })
  t.is(code, 2)
  t.regex(said, /there is no group enrol\n/)
  t.regex(said, /groups: .*enroll/)
})

test('a rate is counted by processor time, and the middle one of several stands for them', t => {
  const slow = rate(100, { user: 900_000, system: 100_000 }, 5_000)
  t.deepEqual(slow, { perCpuSecond: 100, perWallSecond: 20 })
  const fast = rate(100, { user: 100_000, system: 0 }, 100)
  const odd = rate(100, { user: 200_000, system: 0 }, 400)
  t.deepEqual(medianRate([fast, slow, odd]), { ...odd, perCpuSecondMin: 100, perCpuSecondMax: 1_000 })
})

test('a profile is told by what its samples are for, and adds up to the time that was spent', t => {
  const frame = (functionName: string, url = ''): Profiler.Profile['nodes'][number]['callFrame'] => {
    return { functionName, url, scriptId: '0', lineNumber: 0, columnNumber: 0 }
  }
  const modules = 'file:///somewhere/node_modules'
  const profile: Profiler.Profile = {
    startTime: 0,
    endTime: 0,
    nodes: [
      { id: 1, callFrame: frame('(root)'), children: [2, 3, 4, 5, 9] },
      { id: 2, callFrame: frame('(idle)') },
      { id: 3, callFrame: frame('(garbage collector)') },
      { id: 4, callFrame: frame('(program)') },
      { id: 5, callFrame: frame('redeem', 'file:///somewhere/src/identity/enroll.ts'), children: [6, 7] },
      { id: 6, callFrame: frame('find', `${modules}/@mikro-orm/core/EntityManager.js`), children: [8, 10] },
      { id: 7, callFrame: frame('verify', 'node:internal/crypto/sig'), children: [11] },
      { id: 8, callFrame: frame('emit', 'node:events') },
      { id: 9, callFrame: frame('send', `${modules}/pg/lib/client.js`), children: [12] },
      { id: 10, callFrame: frame('JSON.stringify') },
      { id: 11, callFrame: frame('verify') },
      { id: 12, callFrame: frame('writeGeneric', 'node:internal/stream_base_commons'), children: [13] },
      { id: 13, callFrame: frame('writeBuffer') },
    ],
    samples: [2, 2, 2, 2, 3, 4, 5, 6, 8, 10, 7, 11, 9, 13],
    timeDeltas: [],
  }
  const rows = profileRows('calls', profile, 10, 1_000)
  t.deepEqual(Object.fromEntries(rows.map(({ name, value }) => [name, value])), {
    'calls.orm': 30,
    'calls.cryptography': 20,
    'calls.garbage-collection': 10,
    'calls.event-loop': 10,
    'calls.own': 10,
    'calls.database-driver': 10,
    'calls.sockets': 10,
  })
  t.is(rows[0]?.name, 'calls.orm', 'the largest comes first')
})
