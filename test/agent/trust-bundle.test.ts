import { mkdirSync, rmSync } from 'node:fs'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import { loadState } from '../../src/client/state.ts'
import { TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'
import { bundleOf, fleetServer, type Reply } from './fleet-server.ts'
import { startAgent } from './running-agent.ts'
import { deviceCredentials, rootsOf, smallAuthority } from './small-server.ts'

const authority = await smallAuthority()
const newer = await smallAuthority()
const alpha = { ...deviceCredentials(authority, 'alpha'), renewAfter: new Date('2100-01-01') }
const first = bundleOf(authority, 'first')
const both = bundleOf(authority, 'both', newer)

const sending = (trustBundle: TrustBundle | undefined): Reply => ({
  directives: [{ $case: 'trustBundle', value: { trustBundle } }],
})
const nothing: Reply = { directives: [] }

test('a device trusts new roots at once, says so at once, and keeps its stream', async t => {
  const server = await fleetServer(t, authority, {
    answer: ({ report }) => (report === 0 ? sending(both) : nothing),
    bundle: () => first,
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams[0]?.reports.length === 2) stop()
  })
  await agent.done
  t.is(server.streams.length, 1)
  t.deepEqual(server.streams[0]?.reports, ['first', 'both'])
  t.is(agent.timer.uptime(), 0)
  const kept = await loadState(agent.stateDirectory)
  t.is(kept?.trustBundleId, 'both')
  t.is(kept?.rootsPem, [authority, newer].flatMap(rootsOf).join(''))
  t.is(kept?.keyPem, alpha.keyPem)
})

test('after a restart a device still goes by the bundle that it was given, without one that it was never given', async t => {
  const server = await fleetServer(t, authority, { bundle: () => both })
  const agent = await startAgent(t, { server: server.address }, { ...alpha, trustBundleId: '' }, (event, { stop }) => {
    if (event.event === 'reported' && server.streams[0]?.reports.length === 2) stop()
  })
  await agent.done
  t.deepEqual(server.streams[0]?.reports, ['', 'both'])
  const again = await startAgent(
    t,
    { server: server.address },
    await loadState(agent.stateDirectory),
    (event, { stop }) => {
      if (event.event === 'reported') stop()
    },
  )
  await again.done
  t.deepEqual(server.streams[1]?.reports, ['both'])
})

for (const [title, bundle] of [
  ['without a root', TrustBundle.fromPartial({ id: 'empty' })],
  [
    'with a root that is none',
    TrustBundle.fromPartial({ id: 'broken', rootsPem: [rootsOf(authority)[0]!.replace('MII', 'AAA')] }),
  ],
] as const) {
  test(`a bundle ${title} is refused, and nothing else comes of it`, async t => {
    const server = await fleetServer(t, authority, {
      answer: ({ report }) => (report === 0 ? sending(bundle) : nothing),
      bundle: () => first,
    })
    const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
      if (event === 'reported' && server.streams[0]?.reports.length === 2) stop()
    })
    await agent.done
    t.deepEqual(server.streams[0]?.reports, ['first', 'first'])
    t.like(
      agent.events.find(event => event.event === 'trust-bundle-refused'),
      {
        error: { reason: 'CERTIFICATE_UNUSABLE' } as never,
      },
    )
    t.deepEqual(await loadState(agent.stateDirectory), alpha)
  })
}

test('a bundle that can not be kept is not gone by, and the server does not hear otherwise', async t => {
  const server = await fleetServer(t, authority, {
    answer: ({ report }) => (report === 0 ? sending(both) : nothing),
    bundle: () => first,
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stateDirectory, stop }) => {
    if (event === 'connecting') {
      rmSync(join(stateDirectory, 'ca.crt'))
      mkdirSync(join(stateDirectory, 'ca.crt'))
    }
    if (event === 'reported' && server.streams[0]?.reports.length === 2) stop()
  })
  await agent.done
  t.deepEqual(server.streams[0]?.reports, ['first', 'first'])
  t.true(agent.told().includes('trust-bundle-refused'))
})

test('a directive without a bundle is no bundle', async t => {
  const server = await fleetServer(t, authority, {
    answer: ({ report }) => (report === 0 ? sending(undefined) : nothing),
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported' && server.streams[0]?.reports.length === 2) stop()
  })
  await agent.done
  t.deepEqual(server.streams[0]?.reports, ['first', 'first'])
  t.false(agent.told().some(event => event.startsWith('trust-bundle')))
})

test('the next connection is made with the new roots', async t => {
  // The server that the device is sent to has a certificate that only the new root vouches for.
  const next = await fleetServer(t, newer)
  const server = await fleetServer(t, authority, {
    answer: ({ report }) =>
      report === 0 ? sending(both) : { directives: [{ $case: 'reconnect', value: {} as never }] },
  })
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reconnecting') stop()
  })
  await agent.done
  const moved = await startAgent(
    t,
    { server: next.address },
    await loadState(agent.stateDirectory),
    ({ event }, { stop }) => {
      if (event === 'reported') stop()
    },
  )
  await moved.done
  t.is(next.streams.length, 1)
  t.false(moved.told().includes('disconnected'))
})

test('the state of an agent that knew no bundle ids and no token ids is read', async t => {
  const server = await fleetServer(t, authority)
  const agent = await startAgent(t, { server: server.address }, alpha, ({ event }, { stop }) => {
    if (event === 'reported') stop()
  })
  await agent.done
  const path = join(agent.stateDirectory, 'identity.json')
  const { trustBundleId, tokenId, ...old } = JSON.parse(await readFile(path, 'utf8'))
  t.deepEqual([trustBundleId, tokenId], ['first', alpha.tokenId])
  await writeFile(path, JSON.stringify(old))
  t.deepEqual(await loadState(agent.stateDirectory), { ...alpha, trustBundleId: '', tokenId: '' })
})
