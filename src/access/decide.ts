/**
 * Decide: one question, answered by policy over facts.
 *
 * facts → decision cache → on a miss one evaluation, shared by identical questions that ask meanwhile → an answer that
 * never outlives the freshness of the health it rests on, nor the time of day that policy looked at.
 *
 * The cache can't be wrong: a verdict is kept with the version of every fact and the revision of the policy that it rests
 * on, and is used only while all of them are what they were, and the time is between its making and its end.
 */
import { LRUCache } from 'lru-cache'
import { canonicalJson } from '../audit/seals.ts'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { spanned } from '../telemetry/tracing.ts'
import type { Facts, Ground } from './facts.ts'
import type { AuthzInput, PolicyDecision, PolicyEngine, PolicyReason, Weekday } from './policy-engine.ts'

/** `user` is an id or an e-mail address. */
export type AccessQuestion = { deviceId: string; user: string; service: string; action: string }

export type Verdict = {
  /** Whoever asks the same is answered by the same verdict. */
  question: AccessQuestion
  allow: boolean
  reasons: PolicyReason[]
  policyRevision: string
  /** When its input was gathered, ms since epoch. */
  evaluatedAtMs: number
  /** Ask again by then, ms since epoch. */
  expiresAtMs: number
  input: AuthzInput
  onRecord: OnRecord
}

/**
 * The question and the answer as an audited decision has them, as `canonicalJson`: made once, however often the verdict is
 * used. `again` is the same once its input is on record: with the place of that instead of the input, which is most of it.
 * Both are of the verdict as policy gave it; one that ends sooner, with its user's assertion, shares the place alone.
 */
type OnRecord = { expiresAtMs: number; first: string; again?: string; place?: { inputOf: string; inputAt: Date } }

export type Decision = { verdict: Verdict; ground: Ground }

export type Decider = {
  /**
   * At once where facts and verdict are in memory.
   *
   * @param nowMs default: by the clock
   * @throws Fault UNAVAILABLE when policy or facts can't be had; never guesses
   */
  decide(question: AccessQuestion, nowMs?: number): Decision | Promise<Decision>
  stats(): { entries: number; hits: number; misses: number; invalidations: ReadonlyMap<InvalidationCause, number> }
}

/** Why a verdict that was kept could not be used again: a fact or the policy has changed, or its time is over. */
export type InvalidationCause = keyof Ground | 'revision' | 'time'

/** Verdicts kept, about 3 kB each. */
const verdictsMax = 50_000
const tooSlowRetryMs = 1_000

export function createDecider(options: {
  facts: Facts
  engine: PolicyEngine
  clock: Clock
  /** POLICY_ON_ERROR: whether verdicts that have not expired may be used up while the policy can't be evaluated. */
  onError: 'deny' | 'last-known'
}): Decider {
  const { facts, engine, clock, onError } = options
  const verdicts = new LRUCache<string, Kept>({ max: verdictsMax })
  const underWay = new Map<string, { verdict: Promise<Verdict>; now: number }>()
  let hits = 0
  let misses = 0
  const invalidations = new Map(invalidationCauses.map(cause => [cause, 0]))
  const invalidated = (cause: InvalidationCause, entries = 1) =>
    invalidations.set(cause, (invalidations.get(cause) ?? 0) + entries)
  engine.onRevision(() => {
    invalidated('revision', verdicts.size)
    verdicts.clear()
  })

  async function evaluate(asked: string, question: AccessQuestion, ground: Ground, now: number): Promise<Verdict> {
    const input = inputOf(question, ground, facts.maxAgeMs, now)
    const decision = await spanned('policy authz', {}, () => engine.evaluate('authz', input))
    const { allow, reasons, revision: policyRevision } = decision
    // Whole seconds of the policy are cut to the exact moment at which the health turns stale.
    const staleAtMs = allow ? (ground.device.value?.measuredAtMs ?? 0) + facts.maxAgeMs : Number.POSITIVE_INFINITY
    const expiresAtMs = Math.min(endOf(decision, ground.policy.value.hours?.timezone, now), staleAtMs)
    // It has taken so long to decide that the answer is over.
    if (allow && clock() >= expiresAtMs && clock() > now) throw tooSlow()
    const answer = { allow, reasons, policyRevision, evaluatedAtMs: now, expiresAtMs }
    const first = canonicalJson({ ...recordOf(question, answer), input })
    const verdict = { question, ...answer, input, onRecord: { expiresAtMs, first } }
    // Decided by a policy that has been replaced meanwhile, it is an answer to who asked then, and to nobody else.
    if (engine.revision() === policyRevision) verdicts.set(asked, { verdict, ground })
    return verdict
  }

  function decideOn(question: AccessQuestion, ground: Ground, now: number): Decision | Promise<Decision> {
    // No part of it can hold a NUL. If one could, two questions would drop each other's verdicts, and use none.
    const asked = `${question.deviceId}\0${question.user}\0${question.service}\0${question.action}`
    const kept = verdicts.get(asked)
    if (kept) {
      const cause = whatEnded(kept, ground, engine.revision(), now)
      if (cause === undefined && (onError === 'last-known' || engine.ready())) {
        hits++
        return { verdict: kept.verdict, ground }
      }
      if (cause !== undefined) {
        invalidated(cause)
        verdicts.delete(asked)
      }
    }
    misses++
    const key = `${asked}\0${groundParts.map(part => ground[part].version).join()}\0${engine.revision()}`
    let evaluation = underWay.get(key)
    // One that began at a later time than it is now, since the clock was set back, is none that could be shared.
    if (!evaluation || evaluation.now > now) {
      const verdict = evaluate(asked, question, ground, now).finally(() => underWay.delete(key))
      evaluation = { verdict, now }
      underWay.set(key, evaluation)
    }
    return evaluation.verdict.then(verdict => ({ verdict, ground }))
  }

  return {
    decide(question, now = clock()) {
      const ground = facts.ground(question, now)
      if (!(ground instanceof Promise)) return decideOn(question, ground, now)
      return spanned('facts', {}, () => ground).then(known => decideOn(question, known, clock()))
    },
    stats: () => ({ entries: verdicts.size, hits, misses, invalidations }),
  }
}

