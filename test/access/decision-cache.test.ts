/**
 * The decision cache against an oracle that keeps nothing: two instances on one database, whatever happens to facts, data of
 * the policy, policies and clocks. Never is something allowed that the oracle denies.
 */
import { setImmediate } from 'node:timers/promises'
import test from 'ava'
import fc from 'fast-check'
import { type AccessQuestion, createDecider, type Decider, type Verdict } from '../../src/access/decide.ts'
import type { BusinessHours } from '../../src/access/entities.ts'
import { createFacts, type Facts, type Ground } from '../../src/access/facts.ts'
import type { AuthzInput, PolicyDecision, PolicyEngine } from '../../src/access/policy-engine.ts'
import { startShippedPolicy } from '../../src/access/policy-wasm.ts'
import { type ChangeFeed, changeChannel, startChangeFeed } from '../../src/db/change-feed.ts'
import { Fault } from '../../src/fault.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { testDatabase } from '../support/postgres.ts'

const runs = 25
const maxAgeMs = 300_000

type Beginning = { at: number; hours: BusinessHours; isRemote: boolean }

/** A Monday, within hours that are shorter than a report is fresh: they have begun a minute ago, and end in two. */
const start = Date.parse('2026-03-02T09:58:00Z')
const shortHours: BusinessHours = {
  timezone: 'UTC',
  days: ['mon'],
  start_minute: 597,
  end_minute: 600,
  exempt_roles: ['admin'],
}
const berlin = { ...shortHours, timezone: 'Europe/Berlin', days: ['sun' as const] }

/** When it begins, and by which hours. Twice a year an hour of the clock is left out, or comes again. */
const beginnings: Omit<Beginning, 'isRemote'>[] = [
  { at: start, hours: shortHours },
  // 01:58, two minutes before it is 03:00; the hours end at 03:01.
  { at: Date.parse('2026-03-29T00:58:00Z'), hours: { ...berlin, start_minute: 0, end_minute: 181 } },
  // 02:58, two minutes before it is 02:00 again; the hours are from 02:15 on.
  { at: Date.parse('2026-10-25T00:58:00Z'), hours: { ...berlin, start_minute: 135, end_minute: 1_440 } },
  // A minute before midnight, after which it is a Sunday.
  { at: Date.parse('2026-03-07T22:59:00Z'), hours: { ...berlin, days: ['sat'], start_minute: 0, end_minute: 1_440 } },
]

const shipped = await startShippedPolicy()
const log = createLog({ level: 'silent' })

/** A policy that an instance may be given: the shipped one, and what it denies besides. */
type Candidate = {
  revision: string
  deniesAction: string | undefined
  deniesUser: string | undefined
  /** Denies from this minute of the hour on, and says so in time: a clock of its own, beside that of the hours. */
  closesAtMinute: number | undefined
  /** How long it lets an answer be used at most. */
  validSecondsMax: number
}

const shippedAlone: Candidate = {
  revision: 'shipped',
  deniesAction: undefined,
  deniesUser: undefined,
  closesAtMinute: undefined,
  validSecondsMax: 3_600,
}

/** The policy of one instance, which can be replaced. A remote one answers later, by what it was when it was asked. */
function replaceablePolicy(isRemote = false): PolicyEngine & { use(candidate: Candidate): void } {
  const listeners: ((revision: string) => void)[] = []
  let active = shippedAlone
  return {
    ...shipped,
    revision: () => active.revision,
    evaluate(entrypoint, input) {
      const decision = shipped.evaluate(entrypoint, input)
      if (decision instanceof Promise) throw new Error('the shipped policy answers at once')
      const decided = 'action' in input ? decideBesides(active, input, decision) : decision
      return isRemote ? later(decided) : decided
    },
    onRevision: listener => void listeners.push(listener),
    use(candidate) {
      if (candidate.revision === active.revision) return
      active = candidate
      for (const listener of listeners) listener(candidate.revision)
    },
  }
}

