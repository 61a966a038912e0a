import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import test, { type ExecutionContext } from 'ava'
import { saveState } from '../../src/client/state.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { bundleOf, fleetServer, unauthenticated } from '../agent/fleet-server.ts'
import { deviceCredentials, smallAuthority } from '../agent/small-server.ts'

const authority = await smallAuthority()
const token = mintToken({ rootKeySha256: authority.rootKeySha256 }).text
const alpha = deviceCredentials(authority, 'alpha')
const bin = join(import.meta.dirname, '../../src/main.ts')

async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'edgemesh-cli-agent-'))
  t.teardown(() => rm(path, { recursive: true }))
  return join(path, 'state')
}

/** Runs the agent, which is expected to give up. */
function giveUp(server: string, state: string, env: Record<string, string> = {}) {
  const args = [bin, 'agent', '--server', server, '--state', state]
  return new Promise<{ exitCode: number; stderr: string }>(resolve => {
    execFile(process.execPath, args, { env: { PATH: process.env.PATH, ...env } }, (error, _stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stderr })
    })
  })
}

test('a server that the token is not for is refused, and never sees the token', async t => {
  const middle = await fleetServer(t, await smallAuthority())
  const { exitCode, stderr } = await giveUp(middle.address, await folder(t), { EDGEMESH_TOKEN: token })
  t.is(exitCode, 1)
  t.regex(stderr, /^error: .* is not the server that the enrollment token is for/m)
  t.regex(stderr, /^hint: check the address/m)
  t.deepEqual(middle.enrollments, [])
})

test('a server that shows the right root, but has no certificate from it, never sees the token either', async t => {
  const middle = await fleetServer(t, await smallAuthority(), { bundle: () => bundleOf(authority) })
  const args = [bin, 'agent', '--server', middle.address, '--state', await folder(t), '--json']
  const agent = spawn(process.execPath, args, { env: { PATH: process.env.PATH, EDGEMESH_TOKEN: token } })
  t.teardown(() => agent.kill('SIGKILL'))
  for await (const line of createInterface({ input: agent.stdout })) {
    const { event, error } = JSON.parse(line)
    if (event !== 'disconnected') continue
    t.is(error.reason, 'SERVER_UNTRUSTED')
    break
  }
  agent.kill('SIGTERM')
  await once(agent, 'exit')
  t.deepEqual(middle.enrollments, [])
})

for (const [reason, hint] of [
  ['DEVICE_DELETED', /edgemesh token create.*EDGEMESH_TOKEN/],
  ['CERTIFICATE_RETIRED', /new token/],
  ['DEVICE_REVOKED', /another --state folder, another --id/],
] as const) {
  test(`an agent that is refused with ${reason} ends with exit code 1 and says what to do`, async t => {
    const server = await fleetServer(t, authority, { answer: () => ({ refuse: unauthenticated(reason) }) })
    const state = await folder(t)
    await saveState(state, alpha)
    const { exitCode, stderr } = await giveUp(server.address, state)
    t.is(exitCode, 1)
    t.regex(stderr, new RegExp(`^error: refused: ${reason}$`, 'm'))
    t.regex(stderr.split('\n').find(line => line.startsWith('hint: ')) ?? '', hint)
  })
}

test('what the program of --posture-command prints is reported; once it fails, its last words keep their time', async t => {
  const server = await fleetServer(t, authority)
  const state = await folder(t)
  await saveState(state, alpha)
  const program = `${state}-posture`
  await writeFile(program, '#!/bin/sh\necho \'{"diskEncrypted": true, "patchesCurrent": false}\'\n', { mode: 0o700 })
  const args = [bin, 'agent', '--server', server.address, '--state', state, '--posture-command', program, '--json']
  const agent = spawn(process.execPath, args, { env: { PATH: process.env.PATH } })
  t.teardown(() => agent.kill('SIGKILL'))
  const exited = once(agent, 'exit')
  const postures: { diskEncrypted: boolean; patchesCurrent: boolean; measuredAt: string }[] = []
  let brokenAt = Number.POSITIVE_INFINITY
  for await (const line of createInterface({ input: agent.stdout })) {
    const { event, posture } = JSON.parse(line)
    if (event !== 'reported') continue
    postures.push(posture)
    if (postures.length === 2) break
    await writeFile(program, '#!/bin/sh\nexit 3\n')
    brokenAt = Date.now()
    // Another session, and with it another report.
    server.open()[0]?.send({ $case: 'reconnect', value: { delay: undefined } })
  }
  agent.kill('SIGTERM')
  await exited
  t.is(postures.length, 2)
  for (const { diskEncrypted, patchesCurrent } of postures) t.deepEqual([diskEncrypted, patchesCurrent], [true, false])
  t.true(Date.parse(postures[1]?.measuredAt ?? '') <= brokenAt)
})

for (const [what, script, says] of [
  ['prints no posture', 'echo "{\\"disk\\": true}"', /Unrecognized key/],
  ['fails', 'exit 3', /it ended with exit code 3/],
  [
    'prints without end',
    'while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done',
    /more than 65536/,
  ],
] as const) {
  test(`a program of --posture-command that ${what} from the start ends the agent with a sentence`, async t => {
    const state = await folder(t)
    await writeFile(`${state}-posture`, `#!/bin/sh\n${script}\n`, { mode: 0o700 })
    const { exitCode, stderr } = await new Promise<{ exitCode: number; stderr: string }>(resolve => {
      const args = [bin, 'agent', '--state', state, '--posture-command', `${state}-posture`]
      execFile(process.execPath, args, { env: { PATH: process.env.PATH } }, (error, _stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, stderr })
      })
    })
    t.is(exitCode, 1)
    t.regex(stderr, says)
  })
}