/** The input of a verdict is on record: with the decision of this id, dated `at`. Later uses of it refer to that. */
export function keepsOnRecord(verdict: Verdict, id: string, at: Date): void {
  const { onRecord, question } = verdict
  if (onRecord.place) return
  onRecord.place = { inputOf: id, inputAt: at }
  const asPolicyGaveIt = { ...verdict, expiresAtMs: onRecord.expiresAtMs }
  onRecord.again = canonicalJson({ ...recordOf(question, asPolicyGaveIt), ...onRecord.place })
}

/** What a decision that is answered by the verdict puts on record, as JSON. */
export function recordText(verdict: Verdict): string {
  const { onRecord, expiresAtMs, input, question } = verdict
  if (expiresAtMs === onRecord.expiresAtMs) return onRecord.again ?? onRecord.first
  return canonicalJson({ ...recordOf(question, verdict), ...(onRecord.place ?? { input }) })
}

function recordOf({ user, service, action }: AccessQuestion, answer: Omit<Verdict, 'question' | 'input' | 'onRecord'>) {
  const { allow, reasons, policyRevision, evaluatedAtMs, expiresAtMs } = answer
  const [evaluatedAt, expiresAt] = [new Date(evaluatedAtMs), new Date(expiresAtMs)]
  return { user, service, action, allow, reasons, policyRevision, evaluatedAt, expiresAt }
}

function tooSlow(): Fault {
  const message = 'the policy took longer to answer than its answer holds, so nothing is allowed'
  return new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', message, { retryAfterMs: tooSlowRetryMs })
}

type Kept = { verdict: Verdict; ground: Ground }

const groundParts = ['device', 'user', 'service', 'grants', 'policy'] as const
const invalidationCauses: InvalidationCause[] = [...groundParts, 'revision', 'time']

/** undefined while the verdict may be used. A clock that was set back makes it as useless as one that has run on. */
function whatEnded(
  { verdict, ground: before }: Kept,
  ground: Ground,
  revision: string,
  now: number,
): InvalidationCause | undefined {
  if (before.device.version !== ground.device.version) return 'device'
  if (before.user.version !== ground.user.version) return 'user'
  if (before.service.version !== ground.service.version) return 'service'
  if (before.grants.version !== ground.grants.version) return 'grants'
  if (before.policy.version !== ground.policy.version) return 'policy'
  if (verdict.policyRevision !== revision) return 'revision'
  return verdict.evaluatedAtMs <= now && now < verdict.expiresAtMs ? undefined : 'time'
}

