/**
 * What the service counts and measures, in the names that Prometheus sees.
 *
 *     const metrics = startMetrics({ instanceId, version })
 *     metrics.decisions(1, 0, 0.0004)
 *     metrics.observe({ unhealthyDevices: () => presence.unhealthy })
 *     startTelemetryHttp({ metrics: metrics.handler, … })
 *
 * Each `Metrics` has a meter provider of its own, so several servers in one process (tests) stay apart. `NodeSDK` of
 * OpenTelemetry can't do that: it registers itself as the one provider of the process. It is used where there is one of
 * it in a process: for traces, in `tracing.ts`.
 *
 * Counters on hot paths are plain maps that OpenTelemetry reads when Prometheus asks: an authorization stream puts
 * tens of thousands of decisions a second through here, and OpenTelemetry's own counters hash their labels each time.
 */
import type { IncomingMessage, ServerResponse } from 'node:http'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import type { Meter, ObservableResult } from '@opentelemetry/api'
import { PrometheusExporter, PrometheusSerializer } from '@opentelemetry/exporter-prometheus'
import { MeterProvider } from '@opentelemetry/sdk-metrics'

export type Metrics = {
  /** The decisions that one message asked for have been made, all within so many seconds. */
  decisions(allowed: number, denied: number, seconds: number): void
  /** A question has been denied, for these reasons. */
  denied(reasons: readonly { code: string }[]): void
  /** Questions on a stream could not be decided, for this reason. */
  undecided(questions: number, reason: string): void
  /** An enrollment has ended: `enrolled`, or the reason of its refusal. Or it has begun to wait: `pending`. */
  enrollment(outcome: string): void
  /** A device has come back with an expired certificate: how, or the reason why it was refused. */
  recovery(outcome: string): void
  /** Heartbeats were accepted. */
  heartbeat(count?: number): void
  /** A connection to a service has changed its status. */
  connection(service: string, status: string): void
  /** An RPC has ended with this canonical code. The method is one of ours: unknown ones are the caller's words. */
  call(method: string, code: string): void
  /** A trusted proxy has opened a connection: its header was `read`, or was `malformed` or `late`. */
  proxyHeader(outcome: string): void
  /** The handshake of a connection begins, for which it has waited so long. */
  admittedConnection(waitedMs: number): void
  /**
   * A connection was ended when its handshake was over: `not_http2`, or `address_full`; or before it has begun:
   * `queue_full`, `waited_too_long`, or `no_hello`.
   */
  refusedConnection(why: string): void
  /** A batch of audit rows has been committed. */
  auditCommit(rows: number, seconds: number): void
  /** A list or report was read at `replica`, or at `primary` although there are replicas, and then why. */
  reportRead(from: string): void
  /** A revocation has been pushed, so many seconds after its ground went. */
  revocationPush(seconds: number): void
  /** The device has acknowledged it. */
  revocationAcknowledged(seconds: number): void
  /** Adds sources that are read at each scrape. Without a source there is no series. */
  observe(sources: Partial<MetricSources>): void
  /** Answers a scrape. */
  handler(request: IncomingMessage, response: ServerResponse): void
  /** What a scrape would be answered, for a parent who answers for several processes. */
  scrape(): Promise<string>
  stop(): Promise<void>
}

/** Read at each scrape, and so at once from memory. */
export type MetricSources = {
  devicesByStatus: () => ReadonlyMap<string, number>
  /** Active devices that are there, or are not. */
  devicesByPresence: () => ReadonlyMap<string, number>
  unhealthyDevices: () => number
  /** Devices whose clock is wrong, and the most by which one is. */
  clocks: () => { wrong: number; offsetMsMax: number }
  /** By service. */
  connectionsActive: () => ReadonlyMap<string, number>
  /** Whose stream is gone, and which wait to be resumed. */
  connectionsSuspended: () => number
  /** Pushed to devices that have not acknowledged them. */
  revocationsUnacknowledged: () => number
  /** Past their handshake. */
  tlsConnections: () => number
  /** By method. */
  streamsOpen: () => ReadonlyMap<string, number>
  /** Connections that wait for their handshake to begin. */
  connectionsWaiting: () => number
  pool: () => { total: number; idle: number; waiting: number }
  replicas: () => readonly ReplicaSource[]
  /** By kind, so far. */
  databaseFailures: () => ReadonlyMap<string, number>
  decisionCache: () => { entries: number; hits: number; misses: number; invalidations: ReadonlyMap<string, number> }
  policy: () => PolicySource
  /** How far the change feed is behind. */
  feedLagSeconds: () => number
  /** Ends of the lives of authorities and of the server's certificate, ms since epoch, with what they are the ends of. */
  expiries: () => readonly Expiry[]
}

