import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import test, { type ExecutionContext } from 'ava'
import type { Progress, Summary } from '../../src/simulate/simulate.ts'
import { sharedEdgeMesh, unary } from '../support/edgemesh.ts'

const mesh = sharedEdgeMesh(test, { HEARTBEAT_INTERVAL_SECONDS: '1' })
const main = join(import.meta.dirname, '../../src/main.ts')

type Line = ({ type: 'progress' } & Progress) | ({ type: 'summary' } & Summary)

/** Runs `edgemesh simulate --json`. @param onLine may stop it */
async function simulate(
  t: ExecutionContext,
  {
    token,
    args,
    onLine = () => {},
  }: { token: string; args: string[]; onLine?: (line: Line, stop: () => void) => void },
) {
  const server = `127.0.0.1:${mesh().server.apiPort}`
  const child = spawn(process.execPath, [main, 'simulate', '--server', server, '--json', ...args], {
    env: { PATH: process.env.PATH, EDGEMESH_TOKEN: token },
  })
  t.teardown(() => child.kill('SIGKILL'))
  const exited = once(child, 'exit')
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', text => {
    stderr += text
  })
  const lines: Line[] = []
  for await (const text of createInterface({ input: child.stdout })) {
    const line = JSON.parse(text) as Line
    lines.push(line)
    onLine(line, () => child.kill('SIGINT'))
  }
  const [exitCode] = await exited
  const summary = lines.at(-1)
  if (summary?.type !== 'summary') throw new Error(`there is no summary: ${stderr}`)
  return { exitCode, summary, stderr }
}

async function fleet(prefix: string) {
  const { devices } = await unary(mesh().admin, 'listDevices', { pageSize: 100, pageToken: '', status: 0, labels: {} })
  return devices.filter(({ id }) => id.startsWith(prefix))
}

test('fifty devices enroll, report and end in order, and the server sees the mix of postures', async t => {
  const { exitCode, summary, stderr } = await simulate(t, {
    token: await mesh().token({ usesMax: 50 }),
    args: [
      '--devices',
      '50',
      '--id-prefix',
      'mix',
      '--posture-mix',
      'healthy=80,stale=10,failing=10',
      '--duration',
      '3s',
    ],
  })
  t.is(exitCode, 0, stderr)
  t.is(summary.enrolled, 50)
  t.is(summary.statesAtEnd.reporting, 50)
  t.is(summary.states.stopped, 50)
  t.true(summary.heartbeats >= 50)
  t.deepEqual(summary.errors, {})
  const devices = await fleet('mix-')
  t.is(devices.length, 50)
  t.is(devices.filter(({ failingPosture }) => failingPosture.length > 0).length, 5)
  const dayAgo = Date.now() - 86_400_000
  t.is(devices.filter(({ posture }) => Number(posture?.measuredAt) < dayAgo).length, 5)
})

test('what the script does to devices is in the summary, and is no failure', async t => {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-simulate-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const script = join(folder, 'script.json')
  const steps = [
    { at: '1s', action: 'stop-heartbeats', share: 0.3 },
    { at: '2s', action: 'posture', share: 1, posture: 'failing' },
    { at: '3s', action: 'disconnect', share: 0.5 },
  ]
  await writeFile(script, JSON.stringify(steps))
  const { exitCode, summary, stderr } = await simulate(t, {
    token: await mesh().token({ usesMax: 10 }),
    args: ['--devices', '10', '--id-prefix', 'script', '--script', script, '--duration', '6s'],
  })
  t.is(exitCode, 0, stderr)
  t.deepEqual(summary.scripted, { 'stop-heartbeats': 3, posture: 10, disconnect: 5 })
  t.true(summary.reconnects >= 1)
  t.is(summary.failedDevices, 0)
  const failing = (await fleet('script-')).filter(({ failingPosture }) => failingPosture.length > 0)
  t.is(failing.length, 7)
})

test('devices that a token does not let in make exit code 1 and are told by their reason', async t => {
  const { exitCode, summary, stderr } = await simulate(t, {
    token: await mesh().token({ usesMax: 3 }),
    args: ['--devices', '5', '--duration', '1s'],
  })
  t.is(exitCode, 1)
  t.deepEqual([summary.enrolled, summary.failedDevices, summary.errors.TOKEN_USED_UP], [3, 2, 2])
  t.regex(stderr, /^error: 2 of 5 devices failed: 2 TOKEN_USED_UP$/m)
})

test('it ends when its time is over, even where a process has no device left', async t => {
  const { exitCode, summary } = await simulate(t, {
    token: await mesh().token({ usesMax: 1 }),
    args: ['--devices', '4', '--processes', '2', '--duration', '1s'],
  })
  t.is(exitCode, 1)
  t.deepEqual([summary.enrolled, summary.failedDevices], [1, 3])
})

test('Ctrl-C ends the streams in order, with a summary', async t => {
  let stopped = false
  const { exitCode, summary, stderr } = await simulate(t, {
    token: await mesh().token({ usesMax: 5 }),
    args: ['--devices', '5', '--user', 'nobody', '--service', 'nothing'],
    onLine(line, stop) {
      if (stopped || line.states.reporting < 5 || line.denied < 5) return
      stopped = true
      stop()
    },
  })
  t.is(exitCode, 0, stderr)
  t.is(summary.states.stopped, 5)
  t.deepEqual(summary.errors, {})
})

test('more devices than a process may have files open are refused with what would help, and nobody is enrolled', async t => {
  const args = ['simulate', '--server', 'localhost:1', '--devices', '1000000', '--processes', '1', '--duration', '1s']
  const shell = `ulimit -n 1000 && exec "$0" "$@"`
  const child = spawn('sh', ['-c', shell, process.execPath, main, ...args], {
    env: { PATH: process.env.PATH, EDGEMESH_TOKEN: 'token' },
  })
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', text => {
    stderr += text
  })
  const [exitCode] = await once(child, 'close')
  t.is(exitCode, 1)
  t.regex(stderr, /1000000 devices in each of 1 processes need 1000200 open files, and a process may have 1000$/m)
  t.regex(stderr, /^hint: give more --processes, or raise ulimit -n$/m)
})
