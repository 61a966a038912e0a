/** What a statement costs in a database of a million devices, beside the same in one of ten thousand. */

import { claimConnections, departedConnections } from '../../../src/access/connection-records.ts'
import { createFacts } from '../../../src/access/facts.ts'
import { keepInstanceRecord } from '../../../src/access/instances.ts'
import { auditEventHandlers } from '../../../src/admin/audit-events.ts'
import { connectionHandlers } from '../../../src/admin/connections.ts'
import { decisionHandlers } from '../../../src/admin/decisions.ts'
import { deviceHandlers } from '../../../src/admin/devices.ts'
import type { Call } from '../../../src/caller.ts'
import { readAtPrimary } from '../../../src/db/replicas.ts'
import { startCensus } from '../../../src/fleet/census.ts'
import { keepPresence, sweepPresence } from '../../../src/fleet/presence.ts'
import { startReportWriter } from '../../../src/fleet/report-writer.ts'
import { DevicePresence, DeviceStatus } from '../../../src/gen/edgemesh/v1/types.ts'
import { createStanding } from '../../../src/identity/standing.ts'
import { createLog } from '../../../src/telemetry/log.ts'
import { givenServerUrl, startEmbedded } from '../../support/postgres-server.ts'
import { connectionOf, deviceOf, type FilledDatabase, fillDatabase, instanceIds } from '../filled-database.ts'
import type { Group, Row } from '../row.ts'
import { type Cost, costOf, statementsOf } from '../statements.ts'

const few = 10_000
const many = Number(process.env.BENCH_ROWS ?? 1_000_000)
/** An index is a level deeper for a hundred times the rows; what is looked up in several is so in each. */
const buffersRatioMax = 1.8
const batch = 500
const log = createLog({ level: 'silent' })
const clock = () => Date.now()

type Subject = {
  name: string
  /** What of the service sends it. */
  run: (db: FilledDatabase) => Promise<unknown>
  /** Of several statements those that match. */
  only?: RegExp
  /** Pages that it may look at whatever the ratio: a few for each of so many look-ups, which lie side by side in a small table. */
  pagesMax?: number
  /** It looks at all there are, by its nature: told, not judged. */
  isWhole?: true
}

const nobodyChanges = { onChange() {}, onReset() {}, isLive: () => true, caughtUp: async () => {} }
const call = () => ({ audit: { target: '', detail: {} } }) as unknown as Call
/** Devices of all over the table. */
const spread = ({ devices }: FilledDatabase) =>
  Array.from({ length: batch }, (_, at) => deviceOf(1 + Math.floor((at * devices) / batch)))
const middle = ({ devices }: FilledDatabase) => deviceOf(devices / 2 + 1)
const page = { pageSize: 100, pageToken: '' }
const tokenOf = (...key: string[]) => Buffer.from(JSON.stringify(key)).toString('base64url')
const facts = (db: FilledDatabase) =>
  createFacts({ pool: db.pool, feed: nobodyChanges as never, maxAgeMs: 300_000, clock })
const devices = (db: FilledDatabase) => deviceHandlers({ db, reports: readAtPrimary(db), clock, maxAgeMs: 300_000 })
const graceMs = 30_000
const connections = (db: FilledDatabase) =>
  connectionHandlers({ db, reports: readAtPrimary(db), clock, leaseGraceMs: graceMs })
const listing = { ...page, status: DeviceStatus.UNSPECIFIED, labels: {}, presence: undefined }