export type ReplicaSource = {
  name: string
  state: string
  lagMs: number | undefined
  lagBytes: number | undefined
}

export type Expiry =
  | { of: 'root' | 'issuer'; generation: number; stage: string; atMs: number }
  | { of: 'server'; atMs: number }

/** The policy that decides, and what came of the one that should. Revision empty: there is none. */
export type PolicySource = {
  engine: string
  revision: string
  activatedAtMs: number | undefined
  checkedAtMs: number | undefined
  refused: object | undefined
  refusals: number
}

/** A label set beyond these counts under `other`: what callers can name must not grow without end. */
const SERIES_MAX = 1_000

/** Policies that one instance has had and that are observed still. */
const REVISIONS_SHOWN_MAX = 20

const DECISION_SECONDS = [
  0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
]
const COMMIT_SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]

const REVOCATION_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]

const WAIT_SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]

const EVENT_LOOP_RESOLUTION_MS = 10

export function startMetrics({ instanceId, version }: { instanceId: string; version: string }): Metrics {
  const { exporter, provider, meter, scrape } = createMeter()

  const decisions = tally(meter, 'edgemesh_authorization_decisions_total', 'Authorization decisions', ['decision'])
  const denials = tally(
    meter,
    'edgemesh_authorization_denials_total',
    'Reasons for which questions were denied; there may be several against one question',
    ['reason'],
  )
  const undecided = tally(
    meter,
    'edgemesh_authorization_undecided_total',
    'Questions on streams that could not be decided',
    ['reason'],
  )
  const enrollments = tally(
    meter,
    'edgemesh_device_enrollments_total',
    'Enrollments by how they ended, and those that began to wait as pending',
    ['outcome'],
  )
  const recoveries = tally(
    meter,
    'edgemesh_certificate_recoveries_total',
    'Devices that came back with an expired certificate, by how that ended',
    ['outcome'],
  )
  const heartbeats = tally(meter, 'edgemesh_health_checks_total', 'Heartbeats accepted', [])
  const connections = tally(meter, 'edgemesh_connections_total', 'Connections by service and status reached', [
    'service',
    'status',
  ])
  const calls = tally(meter, 'edgemesh_calls_total', 'RPCs by method and status code', ['method', 'code'])
  const proxyHeaders = tally(meter, 'edgemesh_proxy_headers_total', 'PROXY protocol headers by outcome', ['outcome'])
  const refusedConnections = tally(meter, ...refusedConnectionsTotal)
  const reportReads = tally(
    meter,
    'edgemesh_report_reads_total',
    'Lists and reports read, where there are replicas, by where and why there',
    ['where', 'why'],
  )
  const admittedConnections = tally(meter, 'edgemesh_admitted_connections_total', 'Handshakes begun', [])
  const waitSeconds = meter.createHistogram('edgemesh_connection_wait_seconds', {
    description: 'Time from the first words of a client to the begin of its handshake',
    advice: { explicitBucketBoundaries: WAIT_SECONDS },
  })
  const auditRows = tally(meter, 'edgemesh_audit_rows_total', 'Audit rows committed', [])
  const decisionSeconds = meter.createHistogram('edgemesh_authorization_latency_seconds', {
    description: 'Time from a message to the decisions that it asked for',
    advice: { explicitBucketBoundaries: DECISION_SECONDS },
  })
  const commitSeconds = meter.createHistogram('edgemesh_audit_commit_seconds', {
    description: 'Time to commit a batch of audit rows',
    advice: { explicitBucketBoundaries: COMMIT_SECONDS },
  })
  const revocationPushSeconds = meter.createHistogram('edgemesh_revocation_push_seconds', {
    description: 'Time from the commit that took the ground of a connection, or its expiry, to the push to its device',
    advice: { explicitBucketBoundaries: REVOCATION_SECONDS },
  })
  const revocationAcknowledgedSeconds = meter.createHistogram('edgemesh_revocation_acknowledged_seconds', {
    description:
      'Time from the commit that took the ground of a connection, or its expiry, to the acknowledgement by its device',
    advice: { explicitBucketBoundaries: REVOCATION_SECONDS },
  })
  // Series that alerts compute rates of exist from the start, or their first increase would go unseen.
  decisions(0, 'allow')
  decisions(0, 'deny')
  for (const reason of ['POLICY_UNAVAILABLE', 'AUDIT_UNAVAILABLE', 'DATABASE_UNAVAILABLE']) undecided(0, reason)
  heartbeats(0)
  auditRows(0)
  for (const why of ['not_http2', 'address_full', 'queue_full', 'waited_too_long', 'no_hello'])
    refusedConnections(0, why)
  admittedConnections(0)
  for (const outcome of ['quarantined', 'approved', 'needs_approval']) recoveries(0, outcome)

  meter
    .createObservableGauge('edgemesh_build_info', { description: 'Always 1; the labels say who is being scraped' })
    .addCallback(result => result.observe(1, { version, instance_id: instanceId }))
  watchProcess(meter)
  const stopEventLoop = watchEventLoop(meter)

  return {
    decisions(allowed, denied, seconds) {
      if (allowed > 0) decisions(allowed, 'allow')
      if (denied > 0) decisions(denied, 'deny')
      decisionSeconds.record(seconds)
    },
    denied(reasons) {
      for (const { code } of reasons) denials(1, code)
    },
    undecided,
    enrollment: outcome => enrollments(1, outcome),
    recovery: outcome => recoveries(1, outcome),
    heartbeat: (count = 1) => heartbeats(count),
    connection: (service, status) => connections(1, service, status),
    call: (method, code) => calls(1, method, code),
    proxyHeader: outcome => proxyHeaders(1, outcome),
    admittedConnection(waitedMs) {
      admittedConnections(1)
      waitSeconds.record(waitedMs / 1_000)
    },
    refusedConnection: why => refusedConnections(1, why),
    auditCommit(rows, seconds) {
      auditRows(rows)
      commitSeconds.record(seconds)
    },
    reportRead(from) {
      const [where = '', why = ''] = from.split(': ')
      reportReads(1, where, why)
    },
    revocationPush: seconds => revocationPushSeconds.record(seconds),
    revocationAcknowledged: seconds => revocationAcknowledgedSeconds.record(seconds),
    observe: sources => observeSources(meter, sources),
    handler: (request, response) => exporter.getMetricsRequestHandler(request, response),
    scrape,
    async stop() {
      stopEventLoop()
      await provider.shutdown()
    },
  }
}

