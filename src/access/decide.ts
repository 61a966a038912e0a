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
import type { Facts, Ground } from './facts.ts'
import type { AuthzInput, PolicyEngine, PolicyReason, Weekday } from './policy-engine.ts'

/** `user` is an id or an e-mail address. */
export type AccessQuestion = { deviceId: string; user: string; service: string; action: string }

export type Verdict = {
  allow: boolean
  reasons: PolicyReason[]
  policyRevision: string
  /** When its input was gathered, ms since epoch. */
  evaluatedAtMs: number
  /** Ask again by then, ms since epoch. */
  expiresAtMs: number
  input: AuthzInput
  /** The question and the answer as an audited decision has them, as `canonicalJson`: made once, however often used. */
  json: string
  /** The same once its input is on record: with the place of that instead of the input, which is most of it. */
  jsonAgain?: string
}

export type Decision = { verdict: Verdict; ground: Ground }

export type Decider = {
  /**
   * At once where facts and verdict are in memory.
   *
   * @throws Fault UNAVAILABLE when policy or facts can't be had; never guesses
   */
  decide(question: AccessQuestion): Decision | Promise<Decision>
  stats(): { entries: number; hits: number; misses: number; invalidations: ReadonlyMap<InvalidationCause, number> }
}

/** Why a verdict that was kept could not be used again: a fact or the policy has changed, or its time is over. */
export type InvalidationCause = keyof Ground | 'revision' | 'time'

/** Verdicts kept, about 3 kB each. */
const verdictsMax = 50_000

export function createDecider(options: {
  facts: Facts
  engine: PolicyEngine
  clock: Clock
  /** POLICY_ON_ERROR: whether verdicts that have not expired may be used up while the policy can't be evaluated. */
  onError: 'deny' | 'last-known'
}): Decider {
  const { facts, engine, clock, onError } = options
  const verdicts = new LRUCache<string, Kept>({ max: verdictsMax })
  const underWay = new Map<string, Promise<Verdict>>()
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
    const policyRevision = engine.revision()
    const input = inputOf(question, ground, facts.maxAgeMs, now)
    const { allow, reasons, validForSeconds } = await engine.evaluate('authz', input)
    // Whole seconds of the policy are cut to the exact moment at which the health turns stale.
    const staleAtMs = allow ? (ground.device.value?.measuredAtMs ?? 0) + facts.maxAgeMs : Number.POSITIVE_INFINITY
    // The policy is told the time without the part of a second, and counts from there: hours end when they do.
    const expiresAtMs = Math.min(now - (now % 1_000) + validForSeconds * 1_000, staleAtMs)
    const [evaluatedAt, expiresAt] = [new Date(now), new Date(expiresAtMs)]
    const { user, service, action } = question
    const json = canonicalJson({ user, service, action, allow, reasons, evaluatedAt, expiresAt, input })
    const verdict: Verdict = { allow, reasons, policyRevision, evaluatedAtMs: now, expiresAtMs, input, json }
    if (engine.revision() === policyRevision) verdicts.set(asked, { verdict, ground })
    return verdict
  }

  function decideOn(question: AccessQuestion, ground: Ground): Decision | Promise<Decision> {
    const now = clock()
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
    if (!evaluation) {
      evaluation = evaluate(asked, question, ground, now).finally(() => underWay.delete(key))
      underWay.set(key, evaluation)
    }
    return evaluation.then(verdict => ({ verdict, ground }))
  }

  return {
    decide(question) {
      const ground = facts.ground(question)
      return ground instanceof Promise ? ground.then(known => decideOn(question, known)) : decideOn(question, ground)
    },
    stats: () => ({ entries: verdicts.size, hits, misses, invalidations }),
  }
}

/** The input of a verdict is on record: with the decision of this id, dated `at`. Later uses of it refer to that. */
export function keepsOnRecord(verdict: Verdict, { user, service, action }: AccessQuestion, id: string, at: Date): void {
  const { allow, reasons, evaluatedAtMs, expiresAtMs } = verdict
  const [evaluatedAt, expiresAt] = [new Date(evaluatedAtMs), new Date(expiresAtMs)]
  const of = { inputOf: id, inputAt: at }
  verdict.jsonAgain = canonicalJson({ user, service, action, allow, reasons, evaluatedAt, expiresAt, ...of })
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
  for (const part of groundParts) if (before[part].version !== ground[part].version) return part
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
