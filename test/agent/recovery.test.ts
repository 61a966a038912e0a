import test, { type ExecutionContext } from 'ava'
import { describeCallError } from '../../src/client/channel.ts'
import { loadState } from '../../src/client/state.ts'
import { Fault } from '../../src/fault.ts'
import { mintToken } from '../../src/identity/token-text.ts'
import { bundleOf, fleetServer, keySha256, unauthenticated, unavailable } from './fleet-server.ts'
import { type RunningAgent, startAgent } from './running-agent.ts'
import { deviceCredentials, serverCertificate, smallAuthority } from './small-server.ts'

const authority = await smallAuthority()
const alpha = { ...deviceCredentials(authority, 'alpha'), renewAfter: new Date('2100-01-01') }
const retryAfterMs = 60_000

const expired = { refuse: unauthenticated('CERTIFICATE_EXPIRED') }
const nothing = { directives: [] }
const refusal = (reason: string) =>
  new Fault('FAILED_PRECONDITION', reason, reason, reason === 'RECOVERY_NEEDS_APPROVAL' ? { retryAfterMs } : {})

/** A server on which the certificate that alpha has kept has expired; what `renewal` gives is good. */
function served(t: ExecutionContext, renewal: (attempt: number) => Fault | undefined) {
  return fleetServer(t, authority, { answer: ({ stream }) => (stream === 0 ? expired : nothing), renewal })
}

const stopOnceReported = ({ event }: { event: string }, { stop }: RunningAgent) => {
  if (event === 'reported') stop()
}

test('a device that was away until its certificate had expired shows it once more, and gets another', async t => {
  const server = await served(t, () => undefined)
  const agent = await startAgent(t, { server: server.address }, alpha, stopOnceReported)
  await agent.done
  t.deepEqual(agent.told(), [
    'resumed',
    'connecting',
    'certificate-expired',
    'recovered',
    'connecting',
    'reported',
    'stopped',
  ])
  const [asked] = server.renewals
  const [refused, taken] = server.streams
  t.is(asked?.shown.serialNumber, refused?.shown.serialNumber)
  const kept = await loadState(agent.stateDirectory)
  t.true(kept?.certificateChainPem.startsWith(taken?.shown.toString() ?? '?'))
  t.is(asked?.keySha256, keySha256(kept?.keyPem ?? ''))
})

test('a device that an operator has to let in again asks until one does, with one key, and says so once', async t => {
  const server = await served(t, attempt => (attempt < 5 ? refusal('RECOVERY_NEEDS_APPROVAL') : undefined))
  const agent = await startAgent(t, { server: server.address }, alpha, stopOnceReported)
  await agent.done
  t.deepEqual(
    agent.told().filter(event => event === 'recovery-pending' || event === 'disconnected'),
    ['recovery-pending'],
  )
  t.is(server.renewals.length, 6)
  t.is(new Set(server.renewals.map(({ keySha256 }) => keySha256)).size, 1)
  t.true(agent.timer.uptime() >= 5 * retryAfterMs, `${agent.timer.uptime()} ms`)
})

test('a device that waits to be let in again stops when it is told to', async t => {
  const server = await served(t, () => refusal('RECOVERY_NEEDS_APPROVAL'))
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'recovery-pending') stop()
  })
  await agent.done
  t.is(agent.told().at(-1), 'stopped')
})

test('a device that comes back to a server in trouble waits and asks again', async t => {
  const server = await served(t, attempt => (attempt < 2 ? unavailable() : undefined))
  const agent = await startAgent(t, { server: server.address }, alpha, stopOnceReported)
  await agent.done
  t.is(agent.told().filter(event => event === 'disconnected').length, 2)
  t.is(agent.told().filter(event => event === 'recovered').length, 1)
})

for (const reason of ['RECOVERY_WINDOW_OVER', 'RECOVERY_SUPERSEDED', 'SOMETHING_NEW']) {
  test(`a device that is refused with ${reason} gives up after the first time, and keeps what it has`, async t => {
    const server = await served(t, () => refusal(reason))
    const agent = await startAgent(t, { server: server.address }, alpha, stopOnceReported)
    t.is(describeCallError(await t.throwsAsync(agent.done)).reason, reason)
    t.is(server.renewals.length, 1)
    t.deepEqual(await loadState(agent.stateDirectory), alpha)
  })
}