export type ParentMetrics = {
  /** A worker has ended that was not told to: it `crashed`, was `silent` and was killed, or `left` in good order. */
  workerEnded(how: 'crashed' | 'silent' | 'left'): void
  /** A connection found no worker that could take it. */
  refusedConnection(): void
  scrape(): Promise<string>
  stop(): Promise<void>
}

/** What the parent of workers measures: itself, and who of them is there. @param workers their number by state */
export function startParentMetrics(workers: () => ReadonlyMap<string, number>): ParentMetrics {
  const { provider, meter, scrape } = createMeter()
  const ended = tally(meter, 'edgemesh_worker_exits_total', 'Workers that ended by themselves, by how', ['how'])
  const refusedConnections = tally(meter, ...refusedConnectionsTotal)
  for (const how of ['crashed', 'silent', 'left']) ended(0, how)
  refusedConnections(0, 'no_worker')
  meter
    .createObservableGauge('edgemesh_workers', { description: 'Worker processes by state' })
    .addCallback(each('state', workers))
  watchProcess(meter)
  return {
    workerEnded: how => ended(1, how),
    refusedConnection: () => refusedConnections(1, 'no_worker'),
    scrape,
    stop: () => provider.shutdown(),
  }
}

const refusedConnectionsTotal = [
  'edgemesh_refused_connections_total',
  'Connections ended before or with their handshake, or for want of a worker, by why',
  ['why'],
] as const

