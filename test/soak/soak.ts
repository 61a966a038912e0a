/**
 * A soak: everything at once, with faults, for as long as one likes; and somebody beside it who knows what must hold.
 *
 * Three instances as processes, each with a way of its own to a real PostgreSQL; a simulated fleet before them; witnesses,
 * devices that ask at every instance at once; operators who take and give back what permissions rest on. Meanwhile instances
 * are killed and drained, their database is cut off, stalled and killed, connections are broken and policies replaced.
 *
 * Its story: start → let it run, watch → heal → everything must be allowed again → end in order → count what was
 * acknowledged, verify the audit log, see what has grown.
 */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { verifyAudit } from '../../src/audit/verify.ts'
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import type { CreateEnrollmentTokenResponse } from '../../src/gen/edgemesh/v1/admin.ts'
import { parsePostureMix } from '../../src/simulate/mix.ts'
import { type Progress as FleetProgress, simulate } from '../../src/simulate/simulate.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { operatorOf } from '../support/operator.ts'
import { percentile } from '../support/percentile.ts'
import { putBundle, shippedAs } from '../support/policies.ts'
import { administer, databaseUrl, givenServerUrl } from '../support/postgres-server.ts'
import { noTokenRequest } from '../support/token-request.ts'
import { injectFaults } from './faults.ts'
import { type Series, startSampling } from './figures.ts'
import { createFindings } from './findings.ts'
import { openGate } from './gate.ts'
import { createInstance, type Instance } from './instance.ts'
import { createLedger } from './ledger.ts'
import { createOperators, grantSwitch, role, type Switch, serviceSwitch, userSwitch } from './operators.ts'
import { createFact } from './oracle.ts'
import { createRandom } from './random.ts'
import { type Bounds, enrollWitness, type Permission, type Witness, type WitnessDeps } from './witness.ts'

export type SoakOptions = {
  durationMs: number
  seed: number
  devices: number
  /** Within it a withdrawal has to take effect. */
  reachMs: number
  /** Before the first fault and between two. */
  quietMs: { least: number; most: number }
  awayMs: { least: number; most: number }
  onProgress: (progress: SoakProgress) => void
  signal: AbortSignal
}

export type SoakProgress = { elapsedMs: number; doing: string; allowed: number; denied: number; broken: number }

export type SoakSummary = {
  seed: number
  elapsedMs: number
  broken: { rule: string; times: number; examples: string[] }[]
  faults: Record<string, number>
  answers: { allowed: number; denied: number; unanswered: number }
  acknowledged: { enrollments: number; allows: number; reports: number; changes: number; tokens: number }
  fleet: Pick<FleetProgress, 'devices' | 'heartbeats' | 'allowed' | 'denied' | 'revocations' | 'reconnects' | 'errors'>
  /** From the acknowledgement of a withdrawal to the end of what rested on it, at instances that were left in peace. */
  reach: { connections: number; p50Ms: number; p99Ms: number; maxMs: number }
  audit: { ok: boolean; rows: number; seals: number; findings: number }
  series: Series[]
  /** Tables that keep history: bytes that a second of this load has left in them. */
  growth: Record<string, number>
}

const instancesCount = 3
const witnessesCount = 3
const usersCount = 3
const servicesCount = 3
const fleetAsksEveryMs = 3_000
const fleetUser = 'fleet'
const fleetService = 'fleet-service'
const lookEveryMs = 50
/** Two seconds: what took longer has been waited for by then. */
const ownLagsRemembered = 40
/** For so long a device that was revoked goes on asking. */
const watchedMsMax = 3_000
const drainSeconds = 3
const graceSeconds = 5
const maxAgeSeconds = 30
/** A statement is given up after ten seconds, and its answer after eleven. */
const settleMs = 13_000
const secret = 'a-secret-of-the-soak-that-is-long-enough'
/** Reasons that devices of a fleet may meet while servers are killed and their database is away. */
const fleetMayMeet =
  /^(UNAVAILABLE|CANCELLED|DEADLINE_EXCEEDED|DRAINING|\w+_UNAVAILABLE|\w+_BEHIND|STREAM_ENDED|SERVER_SILENT|ANSWER_MISSING|RATE_LIMITED|DEVICE_REVOKED)$/