test('a server that takes no expired certificate at all is not asked twice', async t => {
  const server = await served(t, () => unauthenticated('CERTIFICATE_EXPIRED'))
  const agent = await startAgent(t, { server: server.address }, alpha, stopOnceReported)
  t.is(describeCallError(await t.throwsAsync(agent.done)).reason, 'CERTIFICATE_EXPIRED')
  t.is(server.renewals.length, 1)
})

test('a stream that is cut when the certificate expires is the beginning of the same', async t => {
  const server = await fleetServer(t, authority, { answer: () => nothing })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event !== 'reported') return
    if (server.streams.length === 2) stop()
    else server.streams[0]?.cut(unauthenticated('CERTIFICATE_EXPIRED'))
  })
  await agent.done
  t.true(agent.told().includes('recovered'))
})

test('a certificate that expires while a device changes over is shown once more, by either stream', async t => {
  const server = await fleetServer(t, authority, {
    answer: ({ stream }) => {
      if (stream === 0) return { directives: [{ $case: 'reconnect', value: { delay: undefined } }] }
      if (stream > 1) return nothing
      server.streams[0]?.cut(unauthenticated('CERTIFICATE_EXPIRED'))
      return expired
    },
    renewal: attempt => (attempt === 0 ? refusal('RECOVERY_NEEDS_APPROVAL') : undefined),
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams.length === 3) stop()
  })
  await t.notThrowsAsync(agent.done)
  t.is(agent.told().filter(event => event === 'certificate-expired').length, 1)
  t.is(server.renewals.length, 2)
})

// ── A token that is new ────────────────────────────────────────────────────────────────────────────────────────────

const ends = ['DEVICE_DELETED', 'CERTIFICATE_RETIRED', 'CERTIFICATE_REVOKED']
const tokenOf = (tokenId?: string) => {
  const { text, id } = mintToken({ rootKeySha256: authority.rootKeySha256 })
  return text.replace(id, tokenId || id)
}

/** A server that knows alpha no more, until it has enrolled again. */
function forgetful(t: ExecutionContext, reason: string) {
  return fleetServer(t, authority, {
    answer: ({ stream }) => (stream === 0 ? { refuse: unauthenticated(reason) } : nothing),
  })
}

for (const reason of ends) {
  test(`after ${reason} a device enrolls again with another token, as itself and once`, async t => {
    const server = await forgetful(t, reason)
    const token = tokenOf()
    const agent = await startAgent(t, { server: server.address, token }, alpha, stopOnceReported)
    await agent.done
    t.deepEqual(agent.told(), [
      'resumed',
      'connecting',
      'identity-lost',
      'enrolling',
      'enrolled',
      'connecting',
      'reported',
      'stopped',
    ])
    t.deepEqual(
      server.enrollments.map(({ token, deviceId, keySha256 }) => ({ token, deviceId, keySha256 })),
      [{ token, deviceId: 'alpha', keySha256: keySha256(alpha.keyPem) }],
    )

    // The same token a second time is no new one.
    const kept = await loadState(agent.stateDirectory)
    t.is(kept?.tokenId, token.split('.')[1])
    const again = await forgetful(t, reason)
    const restarted = await startAgent(t, { server: again.address, token }, kept, stopOnceReported)
    t.is(describeCallError(await t.throwsAsync(restarted.done)).reason, reason)
    t.is(again.enrollments.length, 0)
  })

  test(`after ${reason} neither the token that a device came from nor none makes it enroll again`, async t => {
    for (const [token, kept] of [
      [tokenOf(alpha.tokenId), alpha],
      ['', alpha],
      [tokenOf(), { ...alpha, tokenId: '' }],
    ] as const) {
      const server = await forgetful(t, reason)
      const agent = await startAgent(t, { server: server.address, token }, kept, stopOnceReported)
      t.is(describeCallError(await t.throwsAsync(agent.done)).reason, reason)
      t.is(server.enrollments.length, 0)
      t.deepEqual(await loadState(agent.stateDirectory), kept)
    }
  })
}

test('a device that was revoked does not come back, whatever token it has', async t => {
  const server = await forgetful(t, 'DEVICE_REVOKED')
  const agent = await startAgent(t, { server: server.address, token: tokenOf() }, alpha, stopOnceReported)
  t.is(describeCallError(await t.throwsAsync(agent.done)).reason, 'DEVICE_REVOKED')
  t.is(server.enrollments.length, 0)
})