const subjects: Subject[] = [
  {
    name: 'rows.heartbeats',
    async run(db) {
      const writer = startReportWriter({ pool: db.pool, log, onDurable() {} })
      const posture = { cpuPercent: 11, memoryPercent: 41, diskPercent: 50, attributes: {} }
      const nowMs = Date.now() + 60_000
      const report = { sequence: 1, posture, failing: [], measuredAtMs: nowMs, receivedAtMs: nowMs }
      const rest = { clockOffsetMs: 1, trustBundleId: '', issuerKeyId: '', announce: false }
      await Promise.all(spread(db).map(deviceId => writer.write({ deviceId, ...report, ...rest })))
    },
  },
  {
    name: 'rows.facts',
    run: db => Promise.resolve(facts(db).ground({ deviceId: middle(db), user: 'user-500', service: 'service-50' })),
  },
  { name: 'rows.facts.by-address', run: db => facts(db).user('user-501@example.com') },
  {
    name: 'rows.standing',
    run: db =>
      createStanding({ pool: db.pool, feed: nobodyChanges as never, isTrusted: () => true })
        .demandSeen(middle(db), 'none', Date.now())
        .catch(() => {}),
  },
  {
    name: 'rows.presence',
    only: /^insert into device_presence/,
    async run(db) {
      const presence = await keepPresence({ pool: db.pool, instanceId: 'bench', clock, log })
      for (const id of spread(db)) presence.opened(id)
      await new Promise(resolve => setTimeout(resolve, 1_000))
      await presence.stop()
    },
  },
  {
    name: 'rows.claim',
    // A row that has room on its page for its new version needs no index to be written.
    pagesMax: 50,
    run: db =>
      claimConnections(db.pool, {
        ids: [connectionOf(2 * (db.devices / 2 + 1))],
        deviceId: middle(db),
        instanceId: instanceIds[0]!,
        graceMs,
      }),
  },
  {
    name: 'rows.departed',
    pagesMax: 5 * batch,
    run: db =>
      departedConnections(
        db.pool,
        Array.from({ length: batch }, (_, at) => connectionOf(2 * (1 + Math.floor((at * db.devices) / batch)))),
        instanceIds[0]!,
      ),
  },
  {
    name: 'rows.instance-record',
    only: /^with recursive dead/,
    async run(db) {
      const record = await keepInstanceRecord({ pool: db.pool, instanceId: 'bench', leaseGraceMs: 30_000, log })
      await record.stop(false)
    },
  },
  { name: 'rows.presence-sweep', run: db => db.pool.query(sweepPresence, [3_600]) },
  { name: 'rows.list.devices', run: db => devices(db).listDevices(listing, call()) },
  {
    name: 'rows.list.devices.deep',
    run: db => devices(db).listDevices({ ...listing, pageToken: tokenOf(middle(db)) }, call()),
  },
  {
    name: 'rows.list.devices.quarantined',
    run: db => devices(db).listDevices({ ...listing, status: DeviceStatus.QUARANTINED }, call()),
  },
  {
    name: 'rows.list.devices.pending',
    run: db => devices(db).listDevices({ ...listing, status: DeviceStatus.PENDING }, call()),
  },
  {
    name: 'rows.list.devices.label',
    // A five hundredth of the fleet carries it.
    pagesMax: 6_000,
    run: db => devices(db).listDevices({ ...listing, labels: { site: 'site-77' } }, call()),
  },
  {
    name: 'rows.list.devices.no-label',
    run: db => devices(db).listDevices({ ...listing, labels: { site: 'nowhere' } }, call()),
  },
  {
    name: 'rows.list.devices.online',
    run: db => devices(db).listDevices({ ...listing, presence: DevicePresence.ONLINE }, call()),
  },
  {
    name: 'rows.list.devices.offline',
    run: db => devices(db).listDevices({ ...listing, presence: DevicePresence.OFFLINE }, call()),
  },
  {
    // Of those who hold a stream hardly any is: each has to be looked at until a page is full.
    name: 'rows.list.devices.stale',
    isWhole: true,
    run: db => devices(db).listDevices({ ...listing, presence: DevicePresence.STALE }, call()),
  },
  { name: 'rows.device', run: db => devices(db).getDevice({ id: middle(db) }, call()) },
  {
    name: 'rows.list.connections',
    // Of the newest some have ended.
    pagesMax: 500,
    run: db => connections(db).listConnections({ ...page, deviceId: '', status: 1 }, call()),
  },
  {
    name: 'rows.list.connections.device',
    run: db => connections(db).listConnections({ ...page, deviceId: middle(db), status: 0 }, call()),
  },
  {
    name: 'rows.list.decisions',
    run: db => decisions(db).listDecisions({ ...page, deviceId: '', after: undefined, before: undefined }, call()),
  },
  {
    name: 'rows.list.decisions.device',
    run: db =>
      decisions(db).listDecisions({ ...page, deviceId: middle(db), after: undefined, before: undefined }, call()),
  },
  {
    name: 'rows.list.audit.target',
    run: db =>
      auditEventHandlers({ reports: readAtPrimary(db) }).searchAuditEvents(
        { ...page, ...noFilter, target: `device/${middle(db)}` },
        call(),
      ),
  },
  {
    name: 'rows.census',
    isWhole: true,
    async run(db) {
      const census = await startCensus({ pool: db.pool, maxAgeMs: 300_000, log })
      census.stop()
    },
  },
]

const noFilter = { actor: '', method: '', target: '', code: '', after: undefined, before: undefined }
const decisions = (db: FilledDatabase) =>
  decisionHandlers({
    reports: readAtPrimary(db),
    policy: { revision: () => 'bench', explain: async () => undefined } as never,
  })

export const group: Group = {
  title: `Statements at ${many.toLocaleString('en')} devices; the floor is the same at ${few.toLocaleString('en')}`,
  async *measure({ progress }) {
    const given = givenServerUrl()
    const server = given ? { url: given, stop: async () => {} } : await startEmbedded('rows', 'error')
    const databases: FilledDatabase[] = []
    try {
      for (const devices of [few, many]) {
        progress(`a database of ${devices.toLocaleString('en')} devices is filled`)
        databases.push(await fillDatabase(server.url, devices))
      }
      const [small, large] = databases as [FilledDatabase, FilledDatabase]
      for (const subject of subjects) {
        progress(subject.name)
        yield rowOf(subject, await sumOf(subject, small), await sumOf(subject, large))
      }
    } finally {
      for (const database of databases) await database.drop()
      await server.stop()
    }
  },
}

/** All statements of a subject together. */
async function sumOf({ run, only = /./ }: Subject, db: FilledDatabase): Promise<Cost> {
  const sum: Cost = { ms: 0, buffers: 0, plan: [], wholeTables: [] }
  const statements = (await statementsOf(() => run(db))).filter(({ text }) => only.test(text.trim()))
  if (statements.length === 0) throw new Error('it has sent no statement')
  for (const statement of statements) {
    const cost = await costOf(db, statement)
    sum.ms += cost.ms
    sum.buffers += cost.buffers
    sum.plan.push(...cost.plan)
    sum.wholeTables.push(...cost.wholeTables)
  }
  return sum
}

function rowOf({ name, isWhole, pagesMax = 0 }: Subject, small: Cost, large: Cost): Row {
  const buffersRatio = large.buffers / Math.max(1, small.buffers)
  const plan = [...new Set(large.plan)].join(', ')
  const note = `${small.buffers} pages, then ${large.buffers}; ${plan}`
  const row = { name, value: large.ms, unit: 'ms', floor: small.ms, ratio: small.ms / large.ms, note }
  if (isWhole) return row
  const demand = `no table read whole, and at most ${buffersRatioMax} times the pages`
  // A page more for each of a few look-ups is a level of an index, whatever the ratio.
  const isFlat = buffersRatio <= buffersRatioMax || large.buffers <= Math.max(pagesMax, small.buffers + 8)
  return { ...row, bar: { demand, met: large.wholeTables.length === 0 && isFlat } }
}