export async function soak(options: SoakOptions): Promise<SoakSummary> {
  const startedAtMs = Date.now()
  const findings = createFindings(startedAtMs)
  const random = createRandom(options.seed)
  const bounds: Bounds = { reachMs: options.reachMs, graceMs: graceSeconds * 1_000, maxAgeMs: maxAgeSeconds * 1_000 }
  const counts = { allowed: 0, denied: 0, unanswered: 0, ended: 0 }
  const faults: Record<string, number> = {}
  const reach: number[] = []
  const ends: (() => unknown)[] = []
  const stopping = new AbortController()
  const until = AbortSignal.any([options.signal, stopping.signal])
  const lag = monitorEventLoopDelay({ resolution: 10 })
  lag.enable()
  const ownLags: number[] = []
  let doing = 'starting'
  const say = (what: string) => {
    doing = what
    options.onProgress({ elapsedMs: Date.now() - startedAtMs, doing, ...counts, broken: findings.list().length })
  }

  try {
    // Step 1: A database, an operator, three instances, a front before them.
    say('the database starts')
    const database = await startDatabase(ends)
    const folder = await mkdtemp(join(tmpdir(), 'edgemesh-soak-'))
    ends.push(() => rm(folder, { recursive: true, force: true }))
    const putPolicy = async (revision: string) => putBundle(folder, await shippedAs(revision))
    await putPolicy('soak-0')
    const env = environment(folder)
    const { certificatePem, ...rest } = await operatorOf({
      ...env,
      DATABASE_URL: database.url,
      API_PORT: '0',
      METRICS_PORT: '0',
    })
    const operator = { ...rest, certificateChainPem: certificatePem }
    const pool = new pg.Pool({ connectionString: database.url, max: 4 })
    pool.on('error', () => {})
    ends.push(() => pool.end())
    const instances: Instance[] = []
    for (let number = 1; number <= instancesCount; number++) {
      const instance = await createInstance(`soak-${number}`, env, database.url)
      instances.push(instance)
      ends.push(instance.end)
    }
    say('instances start')
    await Promise.all(instances.map(instance => instance.start()))
    const front = await openGate(instances.map(({ apiPort }) => apiPort))
    ends.push(front.close)

    // Step 2: What permissions rest on.
    const ledger = createLedger(pool, findings)
    const hours = createFact('hours', 'true', Date.now)
    const facts = (kind: string, count: number) =>
      Array.from({ length: count }, (_, at) => createFact(`${kind}-${at}`, 'true', Date.now))
    const [users, services, grants] = [
      facts('user', usersCount),
      facts('service', servicesCount),
      facts('grant', servicesCount),
    ] as const
    const permissions: Permission[] = users.flatMap((user, of) =>
      services.map((service, to) => ({
        user: `user-${of}`,
        service: `service-${to}`,
        facts: [user, service, grants[to]!, hours],
      })),
    )
    const switches: Switch[] = [
      ...users.map((fact, at) => userSwitch(`user-${at}`, fact)),
      ...services.map((fact, at) => serviceSwitch(`service-${at}`, fact)),
      ...grants.map((fact, at) => grantSwitch(`service-${at}`, fact)),
    ]
    let witnesses: Witness[] = []
    let witnessesMade = 0
    const prefix = `fleet-${options.seed}`
    const operators = createOperators({
      operator,
      instances,
      switches,
      hours,
      witnesses: () => witnesses,
      replaceWitness,
      fleet: { prefix, devices: options.devices, revocableMax: Math.floor(options.devices / 10) },
      ledger,
      findings,
      random,
      settleMs,
    })
    ends.push(operators.close)
    const { call } = operators
    const first = instances[0]!
    const { data } = await call<{ data?: { requirements?: unknown } }>(first, 'getPolicyState', {})
    await call(first, 'updatePolicyData', { data: { requirements: data?.requirements, hours: undefined } })
    for (const id of [...users.map((_, at) => `user-${at}`), fleetUser]) {
      await call(first, 'createUser', { id, email: `${id}@example.com`, name: '', role })
    }
    for (const id of [...services.map((_, at) => `service-${at}`), fleetService]) {
      await call(first, 'createService', { id, name: '', labels: {}, owner: '', roles: [role] })
    }

    // Step 3: Witnesses and the fleet.
    const witnessDeps: WitnessDeps = {
      instances,
      front: `127.0.0.1:${front.port}`,
      permissions,
      ledger,
      findings,
      random,
      bounds,
      ownLagMs: () => Math.max(0, ...ownLags),
      onReach: ms => reach.push(ms),
      counts,
    }
    async function makeWitness(): Promise<Witness> {
      const id = `witness-${++witnessesMade}`
      for (;;) {
        const instance = random.one(instances.filter(one => one.isRunning()))
        try {
          const { tokenText } = await call<CreateEnrollmentTokenResponse>(instance, 'createEnrollmentToken', {
            ...noTokenRequest,
            usesMax: 1,
          })
          return await enrollWitness(id, tokenText, instance, witnessDeps)
        } catch (failure) {
          // Faults are over by then, too.
          if (options.signal.aborted) throw failure
          await sleep(500)
        }
      }
    }
    async function replaceWitness(gone: Witness): Promise<void> {
      // For as long as it is watched being thrown out.
      await sleep(Math.min(2 * bounds.reachMs, watchedMsMax))
      // When it ends there is nobody to follow: what is asked last is asked by those who are in.
      const next = until.aborted ? [] : [await makeWitness()]
      witnesses = witnesses.flatMap(witness => (witness === gone ? next : [witness]))
      await gone.stop()
    }
    say('witnesses enroll')
    witnesses = await Promise.all(Array.from({ length: witnessesCount }, makeWitness))
    const { tokenText } = await call<CreateEnrollmentTokenResponse>(first, 'createEnrollmentToken', {
      ...noTokenRequest,
      usesMax: options.devices,
    })
    const fleetStopping = new AbortController()
    let fleetProgress: FleetProgress | undefined
    const fleet = simulate({
      server: witnessDeps.front,
      token: tokenText,
      idPrefix: prefix,
      devices: options.devices,
      processes: 1,
      mix: parsePostureMix('healthy=90,failing=10'),
      asking: { user: fleetUser, service: fleetService, everyMs: fleetAsksEveryMs },
      script: [],
      reconnecting: { everyMs: 15_000, share: 0.1 },
      rampMs: Math.min(10_000, options.durationMs / 4),
      onProgress: progress => {
        fleetProgress = progress
      },
      signal: fleetStopping.signal,
      random: random.next,
    })
    fleet.catch(() => {})
    ends.push(() => fleetStopping.abort())

    // Step 4: Let it run.
    const sampler = startSampling({ pool, instance: first, say: () => say(doing) })
    const looking = setInterval(() => {
      ownLags.push(lag.max / 1e6)
      if (ownLags.length > ownLagsRemembered) ownLags.shift()
      lag.reset()
      for (const witness of witnesses) witness.look()
    }, lookEveryMs)
    ends.push(() => clearInterval(looking), sampler.stop)
    say('it runs')
    const timer = setTimeout(() => stopping.abort(), options.durationMs)
    ends.push(() => clearTimeout(timer))
    await Promise.all([
      operators.work(until),
      silenceNowAndThen(() => witnesses, bounds, random.next, until),
      injectFaults(
        {
          instances,
          front,
          crashDatabase: database.crash,
          putPolicy,
          findings,
          random,
          quietMs: options.quietMs,
          awayMs: options.awayMs,
          drainMs: drainSeconds * 1_000,
          onFault(name) {
            faults[name] = (faults[name] ?? 0) + 1
            say(name)
          },
        },
        until,
      ),
    ])

    // Step 5: Everything is given back, and everything must be allowed again.
    say('everything is given back')
    await operators.restore()
    await sleep(bounds.reachMs + reportsAgainMs)
    for (const witness of witnesses) {
      for (const refused of await witness.allAllowed()) findings.broken('in the end everything is well', refused)
    }
    await eventuallyWell(() => fleetProgress, options.devices - operators.revoked(), findings)

    // Step 6: The end, in order.
    say('it ends')
    await Promise.all(witnesses.map(witness => witness.stop()))
    fleetStopping.abort()
    const summary = await fleet
    for (const [reason, times] of Object.entries(summary.errors)) {
      if (fleetMayMeet.test(reason)) continue
      findings.broken('no error comes that a user must not see', `the fleet has met ${reason}, ${times} times`)
    }
    clearInterval(looking)
    await sampler.stop()
    for (const instance of instances) {
      const code = await instance.drain(30_000)
      if (code !== 0) findings.broken('an instance that is told to stop ends in order', `${instance.name}: ${code}`)
      for (const complaint of instance.complaints)
        findings.broken('nothing is logged as a bug', `${instance.name}: ${complaint}`)
    }

    // Step 7: What was acknowledged is there, and nothing else has happened to what is on record.
    say('what was acknowledged is counted')
    await ledger.compare()
    await compareFleet(pool, prefix, summary, findings)
    for (const { method, code, reason, times } of await bugsOnRecord(pool)) {
      findings.broken(
        'no error comes that a user must not see',
        `on record: ${method} ${code} ${reason}, ${times} times`,
      )
    }
    say('the audit log is verified')
    const verification = await verifyAudit({ pool, key: sealKeyFrom(secret), retentionDays: 90, nowMs: Date.now() })
    for (const { kind, table, message } of verification.findings) {
      findings.broken('the audit log is whole', `${kind} in ${table}: ${message}`)
    }
    const series = sampler.series()
    for (const { name, unit, growth, allowed, isFlat } of series) {
      if (isFlat) continue
      const detail = `${name} has grown by ${growth.toFixed(1)} ${unit}; ${allowed.toFixed(1)} are allowed`
      findings.broken('nothing grows', detail)
    }
    const elapsedMs = Date.now() - startedAtMs
    return {
      seed: options.seed,
      elapsedMs,
      broken: findings.list(),
      faults,
      answers: { allowed: counts.allowed, denied: counts.denied, unanswered: counts.unanswered },
      acknowledged: ledger.counts,
      fleet: summary,
      reach: {
        connections: reach.length,
        p50Ms: Math.round(percentile(reach, 50)),
        p99Ms: Math.round(percentile(reach, 99)),
        maxMs: Math.round(percentile(reach, 100)),
      },
      audit: {
        ok: verification.ok,
        rows: verification.rows,
        seals: verification.seals,
        findings: verification.findings.length,
      },
      series,
      growth: sampler.growth(),
    }
  } finally {
    stopping.abort()
    for (const end of ends.reverse()) await end()
    lag.disable()
  }
}