test('a device that was away for too long enrolls again with another token', async t => {
  const server = await served(t, () => refusal('RECOVERY_WINDOW_OVER'))
  const agent = await startAgent(t, { server: server.address, token: tokenOf() }, alpha, stopOnceReported)
  await agent.done
  t.is(server.enrollments.length, 1)
})

test('a device whose authority was replaced while it was away enrolls again with a token of the new one', async t => {
  const newer = await smallAuthority()
  const server = await fleetServer(t, newer)
  const token = mintToken({ rootKeySha256: newer.rootKeySha256 }).text
  const agent = await startAgent(t, { server: server.address, token }, alpha, stopOnceReported)
  await agent.done
  t.is(server.enrollments.length, 1)
  t.is(server.streams.length, 1)
})

test('a new token is not used while there is a session that works', async t => {
  const newer = await smallAuthority()
  const server = await fleetServer(t, authority, {
    answer: () => ({ directives: [{ $case: 'reconnect', value: { delay: undefined } }] }),
    // Of the id that the device goes by: it hears of the new root from the token alone.
    bundle: () => bundleOf(newer),
  })
  const token = mintToken({ rootKeySha256: newer.rootKeySha256 }).text
  const agent = await startAgent(t, { server: server.address, token }, alpha, ({ event }, { stop }) => {
    if (event === 'connecting') server.show(serverCertificate(server.streams.length === 0 ? authority : newer))
    if (event === 'reconnection-failed' || event === 'identity-lost') stop()
  })
  await agent.done
  t.true(agent.told().includes('reconnection-failed'))
  t.false(agent.told().includes('identity-lost'))
  t.is(server.enrollments.length, 0)
})

test('a new token is not shown to a server that it was not made by', async t => {
  const middle = await fleetServer(t, await smallAuthority())
  const agent = await startAgent(t, { server: middle.address, token: tokenOf() }, alpha, ({ event }, { stop }) => {
    if (event === 'disconnected') stop()
  })
  await agent.done
  t.is(middle.enrollments.length, 0)
  t.like(
    agent.events.find(event => event.event === 'disconnected'),
    { error: { reason: 'SERVER_UNTRUSTED' } as never },
  )
})

/** Of another authority, or of one that has lost it with its database. */
const unknown = ['CERTIFICATE_UNTRUSTED', 'CERTIFICATE_UNKNOWN']

test('a device whose certificate the server knows nothing of enrolls again with a new token of that server', async t => {
  for (const reason of unknown) {
    const server = await forgetful(t, reason)
    const token = tokenOf()
    const agent = await startAgent(t, { server: server.address, token }, alpha, stopOnceReported)
    await agent.done
    t.deepEqual(
      server.enrollments.map(({ token, deviceId }) => [token, deviceId]),
      [[token, 'alpha']],
    )
  }
})

test('a device whose certificate the server knows nothing of waits for better times without one', async t => {
  const strangers = mintToken({ rootKeySha256: (await smallAuthority()).rootKeySha256 }).text
  const cases = unknown.flatMap(reason => ['', tokenOf(alpha.tokenId), strangers].map(token => ({ reason, token })))
  for (const { reason, token } of cases) {
    const server = await forgetful(t, reason)
    const agent = await startAgent(t, { server: server.address, token }, alpha, stopOnceReported)
    await agent.done
    t.deepEqual(agent.told(), ['resumed', 'connecting', 'disconnected', 'connecting', 'reported', 'stopped'])
    t.is(server.enrollments.length, 0)
  }
})

test('a token that is damaged is told where it would be needed, and does not matter where it would not', async t => {
  const server = await forgetful(t, 'DEVICE_DELETED')
  const agent = await startAgent(t, { server: server.address, token: 'em1.damaged' }, alpha, stopOnceReported)
  t.is(describeCallError(await t.throwsAsync(agent.done)).reason, 'TOKEN_MALFORMED')
  const fine = await fleetServer(t, authority)
  const other = await startAgent(t, { server: fine.address, token: 'em1.damaged' }, alpha, stopOnceReported)
  await t.notThrowsAsync(other.done)
})