async function later(decision: PolicyDecision): Promise<PolicyDecision> {
  for (let turn = 0; turn < 4; turn++) await setImmediate()
  return decision
}

function decideBesides(candidate: Candidate, input: AuthzInput, decision: PolicyDecision): PolicyDecision {
  const { revision, deniesAction, deniesUser, closesAtMinute, validSecondsMax } = candidate
  const minuteOfHour = input.time.minute % 60
  const closesIn =
    closesAtMinute === undefined
      ? Number.POSITIVE_INFINITY
      : (minuteOfHour < closesAtMinute ? closesAtMinute - minuteOfHour : 60 - minuteOfHour) * 60 - input.time.second
  const isClosed = closesAtMinute !== undefined && minuteOfHour >= closesAtMinute
  const isDenied = isClosed || input.action === deniesAction || input.user?.id === deniesUser
  const reason = { code: 'NOT_NOW', field: 'action', actual: input.action, required: 'another', message: 'No.' }
  const allow = decision.allow && !isDenied
  return {
    allow,
    reasons: isDenied ? [...decision.reasons, reason] : decision.reasons,
    validForSeconds: Math.min(decision.validForSeconds, validSecondsMax, closesIn, allow ? 3_600 : 60),
    clockUsed: decision.clockUsed || closesAtMinute !== undefined,
    revision,
  }
}

const candidate: fc.Arbitrary<Candidate> = fc
  .record({
    deniesAction: fc.constantFrom(undefined, undefined, 'write', 'connect'),
    deniesUser: fc.constantFrom(undefined, undefined, 'eve'),
    closesAtMinute: fc.constantFrom(undefined, undefined, 1, 30, 59),
    validSecondsMax: fc.constantFrom(3_600, 3_600, 60, 1),
  })
  .map(rules => ({ ...rules, revision: JSON.stringify(rules) }))

type Instance = { facts: Facts; decider: Decider; engine: ReturnType<typeof replaceablePolicy>; feed: ChangeFeed }

/** Statements, and the keys that are announced with them when they commit. */
type Change = { sql: string; values: unknown[]; keys: string[] }

const device = fc.constantFrom('alpha', 'beta')
const user = fc.constantFrom('ada', 'eve')
const service = fc.constantFrom('orders', 'mail')
const role = fc.constantFrom('engineer', 'admin')
const mostly = fc.oneof({ weight: 3, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) })

const deviceChange = fc
  .tuple(device, mostly, fc.constantFrom('pending', 'quarantined', 'revoked'))
  .map(([id, isActive, other]) => ({
    sql: `update devices set status = $2 where id = $1`,
    values: [id, isActive ? 'active' : other],
    keys: [`device:${id}`],
  }))
const deviceEnd = device.map(id => ({ sql: 'delete from devices where id = $1', values: [id], keys: [`device:${id}`] }))
const userChange = fc.tuple(user, role, mostly).map(([id, role, isActive]) => ({
  sql: `insert into users (id, email, name, role, status, created_at) values ($1, $1 || '@example.com', '', $2, $3, now())
    on conflict (id) do update set role = excluded.role, status = excluded.status`,
  values: [id, role, isActive ? 'active' : 'disabled'],
  keys: [`user:${id}`],
}))
/** An e-mail address that questions name is nobody's from now on. */
const addressChange = user.map(id => ({
  sql: `update users set email = $1 || '@elsewhere' where id = $1`,
  values: [id],
  keys: [`user:${id}`],
}))
const userEnd = user.map(id => ({ sql: 'delete from users where id = $1', values: [id], keys: [`user:${id}`] }))
const serviceChange = fc.tuple(service, mostly).map(([id, isActive]) => ({
  sql: `insert into services (id, name, labels, owner, status, created_at) values ($1, '', '{}', '', $2, now())
    on conflict (id) do update set status = excluded.status`,
  values: [id, isActive ? 'active' : 'disabled'],
  keys: [`service:${id}`],
}))
const grantsChange = fc
  .tuple(role, service, fc.constantFrom([], ['connect'], ['write'], ['*']))
  .map(([role, service, actions]) => ({
    sql: `insert into role_grants (role, service, actions, created_at) values ($1, $2, $3, now())
      on conflict (role, service) do update set actions = excluded.actions`,
    values: [role, service, JSON.stringify(actions)],
    keys: [`grants:${role}`],
  }))
