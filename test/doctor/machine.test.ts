import { execFile } from 'node:child_process'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { goodSettings, look, told } from '../support/doctor.ts'

test('the Node that runs this is new enough, and one of before is not', async t => {
  t.deepEqual(await told({}, 'node'), [`ok: Node ${process.versions.node}`])
  t.deepEqual(await told({}, 'node', { nodeVersion: '22.20.0' }), ['failed: Node is 22.20.0, and EdgeMesh needs >=26'])
})

test('more workers than there are cores, or memory, are told', async t => {
  t.regex((await told({}, 'memory', { workers: 'auto' })).join(), /^ok: \d+ MiB, \d+ cores: room for \d+ connections/)
  const cores = availableParallelism()
  t.true(
    (await told({}, 'memory', { workers: cores + 1 })).includes(
      `warning: ${cores + 1} workers are more than ${cores} cores`,
    ),
  )
  // Of what Node is given, each of them needs a share.
  const [first] = await told({ NODE_OPTIONS: '--max-old-space-size=150' }, 'memory', { workers: 2 })
  t.regex(first ?? '', /^failed: .* are too little for 2 workers$/)
})

/** The command under another limit. */
function underLimit(files: number): Promise<string> {
  const main = join(import.meta.dirname, '../../src/main.ts')
  const command = 'ulimit -n "$0" && exec "$@"'
  const args = ['-c', command, String(files), process.execPath, main, 'doctor', '--only', 'open-files', '--json']
  return new Promise(resolve => {
    execFile('sh', args, { env: { PATH: process.env.PATH, ...goodSettings } }, (_, stdout) => resolve(stdout))
  })
}

test('a limit of open files below the first thousand devices fails, one below all places is a warning', async t => {
  const finding = (said: string) => JSON.parse(said).findings[0]
  const few = finding(await underLimit(512))
  t.is(few.severity, 'failed')
  t.regex(few.what, /^a process may have 512 files open, and has places for \d+ connections$/)
  t.regex(few.mend, /LimitNOFILE=\d+/)
  t.is(finding(await underLimit(2_000)).severity, 'warning')
})

/** A program of that name that says so: what keeps the clock of a machine is not for a test to change. */
async function pathWith(t: ExecutionContext, name: string, says: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-path-'))
  t.teardown(() => rm(folder, { recursive: true }))
  await writeFile(join(folder, name), `#!/bin/sh\necho '${says}'\n`)
  await chmod(join(folder, name), 0o755)
  return folder
}

test('what timedatectl and chronyc say of the clock is told; where there is neither, that', async t => {
  const synchronised = await pathWith(t, 'timedatectl', 'yes')
  t.deepEqual(await told({ PATH: synchronised }, 'clock'), ['ok: timedatectl keeps the clock right'])
  const notYet = await pathWith(t, 'timedatectl', 'no')
  const [finding] = await look({ PATH: notYet }, 'clock')
  t.like(finding, { severity: 'warning', what: 'timedatectl says that the clock of this host is not synchronised' })
  const lost = await pathWith(t, 'chronyc', '7F7F0101,,10,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,Not synchronised')
  t.deepEqual(await told({ PATH: lost }, 'clock'), [
    'warning: chronyc says that the clock of this host is not synchronised',
  ])
  const followed = await pathWith(t, 'chronyc', 'C0000201,192.0.2.1,2,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,Normal')
  t.deepEqual(await told({ PATH: followed }, 'clock'), ['ok: chronyc keeps the clock right'])
  t.deepEqual(await told({ PATH: '/nonexistent' }, 'clock'), [
    'skipped: neither timedatectl nor chronyc can tell whether the clock is kept right',
  ])
})
