/**
 * A connection's states, whatever happens to it and in whatever order, at two instances that share a database: ends are final,
 * what has ended is never answered as allowed, one instance holds it at most, and nothing of it stays behind.
 */
import { randomUUID } from 'node:crypto'
import { mock } from 'node:test'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import type pg from 'pg'
import type { Claim } from '../../src/access/connection-records.ts'
import type { Verdict } from '../../src/access/decide.ts'
import { createLeases, type Lease, newLease, suspendedPerDeviceMax } from '../../src/access/leases.ts'
import { createResume } from '../../src/access/resume.ts'
import type { JournalEntry } from '../../src/audit/journal.ts'
import type { Call } from '../../src/caller.ts'
import { Fault } from '../../src/fault.ts'
import type { Answer } from '../../src/gen/edgemesh/v1/authorize.ts'
import { createLog } from '../../src/telemetry/log.ts'

const graceMs = 30_000
const runs = 300
const log = createLog({ level: 'silent' })
const id = '00000000-0000-4000-8000-000000000001'
const question = { deviceId: 'alpha', user: 'ada', service: 'payroll', action: 'connect' }
const call = { caller: { kind: 'device', spiffeId: 'spiffe://test/device/alpha' }, startedAt: 0 } as unknown as Call

type Row = { status: Claim['status']; instance: string; resumeBy: Date | null; endReasons: string | null }

/** What both instances see: the row of the connection if it has one, the ground that it stands on, and whether that can be looked at. */
type World = {
  row: Row | undefined
  /** It was closed before it had a row, and that is on record. */
  closed: boolean
  ground: 'good' | 'gone' | 'unknown'
  instances: Instance[]
}

type Stream = { held: Lease | undefined; isOpen: boolean; told: number }

type Instance = ReturnType<typeof startInstance>

/** An instance whose journal writes, and which hears of changes, when the test says so. */
function startInstance(name: string, world: World) {
  const journal: { entries: readonly JournalEntry[]; done: () => void }[] = []
  const news: string[] = []
  const listeners: ((keys: string[], announcedAtMs?: number) => void)[] = []
  const clock = () => Date.now()

  const decider = {
    async decide() {
      await Promise.resolve()
      if (world.ground === 'unknown') throw new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', 'not now')
      const allow = world.ground === 'good'
      const reasons = allow ? [] : [{ code: 'GROUND_GONE', field: '', actual: '', required: '', message: '' }]
      const [evaluatedAtMs, expiresAtMs] = [clock(), clock() + 3_600_000]
      const verdict = {
        question,
        allow,
        reasons,
        policyRevision: '1',
        evaluatedAtMs,
        expiresAtMs,
        onRecord: { first: '{}' },
      } as unknown as Verdict
      return {
        verdict,
        ground: { user: { value: { id: 'ada', role: 'admin' } }, service: { value: { id: 'payroll' } } },
      }
    },
  }
  const pool = {
    async query() {
      const { row } = world
      return { rows: row && (row.status !== 'active' || row.instance !== name) ? [{ id, ...read(row) }] : [] }
    },
  }
  const leases = createLeases({
    decider: decider as never,
    engine: { revision: () => '1', onRevision() {} },
    feed: {
      onChange: listener => void listeners.push(listener),
      onReset() {},
      lagMs: () => 0,
      databaseTimeMs: ms => ms,
    },
    pool: pool as unknown as pg.Pool,
    record: entries => void journal.push({ entries, done() {} }),
    decisionOf: () => ({ entry: { table: { name: 'decisions', columns: [] }, row: [] }, decisionId: 'd' }),
    instanceId: name,
    graceMs,
    clock,
    log,
    onState() {},
  })
  const resume = createResume({
    facts: { isCurrent: () => true } as never,
    decider: decider as never,
    assertions: undefined,
    leases,
    journal: {
      append: (entries: readonly JournalEntry[]) => new Promise<void>(done => void journal.push({ entries, done })),
      drained: () => new Promise<void>(done => void journal.push({ entries: [], done })),
    } as never,
    instanceId: name,
    clock,
    limit: async () => {},
    onDecisions() {},
    onDenied() {},
    onConnection() {},
    async claim() {
      const row = fromDecision(world)
      if (!row) return new Map()
      const before = read(row)
      const claimed = row.status === 'active' && (row.resumeBy === null || row.resumeBy.getTime() > clock())
      if (claimed) {
        for (const other of world.instances) if (other.name === row.instance && other.name !== name) other.tell()
        Object.assign(row, { instance: name, resumeBy: null })
      }
      return new Map([
        [id, { ...before, id, claimed, userId: 'ada', serviceId: 'payroll', action: 'connect' } as Claim],
      ])
    },
  })

  return {
    name,
    leases,
    tell: (key = `connection:${id}`) => void news.push(key),
    /** What has been announced arrives. */
    hear() {
      const keys = news.splice(0)
      if (keys.length > 0) for (const listener of listeners) listener(keys, clock())
    },
    /** The journal commits, by the rule of `connectionsTable`. */
    write() {
      for (const { entries, done } of journal.splice(0)) {
        for (const { table, row } of entries) {
          if (table.name === 'connections') upsert(world, row)
          else if (table === closedTable) world.closed = true
        }
        done()
      }
    },
    grant(stream: Stream): void {
      stream.held = leases.grant(newLease({ id, questionId: 'q', question, ...leaseOf(stream) }))
    },
    resume: (stream: Stream): Promise<Answer[]> =>
      resume([id], {
        ...leaseOf(stream),
        deviceId: 'alpha',
        call,
        userAssertion: '',
        hold(lease) {
          if (stream.isOpen) stream.held = lease
          else leases.suspend([lease])
        },
      }),
    watched: () => (leases.activeByService().get('payroll') ?? 0) + leases.suspended(),
  }
}

