/**
 * Leases: allowed connections, for as long as their ground holds.
 *
 * A lease's life:
 *
 * - `active`: allowed. Decided anew when a fact that it rests on changes, when its verdict expires (health about to turn
 *   stale, closing time), and when the policy changes. Stays active if the answer is still yes.
 * - `revoked`: the answer has become no, an operator closed it, its holder was thrown out, or this instance has been cut
 *   off from the facts for longer than the grace time. The holder is told at once; the record follows.
 * - `closed`: the holder ended it, or its stream did.
 *
 * Both ends are final.
 */
import { randomUUIDv7 } from 'node:crypto'
import type pg from 'pg'
import type { JournalEntry } from '../audit/journal.ts'
import type { JournalTable } from '../audit/journal-table.ts'
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import type { AccessQuestion, Decider, Verdict } from './decide.ts'
import type { PolicyEngine, PolicyReason } from './policy-engine.ts'

export type Lease = {
  id: string
  questionId: string
  question: AccessQuestion
  userId: string
  serviceId: string
  role: string
  state: 'active' | 'revoked' | 'closed'
  grantedAtMs: number
  /** When the verdict that it stands on expires. */
  expiresAtMs: number
  decisionId: string
  /** Tells the holder. */
  push: (revocation: Revocation) => void
}

export type Revocation = {
  lease: Lease
  reasons: PolicyReason[]
  policyRevision: string
  decisionId: string
}

export type Leases = {
  /** From here on the lease is watched: before it is on record, so that no change falls between. */
  grant(lease: Omit<Lease, 'id' | 'state' | 'grantedAtMs'>): Lease
  /** It is taken back for something that policy has no part in. */
  revoke(lease: Lease, reasons: PolicyReason[]): void
  /** The holder ends it. @returns false when it had ended before */
  close(lease: Lease): boolean
  /** The same, with its record left to the caller's batch. */
  drop(lease: Lease): void
  activeByService(): Map<string, number>
  stop(): void
}

export type LeasesOptions = {
  decider: Decider
  engine: PolicyEngine
  feed: ChangeFeed
  pool: pg.Pool
  /** Writes what has happened: the ends of leases and the decisions that ended them. */
  record: (entries: JournalEntry[]) => void
  /** The decision row for a verdict that ended a lease, and its id. */
  decisionOf: (lease: Lease, verdict: Verdict) => { entry: JournalEntry; decisionId: string }
  instanceId: string
  graceMs: number
  clock: Clock
  log: Log
  onEnd: (lease: Lease) => void
}

/** How often leases are looked through for expired verdicts: about 5 ns a lease. */
const sweepMs = 200
/** Leases decided anew at the same time: keeps a policy server's queue short. */
const underWayMax = 64
/** A lease that could not be decided is tried again after this long. */
const retryMs = 500

const connectionsTable: JournalTable = {
  name: 'connections',
  columns: [
    { name: 'id', type: 'uuid' },
    { name: 'device_id', type: 'text' },
    { name: 'user_id', type: 'text' },
    { name: 'service_id', type: 'text' },
    { name: 'action', type: 'text' },
    { name: 'instance_id', type: 'text' },
    { name: 'status', type: 'text' },
    { name: 'granted_at', type: 'timestamptz' },
    { name: 'ended_at', type: 'timestamptz' },
    { name: 'end_reasons', type: 'jsonb' },
    { name: 'decision_id', type: 'text' },
  ],
  key: row => String(row[0]),
  // A connection ends once: what came first stays.
  onConflict: `on conflict (id) do update set status = excluded.status, ended_at = excluded.ended_at,
    end_reasons = excluded.end_reasons where connections.status = 'active'`,
}