/** After everything was given back: witnesses have reported again. */
const reportsAgainMs = 3_000

type SoakDatabase = { url: string; crash: (() => void) | undefined }

/** On a server that is given a database of its own; else a server of our own, which can be killed. */
async function startDatabase(ends: (() => unknown)[]): Promise<SoakDatabase> {
  const given = givenServerUrl()
  if (given) {
    const name = `edgemesh_soak_${process.pid}_${Date.now()}`
    await administer(given, `create database ${name}`)
    ends.push(() => administer(given, `drop database ${name} with (force)`))
    return { url: databaseUrl(given, name), crash: undefined }
  }
  const directory = await mkdtemp(join(tmpdir(), 'edgemesh-soak-postgres-'))
  const postgres = await startEmbeddedPostgres({ directory, log: createLog({ level: 'fatal' }) })
  ends.push(async () => {
    await postgres.stop()
    await rm(directory, { recursive: true, force: true })
  })
  return { url: postgres.url, crash: () => postgres.kill() }
}

function environment(policyFolder: string): Record<string, string> {
  return {
    ENROLLMENT_TOKEN_SECRET: secret,
    CA_KEY_PASSPHRASE: secret,
    RATE_LIMIT_ENROLLMENTS: '100000/minute',
    RATE_LIMIT_CONNECTIONS: '1000000/minute',
    RATE_LIMIT_HEALTH: '100000/minute',
    API_HOST: '127.0.0.1',
    METRICS_HOST: '127.0.0.1',
    DRAIN_SECONDS: String(drainSeconds),
    LEASE_GRACE_SECONDS: String(graceSeconds),
    HEALTH_CHECK_MAX_AGE_MINUTES: String(maxAgeSeconds / 60),
    HEARTBEAT_INTERVAL_SECONDS: '2',
    DATABASE_POOL_SIZE: '10',
    DATABASE_MAX_OVERFLOW: '5',
    POLICY_BUNDLE_DIR: policyFolder,
    LOG_LEVEL: 'WARN',
  }
}