function leaseOf(stream: Stream) {
  return {
    userId: 'ada',
    serviceId: 'payroll',
    role: 'admin',
    grantedAtMs: Date.now(),
    recorded: false,
    expiresAtMs: Date.now() + 3_600_000,
    assertedUntilMs: Number.POSITIVE_INFINITY,
    decisionId: 'd',
    push({ lease }: { lease: Lease }) {
      if (stream.held !== lease) return
      stream.held = undefined
      stream.told += 1
    },
    moved(lease: Lease) {
      if (stream.held === lease) stream.held = undefined
    },
  }
}

function read(row: Row) {
  const endReasons = row.endReasons === null ? null : JSON.parse(row.endReasons)
  return {
    status: row.status,
    endReasons,
    resumeByMs: row.resumeBy?.getTime() ?? null,
    grantedAtMs: 0,
    decisionId: 'd',
  }
}

/** The row, made from the decision of instance a if there is none, by the rule of `recordFromDecisions`. */
function fromDecision(world: World): Row | undefined {
  if (!world.row && !world.closed) {
    world.row = { instance: 'a', status: 'active', endReasons: null, resumeBy: null }
  }
  return world.row
}

const closedTable = { name: 'audit_events', columns: [] }
const noted = (): JournalEntry => ({ table: closedTable, row: [] })

function upsert(world: World, row: readonly unknown[]): void {
  const [instance, status, endReasons, resumeBy] = [row[5], row[6], row[9], row[11]] as [
    string,
    Claim['status'],
    string | null,
    Date | null,
  ]
  const before = world.row
  if (before && (before.status !== 'active' || before.instance !== instance)) return
  world.row = { instance, status, endReasons, resumeBy }
}

/** Everything that waits for nothing but its turn. */
const settled = () => new Promise<void>(resolve => setImmediate(resolve))

const at = fc.nat(1)
const event = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('resume' as const), at }) },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('lose' as const), at }) },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('write' as const), at }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('hear' as const), at }) },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('ground' as const),
      ground: fc.constantFrom('good' as const, 'good' as const, 'gone' as const, 'unknown' as const),
    }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('close' as const), at }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('operator' as const) }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('time' as const), ms: fc.constantFrom(300, 2_100, 31_000) }) },
)