function createMeter() {
  const exporter = new PrometheusExporter({ preventServerStart: true, withoutScopeInfo: true, withoutTargetInfo: true })
  const provider = new MeterProvider({ readers: [exporter] })
  const serializer = new PrometheusSerializer('', false, undefined, true, true)
  return {
    exporter,
    provider,
    meter: provider.getMeter('edgemesh'),
    scrape: async () => serializer.serialize((await exporter.collect()).resourceMetrics),
  }
}

type Tally = (count: number, ...labelValues: string[]) => void

/** A counter as a plain map from label values to a sum. */
function tally(meter: Meter, name: string, description: string, labels: readonly string[]): Tally {
  type Sum = { attributes: Record<string, string>; sum: number }
  /** By the first label, then by the others: most have one or two, and no text has to be made to look it up. */
  const sums = new Map<string, Map<string, Sum>>()
  let series = 0
  meter.createObservableCounter(name, { description }).addCallback(result => {
    for (const ofFirst of sums.values()) {
      for (const { attributes, sum } of ofFirst.values()) result.observe(sum, attributes)
    }
  })

  function add(count: number, first = '', second = '', ...others: string[]): void {
    const rest = others.length === 0 ? second : [second, ...others].join('\n')
    const ofFirst = sums.get(first)
    const known = ofFirst?.get(rest)
    if (known) {
      known.sum += count
      return
    }
    const labelValues = [first, second, ...others].slice(0, labels.length)
    // One place is kept for `other` itself, so that it can always be entered.
    const isOther = labelValues.every(value => value === 'other')
    if (series >= SERIES_MAX - 1 && !isOther) {
      add(count, ...labels.map(() => 'other'))
    } else {
      const attributes = Object.fromEntries(labels.map((label, index) => [label, labelValues[index] ?? '']))
      series++
      if (ofFirst) ofFirst.set(rest, { attributes, sum: count })
      else sums.set(first, new Map([[rest, { attributes, sum: count }]]))
    }
  }
  return add
}