const dataChange = fc.tuple(fc.constantFrom(90, 50, null), fc.constantFrom(null, 480, 485)).map(([cpu, from]) => {
  const hours = { timezone: 'UTC', days: ['mon', 'tue'], start_minute: from, end_minute: 600, exempt_roles: ['admin'] }
  return {
    sql: `update policy_data set requirements = requirements || jsonb_build_object('cpu_percent_max', $1::int), hours = $2`,
    values: [cpu, from === null ? null : JSON.stringify(hours)],
    keys: ['policy:data'],
  }
})

const change: fc.Arbitrary<Change> = fc.oneof(
  deviceChange,
  { weight: 1, arbitrary: deviceEnd },
  userChange,
  addressChange,
  userEnd,
  serviceChange,
  grantsChange,
  dataChange,
)

const question: fc.Arbitrary<AccessQuestion> = fc.record({
  deviceId: fc.oneof({ weight: 5, arbitrary: device }, { weight: 1, arbitrary: fc.constant('nobody') }),
  user: fc.constantFrom('ada', 'eve', 'ADA@example.com'),
  service,
  action: fc.constantFrom('connect', 'write'),
})

const beginning: fc.Arbitrary<Beginning> = fc
  .record({ of: fc.constantFrom(...beginnings), isRemote: fc.boolean() })
  .map(({ of, isRemote }) => ({ ...of, isRemote }))

const instance = fc.constantFrom(0, 1)

const event = fc.oneof(
  { weight: 4, arbitrary: change.map(change => ({ kind: 'change' as const, change })) },
  // A report that policy can see, and one that moves nothing but its time: the others are not told of that.
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('report' as const),
      device,
      isGood: mostly,
      cpu: fc.constantFrom(10, 60),
    }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('quiet report' as const), device, instance }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('policy' as const), instance, candidate }) },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('time' as const),
      seconds: fc.constantFrom(0.9, 1, 59, 119.999, 121, 240, 299, 300, 600, 3_600, 7_200, -0.5, -1, -61, -120, -3_600),
    }),
  },
)

const step = fc.record({
  event,
  /** Under way while it happens; their answers may be of before, what they leave in memory must not be used after. */
  meanwhile: fc.array(question, { maxLength: 2 }),
  questions: fc.array(question, { minLength: 1, maxLength: 3 }),
  /** At which part of its time an allow is looked at again. */
  part: fc.double({ min: 0, max: 1, noNaN: true }),
})

