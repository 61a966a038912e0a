/**
 * The composition root: starts every part in order, hands each what it needs, stops all in reverse.
 *
 *     const server = await startServer({ settings: readSettings(process.env), log })
 *     …
 *     await server.stop()
 */
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Server } from '@grpc/grpc-js'
import { createAuthorize } from './access/authorize.ts'
import { createCheck } from './access/check.ts'
import { claimConnections } from './access/connection-records.ts'
import { createDecider } from './access/decide.ts'
import { revocationEntry } from './access/decision-records.ts'
import { accessEntities } from './access/entities.ts'
import { createEnvoyCheck } from './access/envoy.ts'
import { createFacts } from './access/facts.ts'
import { keepInstanceRecord } from './access/instances.ts'
import { createLeases } from './access/leases.ts'
import type { PolicyEngine } from './access/policy-engine.ts'
import { startFolderPolicy } from './access/policy-folder.ts'
import { startOpaPolicy } from './access/policy-server.ts'
import { startShippedPolicy } from './access/policy-wasm.ts'
import { createResume } from './access/resume.ts'
import { watchRevocations } from './access/revocations.ts'
import { createUserAssertions } from './access/user-assertion.ts'
import { adminHandlers, adminStreams } from './admin/admin-service.ts'
import { keepLifecycle } from './admin/lifecycle.ts'
import { permissionDemand } from './admin/permission.ts'
import { auditEntities } from './audit/entities.ts'
import { createFollower } from './audit/follower.ts'
import { startJournal } from './audit/journal.ts'
import { countRefusals } from './audit/refusals.ts'
import { sealKeyFrom } from './audit/seals.ts'
import { sealLeftovers } from './audit/unsealed.ts'
import { type Clock, systemClock } from './clock.ts'
import { startChangeFeed } from './db/change-feed.ts'
import { startEmbeddedPostgres } from './db/embedded.ts'
import { type Database, openDatabase } from './db/orm.ts'
import { maintainPartitions } from './db/partitions.ts'
import { type ReadFrom, type Replicas, startReplicas } from './db/replicas.ts'
import { applyRetention } from './db/retention.ts'
import { ownAudit } from './db/service-role.ts'
import { Fault } from './fault.ts'
import { startCensus } from './fleet/census.ts'
import { fleetEntities } from './fleet/entities.ts'
import { createHeartbeats } from './fleet/heartbeat.ts'
import { keepPresence } from './fleet/presence.ts'
import { startReportWriter } from './fleet/report-writer.ts'
import { createApprovals } from './identity/approvals.ts'
import {
  type AuthorityOptions,
  type AuthoritySet,
  issuerOf,
  keepAuthorities,
  openAuthorities,
} from './identity/authorities.ts'
import { createChallenges } from './identity/challenge.ts'
import { createEnroll, type EnrollDeps } from './identity/enroll.ts'
import { identityEntities } from './identity/entities.ts'
import { createIssuance, isLateInLife } from './identity/issuance.ts'
import { type CertifiedName, issueOperator, issueServiceIdentity } from './identity/operator.ts'
import { createRedemptions } from './identity/redemption.ts'
import { createRenew } from './identity/renew.ts'
import { createRotation } from './identity/rotation.ts'
import { keepServerCertificate } from './identity/server-certificate.ts'
import { createStanding } from './identity/standing.ts'
import { createTrustBundleSource } from './identity/trust-bundle.ts'
import { networkOf } from './network.ts'
import { createDispatch } from './rpc/dispatch.ts'
import { enforceStanding } from './rpc/enforcement.ts'
import { openCallLimit, rateLimit, sharedRateLimit, sweepRateLimits } from './rpc/limits.ts'
import { openPort, type Port } from './rpc/port.ts'
import { addServices } from './rpc/services.ts'
import { settleIn, sharedAllowance } from './rpc/shared-allowance.ts'
import type { Settings } from './settings.ts'
import { type Readiness, startTelemetryHttp, type TelemetryHttpOptions } from './telemetry/http.ts'
import type { Log } from './telemetry/log.ts'
import { type Expiry, startMetrics } from './telemetry/metrics.ts'
import { version } from './version.ts'