function inputOf({ deviceId, action }: AccessQuestion, ground: Ground, maxAgeMs: number, now: number): AuthzInput {
  const device = ground.device.value
  const user = ground.user.value
  const service = ground.service.value
  const { requirements, hours } = ground.policy.value
  const grants = ground.grants.value
  return {
    device: {
      id: deviceId,
      type: device?.type ?? 'unspecified',
      status: device?.status ?? 'unknown',
      labels: device?.labels ?? {},
      // Nobody gets here without a live certificate; an operator asks as if the device did.
      authenticated: device !== undefined,
      health: device ? healthOf(device, now) : null,
    },
    user: user ? { id: user.id, role: user.role, status: user.status } : null,
    service: service ? { id: service.id, labels: service.labels, status: service.status } : null,
    action,
    grants: user && service ? [...(grants.get(service.id) ?? []), ...(grants.get('*') ?? [])] : [],
    requirements: { health_max_age_seconds: maxAgeMs / 1_000, ...requirements },
    hours,
    time: timeIn(hours?.timezone ?? 'UTC', now),
  }
}

function healthOf(
  { posture, measuredAtMs }: NonNullable<Ground['device']['value']>,
  now: number,
): AuthzInput['device']['health'] {
  if (!posture) return null
  return {
    age_seconds: Math.max(0, Math.floor((now - measuredAtMs) / 1_000)),
    cpu_percent: posture.cpuPercent ?? null,
    memory_percent: posture.memoryPercent ?? null,
    disk_percent: posture.diskPercent ?? null,
    patches_current: posture.patchesCurrent ?? null,
    antivirus_enabled: posture.antivirusEnabled ?? null,
    disk_encrypted: posture.diskEncrypted ?? null,
    firewall_enabled: posture.firewallEnabled ?? null,
    attributes: posture.attributes,
  }
}

/**
 * Until when an answer of `now` holds. Where it rests on the time of day, policy was told a whole second, and counts from it;
 * and it counts as if no clock in that zone were ever put forward or back, so the answer ends where one is.
 */
function endOf({ validForSeconds, clockUsed }: PolicyDecision, timeZone: string | undefined, now: number): number {
  if (!clockUsed) return now + validForSeconds * 1_000
  const secondMs = now - (now % 1_000)
  return beforeClockChange(timeZone ?? 'UTC', secondMs, secondMs + validForSeconds * 1_000)
}

/** `until`, or if the zone's offset changes before it, the moment when it does. Both are whole seconds. */
function beforeClockChange(timeZone: string, from: number, until: number): number {
  const offset = offsetIn(timeZone, from)
  if (offsetIn(timeZone, until) === offset) return until
  let [same, other] = [from, until]
  while (other - same > 1_000) {
    const middle = same + Math.floor((other - same) / 2_000) * 1_000
    if (offsetIn(timeZone, middle) === offset) same = middle
    else other = middle
  }
  return other
}

const weekdays: Weekday[] = ['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun']
const daySeconds = 86_400
const weekSeconds = 7 * daySeconds
/** The first day of Unix time was a Thursday. */
const epochSecondOfWeek = weekdays.indexOf('thu') * daySeconds

/** By how many seconds the clocks in that zone are ahead of UTC, within a week. */
function offsetIn(timeZone: string, at: number): number {
  const { weekday, minute, second } = timeIn(timeZone, at)
  const local = weekdays.indexOf(weekday) * daySeconds + minute * 60 + second
  const utc = (Math.floor(at / 1_000) + epochSecondOfWeek) % weekSeconds
  return (local - utc + weekSeconds) % weekSeconds
}

/** Formatters are dear to make; zones are few, since an operator names them. */
const formatters = new LRUCache<string, Intl.DateTimeFormat>({ max: 50 })

function timeIn(timeZone: string, now: number): AuthzInput['time'] {
  let formatter = formatters.get(timeZone)
  if (!formatter) {
    formatter = new Intl.DateTimeFormat('en-US', {
      timeZone,
      weekday: 'short',
      hour: 'numeric',
      minute: 'numeric',
      second: 'numeric',
      hourCycle: 'h23',
    })
    formatters.set(timeZone, formatter)
  }
  const parts = Object.fromEntries(formatter.formatToParts(now).map(({ type, value }) => [type, value]))
  return {
    weekday: String(parts.weekday).toLowerCase() as Weekday,
    minute: Number(parts.hour) * 60 + Number(parts.minute),
    second: Number(parts.second),
  }
}
