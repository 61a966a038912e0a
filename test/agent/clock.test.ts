import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { saveCredentials } from '../../src/cli/operator-credentials.ts'
import { describeCallError } from '../../src/client/channel.ts'
import { fetchTrustBundle } from '../../src/client/enroll.ts'
import { comparingClocks, sentenceOf } from '../../src/client/server-clock.ts'
import { loadState } from '../../src/client/state.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { fleetServer } from './fleet-server.ts'
import { startAgent } from './running-agent.ts'
import { deviceCredentials, issue, rootsOf, serveAs, serverCertificate, smallAuthority } from './small-server.ts'

const yearMs = 31_557_600_000
const hourMs = 3_600_000

// For a server of that time, this host's clock has stopped in 1970, or nearly.
const in56Years = () => Date.now() + 56 * yearMs
const ahead = await smallAuthority(new Date(in56Years()))
const today = await smallAuthority()

test('a device that enrolls on a host of 1970 is told that its clock is wrong, and enrolls when it is set', async t => {
  const server = await fleetServer(t, ahead, { clock: in56Years })
  const token = mintToken({ rootKeySha256: ahead.rootKeySha256 }).text
  const agent = await startAgent(t, { server: server.address, token }, undefined, ({ event }, { stop }) => {
    if (event === 'disconnected') stop()
  })
  await agent.done
  const failed = agent.events.find(event => event.event === 'disconnected')
  t.is(failed?.error.reason, 'CLOCK_WRONG')
  t.regex(failed?.error.message ?? '', /clock of this host.*your clock is 56 years behind.*not be verified/)
  t.true(Math.abs((failed?.error.clockOffsetMs ?? 0) + 56 * yearMs) < 60_000)
  t.deepEqual(server.enrollments, [])
})

test('so is a device that has an identity, which does not go by a time that could not be verified', async t => {
  const server = await fleetServer(t, ahead, { clock: in56Years })
  const kept = { ...alpha, rootsPem: rootsOf(ahead).join('') }
  const agent = await startAgent(t, { server: server.address }, kept, ({ event }, { stop }) => {
    if (event === 'disconnected') stop()
  })
  await agent.done
  const failed = agent.events.find(event => event.event === 'disconnected')
  t.is(failed?.error.reason, 'CLOCK_WRONG')
  t.false(agent.told().includes('clock-wrong'))
  t.deepEqual(await loadState(agent.stateDirectory), kept)
})

test('a command on such a host says clock', async t => {
  const server = await fleetServer(t, ahead, { clock: in56Years })
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-clock-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const spiffeId = 'spiffe://edgemesh.test/operator/ada'
  const { keyPem, certificateChainPem } = issue(today, { purpose: 'client', spiffeId })
  await saveCredentials(folder, { keyPem, certificatePem: certificateChainPem, rootsPem: rootsOf(ahead).join('') })
  const bin = join(import.meta.dirname, '../../src/main.ts')
  for (const command of [
    ['token', 'list'],
    ['operator', 'renew'],
    ['check', '--user', 'a', '--service', 'b', '--device', 'c'],
  ]) {
    const args = [bin, ...command, '--credentials', folder, '--server', server.address]
    const stderr = await new Promise<string>(resolve => {
      execFile(process.execPath, args, { env: { PATH: process.env.PATH } }, (_error, _stdout, stderr) =>
        resolve(stderr),
      )
    })
    t.regex(stderr, /^error: .*your clock is 56 years behind/m)
    t.regex(stderr, /^hint: set the clock of this host/m)
  }
})

const expired = () => serverCertificate(today, new Date(Date.now() - 1.5 * hourMs))
const alpha = { ...deviceCredentials(today, 'alpha'), renewAfter: new Date('2100-01-01') }

test("where the clocks agree, it is the server's certificate that has expired", async t => {
  const { address } = await fleetServer(t, today, { shown: expired() })
  const failure = await t.throwsAsync(comparingClocks(address, fetchTrustBundle(address, alpha)))
  t.is(describeCallError(failure).reason, 'SERVER_CERTIFICATE_EXPIRED')
})

test('where the server does not say what time it is, the failure stays as it is', async t => {
  const { address } = await serveAs(t, expired(), [])
  const failure = await t.throwsAsync(comparingClocks(address, fetchTrustBundle(address, alpha)))
  t.is(describeCallError(failure).reason, 'SERVER_CERTIFICATE_EXPIRED')
})

test('a clock that is wrong is told once, and once when it is right again', async t => {
  let wrongMs = 3 * hourMs
  const server = await fleetServer(t, today, {
    answer: ({ report }) => {
      if (report === 2) wrongMs = 0
      return { directives: [] }
    },
  })
  let reports = 0
  const clock = () => Date.now() + wrongMs
  const agent = await startAgent(t, { server: server.address, clock }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && ++reports === 4) stop()
  })
  await agent.done
  t.deepEqual(
    agent.told().filter(event => event.startsWith('clock')),
    ['clock-wrong', 'clock-right'],
  )
  const wrong = agent.events.find(event => event.event === 'clock-wrong')
  t.true(Math.abs((wrong?.offsetMs ?? 0) - 3 * hourMs) < 60_000)
})

test('a sentence names the clock when it is over a minute out, and only then', t => {
  const error = { code: 'UNAUTHENTICATED', reason: 'X', message: 'no', violations: [], metadata: {} }
  t.is(sentenceOf({ ...error, clockOffsetMs: 61_000 }), 'no; your clock is 61 s ahead')
  t.is(sentenceOf({ ...error, clockOffsetMs: -60_000 }), 'no')
  t.is(sentenceOf(error), 'no')
})
