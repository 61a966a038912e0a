/**
 * Leases: allowed connections, for as long as their ground holds.
 *
 * A lease's life:
 *
 * - `active`: allowed, and held on a stream. Decided anew when a fact that it rests on changes, when its verdict expires
 *   (health about to turn stale, closing time), and when the policy changes. Stays active if the answer is still yes.
 * - `suspended`: its stream is gone, and was not ended. It is decided anew like one that is active, and waits for its
 *   device to resume it on another stream, for the grace time. `resume.ts` says how.
 * - `revoked`: the answer has become no, its user's assertion has expired, an operator closed it, its holder was thrown
 *   out, or this instance has been cut off from the facts for longer than the grace time. The holder is told at once; the
 *   record follows.
 * - `closed`: the holder ended it, or ended its stream, or did not resume it in time.
 * - `moved`: it was resumed on another stream, here or at another instance. It lives on there; this copy of it is over, and
 *   leaves no trace on record.
 *
 * Revoked and closed are ends of the connection, and final. Here so is moved: what comes back is another copy.
 */
import type pg from 'pg'
import type { JournalEntry } from '../audit/journal.ts'
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'
import { spannedApart } from '../telemetry/tracing.ts'
import { decisionOf } from './connection-id.ts'
import { type Chained, createConnectionMap } from './connection-map.ts'
import { connectionEntry, departedConnections, recordedAfterMs } from './connection-records.ts'
import type { AccessQuestion, Decider, Verdict } from './decide.ts'
import { createLeaseSet, type LeaseSet, type SetOfLeases } from './lease-set.ts'
import type { PolicyEngine, PolicyReason } from './policy-engine.ts'
import { assertionExpired } from './user-assertion.ts'

export type LeaseState = 'active' | 'suspended' | 'revoked' | 'closed' | 'moved'

export type Lease = Record<SetOfLeases, number> &
  Chained & {
    questionId: string
    question: AccessQuestion
    userId: string
    serviceId: string
    role: string
    state: LeaseState
    grantedAtMs: number
    /** It has a row of its own, or will have. */
    recorded: boolean
    /** When the verdict that it stands on expires, or the user's assertion if that is sooner. */
    expiresAtMs: number
    /** How often it has been asked to be decided anew: what was asked earlier and is answered later does not count. */
    turn: number
    /** When the assertion that names its user expires; never, where the user was named without. */
    assertedUntilMs: number
    /** The answer that allowed it last; absent where that is the one that its id tells (`decisionOf`). */
    decisionId: string | undefined
    /** While it is suspended: until when it can be resumed, by the database's clock, which claims go by. */
    resumeBy: Date | undefined
    /** Tells the holder. */
    push: (revocation: Revocation) => void
    /** The holder holds it no more, and needn't be told. */
    moved: (lease: Lease) => void
  }

export type Revocation = {
  lease: Lease
  reasons: PolicyReason[]
  policyRevision: string
  decisionId: string
  /** When its ground went, by this instance's clock; absent where that is not known. */
  sinceMs: number | undefined
}

/** `recorded`: it is resumed, and so has a row. */
export type Granted = Omit<Lease, SetOfLeases | Exclude<keyof Chained, 'id'> | 'state' | 'resumeBy' | 'turn'>

export type Leases = {
  /**
   * From here on the lease is watched: before its decision is on record, so that no change falls between. One with the same
   * id that there is here has moved.
   *
   * @param lease by `newLease`
   * @param decidedBy the revision of the policy that allowed it; if that has been replaced meanwhile, it is decided anew
   */
  grant(lease: Lease, decidedBy?: string): Lease
  /** It is taken back for something that no change of its ground has shown. */
  revoke(lease: Lease, reasons: PolicyReason[]): void
  /**
   * Their holder ends them.
   *
   * @param noted what to put on record of those that have no row
   * @returns those that had not ended before
   */
  close(leases: readonly Lease[], noted: (ids: string[]) => JournalEntry): Lease[]
  /**
   * The holder is gone. At most `suspendedPerDeviceMax` of a device wait; beyond that those that have waited longest are closed.
   *
   * @param resumeByMs by the database's clock; default: for the grace time from now on
   */
  suspend(leases: Iterable<Lease>, resumeByMs?: number): void
  /** One that is active or suspended. */
  find(connectionId: string): Lease | undefined
  /** It was never told to anybody. */
  drop(lease: Lease): void
  /** Looks up which of these connections have ended or moved elsewhere. @throws when the database can't be asked */
  reconcile(ids: Iterable<string>, sinceMs?: number): Promise<void>
  activeByService(): Map<string, number>
  suspended(): number
  stop(): void
}