export function createLeases(options: LeasesOptions): Leases {
  const { decider, engine, feed, clock, log } = options
  const active = new Set<Lease>()
  const byDevice = new Map<string, Set<Lease>>()
  const due = new Set<Lease>()
  let underWay = 0

  function end(lease: Lease, state: 'revoked' | 'closed'): void {
    lease.state = state
    active.delete(lease)
    due.delete(lease)
    const siblings = byDevice.get(lease.question.deviceId)
    siblings?.delete(lease)
    if (siblings?.size === 0) byDevice.delete(lease.question.deviceId)
    options.onEnd(lease)
  }

  function revoke(
    lease: Lease,
    reasons: PolicyReason[],
    policyRevision: string,
    decision?: JournalEntry,
    id = '',
  ): void {
    if (lease.state !== 'active') return
    end(lease, 'revoked')
    const decisionId = id || lease.decisionId
    // Told first: a revocation needs nobody's leave, and must not wait for a database that may be away.
    lease.push({ lease, reasons, policyRevision, decisionId })
    const record = connectionEntry(lease, options.instanceId, clock(), reasons)
    options.record(decision ? [decision, record] : [record])
  }

  async function decideAnew(lease: Lease): Promise<void> {
    try {
      const { verdict } = await decider.decide(lease.question)
      if (lease.state !== 'active') return
      if (verdict.allow) {
        lease.expiresAtMs = verdict.expiresAtMs
        return
      }
      const { entry, decisionId } = options.decisionOf(lease, verdict)
      revoke(lease, verdict.reasons, verdict.policyRevision, entry, decisionId)
    } catch (error) {
      if (!(error instanceof Fault)) log.warn({ err: error, lease: lease.id }, 'a lease could not be decided anew')
      if (clock() - lease.expiresAtMs > options.graceMs) {
        revoke(lease, [outOfTouch(options.graceMs)], engine.revision())
        return
      }
      setTimeout(() => enqueue([lease]), retryMs).unref()
    }
  }

  function enqueue(leases: Iterable<Lease>): void {
    for (const lease of leases) if (lease.state === 'active') due.add(lease)
    work()
  }

  function work(): void {
    for (const lease of due) {
      if (underWay >= underWayMax) return
      due.delete(lease)
      underWay++
      decideAnew(lease).finally(() => {
        underWay--
        work()
      })
    }
  }

  /** An operator has closed it: the row says why. */
  async function closedByOperator(id: string): Promise<void> {
    const lease = [...active].find(candidate => candidate.id === id)
    if (!lease) return
    const { rows } = await options.pool.query<{ status: string; end_reasons: PolicyReason[] | null }>(
      'select status, end_reasons from connections where id = $1',
      [id],
    )
    if (rows[0]?.status === 'revoked') revoke(lease, rows[0].end_reasons ?? [], engine.revision())
  }

  feed.onChange(keys => {
    for (const key of keys) {
      const at = key.indexOf(':')
      const [kind, id] = [key.slice(0, at), key.slice(at + 1)]
      if (kind === 'device') enqueue(byDevice.get(id) ?? [])
      else if (kind === 'connection')
        closedByOperator(id).catch(error => log.warn({ err: error }, 'can not read a connection'))
      else if (kind === 'policy') enqueue(active)
      else if (kind === 'user') enqueue([...active].filter(lease => lease.userId === id))
      else if (kind === 'service') enqueue([...active].filter(lease => lease.serviceId === id))
      else if (kind === 'grants') enqueue([...active].filter(lease => lease.role === id))
    }
  })
  feed.onReset(() => enqueue(active))
  engine.onRevision(() => enqueue(active))

  const sweeping = setInterval(() => {
    const now = clock()
    if (feed.lagMs() > options.graceMs) {
      for (const lease of [...active]) revoke(lease, [outOfTouch(options.graceMs)], engine.revision())
      return
    }
    enqueue([...active].filter(lease => lease.expiresAtMs <= now))
  }, sweepMs)
  sweeping.unref()

  return {
    grant(wanted) {
      const lease: Lease = { ...wanted, id: randomUUIDv7(), state: 'active', grantedAtMs: clock() }
      active.add(lease)
      const siblings = byDevice.get(lease.question.deviceId)
      if (siblings) siblings.add(lease)
      else byDevice.set(lease.question.deviceId, new Set([lease]))
      return lease
    },
    revoke: (lease, reasons) => revoke(lease, reasons, engine.revision()),
    close(lease) {
      if (lease.state !== 'active') return false
      end(lease, 'closed')
      options.record([connectionEntry(lease, options.instanceId, clock(), [])])
      return true
    },
    drop(lease) {
      if (lease.state === 'active') end(lease, 'closed')
    },
    activeByService() {
      const counts = new Map<string, number>()
      for (const lease of active) counts.set(lease.serviceId, (counts.get(lease.serviceId) ?? 0) + 1)
      return counts
    },
    stop: () => clearInterval(sweeping),
  }
}

/** The row of a connection as it stands. */
export function connectionEntry(
  lease: Lease,
  instanceId: string,
  nowMs: number,
  reasons: PolicyReason[],
): JournalEntry {
  const ended = lease.state !== 'active'
  return {
    table: connectionsTable,
    row: [
      lease.id,
      lease.question.deviceId,
      lease.userId,
      lease.serviceId,
      lease.question.action,
      instanceId,
      lease.state,
      new Date(lease.grantedAtMs),
      ended ? new Date(nowMs) : null,
      ended ? JSON.stringify(reasons) : null,
      lease.decisionId,
    ],
  }
}

function outOfTouch(graceMs: number): PolicyReason {
  return {
    code: 'FACTS_UNKNOWN',
    field: 'server.facts',
    actual: 'out of touch',
    required: `in touch within ${graceMs / 1_000} s`,
    message: 'The server has lost touch with the facts for too long to let the connection go on.',
  }
}