export const entities = [...identityEntities, ...fleetEntities, ...accessEntities, ...auditEntities]

export type OperatorRequest = { name: string; role: string; csr: Uint8Array; validityMs: number }
export type ServiceRequest = { name: string; csr: Uint8Array; validityMs: number }

/** What a worker of several has from its parent, who has both ports. */
export type Employment = { connectionsMost: number }

export type RunningServer = {
  /** 0 for a worker, as is the next. */
  apiPort: number
  metricsPort: number
  instanceId: string
  /** What enrollment tokens pin. */
  rootKeySha256: string
  rootsPem: string
  /** False when the database already had an authority. */
  createdAuthority: boolean
  issueOperator(request: OperatorRequest): Promise<CertifiedName>
  readiness(): Promise<Readiness>
  /** For a worker: a connection that its parent has accepted; how many it has; and what it would answer over HTTP. */
  take: Port['take']
  load: Port['load']
  scrape(): Promise<string>
  revocationList: TelemetryHttpOptions['revocationList']
  /** Asks devices to reconnect, finishes what is under way, and stops everything. */
  stop(): Promise<void>
}

export type StartStep = 'database' | 'authority' | 'listen'

/** gRPC messages larger than this are refused: 128 questions are under 100 kB. */
const messageBytesMax = 256 * 1_024
/** A connection without an open call gives up its place after so long; clients of gRPC open the next by themselves. */
const connectionIdleMs = 120_000
const keepaliveMs = 30_000
const keepaliveTimeoutMs = 10_000
const streamsPerConnectionMax = 256
/** A fleet is counted ten times a second. The first report of a device in a window waits for that; it comes once in half a minute. */
const healthGatherMs = 100
/** Removing what is old is no part of a start, which may be one of many: partitions are. */
const retentionEveryMs = 600_000
const dayMs = 86_400_000
/** Connections to one replica: lists and reports are asked for by people, one page at a time. */
const replicaPoolMax = 8
/** Share of the time to drain in which devices are asked to leave, so that the last of them has the rest to do so. */
const leavingShare = 0.5
/** How often an instance that drains looks whether the last stream has gone. */
const drainLookMs = 25
/** What the answers of the last calls have at least to arrive. */
const lastCallsMs = 1_000
/** What a part may take to stop beyond the time to drain: work that waits for a database that is away is given up. */
const stopMarginMs = 2_000

/** @throws when a part can't start; those that had started are stopped first */
export async function startServer(options: {
  settings: Settings
  log: Log
  clock?: Clock
  /** Neither of the ports is opened. */
  employment?: Employment
  /** Called as each part of the start is done. */
  onStep?: (step: StartStep, ms: number, detail: Record<string, unknown>) => void
}): Promise<RunningServer> {
  const { log } = options
  const stops: (() => Promise<void> | void)[] = []
  const stopAll = async () => {
    for (const stop of stops.reverse().splice(0)) {
      await within(options.settings.drainMs + stopMarginMs, stop).catch(error =>
        log.error({ err: error }, 'a part did not stop cleanly'),
      )
    }
  }
  try {
    return await compose(options, stops, stopAll)
  } catch (error) {
    await stopAll()
    throw error
  }
}