test('whatever changes, at two instances nothing is allowed that a server without memory denies', async t => {
  t.timeout(240_000)
  const db = await testDatabase(t)
  const feeds = await Promise.all(
    [1, 2].map(n => startChangeFeed({ servers: db.servers, instanceId: `instance-${n}`, log })),
  )
  t.teardown(() => Promise.all(feeds.map(feed => feed.stop())))
  let time = start
  const counts = { hits: 0, allowed: 0 }

  /** Commits, and waits until both instances have been told of it. */
  async function commit({ sql, values, keys }: Change): Promise<void> {
    const marker = `marker:${++markers}`
    const seen = Promise.all(awaited.map(waiting => new Promise<void>(resolve => void waiting.set(marker, resolve))))
    const client = await db.pool.connect()
    try {
      await client.query('begin')
      await client.query(sql, values)
      await client.query(`select pg_notify('${changeChannel}', $1)`, [[...keys, marker].join('\n')])
      await client.query('commit')
    } catch (error) {
      await client.query('rollback')
      throw error
    } finally {
      client.release()
    }
    await seen
  }
  let markers = 0
  const awaited = feeds.map(() => new Map<string, () => void>())

  function startInstance(feed: ChangeFeed, isRemote: boolean): Instance {
    const engine = replaceablePolicy(isRemote)
    const facts = createFacts({ pool: db.pool, feed, maxAgeMs, clock: () => time })
    return { feed, facts, engine, decider: createDecider({ facts, engine, clock: () => time, onError: 'deny' }) }
  }

  /** undefined where it has none: by the time that a remote policy has answered, its answer may be over. */
  async function answer({ decider }: Instance, question: AccessQuestion): Promise<Verdict | undefined> {
    try {
      return (await decider.decide(question)).verdict
    } catch (error) {
      if (error instanceof Fault && error.code === 'UNAVAILABLE') return undefined
      throw error
    }
  }

  /** Everything read and decided anew, under the policy that the instance has now. */
  async function oracle(question: AccessQuestion, { engine }: Instance, at: number): Promise<boolean> {
    const clock = () => at
    const deaf = { onChange() {}, onReset() {}, isLive: () => true, caughtUp: async () => {} }
    const facts = createFacts({ pool: db.pool, feed: deaf, maxAgeMs, clock })
    const { verdict } = await createDecider({ facts, engine, clock, onError: 'deny' }).decide(question)
    return verdict.allow
  }

  async function happen(what: typeof event extends fc.Arbitrary<infer E> ? E : never, instances: Instance[]) {
    if (what.kind === 'change') return commit(what.change)
    if (what.kind === 'policy') return instances[what.instance]?.engine.use(what.candidate)
    if (what.kind === 'time') {
      time += Math.round(what.seconds * 1_000)
      return
    }
    const id = what.device
    if (what.kind === 'report') return commit(report(id, what.isGood, what.cpu))
    // A report after the device had been stale is announced, as a change is.
    const { rowCount } = await db.pool.query(
      `update device_postures set measured_at = greatest(measured_at, $2) where device_id = $1 and measured_at > $3`,
      [id, new Date(time), new Date(time - maxAgeMs)],
    )
    if (rowCount) instances[what.instance]?.facts.reported(id, time)
  }

  function report(id: string, isGood: boolean, cpuPercent: number): Change {
    const posture = { cpuPercent, memoryPercent: 10, patchesCurrent: true, antivirusEnabled: true, attributes: {} }
    return {
      sql: `with known as (
          insert into devices (id, type, os, os_version, labels, status, spiffe_id, public_key_sha256, enrolled_at, updated_at)
          values ($1, 'laptop', '', '', '{}', 'active', $1, '', now(), now())
          on conflict (id) do update set updated_at = now() returning id)
        insert into device_postures (device_id, posture, failing, measured_at, received_at)
        select id, $2, '[]', $3, now() from known
        on conflict (device_id) do update set posture = excluded.posture, measured_at = excluded.measured_at`,
      values: [id, JSON.stringify({ ...posture, diskEncrypted: isGood }), new Date(time)],
      keys: [`device:${id}`],
    }
  }

  /** Everybody may do everything in these hours, until something happens. */
  async function begin({ at, hours, isRemote }: Beginning): Promise<Instance[]> {
    time = at
    await db.pool.query('delete from devices; delete from users; delete from services; delete from role_grants')
    await db.pool.query(`insert into users (id, email, name, role, status, created_at)
      select id, id || '@example.com', '', 'engineer', 'active', now() from unnest(array['ada', 'eve']) as id`)
    await db.pool.query(`insert into services (id, name, labels, owner, status, created_at)
      select id, '', '{}', '', 'active', now() from unnest(array['orders', 'mail']) as id`)
    await db.pool.query(`insert into role_grants (role, service, actions, created_at)
      select role, '*', '["*"]', now() from unnest(array['engineer', 'admin']) as role`)
    await db.pool.query('update policy_data set hours = $1', [JSON.stringify(hours)])
    for (const id of ['alpha', 'beta']) await commit(report(id, true, 10))
    return feeds.map(feed => startInstance(feed, isRemote))
  }

  // All that listen to a feed have heard of a change before anybody who awaits it goes on.
  feeds.forEach((feed, at) => {
    feed.onChange(keys => {
      for (const key of keys) awaited[at]?.get(key)?.()
    })
  })

  await fc.assert(
    fc.asyncProperty(beginning, fc.array(step, { minLength: 4, maxLength: 10 }), async (beginning, steps) => {
      const instances = await begin(beginning)
      for (const { event, meanwhile, questions, part } of steps) {
        const underWay = instances.flatMap(({ decider }) => meanwhile.map(question => decider.decide(question)))
        await setImmediate()
        await happen(event, instances)
        for (const question of [...questions, ...meanwhile]) {
          for (const [at, instance] of instances.entries()) {
            const verdict = await answer(instance, question)
            const now = await oracle(question, instance, time)
            if (!verdict?.allow) continue
            if (!now) t.fail(`instance ${at} allows what is denied: ${JSON.stringify(question)}`)
            counts.allowed++
            const until = verdict.expiresAtMs - 1
            for (const later of [until, Math.floor(time + (until - time) * part)]) {
              const holds = await oracle(question, instance, later)
              if (!holds)
                t.fail(`instance ${at} says that it holds for longer than it does: ${JSON.stringify(question)}`)
            }
          }
        }
        await Promise.allSettled(underWay)
      }
      for (const { decider } of instances) counts.hits += decider.stats().hits
    }),
    { numRuns: runs, endOnFailure: true },
  )
  t.log(`${counts.allowed} allowed, ${counts.hits} answers from memory`)
  // A cache that is never used is never wrong.
  t.true(counts.hits > 0 && counts.allowed > 0)
})

