import { EventEmitter } from 'node:events'
import type { Socket } from 'node:net'
import { mock } from 'node:test'
import test, { type ExecutionContext } from 'ava'
import type { Identified } from '../../src/caller.ts'
import type { ChangeFeed } from '../../src/db/change-feed.ts'
import { Fault } from '../../src/fault.ts'
import type { Standing } from '../../src/identity/standing.ts'
import type { Dispatch } from '../../src/rpc/dispatch.ts'
import { enforceStanding } from '../../src/rpc/enforcement.ts'
import { createLog } from '../../src/telemetry/log.ts'

const start = Date.parse('2026-03-02T10:00:00Z')
const hourMs = 3_600_000

const device = (id: string, serial: string, notAfter = start + hourMs): Identified => ({
  kind: 'device',
  id,
  issuerKeyId: '',
  spiffeId: `spiffe://test/device/${id}`,
  serial,
  notBefore: start - hourMs,
  notAfter,
  role: '',
  publicKeySha256: '',
})

/** Enforcement with everything around it in the test's hands. Time stands still until `pass`. */
function enforcement(t: ExecutionContext) {
  mock.timers.enable({ apis: ['setTimeout', 'setInterval', 'Date'], now: start })
  const feed = new EventEmitter()
  const events: string[] = []
  const asked: string[] = []
  /** Why a certificate is refused, by its serial. */
  const refusals = new Map<string, Fault>()
  const standing: Pick<Standing, 'demand'> = {
    async demand({ serial }) {
      asked.push(serial)
      const refusal = refusals.get(serial)
      if (refusal) throw refusal
    },
  }
  const dispatch: Pick<Dispatch, 'cut'> = {
    cut(concerns, { reason }) {
      for (const serial of ['a1', 'a2', 'b1'])
        if (concerns(device('any', serial))) events.push(`cut ${serial} ${reason}`)
    },
  }
  const { connected, stop } = enforceStanding({
    feed: {
      onChange: (listener: (keys: string[]) => void) => void feed.on('change', listener),
      onReset: (listener: () => void) => void feed.on('reset', listener),
    } as unknown as ChangeFeed,
    onTrustChange: listener => void feed.on('trust', listener),
    standing,
    dispatch: dispatch as Dispatch,
    beforeCut: ({ serial }, { reason }) => void events.push(`before ${serial} ${reason}`),
    clock: Date.now,
    log: createLog({ level: 'silent' }),
  })
  t.teardown(() => {
    stop()
    mock.timers.reset()
  })
  return {
    events,
    asked,
    refusals,
    change: (...keys: string[]) => feed.emit('change', keys),
    reset: () => feed.emit('reset'),
    connect(name: string, identity: Parameters<typeof connected>[0]['identity']) {
      const socket = Object.assign(new EventEmitter(), {
        destroy() {
          events.push(`ended ${name}`)
          socket.emit('close')
        },
      })
      connected({ address: '192.0.2.1', identity }, socket as unknown as Socket)
      return socket
    },
    /** Lets time pass, and everything that was waiting for it happen. */
    async pass(ms: number) {
      mock.timers.tick(ms)
      for (let turn = 0; turn < 10; turn++) await Promise.resolve()
    },
  }
}

const revoked = new Fault('UNAUTHENTICATED', 'DEVICE_REVOKED', 'device a has been revoked')
const away = new Fault('UNAVAILABLE', 'FACTS_BEHIND', 'the database is away')

test.serial('a certificate that is refused loses its calls at once, and its connections a second later', async t => {
  const { connect, change, refusals, events, pass } = enforcement(t)
  connect('first', device('a', 'a1'))
  connect('second', device('a', 'a1'))
  connect('other', device('a', 'a2'))
  await pass(0)
  t.deepEqual(events, [])
  refusals.set('a1', revoked)
  change('device:a')
  await pass(0)
  t.deepEqual(events.splice(0), ['before a1 DEVICE_REVOKED', 'cut a1 DEVICE_REVOKED'])
  await pass(999)
  t.deepEqual(events, [])
  await pass(1)
  t.deepEqual(events, ['ended first', 'ended second'])
})

test.serial('a connection that is made with a certificate that does not stand goes on for a second', async t => {
  const { connect, refusals, events, pass } = enforcement(t)
  refusals.set('a1', revoked)
  connect('late', device('a', 'a1'))
  await pass(0)
  t.deepEqual(events.splice(0), ['before a1 DEVICE_REVOKED', 'cut a1 DEVICE_REVOKED'])
  await pass(1_000)
  t.deepEqual(events, ['ended late'])
})

test.serial('a certificate that expires loses its calls within half a second, its connection later', async t => {
  const { connect, events, pass } = enforcement(t)
  connect('old', device('a', 'a1', start + 2_000))
  await pass(1_999)
  t.deepEqual(events, [])
  await pass(501)
  t.deepEqual(events.splice(0), ['before a1 CERTIFICATE_EXPIRED', 'cut a1 CERTIFICATE_EXPIRED'])
  await pass(29_999)
  t.deepEqual(events, [])
  await pass(1)
  t.deepEqual(events, ['ended old'])
})

test.serial('a connection made with an expired certificate ends, others that prove nothing stay', async t => {
  const { connect, events, pass } = enforcement(t)
  const refused = (refused: string) => ({ refused, message: '' })
  connect('expired', { ...refused('CERTIFICATE_EXPIRED'), expired: device('a', 'a1', start - 1) })
  connect('anonymous', refused('CERTIFICATE_MISSING'))
  connect('foreign', refused('CERTIFICATE_UNTRUSTED'))
  await pass(29_999)
  t.deepEqual(events, [])
  await pass(24 * hourMs)
  t.deepEqual(events, ['ended expired'])
})

test.serial('a change has those looked at whom it concerns, a lost feed everybody who is connected', async t => {
  const { connect, change, reset, asked, pass } = enforcement(t)
  connect('a', device('a', 'a1'))
  connect('b', device('b', 'b1'))
  const gone = connect('c', device('c', 'c1'))
  await pass(0)
  t.deepEqual(asked.splice(0), ['a1', 'b1', 'c1'])
  gone.emit('close')
  change('policy:data', 'device:b', 'device:c', 'device:nobody')
  await pass(0)
  t.deepEqual(asked.splice(0), ['b1'])
  reset()
  await pass(0)
  t.deepEqual(asked.splice(0), ['a1', 'b1'])
})

test.serial('whose standing can not be read is looked at again for as long as it is connected', async t => {
  const { connect, refusals, asked, events, pass } = enforcement(t)
  refusals.set('a1', away)
  refusals.set('b1', away)
  connect('a', device('a', 'a1'))
  const b = connect('b', device('b', 'b1'))
  await pass(0)
  await pass(500)
  t.deepEqual(asked.splice(0), ['a1', 'b1', 'a1', 'b1'])
  b.emit('close')
  await pass(500)
  t.deepEqual(asked.splice(0), ['a1'])
  refusals.set('a1', revoked)
  await pass(500)
  t.deepEqual(events, ['before a1 DEVICE_REVOKED', 'cut a1 DEVICE_REVOKED'])
  asked.length = 0
  await pass(500)
  t.deepEqual(asked, [])
})