async function compose(
  { settings, log, clock = systemClock, employment, onStep = () => {} }: Parameters<typeof startServer>[0],
  stops: (() => Promise<void> | void)[],
  stopAll: () => Promise<void>,
): Promise<RunningServer> {
  const { instanceId } = settings
  const metrics = startMetrics({ instanceId, version })
  stops.push(metrics.stop)

  // Database
  let startedAt = performance.now()
  const { db, embedded } = await openState(settings, log, stops)
  const migrated = await db.migrate()
  const { newer } = await db.migrations()
  if (newer.length > 0) log.info({ newer }, 'the schema is of a newer version; it is left as it is')
  const retain = () => applyRetention(db.pool, settings.audit.retentionDays, clock(), log)
  await maintainPartitions(db.pool, settings.audit.retentionDays, clock())
  const retaining = setInterval(() => {
    retain().catch(error => log.warn({ err: error }, 'what is older than the retention could not be removed'))
  }, retentionEveryMs)
  stops.push(() => clearInterval(retaining))
  const audit = await auditCheck(db, embedded, log)
  // Before this instance is on record: what it writes from then on proves whom a replica follows.
  const reports = await openReplicas(settings, db, metrics.reportRead, clock, log)
  stops.push(reports.stop)
  const feed = await startChangeFeed({ servers: db.servers, instanceId, log, clock })
  stops.push(feed.stop)
  onStep('database', performance.now() - startedAt, { embedded, migrated: migrated.length })

  // Audit
  const sealKey = sealKeyFrom(settings.identity.enrollmentTokenSecret)
  const journal = startJournal({
    pool: db.pool,
    log,
    sealKey,
    instanceId,
    clock,
    onCommit: metrics.auditCommit,
  })
  stops.push(journal.stop)
  const refusals = countRefusals({ journal, clock })
  stops.push(refusals.stop)
  const follower = createFollower({ pool: db.pool, reports, clock, log })
  // Nobody has to wait for it; what one server does not get done, the next one that starts does.
  sealLeftovers({ pool: db.pool, key: sealKey, journal, instanceId, startedAtMs: clock() }).then(
    events => events > 0 && log.info({ events }, 'events of a server that was killed have been sealed'),
    error => log.warn({ err: error }, 'events that a server has left unsealed could not be looked for'),
  )

  // Identity
  startedAt = performance.now()
  const { trustDomain } = settings.identity
  const authorityOptions = authorityOptionsOf(settings, db, clock)
  const { authorities, created } = await keepAuthorities({ ...authorityOptions, feed, log })
  stops.push(authorities.stop)
  const issuance = createIssuance({
    db,
    authorities,
    trustDomain,
    crlUrl: settings.identity.crlUrl,
    caughtUp: feed.caughtUp,
    clock,
  })
  const trustBundle = createTrustBundleSource({ db, authorities, trustDomain, clock })
  const standing = createStanding({
    pool: db.pool,
    feed,
    isTrusted: keyId =>
      authorities
        .current()
        .trusted.some(({ issuerKeyId, generation }) => (keyId === null ? generation === 1 : issuerKeyId === keyId)),
  })
  let port: Port | undefined
  const serverCertificate = await keepServerCertificate({
    db,
    authorities,
    issuance,
    names: settings.identity.serverNames,
    validityMs: settings.identity.serverCertValidityMs,
    log,
    onChanged: certificate => port?.useIdentity(certificate),
  })
  stops.push(serverCertificate.stop)
  onStep('authority', performance.now() - startedAt, {
    created,
    trustDomain,
    rootKeySha256: authorities.current().issuing.rootKeySha256,
  })

  // Access
  startedAt = performance.now()
  const engine = await startEngine(settings, clock, log)
  stops.push(engine.stop)
  const facts = createFacts({ pool: db.pool, feed, maxAgeMs: settings.health.maxAgeMs, clock })
  const decider = createDecider({ facts, engine, clock, onError: settings.policy.onError })
  const leases = createLeases({
    decider,
    engine,
    feed,
    pool: db.pool,
    record: journal.appendLater,
    decisionOf: revocationEntry(instanceId, clock),
    instanceId,
    graceMs: settings.leases.graceMs,
    clock,
    log,
    onState: lease => metrics.connection(lease.serviceId, lease.state),
  })
  stops.push(leases.stop)
  const assertions =
    settings.userAssertions && createUserAssertions({ settings: settings.userAssertions, facts, clock, log })
  stops.push(() => assertions?.stop())
  const authorizeDeps = {
    assertions,
    facts,
    decider,
    leases,
    journal,
    instanceId,
    clock,
    limit: sharedAllowance({
      name: 'RATE_LIMIT_CONNECTIONS',
      limit: settings.rateLimits.connections,
      settle: settleIn(db.pool, 'RATE_LIMIT_CONNECTIONS', settings.rateLimits.connections),
    }),
    onDecisions: metrics.decisions,
    onDenied: metrics.denied,
    onUndecided: metrics.undecided,
    onConnection: metrics.connection,
  }
  const resume = createResume({
    ...authorizeDeps,
    claim: (ids, deviceId) =>
      claimConnections(db.pool, { ids, deviceId, instanceId, graceMs: settings.leases.graceMs }),
  })
  const revocations = watchRevocations({
    clock,
    onPush: metrics.revocationPush,
    onAcknowledge: metrics.revocationAcknowledged,
  })
  const instance = await keepInstanceRecord({ pool: db.pool, instanceId, leaseGraceMs: settings.leases.graceMs, log })
  stops.push(async () => {
    // What waits to be resumed has to be on record as such before this instance is gone.
    await journal.drained()
    await instance.stop(leases.suspended() > 0)
  })

  // Fleet
  const writer = startReportWriter({
    pool: db.pool,
    log,
    onDurable: report => {
      if (!report.announce) facts.reported(report.deviceId, report.measuredAtMs)
    },
  })
  stops.push(writer.drained)
  const certValidityMs = settings.identity.certValidityDays * dayMs
  const presence = await keepPresence({ pool: db.pool, instanceId, clock, log })
  stops.push(presence.stop)
  const heartbeats = createHeartbeats({
    writer,
    present: presence.opened,
    requirements: async () => (await facts.policyData()).requirements,
    async deviceStatus(id) {
      const device = await facts.device(id)
      return device && { status: device.status, reason: device.statusReason }
    },
    policyRevision: engine.revision,
    issuerKeyId: () => authorities.current().issuing.issuerKeyId,
    trustBundle: trustBundle.roots,
    limit: sharedAllowance({
      name: 'RATE_LIMIT_HEALTH',
      limit: settings.rateLimits.health,
      settle: settleIn(db.pool, 'RATE_LIMIT_HEALTH', settings.rateLimits.health),
      gatherMs: healthGatherMs,
    }),
    intervalMs: settings.health.heartbeatIntervalMs,
    maxAgeMs: settings.health.maxAgeMs,
    isLateInLife,
    clock,
    random: Math.random,
    onHeartbeat: () => metrics.heartbeat(),
  })
  feed.onChange(keys => {
    for (const key of keys) if (key.startsWith('device:')) heartbeats.tell(key.slice('device:'.length))
  })
  const census = await startCensus({ pool: db.pool, maxAgeMs: settings.health.maxAgeMs, log })
  stops.push(census.stop)

  // The port
  const server = new Server({
    'grpc.max_receive_message_length': messageBytesMax,
    'grpc.max_concurrent_streams': streamsPerConnectionMax,
    'grpc.max_connection_idle_ms': connectionIdleMs,
    'grpc.keepalive_time_ms': keepaliveMs,
    'grpc.keepalive_timeout_ms': keepaliveTimeoutMs,
    // What nobody reads is not counted: it costs a twentieth of a call.
    'grpc.enable_channelz': 0,
  })
  const dispatch = createDispatch({
    server,
    peerAt: address => port?.peer(address),
    demandStanding: standing.demand,
    demandPermission: permissionDemand(engine),
    journal,
    refusals,
    instanceId,
    clock,
    log,
    onCall: metrics.call,
  })
  const enforcement = enforceStanding({
    feed,
    standing,
    dispatch,
    onTrustChange: authorities.onChange,
    beforeCut(caller, { reason, metadata }) {
      if (reason === 'DEVICE_REVOKED') heartbeats.tellRevoked(caller, metadata.because ?? '')
    },
    clock,
    log,
  })
  stops.push(enforcement.stop)
  authorities.onChange(() => {
    trustBundle.invalidate()
    void heartbeats.tellAuthorities()
  })
  // The revocation lists are signed anew when certificates were revoked, or may have been.
  feed.onReset(trustBundle.invalidate)
  feed.onChange(keys => {
    if (keys.some(key => key.startsWith('crl:'))) trustBundle.invalidate()
  })
  const challenges = createChallenges({ secret: settings.identity.enrollmentTokenSecret, clock })
  const { enrollments } = settings.rateLimits
  const limitEnrollments = sharedRateLimit(db.pool, 'RATE_LIMIT_ENROLLMENTS', 'address', enrollments)
  stops.push(sweepRateLimits(db.pool, log))
  const approvals = createApprovals({ pool: db.pool, feed, log })
  const enrollDeps: EnrollDeps = {
    db,
    issuance,
    redemptions: createRedemptions({ pool: db.pool, issuance, trustDomain, certValidityMs, clock }),
    approvals,
    trustBundle,
    challenges,
    trustDomain,
    tokenSecret: settings.identity.enrollmentTokenSecret,
    certValidityMs,
    clock,
    limit: address => limitEnrollments(networkOf(address)),
    limitToken: sharedRateLimit(db.pool, 'RATE_LIMIT_ENROLLMENTS', 'token', enrollments),
    onEnrollment: metrics.enrollment,
  }
  const health = addServices(
    dispatch,
    {
      enroll: createEnroll(enrollDeps),
      challenges,
      limitOpenCalls: openCallLimit('RATE_LIMIT_ENROLLMENTS', enrollments),
      renewCertificate: createRenew({
        ...enrollDeps,
        limitRenewals: rateLimit('RATE_LIMIT_ENROLLMENTS', enrollments),
        demandIssuer: standing.demandIssuer,
        recovery: settings.identity.recovery,
        log,
        onRecovery: metrics.recovery,
      }),
      trustBundle,
      heartbeats,
      check: createCheck(authorizeDeps),
      authorize: createAuthorize({ ...authorizeDeps, resume, revocations, graceMs: settings.leases.graceMs }),
      envoyCheck: createEnvoyCheck({ ...authorizeDeps, standing, trustDomain }),
      admin: adminHandlers({
        db,
        reports,
        clock,
        maxAgeMs: settings.health.maxAgeMs,
        leaseGraceMs: settings.leases.graceMs,
        tokenSecret: settings.identity.enrollmentTokenSecret,
        authority: {
          trustDomain,
          current: authorities.current,
          refresh: authorities.refresh,
          trustBundle: trustBundle.current,
          rotation: createRotation({
            ...authorityOptions,
            current: authorities.current,
            recoveryMs: settings.identity.recovery.windowMs,
          }),
          recoveryMs: settings.identity.recovery.windowMs,
        },
        policy: {
          revision: engine.revision,
          explain: engine.explain,
          status: engine.status,
          engine: settings.opa.url ? 'opa-server' : 'in-process',
        },
      }),
      adminStreams: adminStreams({ db, clock, follower }),
    },
    clock,
  )
  port = await openPort({
    server,
    listen: employment ? undefined : settings.api,
    connectionsMost: employment?.connectionsMost,
    trustDomain,
    identity: serverCertificate.current(),
    trustedProxies: settings.api.trustedProxies,
    onProxyHeader: metrics.proxyHeader,
    issuerOf: certificate => issuerOf(certificate, authorities.current()),
    onAdmitted: metrics.admittedConnection,
    onRefused: metrics.refusedConnection,
    onConnection: enforcement.connected,
    log,
  })
  const openedPort = port
  stops.push(() => server.forceShutdown())
  let drainEndsAt = Number.POSITIVE_INFINITY
  stops.push(() => {
    const leftMs = Math.max(lastCallsMs, drainEndsAt - performance.now())
    return openedPort.close(Math.min(settings.drainMs, leftMs))
  })

  const { ownEvents } = journal
  const lifecycle = keepLifecycle({ db, clock, instanceId, trustDomain, ownEvents, log })
  stops.push(lifecycle.stop)

  // Telemetry
  metrics.observe({
    devicesByStatus: census.devicesByStatus,
    devicesByPresence: census.devicesByPresence,
    unhealthyDevices: census.unhealthyDevices,
    clocks: census.clocks,
    connectionsActive: leases.activeByService,
    connectionsSuspended: leases.suspended,
    revocationsUnacknowledged: revocations.unacknowledged,
    tlsConnections: port.connections,
    streamsOpen: dispatch.streamsOpen,
    connectionsWaiting: openedPort.waiting,
    pool: () => ({ total: db.pool.totalCount, idle: db.pool.idleCount, waiting: db.pool.waitingCount }),
    replicas: reports.status,
    databaseFailures: () => db.servers.failures,
    decisionCache: decider.stats,
    policy: () => ({ engine: settings.opa.url ? 'opa-server' : 'in-process', ...engine.status() }),
    feedLagSeconds: () => feed.lagMs() / 1_000,
    expiries: () => [
      ...expiriesOf(authorities.current()),
      { of: 'server', atMs: serverCertificate.current().notAfter.getTime() },
    ],
  })
  let stopping = false
  const readiness = async (): Promise<Readiness> => {
    const checks = {
      database: await databaseCheck(db),
      audit,
      facts: { ok: feed.isLive(), detail: feed.isLive() ? undefined : 'the change feed is behind' },
      authority: authorityCheck(authorities.current()),
      policy: policyCheck(engine),
      lifecycle: { ok: !stopping, detail: stopping ? 'stopping' : undefined },
    }
    return { ready: Object.values(checks).every(check => check.ok), checks }
  }
  const http = employment
    ? undefined
    : await startTelemetryHttp({
        ...settings.metrics,
        metrics: metrics.handler,
        ready: readiness,
        revocationList: trustBundle.revocationList,
        log,
      })
  stops.push(() => http?.stop())
  health.setServing(true)
  const policy = engine.revision()
  const ports = { port: port.port, metricsPort: http?.port ?? 0 }
  onStep('listen', performance.now() - startedAt, { ...ports, policy })
  if (employment) log.info({ instanceId, policy }, 'a worker is serving')
  else log.info({ ...ports, trustDomain, policy }, 'edgemesh is serving')

  let stopped: Promise<void> | undefined
  return {
    apiPort: ports.port,
    metricsPort: ports.metricsPort,
    instanceId,
    rootKeySha256: authorities.current().issuing.rootKeySha256,
    rootsPem: trustBundle.roots().rootsPem.join(''),
    createdAuthority: created,
    issueOperator: request => issueOperator({ db, authorities, issuance }, request),
    readiness,
    take: openedPort.take,
    load: openedPort.load,
    scrape: metrics.scrape,
    revocationList: trustBundle.revocationList,
    stop() {
      stopped ??= (async () => {
        stopping = true
        health.setServing(false)
        drainEndsAt = performance.now() + settings.drainMs
        heartbeats.askToReconnect(settings.drainMs * leavingShare)
        const draining = new Fault('UNAVAILABLE', 'DRAINING', 'this instance is stopping; connect again', {
          retryAfterMs: 1_000,
        })
        approvals.endAll(draining)
        follower.endAll(draining)
        // A stream that is cut has its device come back late, so each stays until its device has opened another elsewhere.
        while (dispatch.streamsOpen().size > 0 && performance.now() < drainEndsAt) await sleep(drainLookMs)
        dispatch.finishAll(draining)
        await stopAll()
        log.info(employment ? 'a worker has stopped' : 'edgemesh has stopped')
      })()
      return stopped
    },
  }
}