/** A decider over facts that stay as they are, with nobody and nothing in them. */
function deciderOver(engine: PolicyEngine, clock: () => number, hours: BusinessHours | null = null) {
  let version = 0
  const fact = <V>(value: V) => ({ version: ++version, loadedAt: start, value })
  const ground = {
    device: fact(undefined),
    user: fact(undefined),
    service: fact(undefined),
    grants: fact(new Map()),
    policy: fact({ requirements: nothingRequired, hours }),
  }
  const facts = { ground: async () => ground, maxAgeMs } as unknown as Facts
  return createDecider({ facts, engine, clock, onError: 'deny' })
}

const nothingRequired = {
  ...{ patches_current: false, antivirus_enabled: false, disk_encrypted: false, firewall_enabled: false },
  ...{ cpu_percent_max: null, memory_percent_max: null, disk_percent_max: null },
}

test('of identical questions that are asked at the same time, one is put to the policy', async t => {
  let asked = 0
  const policy = replaceablePolicy(true)
  const engine: PolicyEngine = {
    ...policy,
    evaluate(entrypoint, input) {
      asked++
      return policy.evaluate(entrypoint, input)
    },
  }
  const { decide } = deciderOver(engine, () => start)
  const question = { deviceId: 'alpha', user: 'ada', service: 'orders', action: 'connect' }
  const verdicts = await Promise.all(Array.from({ length: 100 }, () => decide(question)))
  t.is(asked, 1)
  t.is(new Set(verdicts.map(({ verdict }) => verdict)).size, 1)
  await Promise.all([decide({ ...question, action: 'write' }), decide({ ...question, user: 'eve' })])
  t.is(asked, 3)
})

