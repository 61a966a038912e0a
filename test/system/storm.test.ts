/** What a fleet notices when one of its instances dies, with real processes on both sides. */
import test, { type ExecutionContext } from 'ava'
import { parsePostureMix } from '../../src/simulate/mix.ts'
import { type Progress, type Summary, simulate } from '../../src/simulate/simulate.ts'
import { eventually, startEdgeMesh, testEnvironment, unary } from '../support/edgemesh.ts'
import { link } from '../support/relay.ts'
import { serve } from '../support/serve.ts'

const env = { HEARTBEAT_INTERVAL_SECONDS: '1' }

/** Devices in a process of their own, until the test ends or ends them. */
function fleet(t: ExecutionContext, of: { server: string; token: string; idPrefix: string; devices: number }) {
  const stopping = new AbortController()
  let last: Progress | undefined
  const done: Promise<Summary> = simulate({
    ...of,
    processes: 1,
    mix: parsePostureMix('healthy=1'),
    script: [],
    rampMs: 0,
    onProgress: progress => {
      last = progress
    },
    signal: stopping.signal,
  })
  done.catch(() => {})
  const end = () => {
    stopping.abort()
    return done
  }
  t.teardown(() => end().catch(() => {}))
  return { progress: () => last, end }
}

test('when an instance dies its devices come back at another, whose devices notice nothing, and a revoked one stays out', async t => {
  const [stayCount, moveCount] = [10, 30]
  const mesh = await startEdgeMesh(t, env)
  const shared = { ...testEnvironment, ...env, DATABASE_URL: mesh.databaseUrl }
  const [survivor, doomed] = await Promise.all([serve(t, shared), serve(t, shared)])
  const portOf = ({ address }: { address: string }) => Number(address.split(':')[1])
  const way = await link(t, portOf(doomed))
  const token = () => mesh.token({ usesMax: 100 })
  const stay = fleet(t, { server: survivor.address, token: await token(), idPrefix: 'stay', devices: stayCount })
  const move = fleet(t, { server: `127.0.0.1:${way.port}`, token: await token(), idPrefix: 'move', devices: moveCount })
  const reporting = ({ progress }: typeof stay) => progress()?.states.reporting ?? 0
  await eventually('all report', () => reporting(stay) === stayCount && reporting(move) === moveCount)

  way.leadTo(portOf(survivor))
  await doomed.kill()
  await unary(mesh.admin, 'revokeDevice', { id: 'move-00000', reason: 'stolen' })
  await eventually('all are back but the one', () => {
    const { states, reconnects = 0 } = move.progress() ?? {}
    return reconnects >= moveCount && states?.reporting === moveCount - 1 && states.failed === 1
  })
  const moved = await move.end()
  t.is(moved.statesAtEnd.failed, 1)
  t.is(moved.errors.DEVICE_REVOKED, 1)

  const stayed = await stay.end()
  t.deepEqual(stayed.errors, {})
  t.is(stayed.reconnects, 0)
  t.is(stayed.statesAtEnd.reporting, stayCount)
})