function observeSources(meter: Meter, sources: Partial<MetricSources>): void {
  const { devicesByStatus, devicesByPresence, unhealthyDevices, clocks, connectionsActive, streamsOpen } = sources
  const { connectionsSuspended, revocationsUnacknowledged, tlsConnections, connectionsWaiting } = sources
  const { pool, replicas, databaseFailures, decisionCache, policy, feedLagSeconds, expiries } = sources

  function gauge(name: string, description: string, read: (result: ObservableResult) => void): void {
    meter.createObservableGauge(name, { description }).addCallback(read)
  }
  function counter(name: string, description: string, read: (result: ObservableResult) => void): void {
    meter.createObservableCounter(name, { description }).addCallback(read)
  }

  if (devicesByStatus) {
    gauge('edgemesh_devices_total', 'Devices by status', each('status', devicesByStatus))
  }
  if (devicesByPresence) {
    gauge('edgemesh_devices_present', 'Active devices by presence', each('presence', devicesByPresence))
  }
  if (unhealthyDevices) {
    gauge('edgemesh_unhealthy_devices', 'Devices that are late or out of posture', result =>
      result.observe(unhealthyDevices()),
    )
  }
  if (clocks) {
    gauge('edgemesh_wrong_clock_devices', 'Devices whose clock is off by more than a minute', result =>
      result.observe(clocks().wrong),
    )
    gauge('edgemesh_device_clock_offset_max_seconds', 'The most by which the clock of a device is off', result =>
      result.observe(clocks().offsetMsMax / 1_000),
    )
  }
  if (connectionsActive) {
    gauge('edgemesh_connections_active', 'Connections open now', each('service', connectionsActive))
  }
  if (connectionsSuspended) {
    gauge('edgemesh_connections_suspended', 'Connections that wait to be resumed', result =>
      result.observe(connectionsSuspended()),
    )
  }
  if (revocationsUnacknowledged) {
    gauge('edgemesh_revocations_unacknowledged', 'Revocations pushed and not acknowledged', result =>
      result.observe(revocationsUnacknowledged()),
    )
  }
  if (tlsConnections) {
    gauge('edgemesh_tls_connections', 'TLS connections open now', result => result.observe(tlsConnections()))
  }
  if (streamsOpen) {
    gauge('edgemesh_streams_open', 'Streams open now', each('method', streamsOpen))
  }
  if (connectionsWaiting) {
    gauge('edgemesh_connections_waiting', 'Connections that wait for their handshake to begin', result =>
      result.observe(connectionsWaiting()),
    )
  }
  if (pool) {
    gauge('edgemesh_database_pool_connections', 'Database connections by state', result => {
      for (const [state, count] of Object.entries(pool())) result.observe(count, { state })
    })
  }
  if (databaseFailures) {
    counter(
      'edgemesh_database_failures_total',
      'What the database did not do, by the kind of failure: docs/database-failures.md',
      each('kind', databaseFailures),
    )
  }
  if (decisionCache) {
    gauge('edgemesh_decision_cache_entries', 'Decisions held', result => result.observe(decisionCache().entries))
    counter('edgemesh_decision_cache_hits_total', 'Decisions found', result => result.observe(decisionCache().hits))
    counter('edgemesh_decision_cache_misses_total', 'Decisions not found and made', result =>
      result.observe(decisionCache().misses),
    )
    counter(
      'edgemesh_decision_cache_invalidations_total',
      'Decisions held that could not be used again, by what has changed',
      each('cause', () => decisionCache().invalidations),
    )
  }
  if (replicas) watchReplicas(meter, replicas)
  if (policy) watchPolicy(meter, policy)
  if (expiries) watchExpiries(meter, expiries)
  if (feedLagSeconds) {
    gauge('edgemesh_change_feed_lag_seconds', 'Age of the oldest change not seen yet', result =>
      result.observe(feedLagSeconds()),
    )
  }
}

function watchReplicas(meter: Meter, read: () => readonly ReplicaSource[]): void {
  meter
    .createObservableGauge('edgemesh_replica_ready', {
      description: '1 for replicas that lists and reports are read from',
    })
    .addCallback(result => {
      for (const { name, state } of read()) result.observe(state === 'ready' ? 1 : 0, { replica: name })
    })
  meter
    .createObservableGauge('edgemesh_replica_lag_seconds', {
      description:
        'How long ago a replica had all that the primary had; while it is ready, how long it took to have it',
    })
    .addCallback(result => {
      for (const { name, lagMs } of read()) if (lagMs !== undefined) result.observe(lagMs / 1_000, { replica: name })
    })
  meter
    .createObservableGauge('edgemesh_replica_lag_bytes', {
      description: 'WAL that a replica has not replayed, when it was looked at',
    })
    .addCallback(result => {
      for (const { name, lagBytes } of read()) if (lagBytes !== undefined) result.observe(lagBytes, { replica: name })
    })
}