test.serial('a connection ends once, is held by one at most, and leaves nothing behind, whatever happens', async t => {
  t.timeout(240_000)
  const seen = { resumed: 0, deniedWithReasons: 0, notHeld: 0, waiting: 0, revoked: 0, closed: 0, closedWithoutRow: 0 }
  await fc.assert(
    fc.asyncProperty(fc.array(event, { minLength: 1, maxLength: 24 }), async events => {
      mock.timers.enable({ apis: ['setTimeout', 'setInterval', 'Date'], now: Date.parse('2026-03-02T10:00:00Z') })
      const world: World = { row: undefined, closed: false, ground: 'good', instances: [] }
      world.instances.push(startInstance('a', world), startInstance('b', world))
      const instance = (at: number) => world.instances[at] as Instance
      const streams: [Stream[], Stream[]] = [[], []]
      const open = (at: number) => {
        const stream: Stream = { held: undefined, isOpen: true, told: 0 }
        streams[at]?.push(stream)
        return stream
      }
      const announce = (key: string) => world.instances.forEach(({ tell }) => void tell(key))
      let end: string | undefined
      const pending: Promise<void>[] = []
      try {
        instance(0).grant(open(0))
        for (const event of events) {
          if (event.kind === 'resume') pending.push(resume(event.at))
          else if (event.kind === 'lose') lose(event.at)
          else if (event.kind === 'write') instance(event.at).write()
          else if (event.kind === 'hear') instance(event.at).hear()
          else if (event.kind === 'time') mock.timers.tick(event.ms)
          else if (event.kind === 'close') close(event.at)
          else if (event.kind === 'ground') {
            world.ground = event.ground
            announce('device:alpha')
          } else {
            const row = fromDecision(world)
            if (row?.status === 'active') Object.assign(row, { status: 'revoked', endReasons: '[{"code":"OPERATOR"}]' })
            announce(`connection:${id}`)
          }
          await settled()
          checkEnd()
        }
        await quiet()
        await Promise.all(pending)
        checkHolder()

        // Everybody leaves, and the grace time is over.
        lose(0)
        lose(1)
        await quiet()
        mock.timers.tick(graceMs + 1_000)
        await quiet()
        checkEnd()
        t.deepEqual(
          world.instances.map(({ watched }) => watched()),
          [0, 0],
          'nothing is left in memory',
        )
        t.not(world.row?.status, 'active')
        if (world.row?.status === 'revoked') seen.revoked++
        else if (world.row) seen.closed++
        else seen.closedWithoutRow++
      } finally {
        for (const { leases } of world.instances) leases.stop()
        mock.timers.reset()
      }

      async function resume(at: number): Promise<void> {
        const stream = open(at)
        const [answer] = await instance(at)
          .resume(stream)
          .catch((): [] => [])
        if (answer === undefined) seen.waiting++
        else if (answer.retryAfter) seen.waiting++
        else if (answer.allowed) {
          seen.resumed++
          t.is(world.row?.status, 'active', 'what has ended is not allowed')
          t.is(answer.connectionId, id)
        } else if (answer.reasons.some(({ code }) => code === 'CONNECTION_NOT_HELD')) seen.notHeld++
        else seen.deniedWithReasons++
      }

      function lose(at: number): void {
        for (const stream of streams[at] ?? []) {
          stream.isOpen = false
          if (stream.held) instance(at).leases.suspend([stream.held])
          stream.held = undefined
        }
      }

      function close(at: number): void {
        for (const stream of streams[at] ?? []) {
          if (stream.held) instance(at).leases.close([stream.held], noted)
          stream.held = undefined
        }
      }

      /** All is written, heard and decided. */
      async function quiet(): Promise<void> {
        for (let round = 0; round < 6; round++) {
          for (const { write, hear } of world.instances) {
            write()
            hear()
          }
          await settled()
        }
      }

      function checkEnd(): void {
        const now = world.row && world.row.status !== 'active' ? JSON.stringify(world.row) : undefined
        if (end !== undefined) t.is(now, end, 'an end is final')
        end = now
      }

      function checkHolder(): void {
        const watching = world.instances.filter(({ watched }) => watched() > 0).map(({ name }) => name)
        const holder = world.row ? world.row.status === 'active' && world.row.instance : !world.closed && 'a'
        t.deepEqual(watching, holder ? [holder] : [])
        t.true(world.instances.every(({ watched }) => watched() <= 1))
        const holding = streams.flat().filter(({ held }) => held?.state === 'active')
        t.is(holding.length, streams.flat().filter(({ held }) => held).length, 'no stream holds what is not active')
        t.true(holding.length <= 1)
      }
    }),
    { numRuns: runs },
  )
  t.log(JSON.stringify(seen))
  for (const [what, count] of Object.entries(seen)) t.true(count > 0, what)
})

test.serial(
  'of what waits for one device no more is kept than a stream may hold, and the longest is closed first',
  async t => {
    const { leases, written } = alone(t)
    const all = Array.from({ length: suspendedPerDeviceMax + 3 }, () =>
      leases.grant(
        newLease({
          id: randomUUID(),
          questionId: 'q',
          question,
          ...leaseOf({ held: undefined, isOpen: true, told: 0 }),
        }),
      ),
    )
    leases.suspend(all)
    t.is(leases.suspended(), suspendedPerDeviceMax)
    t.deepEqual(
      all.filter(({ state }) => state === 'closed'),
      all.slice(0, 3),
    )
    const closed = written.filter(({ row }) => row[6] === 'closed')
    t.deepEqual(
      closed.map(({ row }) => JSON.parse(String(row[9]))[0].code),
      Array(3).fill('NOT_RESUMED'),
    )
  },
)

test.serial('a connection that is not allowed after all, after its record has taken long, is closed on record', t => {
  mock.timers.enable({ apis: ['setInterval', 'Date'], now: Date.parse('2026-03-02T10:00:00Z') })
  t.teardown(() => mock.timers.reset())
  const { leases, written } = alone(t)
  const stream = { held: undefined, isOpen: true, told: 0 }
  const [quick, slow] = [0, 1].map(() =>
    leases.grant(newLease({ id: randomUUID(), questionId: 'q', question, ...leaseOf(stream) })),
  )
  leases.drop(quick!)
  mock.timers.tick(2_200)
  leases.drop(slow!)
  t.deepEqual(
    written.map(({ row }) => [row[0], row[6]]),
    [
      [slow!.id, 'active'],
      [slow!.id, 'closed'],
    ],
  )
})

function alone(t: ExecutionContext) {
  const written: JournalEntry[] = []
  const leases = createLeases({
    decider: { decide: () => Promise.reject(new Error('nothing is decided here')) },
    engine: { revision: () => '1', onRevision() {} },
    feed: { onChange() {}, onReset() {}, lagMs: () => 0, databaseTimeMs: ms => ms },
    pool: {} as pg.Pool,
    record: entries => void written.push(...entries),
    decisionOf: () => ({ entry: { table: { name: 'decisions', columns: [] }, row: [] }, decisionId: 'd' }),
    instanceId: 'a',
    graceMs,
    clock: Date.now,
    log,
    onState() {},
  })
  t.teardown(() => leases.stop())
  return { leases, written }
}
