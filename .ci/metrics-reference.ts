/** docs/metrics.md, from what src/telemetry/metrics.ts shows when each of its metrics has been used once. */
import {
  type MetricSources,
  type Metrics,
  type ParentMetrics,
  startMetrics,
  startParentMetrics,
} from '../src/telemetry/metrics.ts'

type Metric = { name: string; type: string; help: string; labels: Map<string, Set<string>> }

/** A label that is left out here shows no values. */
type Uses<M> = { [Method in Exclude<keyof M, 'observe' | 'handler' | 'scrape' | 'stop'>]: (metrics: M) => void }

// A method or a source that is missing here is an error of types: no metric is forgotten.
const uses: Uses<Metrics> = {
  decisions: metrics => metrics.decisions(1, 1, 0.001),
  denied: metrics => metrics.denied(['DISK_NOT_ENCRYPTED', 'DEVICE_QUARANTINED'].map(code => ({ code }))),
  undecided: metrics => metrics.undecided(1, 'FACTS_BEHIND'),
  enrollment(metrics) {
    for (const outcome of ['enrolled', 'pending', 'TOKEN_EXPIRED']) metrics.enrollment(outcome)
  },
  recovery: metrics => metrics.recovery('quarantined'),
  heartbeat: metrics => metrics.heartbeat(),
  connection(metrics) {
    for (const status of ['allowed', 'denied', 'resumed', 'suspended', 'revoked', 'closed', 'moved']) {
      metrics.connection('…', status)
    }
  },
  call: metrics => metrics.call('/edgemesh.v1.EnrollService/Enroll', 'OK'),
  proxyHeader(metrics) {
    for (const outcome of ['read', 'malformed', 'late']) metrics.proxyHeader(outcome)
  },
  admittedConnection: metrics => metrics.admittedConnection(1),
  refusedConnection: metrics => metrics.refusedConnection('not_http2'),
  auditCommit: metrics => metrics.auditCommit(1, 0.001),
  reportRead(metrics) {
    for (const from of ['replica', 'primary: none ready', 'primary: replica behind', 'primary: replica failed'])
      metrics.reportRead(from)
  },
  revocationPush: metrics => metrics.revocationPush(0.01),
  revocationAcknowledged: metrics => metrics.revocationAcknowledged(0.01),
}

const sources: MetricSources = {
  devicesByStatus: () => new Map(['active', 'pending', 'quarantined', 'revoked'].map(status => [status, 1])),
  devicesByPresence: () => new Map(['online', 'stale', 'offline'].map(presence => [presence, 1])),
  unhealthyDevices: () => 0,
  clocks: () => ({ wrong: 0, offsetMsMax: 0 }),
  connectionsActive: () => new Map([['…', 1]]),
  connectionsSuspended: () => 0,
  revocationsUnacknowledged: () => 0,
  tlsConnections: () => 0,
  streamsOpen: () => new Map([['/edgemesh.v1.HeartbeatService/Heartbeat', 1]]),
  connectionsWaiting: () => 0,
  pool: () => ({ total: 1, idle: 1, waiting: 0 }),
  replicas: () => [{ name: '…', state: 'ready', lagMs: 1, lagBytes: 1 }],
  databaseFailures: () => new Map(['unreachable', 'pool_exhausted', 'timeout'].map(kind => [kind, 1])),
  decisionCache: () => ({
    entries: 1,
    hits: 1,
    misses: 1,
    invalidations: new Map(
      ['device', 'user', 'service', 'grants', 'policy', 'revision', 'time'].map(cause => [cause, 1]),
    ),
  }),
  policy: () => ({
    engine: 'in-process',
    revision: '…',
    activatedAtMs: 1,
    checkedAtMs: 1,
    refused: undefined,
    refusals: 0,
  }),
  feedLagSeconds: () => 0,
  expiries: () => [
    { of: 'root', generation: 1, stage: 'issuing', atMs: 1 },
    { of: 'issuer', generation: 1, stage: 'issuing', atMs: 1 },
    { of: 'server', atMs: 1 },
  ],
}