export type LeasesOptions = {
  decider: Pick<Decider, 'decide'>
  engine: Pick<PolicyEngine, 'revision' | 'onRevision'>
  feed: Pick<ChangeFeed, 'onChange' | 'onReset' | 'lagMs' | 'databaseTimeMs'>
  pool: pg.Pool
  /** Writes what has happened: the ends of leases and the decisions that ended them. */
  record: (entries: JournalEntry[]) => void
  /** The decision row for a verdict that ended a lease, and its id. */
  decisionOf: (lease: Lease, verdict: Verdict) => { entry: JournalEntry; decisionId: string }
  instanceId: string
  /** For how long a lease may be resumed, and for how long this instance may be cut off. */
  graceMs: number
  clock: Clock
  log: Log
  /** It has been suspended, or has ended. */
  onState: (lease: Lease) => void
}

/** How often leases are looked through for what has expired, or has to get a row: about 5 ns a lease. */
const sweepMs = 200
/** Leases decided anew at the same time: keeps a policy server's queue short. */
const underWayMax = 64
/** A lease that could not be decided is tried again after this long. */
const retryMs = 500
/** Leases of one device that wait to be resumed: as many as a stream may hold. */
export const suspendedPerDeviceMax = 4_096
/** Rows of connections that wait for the journal as one. */
const recordedAtOnceMax = 500
/** Leases looked up in one statement. */
const reconciledAtOnceMax = 5_000

const ways: Record<LeaseState, readonly LeaseState[]> = {
  active: ['suspended', 'revoked', 'closed', 'moved'],
  suspended: ['revoked', 'closed', 'moved'],
  revoked: [],
  closed: [],
  moved: [],
}

