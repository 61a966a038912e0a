import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import test from 'ava'

const steps = [
  'database',
  'authority',
  'listen',
  'token',
  'enroll',
  'heartbeat',
  'allow',
  'posture',
  'revoked',
  'deny',
  'metrics',
  'done',
]

type Line = { step: string; ok: boolean; ms: number; detail: Record<string, unknown> }

const main = join(import.meta.dirname, '../../src/main.ts')
/** Ports of its own, so that tests run side by side; the embedded database, whatever the tests use otherwise. */
const env = { PATH: process.env.PATH, API_PORT: '0', METRICS_PORT: '0' }

function dev(folder: string, ...options: string[]) {
  return spawn(process.execPath, [main, 'dev', '--data', folder, ...options], {
    env,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
}

async function outcome(child: ReturnType<typeof dev>) {
  const [stdout, stderr, [exitCode]] = await Promise.all([text(child.stdout), text(child.stderr), once(child, 'close')])
  return { exitCode: exitCode as number | null, stdout, stderr }
}

/** Resolves when the step has been told of, or when there will be no more. */
function stepOf(child: ReturnType<typeof dev>, step: string): Promise<void> {
  return new Promise(resolve => {
    child.stdout.on('data', chunk => {
      if (String(chunk).includes(`"step":"${step}"`)) resolve()
    })
    child.once('close', () => resolve())
  })
}

function linesOf(stdout: string): Line[] {
  return stdout
    .trimEnd()
    .split('\n')
    .map(line => JSON.parse(line))
}

async function newFolder(t: { teardown(fn: () => Promise<void>): void }): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-'))
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

test('dev proves itself in twelve steps, and again in the same folder', async t => {
  const folder = await newFolder(t)
  const devices: unknown[] = []
  for (const start of ['first', 'second']) {
    const { exitCode, stdout, stderr } = await outcome(dev(folder, '--once', '--json'))
    const lines = linesOf(stdout)
    t.is(exitCode, 0, `${start}: ${stdout}${stderr}`)
    t.deepEqual(
      lines.map(line => line.step),
      steps,
    )
    for (const line of lines) {
      t.deepEqual(Object.keys(line), ['step', 'ok', 'ms', 'detail'])
      t.true(line.ok)
      t.true(line.ms >= 0)
    }
    devices.push(lines.find(line => line.step === 'enroll')?.detail.spiffeId)
  }
  t.is(devices[0], devices[1])

  for (const secret of ['secrets.json', 'operator/operator.key', 'demo-device/device.key']) {
    t.is((await stat(join(folder, secret))).mode & 0o777, 0o600, secret)
  }
})

test('dev serves until it is told to stop, and can be killed at any moment', async t => {
  const folder = await newFolder(t)

  // While the database is being made, and later right behind one step or another.
  for (const moment of [300, 900, 'database', 'authority', 'enroll', 'posture']) {
    const killed = dev(folder, '--json')
    const ended = outcome(killed)
    if (typeof moment === 'number') await new Promise(resolve => setTimeout(resolve, moment))
    else await stepOf(killed, moment)
    killed.kill('SIGKILL')
    t.is((await ended).exitCode, null, `killed at ${moment}`)
  }

  const child = dev(folder, '--json')
  const ended = outcome(child)
  await stepOf(child, 'done')
  // As npm does it: the signal comes from the terminal and from npm.
  child.kill('SIGINT')
  child.kill('SIGINT')
  const { exitCode, stdout, stderr } = await ended
  t.is(exitCode, 0, stdout + stderr)
  t.deepEqual(
    linesOf(stdout).map(line => line.step),
    steps,
  )
})

test('a start that fails tells which step, and ends in exit code 1', async t => {
  const folder = await newFolder(t)
  const child = spawn(process.execPath, [main, 'dev', '--data', folder, '--once', '--json'], {
    env: { ...env, DATABASE_URL: 'postgresql://nobody:nothing@127.0.0.1:1/nowhere' },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const { exitCode, stdout, stderr } = await outcome(child)
  t.is(exitCode, 1)
  const [line, ...more] = linesOf(stdout)
  t.deepEqual(more, [])
  t.is(line?.step, 'database')
  t.false(line?.ok)
  t.is(typeof line?.detail.error, 'string')
  t.regex(stderr, /^error: /m)
  t.notRegex(stderr, /^ {4}at /m)
})