function watchPolicy(meter: Meter, read: () => PolicySource): void {
  function gauge(name: string, description: string, value: (policy: PolicySource) => number | undefined): void {
    meter.createObservableGauge(name, { description }).addCallback(result => {
      const now = value(read())
      if (now !== undefined) result.observe(now)
    })
  }
  // What is not observed keeps its last value: a policy that has been replaced is told to be 0, once at least.
  const replaced = new Set<string>()
  meter
    .createObservableGauge('edgemesh_policy_revision', {
      description: '1 for the policy that decides, which the label names; 0 for those before it',
    })
    .addCallback(result => {
      const { revision, engine } = read()
      replaced.delete(revision)
      for (const before of replaced) result.observe(0, { revision: before, engine })
      if (!revision) return
      result.observe(1, { revision, engine })
      replaced.add(revision)
      if (replaced.size > REVISIONS_SHOWN_MAX) replaced.delete([...replaced][0]!)
    })
  gauge(
    'edgemesh_policy_activated_timestamp_seconds',
    'Since when the policy decides at this instance, Unix time',
    ({ activatedAtMs }) => activatedAtMs && activatedAtMs / 1_000,
  )
  gauge(
    'edgemesh_policy_last_checked_timestamp_seconds',
    'When the policy that decides was last seen to be the one that should, Unix time',
    ({ checkedAtMs }) => checkedAtMs && checkedAtMs / 1_000,
  )
  gauge('edgemesh_policy_refused', '1 while what was found in place of the policy is refused', ({ refused }) =>
    refused ? 1 : 0,
  )
  meter
    .createObservableCounter('edgemesh_policy_refusals_total', { description: 'Policies that were refused' })
    .addCallback(result => result.observe(read().refusals))
}

/** What has gone is not observed any more, and neither shown: an authority that was forgotten raises no alarm. */
function watchExpiries(meter: Meter, read: () => readonly Expiry[]): void {
  meter
    .createObservableGauge('edgemesh_ca_expiry_timestamp_seconds', {
      description: 'When the certificate of an authority expires, Unix time',
    })
    .addCallback(result => {
      for (const expiry of read()) {
        if (expiry.of === 'server') continue
        const { of: ca, generation, stage, atMs } = expiry
        result.observe(atMs / 1_000, { ca, generation: String(generation), stage })
      }
    })
  meter
    .createObservableGauge('edgemesh_server_certificate_expiry_timestamp_seconds', {
      description: "When this instance's own certificate expires, Unix time",
    })
    .addCallback(result => {
      for (const { of, atMs } of read()) if (of === 'server') result.observe(atMs / 1_000)
    })
}

function each(label: string, read: () => ReadonlyMap<string, number>): (result: ObservableResult) => void {
  // What is not observed keeps its last value: who has been counted once is counted from then on, as 0 if need be.
  const seen = new Set<string>()
  return result => {
    const counts = read()
    for (const value of counts.keys()) seen.add(value)
    for (const value of seen) result.observe(counts.get(value) ?? 0, { [label]: value })
  }
}

/** Under the names that every Prometheus client library uses, so that common dashboards find them. */
function watchProcess(meter: Meter): void {
  meter
    .createObservableGauge('process_resident_memory_bytes', { description: 'Resident memory' })
    .addCallback(result => result.observe(process.memoryUsage.rss()))
  meter
    .createObservableCounter('process_cpu_seconds_total', { description: 'User and system CPU time' })
    .addCallback(result => {
      const { user, system } = process.cpuUsage()
      result.observe((user + system) / 1_000_000)
    })
  const startedAtSeconds = Math.round(Date.now() / 1_000 - process.uptime())
  meter
    .createObservableGauge('process_start_time_seconds', { description: 'Start of the process, Unix time' })
    .addCallback(result => result.observe(startedAtSeconds))
}

/** How late timers fire, over the time since the last scrape. Returns what ends the watch. */
function watchEventLoop(meter: Meter): () => void {
  const delay = monitorEventLoopDelay({ resolution: EVENT_LOOP_RESOLUTION_MS })
  delay.enable()
  meter
    .createObservableGauge('edgemesh_event_loop_delay_seconds', { description: 'Lateness of timers since last scrape' })
    .addCallback(result => {
      for (const quantile of [0.5, 0.99, 1]) {
        // The histogram holds the whole interval between two ticks: what exceeds its resolution is delay.
        const lateMs = delay.percentile(quantile * 100) / 1_000_000 - EVENT_LOOP_RESOLUTION_MS
        result.observe(Math.max(0, lateMs) / 1_000, { quantile: String(quantile) })
      }
      delay.reset()
    })
  return () => delay.disable()
}