export function createLeases(options: LeasesOptions): Leases {
  const { decider, engine, feed, clock, log, graceMs, instanceId } = options
  /** Those that are active or suspended, by id. */
  const watched = createConnectionMap<Lease>()
  const byDevice = new Map<string, LeaseSet<Lease>>()
  /** By device, those that have waited longest first. */
  const suspended = groups<Lease>()
  /** To be decided anew, each with the moment since when it might not stand. */
  const due = new Map<Lease, number | undefined>()
  let underWay = 0

  /** None may be added or removed meanwhile. */
  function forEachWatched(visit: (lease: Lease) => void): void {
    // A device's leases lie closer together in memory than those that `watched` has next to each other.
    for (const ofDevice of byDevice.values()) ofDevice.forEach(visit)
  }

  const isWatched = ({ state }: Lease) => state === 'active' || state === 'suspended'

  /** The one place in which a state changes. @returns false when there is no way there */
  function become(lease: Lease, state: LeaseState): boolean {
    if (!ways[lease.state].includes(state)) return false
    const { deviceId } = lease.question
    if (lease.state === 'suspended') suspended.remove(deviceId, lease)
    lease.state = state
    if (state === 'suspended') {
      suspended.add(deviceId, lease)
    } else {
      watched.remove(lease)
      due.delete(lease)
      const ofDevice = byDevice.get(deviceId)
      ofDevice?.remove(lease)
      if (ofDevice?.size === 0) byDevice.delete(deviceId)
    }
    if (state !== 'moved') options.onState(lease)
    return true
  }

  function entryOf(lease: Lease, reasons: PolicyReason[] = []): JournalEntry {
    lease.recorded = true
    return connectionEntry(lease, instanceId, clock(), reasons)
  }

  function revoke(lease: Lease, revocation: Omit<Revocation, 'lease'>, decision?: JournalEntry): void {
    if (!become(lease, 'revoked')) return
    // Told first: a revocation needs nobody's leave, and must not wait for a database that may be away.
    lease.push({ lease, ...revocation })
    const record = entryOf(lease, revocation.reasons)
    options.record(decision ? [decision, record] : [record])
  }

  function takeBack(lease: Lease, reasons: PolicyReason[], sinceMs?: number): void {
    revoke(lease, { reasons, policyRevision: engine.revision(), decisionId: decisionOf(lease), sinceMs })
  }

  function move(lease: Lease): void {
    if (become(lease, 'moved')) lease.moved(lease)
  }

  async function decideAnew(lease: Lease, sinceMs: number | undefined): Promise<void> {
    const turn = ++lease.turn
    try {
      if (lease.assertedUntilMs <= clock()) {
        takeBack(lease, [assertionExpired(lease.assertedUntilMs)], sinceMs)
        return
      }
      const { verdict, ground } = await decider.decide(lease.question)
      if (!isWatched(lease) || lease.turn !== turn) return
      if (verdict.allow) {
        lease.expiresAtMs = Math.min(verdict.expiresAtMs, lease.assertedUntilMs)
        const { id: userId = '', role = '' } = ground.user.value ?? {}
        if (userId === lease.userId && role === lease.role) return
        // From here on changes of these concern it. One that came while this was decided did not, so it is decided once more.
        lease.userId = userId
        lease.role = role
        enqueue([lease], sinceMs)
        return
      }
      const { entry, decisionId } = options.decisionOf(lease, verdict)
      const { reasons, policyRevision } = verdict
      revoke(lease, { reasons, policyRevision, decisionId, sinceMs }, entry)
    } catch (error) {
      if (!(error instanceof Fault)) log.warn({ err: error, lease: lease.id }, 'a lease could not be decided anew')
      if (clock() - lease.expiresAtMs > graceMs) {
        takeBack(lease, [outOfTouch(graceMs)])
        return
      }
      setTimeout(() => enqueue([lease], sinceMs), retryMs).unref()
    }
  }

  function enqueue(leases: Iterable<Lease>, sinceMs?: number): void {
    for (const lease of leases) if (isWatched(lease)) due.set(lease, earliest(due.get(lease), sinceMs))
    work()
  }

  function work(): void {
    for (const [lease, sinceMs] of due) {
      if (underWay >= underWayMax) return
      due.delete(lease)
      underWay++
      const about = { 'edgemesh.connection': lease.id, 'edgemesh.device': lease.question.deviceId }
      spannedApart('connection decided anew', about, () => decideAnew(lease, sinceMs)).finally(() => {
        underWay--
        work()
      })
    }
  }

  async function reconcile(ids: Iterable<string>, sinceMs?: number): Promise<void> {
    const looked = new Map<string, Lease>()
    for (const id of ids) {
      const lease = watched.get(id)
      if (lease) looked.set(id, lease)
    }
    const all = [...looked.keys()]
    for (let at = 0; at < all.length; at += reconciledAtOnceMax) {
      const departed = await departedConnections(options.pool, all.slice(at, at + reconciledAtOnceMax), instanceId)
      for (const { id, status, endReasons } of departed) {
        // A copy that has come since was not what was looked up.
        const lease = looked.get(id) as Lease
        if (status === 'active') move(lease)
        else takeBack(lease, endReasons ?? [], sinceMs)
      }
    }
  }

  function reconcileSoon(ids: Iterable<string>, sinceMs?: number): void {
    reconcile(ids, sinceMs).catch(error => log.warn({ err: error }, 'connections can not be looked up'))
  }

  feed.onChange((keys, announcedAtMs) => {
    const connections: string[] = []
    for (const key of keys) {
      const at = key.indexOf(':')
      const [kind, id] = [key.slice(0, at), key.slice(at + 1)]
      if (kind === 'device') enqueue(byDevice.get(id)?.values() ?? [], announcedAtMs)
      else if (kind === 'connection') connections.push(id)
      else if (kind === 'policy') enqueue(watched.values(), announcedAtMs)
      else if (kind === 'user')
        enqueue(
          those(lease => lease.userId === id),
          announcedAtMs,
        )
      else if (kind === 'service')
        enqueue(
          those(lease => lease.serviceId === id),
          announcedAtMs,
        )
      else if (kind === 'grants')
        enqueue(
          those(lease => lease.role === id),
          announcedAtMs,
        )
    }
    if (connections.some(id => watched.get(id))) reconcileSoon(connections, announcedAtMs)
  })
  feed.onReset(() => {
    enqueue(watched.values())
    if (watched.size > 0) reconcileSoon(watched.values().map(({ id }) => id))
  })
  engine.onRevision(() => enqueue(watched.values(), clock()))

  function those(which: (lease: Lease) => boolean): Lease[] {
    const found: Lease[] = []
    forEachWatched(lease => {
      if (which(lease)) found.push(lease)
    })
    return found
  }

  function closeUnresumed(lease: Lease): void {
    if (become(lease, 'closed')) options.record([entryOf(lease, [notResumed])])
  }

  const sweeping = setInterval(() => {
    const now = clock()
    if (feed.lagMs() > graceMs) {
      for (const lease of watched.values()) takeBack(lease, [outOfTouch(graceMs)])
      return
    }
    const databaseNow = feed.databaseTimeMs(now)
    for (const lease of suspended.all()) {
      if (lease.resumeBy && lease.resumeBy.getTime() <= databaseNow) closeUnresumed(lease)
    }
    const expired: Lease[] = []
    const lasting: Lease[] = []
    forEachWatched(lease => {
      const { expiresAtMs, recorded, grantedAtMs } = lease
      if (expiresAtMs <= now) expired.push(lease)
      if (!recorded && Math.abs(now - grantedAtMs) >= recordedAfterMs) lasting.push(lease)
    })
    for (let at = 0; at < lasting.length; at += recordedAtOnceMax) {
      options.record(lasting.slice(at, at + recordedAtOnceMax).map(lease => entryOf(lease)))
    }
    for (const lease of expired) enqueue([lease], lease.expiresAtMs)
  }, sweepMs)
  sweeping.unref()

  return {
    grant(lease, decidedBy = engine.revision()) {
      const before = watched.add(lease)
      if (before) move(before)
      const { deviceId } = lease.question
      let ofDevice = byDevice.get(deviceId)
      if (!ofDevice) {
        ofDevice = createLeaseSet('atDevice')
        byDevice.set(deviceId, ofDevice)
      }
      ofDevice.add(lease)
      // The change of the policy was told before there was this lease to think of.
      if (decidedBy !== engine.revision()) enqueue([lease])
      return lease
    },
    revoke: (lease, reasons) => takeBack(lease, reasons),
    close(leases, noted) {
      const closed = leases.filter(lease => become(lease, 'closed'))
      const entries: JournalEntry[] = []
      const withoutRow: string[] = []
      for (const lease of closed) {
        if (lease.recorded) entries.push(entryOf(lease))
        else withoutRow.push(lease.id)
      }
      if (withoutRow.length > 0) entries.push(noted(withoutRow))
      if (entries.length > 0) options.record(entries)
      return closed
    },
    suspend(leases, resumeByMs = feed.databaseTimeMs(clock()) + graceMs) {
      const entries: JournalEntry[] = []
      for (const lease of leases) {
        lease.resumeBy = new Date(resumeByMs)
        if (!become(lease, 'suspended')) continue
        // What belongs to the stream goes with it.
        lease.push = nobody
        lease.moved = nobody
        entries.push(entryOf(lease))
        const siblings = suspended.of(lease.question.deviceId)
        const [longest] = siblings
        if (siblings.size > suspendedPerDeviceMax && longest) closeUnresumed(longest)
      }
      if (entries.length > 0) options.record(entries)
    },
    find: id => watched.get(id),
    drop(lease) {
      if (become(lease, 'closed') && lease.recorded) options.record([entryOf(lease)])
    },
    reconcile,
    activeByService() {
      const counts = new Map<string, number>()
      forEachWatched(({ state, serviceId }) => {
        if (state === 'active') counts.set(serviceId, (counts.get(serviceId) ?? 0) + 1)
      })
      return counts
    },
    suspended: () => suspended.all().length,
    stop: () => clearInterval(sweeping),
  }
}