test('an answer that rests on the time of day ends with a whole second, and where clocks are put forward or back', async t => {
  const question = { deviceId: 'alpha', user: 'ada', service: 'orders', action: 'connect' }
  const endOf = async (at: string, timezone: string) => {
    const decider = deciderOver(replaceablePolicy(), () => Date.parse(at), { ...berlin, timezone })
    const { verdict } = await decider.decide(question)
    return new Date(verdict.expiresAtMs).toISOString()
  }
  // A denial holds for a minute, if nothing comes before.
  t.is(await endOf('2026-03-28T00:59:30.900Z', 'Europe/Berlin'), '2026-03-28T01:00:30.000Z')
  t.is(await endOf('2026-03-29T00:59:30.900Z', 'Europe/Berlin'), '2026-03-29T01:00:00.000Z')
  t.is(await endOf('2026-10-25T00:59:30Z', 'Europe/Berlin'), '2026-10-25T01:00:00.000Z')
  t.is(await endOf('2026-10-25T00:59:30Z', 'UTC'), '2026-10-25T01:00:30.000Z')
  // Lord Howe's clocks are put forward by half an hour.
  t.is(await endOf('2026-10-03T15:29:59Z', 'Australia/Lord_Howe'), '2026-10-03T15:30:00.000Z')
})

test('an allow that is over before it arrives is none', async t => {
  let time = start
  const allowed = { allow: true, reasons: [], validForSeconds: 1, clockUsed: true, revision: 'shipped' }
  const engine: PolicyEngine = {
    ...replaceablePolicy(),
    async evaluate() {
      time += 2_000
      return allowed
    },
  }
  const question = { deviceId: 'alpha', user: 'ada', service: 'orders', action: 'connect' }
  const decider = deciderOver(engine, () => time)
  const fault = await t.throwsAsync(async () => decider.decide(question), {
    instanceOf: Fault,
    message: /so nothing is allowed$/,
  })
  t.like(fault, { code: 'UNAVAILABLE', reason: 'POLICY_UNAVAILABLE', retryAfterMs: 1_000 })
  t.is(decider.stats().entries, 0)
})

test('what is decided is kept up to a bound, the least used going first', async t => {
  const { decide, stats } = deciderOver(replaceablePolicy(), () => start)
  const ask = (user: number) =>
    decide({ deviceId: 'alpha', user: `user-${user}`, service: 'orders', action: 'connect' })
  for (let user = 0; user <= 50_000; user++) await ask(user)
  t.is(stats().entries, 50_000)
  await ask(50_000)
  t.is(stats().hits, 1)
  await ask(0)
  t.is(stats().hits, 1)
})

test('a verdict that can not be used again is counted under what has ended it', async t => {
  let [time, version] = [start, 0]
  const fact = <V>(value: V) => ({ version: ++version, loadedAt: start, value })
  let ground: Ground = {
    device: fact(undefined),
    user: fact(undefined),
    service: fact(undefined),
    grants: fact(new Map()),
    policy: fact({ requirements: nothingRequired, hours: null }),
  }
  const engine = replaceablePolicy()
  const facts = { ground: async () => ground, maxAgeMs } as unknown as Facts
  const decider = createDecider({ facts, engine, clock: () => time, onError: 'deny' })
  const question = { deviceId: 'alpha', user: 'ada', service: 'orders', action: 'connect' }
  const counted = async () => {
    await decider.decide(question)
    return Object.fromEntries(decider.stats().invalidations)
  }
  const none = { device: 0, user: 0, service: 0, grants: 0, policy: 0, revision: 0, time: 0 }
  t.deepEqual(await counted(), none)
  t.deepEqual(await counted(), none)
  t.is(decider.stats().hits, 1)
  const expected: Record<string, number> = { ...none }
  for (const part of ['device', 'user', 'service', 'grants', 'policy'] as const) {
    ground = { ...ground, [part]: fact(ground[part].value) }
    expected[part] = 1
    t.deepEqual(await counted(), expected)
  }
  engine.use({ ...shippedAlone, revision: 'another' })
  t.deepEqual(await counted(), { ...expected, revision: 1 })
  // A denial holds for a minute; and a clock that is set back is before all that was decided.
  time += 60_000
  t.deepEqual(await counted(), { ...expected, revision: 1, time: 1 })
  time -= 1
  t.deepEqual(await counted(), { ...expected, revision: 1, time: 2 })
  t.is(decider.stats().hits, 1)
  t.is(decider.stats().entries, 1)
})