/** A device that says nothing for longer than its health is fresh. */
async function silenceNowAndThen(
  witnesses: () => readonly Witness[],
  { maxAgeMs }: Bounds,
  random: () => number,
  signal: AbortSignal,
): Promise<void> {
  const pause = (ms: number) => sleep(ms, undefined, { signal }).catch(() => {})
  while (!signal.aborted) {
    const [witness] = witnesses().slice(Math.floor(random() * witnesses().length))
    witness?.setSilent(true)
    await pause(maxAgeMs * 1.2)
    witness?.setSilent(false)
    await pause(maxAgeMs * (0.2 + random() * 0.3))
  }
}

const wellWithinMs = 45_000

async function eventuallyWell(
  progress: () => FleetProgress | undefined,
  expected: number,
  findings: ReturnType<typeof createFindings>,
): Promise<void> {
  const until = Date.now() + wellWithinMs
  while ((progress()?.states.reporting ?? 0) < expected) {
    if (Date.now() > until) {
      const states = JSON.stringify(progress()?.states)
      findings.broken('in the end everything is well', `${expected} devices of the fleet should report: ${states}`)
      return
    }
    await sleep(250)
  }
}

/** What the fleet has counted as acknowledged is on record at least as often. */
async function compareFleet(
  pool: pg.Pool,
  prefix: string,
  { heartbeats, allowed, denied, enrolled }: FleetProgress,
  findings: ReturnType<typeof createFindings>,
): Promise<void> {
  const { rows } = await pool.query<{ reports: number; answers: number; devices: number }>(
    `select (select count(*)::int from health_reports where device_id ^@ $1) as reports,
       (select coalesce(sum(jsonb_array_length(questions)), 0)::int from decisions where device_id ^@ $1) as answers,
       (select count(*)::int from devices where id ^@ $1) as devices`,
    [`${prefix}-`],
  )
  const [onRecord] = rows
  for (const [what, heard, kept] of [
    ['reports', heartbeats, onRecord?.reports],
    ['answers', allowed, onRecord?.answers],
    ['devices', enrolled, onRecord?.devices],
  ] as const) {
    if ((kept ?? 0) >= heard) continue
    findings.broken(
      'acknowledged work is in the database',
      `${heard} ${what} of the fleet, on record ${kept} (${denied} denied)`,
    )
  }
}

async function bugsOnRecord(pool: pg.Pool) {
  const { rows } = await pool.query<{ method: string; code: string; reason: string; times: number }>(
    `select method, code, reason, count(*)::int as times from audit_events
     where code in ('INTERNAL', 'UNKNOWN', 'DATA_LOSS', 'UNIMPLEMENTED', 'OUT_OF_RANGE', 'ABORTED')
     group by method, code, reason`,
  )
  return rows
}