/** One that is not watched yet: for `Leases.grant`. */
export function newLease(granted: Granted): Lease {
  // One by one: spreading the object is many times as dear.
  return {
    id: granted.id,
    idHash: 0,
    nextInChain: undefined,
    questionId: granted.questionId,
    question: granted.question,
    userId: granted.userId,
    serviceId: granted.serviceId,
    role: granted.role,
    state: 'active',
    grantedAtMs: granted.grantedAtMs,
    recorded: granted.recorded,
    expiresAtMs: granted.expiresAtMs,
    assertedUntilMs: granted.assertedUntilMs,
    turn: 0,
    decisionId: granted.decisionId,
    resumeBy: undefined,
    push: granted.push,
    moved: granted.moved,
    atStream: -1,
    atDevice: -1,
  }
}

function nobody(): void {}

function earliest(one: number | undefined, other: number | undefined): number | undefined {
  if (one === undefined || other === undefined) return one ?? other
  return Math.min(one, other)
}

/** Sets by name; one that is empty is not kept. */
function groups<T>() {
  const sets = new Map<string, Set<T>>()
  const none: ReadonlySet<T> = new Set()
  return {
    add(name: string, member: T): void {
      const set = sets.get(name)
      if (set) set.add(member)
      else sets.set(name, new Set([member]))
    },
    remove(name: string, member: T): void {
      const set = sets.get(name)
      set?.delete(member)
      if (set?.size === 0) sets.delete(name)
    },
    of: (name: string): ReadonlySet<T> => sets.get(name) ?? none,
    all: (): T[] => [...sets.values()].flatMap(set => [...set]),
  }
}

export const notResumed: PolicyReason = {
  code: 'NOT_RESUMED',
  field: 'connection.resume_by',
  actual: 'not resumed',
  required: 'resumed in time',
  message: 'The stream that held the connection was lost, and the device did not resume it in time.',
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