async function within(ms: number, stop: () => Promise<void> | void): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not stopped after ${ms} ms`)), ms)
  })
  await Promise.race([Promise.resolve().then(stop), timeout]).finally(() => clearTimeout(timer))
}

/** The database, embedded or given. */
async function openState(settings: Settings, log: Log, stops: (() => Promise<void> | void)[]) {
  let { url } = settings.database
  const embedded = url === undefined
  if (url === undefined) {
    const postgres = await startEmbeddedPostgres({ directory: join(settings.dataDir, 'postgres'), log })
    stops.push(postgres.stop)
    url = postgres.url
  }
  const db = await openDatabase({ url, poolMax: settings.database.poolMax, entities })
  stops.push(db.close)
  return { db, embedded }
}

async function openReplicas(
  { database, instanceId }: Settings,
  primary: Database,
  onRead: (from: ReadFrom) => void,
  clock: Clock,
  log: Log,
): Promise<Replicas> {
  const replicas = database.replicaUrls.map(async url => ({
    url,
    db: await openDatabase({ url, poolMax: replicaPoolMax, entities, takesStandby: true }),
  }))
  return startReplicas({ primary, replicas: await Promise.all(replicas), instanceId, clock, log, onRead })
}

async function startEngine({ opa, policy }: Settings, clock: Clock, log: Log): Promise<PolicyEngine> {
  const { url, timeoutMs, bearerToken } = opa
  if (url !== undefined) return startOpaPolicy({ url, timeoutMs, bearerToken, clock, log })
  if (policy.bundleDir !== undefined) return startFolderPolicy({ directory: policy.bundleDir, clock, log })
  return startShippedPolicy(clock)
}

function authorityOptionsOf({ identity }: Settings, db: Database, clock: Clock): AuthorityOptions {
  const { trustDomain, caCertValidityDays, caKeyPassphrase, caCertPem, caKeyPem } = identity
  return {
    db,
    trustDomain,
    validityDays: caCertValidityDays,
    passphrase: caKeyPassphrase,
    files: caCertPem && caKeyPem ? { certPem: caCertPem, keyPem: caKeyPem } : undefined,
    clock,
  }
}

/** An instance that can't issue lets nobody in and renews nobody: a balancer has to send them elsewhere. */
function authorityCheck({ issuing }: AuthoritySet): { ok: boolean; detail?: string } {
  const ok = issuing.issuer.privateKey !== undefined
  return { ok, ...(!ok && { detail: `the key of authority ${issuing.generation} is not here: see CA_KEY_FILE` }) }
}

function expiriesOf({ all }: AuthoritySet): Expiry[] {
  return all.flatMap(({ generation, stage, rootNotAfter, issuer }) => [
    { of: 'root' as const, generation, stage, atMs: rootNotAfter.getTime() },
    { of: 'issuer' as const, generation, stage, atMs: issuer.notAfter.getTime() },
  ])
}

/** A policy that was refused keeps nobody out while the one before it decides. */
function policyCheck(engine: PolicyEngine): { ok: boolean; detail: string } {
  const { revision, refused } = engine.status()
  const refusal = refused && `refused: ${refused.problem}`
  if (!engine.ready()) return { ok: false, detail: refusal ?? 'the policy can not be evaluated' }
  return { ok: true, detail: refusal ? `${revision}; ${refusal}` : revision }
}

/** Whether the service could change what it has put on record. It serves all the same: one role for all is how it begins. */
async function auditCheck(db: Database, embedded: boolean, log: Log): Promise<{ ok: true; detail?: string }> {
  const { role, isHeld } = await ownAudit(db.pool)
  if (isHeld) return { ok: true }
  const detail = `the role ${role} could change what is on record: see docs/audit.md`
  if (!embedded)
    log.warn({ role }, 'the service could change what is on record, as its role owns it: see docs/audit.md')
  return { ok: true, detail }
}

async function databaseCheck(db: Database): Promise<{ ok: boolean; detail?: string }> {
  try {
    await db.pool.query('select 1')
    return { ok: true }
  } catch (error) {
    return { ok: false, detail: (error as Error).message }
  }
}

/**
 * The state without the service, for commands that run beside the database.
 *
 * With the embedded database this fails, with a clear message, while a server uses it.
 */
export async function openOffline(
  settings: Settings,
  log: Log,
): Promise<{
  db: Database
  /** Makes the authority if there is none yet. */
  authorities(): Promise<AuthoritySet & { created: boolean }>
  issueOperator(request: OperatorRequest): Promise<CertifiedName>
  issueServiceIdentity(request: ServiceRequest): Promise<CertifiedName>
  close(): Promise<void>
}> {
  const stops: (() => Promise<void> | void)[] = []
  const close = async () => {
    for (const stop of stops.reverse().splice(0)) await stop()
  }
  try {
    const { db } = await openState(settings, log, stops)
    const openMigrated = async () => {
      await db.migrate()
      return openAuthorities(authorityOptionsOf(settings, db, systemClock))
    }
    const openIssuing = async () => {
      const { trustDomain, crlUrl } = settings.identity
      const { set } = await openMigrated()
      const authorities = { current: () => set }
      const caughtUp = async () => {}
      const issuance = createIssuance({ db, authorities, trustDomain, crlUrl, caughtUp, clock: systemClock })
      return { db, authorities, issuance }
    }
    return {
      db,
      close,
      async authorities() {
        const { set, created } = await openMigrated()
        return { ...set, created }
      },
      issueOperator: async request => issueOperator(await openIssuing(), request),
      issueServiceIdentity: async request => issueServiceIdentity(await openIssuing(), request),
    }
  } catch (error) {
    await close()
    throw error
  }
}
