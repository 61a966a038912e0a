/** A drill: a fleet of real agents on two instances goes through a whole change of authority, with no step forced. */
import { X509Certificate } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { createKey } from '../../src/client/csr.ts'
import { loadState } from '../../src/client/state.ts'
import { AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import {
  type Credentials,
  eventually,
  freshCsr,
  refusal,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const agentsMax = 50

test('fifty agents go through a whole change of authority, none of them without a stream for a moment', async t => {
  t.timeout(110_000)
  const env = { HEARTBEAT_INTERVAL_SECONDS: '1' }
  const one = await startEdgeMesh(t, env)
  const two = await startSecondInstance(t, one, env)
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-drill-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const token = await one.token({ usesMax: agentsMax })

  // The fleet.
  const stopping = new AbortController()
  const events = new Map<string, AgentEvent[]>()
  const names = Array.from({ length: agentsMax }, (_, at) => `agent-${at}`)
  const running = names.map((id, at) => {
    const heard: AgentEvent[] = []
    events.set(id, heard)
    return runAgent({
      server: `127.0.0.1:${(at % 2 ? one : two).server.apiPort}`,
      stateDirectory: join(folder, id),
      token,
      device: { id },
      posture: async () => healthy,
      log: event => void heard.push(event),
      signal: stopping.signal,
    })
  })
  const all = Promise.all(running)
  all.catch(() => {})
  t.teardown(async () => {
    stopping.abort()
    await Promise.allSettled(running)
  })
  const everyone = (what: string, event: AgentEvent['event']) =>
    eventually(what, () => [...events.values()].every(heard => heard.some(one => one.event === event)))
  await everyone('every agent reports', 'reported')

  // The change: each step as soon as the service itself says that nobody is left behind.
  let operator: Credentials = one.operator
  async function to(stage: Stage): Promise<void> {
    const { admin } = one.clients(operator)
    await eventually(`stage ${stage}`, async () => {
      try {
        await unary(admin, 'rotateAuthority', { stage, force: false })
        return true
      } catch (error) {
        if (refusal(error).reason !== 'ROTATION_NOT_READY') throw error
        return false
      }
    })
  }
  await to(Stage.PUBLISHED)
  await to(Stage.ISSUING)
  const keyPem = createKey()
  const { enroll } = one.clients(operator)
  const issued = await eventually('the instance issues by the new authority', async () => {
    const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
    const chain = identity!.certificateChainPem
    const old = new X509Certificate(operator.certificatePem!).issuer
    return new X509Certificate(chain[0]!).issuer !== old && identity
  })
  operator = {
    rootsPem: issued.trustBundle!.rootsPem.join(''),
    certificatePem: issued.certificateChainPem.join(''),
    keyPem,
  }
  await to(Stage.RETIRING)
  await to(Stage.STABLE)

  // What is left of the old one: nothing, with nobody.
  const { trustBundle } = await unary(one.clients(operator).admin, 'getAuthority', {})
  const roots = trustBundle!.rootsPem
  t.is(roots.length, 1)
  for (const id of names) {
    const kept = await eventually(`${id} trusts the new root alone`, async () => {
      const state = await loadState(join(folder, id))
      return state?.rootsPem === roots.join('') && state
    })
    const chain = kept.certificateChainPem.match(/-----BEGIN[^-]+-----[^-]+-----END[^-]+-----/g)!
    t.true(new X509Certificate(chain[1]!).verify(new X509Certificate(roots[0]!).publicKey), id)
  }
  for (const [id, heard] of events) {
    t.is(heard.filter(({ event }) => event === 'renewed').length, 1, `${id} renews once`)
    t.deepEqual(
      heard.filter(({ event }) => event === 'disconnected' || event === 'renewal-failed'),
      [],
      `${id} is never without a stream`,
    )
  }
  stopping.abort()
  await all

  // The service saw it, too: from each device's first stream to its last there was always one open.
  const { rows } = await eventually('all streams are on record', async () => {
    const found = await one.pool.query<{ target: string; step: string }>(
      `select target, detail ->> 'stream' as step from audit_events
       where method like '%/Heartbeat' order by at, id`,
    )
    return found.rows.filter(({ step }) => step === 'ended').length >= 2 * agentsMax && found
  })
  const open = new Map<string, number>()
  const streams = new Map<string, number>()
  for (const { target, step } of rows) {
    const count = (open.get(target) ?? 0) + (step === 'opened' ? 1 : -1)
    open.set(target, count)
    if (step === 'opened') streams.set(target, (streams.get(target) ?? 0) + 1)
    else if ((streams.get(target) ?? 0) < 2) t.true(count > 0, `${target} was without a stream`)
  }
  t.is(streams.size, agentsMax)
  t.true(
    [...streams.values()].every(count => count === 2),
    'one stream for each certificate',
  )
})