const usesOfParent: Uses<ParentMetrics> = {
  workerEnded: metrics => metrics.workerEnded('crashed'),
  refusedConnection: metrics => metrics.refusedConnection(),
}

/** Whose values are not told: they are whatever there is. */
const open = new Set(['service', 'replica', 'revision', 'version', 'instance_id', 'generation'])
const valuesShownMax = 8

export async function metricsReference(): Promise<string> {
  const metrics = startMetrics({ instanceId: '…', version: '…' })
  metrics.observe(sources)
  for (const use of Object.values(uses)) use(metrics)
  const parent = startParentMetrics(() => new Map(['starting', 'serving', 'stopping', 'gone'].map(state => [state, 1])))
  for (const use of Object.values(usesOfParent)) use(parent)
  const ofInstance = read(await metrics.scrape())
  const ofParent = read(await parent.scrape()).filter(({ name }) => !ofInstance.some(metric => metric.name === name))
  await Promise.all([metrics.stop(), parent.stop()])
  return `# Metrics

<!-- Made from src/telemetry/metrics.ts by npm run generate. -->

What \`/metrics\` of METRICS_PORT shows. Names end with the unit: \`_seconds\`, \`_bytes\`, \`_total\` for counts that only grow; a histogram has
\`_bucket\`, \`_sum\` and \`_count\`. A metric that has nothing to tell (no replicas, nothing refused yet) is not there. Label values are those
that exist, or examples where they are many; no label holds more than a thousand of them, and what comes then counts as \`other\`.

[monitoring.md](monitoring.md) has the alerts and dashboards that look at them, \`deploy/prometheus/rules/recording.yml\` what is computed of them.

${table(ofInstance)}

## With workers

\`edgemesh serve --workers\` answers for all of its processes: each series has a label \`worker\`, and the parent adds its own
([workers.md](workers.md)).

${table(ofParent)}
`
}

function table(metrics: Metric[]): string {
  const rows = metrics.map(({ name, type, help, labels }) => {
    const told = [...labels].map(([label, values]) => {
      const shown = [...values].filter(value => value !== '').slice(0, valuesShownMax)
      return open.has(label) ? `\`${label}\`` : `\`${label}\`: ${shown.map(value => `\`${value}\``).join(', ')}`
    })
    return `| <a id="${name}"></a>\`${name}\` | ${type} | ${told.join('<br>')} | ${help.replaceAll('|', '\\|')} |`
  })
  return ['| name | type | labels | meaning |', '|---|---|---|---|', ...rows].join('\n')
}

/** The metrics of an exposition in Prometheus' text format. */
function read(text: string): Metric[] {
  const metrics = new Map<string, Metric>()
  for (const line of text.split('\n')) {
    const [, what, name = '', rest = ''] = /^# (HELP|TYPE) (\S+) (.*)$/.exec(line) ?? []
    if (what === 'HELP') metrics.set(name, { name, type: '', help: rest, labels: new Map() })
    const known = metrics.get(name)
    if (what === 'TYPE' && known) known.type = rest
    const [, series = '', labels = ''] = /^([a-z_]+)(?:\{(.*)\})? /.exec(line) ?? []
    const metric = metrics.get(series) ?? metrics.get(series.replace(/_(bucket|sum|count)$/, ''))
    for (const [, label = '', value = ''] of labels.matchAll(/([a-z_]+)="((?:[^"\\]|\\.)*)"/g)) {
      if (!metric || (label === 'le' && metric.type === 'histogram')) continue
      const values = metric.labels.get(label) ?? new Set()
      metric.labels.set(label, values.add(value))
    }
  }
  return [...metrics.values()].sort((one, other) => (one.name < other.name ? -1 : 1))
}
