/**
 * A device that asks at every instance at once, and knows what the answers have to be.
 *
 * It reports its health through the front, wherever that leads; holds a stream with leases at each instance, to see when each
 * of them takes one back; and asks over connections of its own. Some of its leases are held through the front by
 * `keepAuthorizations`, which resumes them at another instance when one has gone.
 */
import { X509Certificate } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Authorizations, keepAuthorizations } from '../../src/client/authorizations.ts'
import { type AuthorizationStream, check, openAuthorizations } from '../../src/client/authorize-stream.ts'
import { openChannel } from '../../src/client/channel.ts'
import { type DeviceCredentials, enrollDevice } from '../../src/client/enroll.ts'
import { type HeartbeatStream, openHeartbeats } from '../../src/client/heartbeat-stream.ts'
import { DeviceType } from '../../src/gen/edgemesh/v1/types.ts'
import { judgeFailure } from './calls.ts'
import type { Findings } from './findings.ts'
import type { Instance } from './instance.ts'
import type { Ledger } from './ledger.ts'
import { createFact, describeFacts, type Fact, fallenSince, mayStand, mustStand } from './oracle.ts'
import type { Random } from './random.ts'

/** Who may reach what, and what that rests on. */
export type Permission = { user: string; service: string; facts: Fact[] }

export type WitnessDeps = {
  instances: readonly Instance[]
  /** host:port of what spreads connections over the instances. */
  front: string
  permissions: readonly Permission[]
  ledger: Ledger
  findings: Findings
  random: Random
  bounds: Bounds
  /** How late this process was lately, on the same processors: what is late by that is not the service's fault. */
  ownLagMs: () => number
  onReach: (ms: number) => void
  counts: { allowed: number; denied: number; unanswered: number; ended: number }
}

export type Bounds = {
  /** Within it a withdrawal takes effect on every instance that reaches the database. */
  reachMs: number
  /** LEASE_GRACE_SECONDS */
  graceMs: number
  /** HEALTH_CHECK_MAX_AGE_MINUTES */
  maxAgeMs: number
}

export type Witness = {
  id: string
  /** Neither quarantined nor revoked. */
  active: Fact
  /** Reports that its disk is encrypted, or is not. */
  setHealthy(is: boolean): void
  /** Says nothing more until it is told to. */
  setSilent(is: boolean): void
  /** Looks whether any lease is open that should not be. */
  look(): void
  /** Whether everything that must stand does, at every instance: for the end. */
  allAllowed(): Promise<string[]>
  stop(): Promise<void>
}

type Lease = { id: string; permission: Permission; grantedAtMs: number; isLate: boolean }

const reportEveryMs = 1_000
const askEveryMs = 250
const againMs = 400
/** How long an instance has to have been left in peace before what it does is measured; how long that may take is another thing. */
const calmBeforeMs = 1_000
const leasesPerPostMax = 6
/** One question in so many comes over a connection of its own. */
const checksOneIn = 10
/** What is remembered of revocations that overtake their answers. */
const overtakingMax = 1_000
/** Clocks of one host are one, but milliseconds are rounded, and answers take their way. */
const measuredMarginMs = 250
/** Why a connection ends though its ground holds: its holder or its instance was away. */
const endsOfAbsence = new Set(['NOT_RESUMED', 'FACTS_UNKNOWN', 'INSTANCE_GONE', 'POLICY_UNAVAILABLE'])

export async function enrollWitness(
  id: string,
  token: string,
  instance: Instance,
  deps: WitnessDeps,
): Promise<Witness> {
  const credentials = await enrollDevice({
    server: instance.address,
    token,
    device: { id, type: DeviceType.SERVER, os: 'soak', osVersion: '1' },
    signal: AbortSignal.timeout(20_000),
  })
  deps.ledger.enrolled(id, new X509Certificate(credentials.certificateChainPem).serialNumber.toLowerCase())
  return startWitness(id, credentials, deps)
}

function startWitness(id: string, credentials: DeviceCredentials, deps: WitnessDeps): Witness {
  const { instances, findings, ledger, random, bounds, counts } = deps
  const now = () => Date.now()
  const active = createFact(`${id} active`, 'true', now)
  const healthy = createFact('healthy', 'false', now)
  const fresh = createFact('fresh', 'false', now)
  const ofDevice = [active, healthy, fresh]
  const groundOf = ({ facts }: Permission) => [...ofDevice, ...facts]
  const stopping = new AbortController()
  const { signal } = stopping
  let isHealthy = true
  let isSilent = false
  let reporting: HeartbeatStream | undefined
  let reported = 0
  /** Until then its health is certainly fresh. */
  let freshUntilMs = 0

  const pause = (ms: number) => sleep(ms, undefined, { signal }).catch(() => {})

  // ── Health ──

  async function report(): Promise<void> {
    reporting ??= openHeartbeats({
      server: deps.front,
      credentials,
      onClosed: () => {
        reporting = undefined
      },
    })
    const says = isHealthy
    const acknowledged = healthy.at(now()) === (says ? 'true' : 'false') ? () => {} : healthy.change(says)
    // Each is another, to be found again. It does not count for the policy.
    const diskPercent = Math.round((++reported % 9_000) + 1) / 100
    const sentAtMs = now()
    fresh.plan(
      { fromMs: Math.max(sentAtMs, freshUntilMs), can: 'either' },
      { fromMs: sentAtMs + bounds.maxAgeMs + measuredMarginMs, can: 'false' },
    )
    const posture = {
      cpuPercent: 10,
      memoryPercent: 20,
      diskPercent,
      patchesCurrent: true,
      antivirusEnabled: true,
      diskEncrypted: says,
      firewallEnabled: true,
      measuredAt: new Date(sentAtMs),
    }
    await reporting.report(posture)
    ledger.reported(id, diskPercent)
    acknowledged()
    freshUntilMs = sentAtMs + bounds.maxAgeMs - measuredMarginMs
    fresh.plan(
      { fromMs: now(), can: 'true' },
      { fromMs: freshUntilMs, can: 'either' },
      { fromMs: sentAtMs + bounds.maxAgeMs + measuredMarginMs, can: 'false' },
    )
  }

  async function keepReporting(): Promise<void> {
    while (!signal.aborted) {
      if (isSilent) {
        await pause(50)
        continue
      }
      try {
        await report()
        await pause(reportEveryMs)
      } catch {
        const broken = reporting
        reporting = undefined
        await broken?.close()
        await pause(againMs)
      }
    }
    await reporting?.close()
  }

  // ── At each instance ──

  const posts = instances.map(instance => {
    let stream: AuthorizationStream | undefined
    let close = () => {}
    const leases = new Map<string, Lease>()
    const overtaking = new Set<string>()

    function open(): AuthorizationStream {
      const channel = openChannel(instance.address, credentials)
      const opened = openAuthorizations({
        server: instance.address,
        credentials,
        channel,
        onRevoked({ connectionId, reasons }) {
          const lease = leases.get(connectionId)
          if (!lease) {
            if (overtaking.size < overtakingMax) overtaking.add(connectionId)
            return
          }
          leases.delete(connectionId)
          ended(lease, reasons.map(({ code }) => code).join(','))
        },
        onClosed: () => {
          if (stream === opened) stream = undefined
          for (const lease of leases.values()) ended(lease, 'STREAM_ENDED')
          leases.clear()
          channel.close()
        },
      })
      close = () => void opened.close()
      return opened
    }

    /** A lease is over. Measures how long that took, where its ground had gone. */
    function ended(lease: Lease, why: string): void {
      counts.ended += 1
      const since = fallenSince(groundOf(lease.permission), lease.grantedAtMs, now())
      if (since !== undefined) {
        if (instance.wasCalm(since - calmBeforeMs, now())) deps.onReach(now() - since)
        return
      }
      const [fromMs, untilMs] = [now() - bounds.reachMs - deps.ownLagMs(), now()]
      if (why === 'STREAM_ENDED' || endsOfAbsence.has(why) || !instance.wasCalm(fromMs, untilMs)) return
      if (!mustStand(groundOf(lease.permission), fromMs, untilMs)) return
      findings.broken('a connection whose ground holds is not taken back', `${id} at ${instance.name}: ${why}`)
    }

    async function ask(permission: Permission): Promise<boolean | undefined> {
      const facts = groundOf(permission)
      const askedAtMs = now()
      const question = { user: permission.user, service: permission.service }
      try {
        const alone = random.next() * checksOneIn < 1
        if (!alone) stream ??= open()
        const answer = alone
          ? await check({ server: instance.address, credentials, question })
          : (await stream!.ask([question]))[0]!
        const answeredAtMs = now()
        if (!answer.allowed && answer.retryAfter) {
          counts.unanswered += 1
          if (instance.wasCalm(askedAtMs - bounds.reachMs, answeredAtMs)) {
            const said = answer.reasons.map(({ code }) => code).join(',')
            findings.broken('an instance that is left in peace answers', `${id} at ${instance.name}: ${said}`)
          }
          return undefined
        }
        judge(answer.allowed, facts, askedAtMs, answeredAtMs, answer.reasons.map(({ code }) => code).join(','))
        if (!answer.allowed) return false
        ledger.allowed({ decisionId: answer.decisionId, connectionId: answer.connectionId, deviceId: id })
        if (!alone && !overtaking.delete(answer.connectionId)) {
          leases.set(answer.connectionId, {
            id: answer.connectionId,
            permission,
            grantedAtMs: askedAtMs,
            isLate: false,
          })
        }
        return true
      } catch (failure) {
        counts.unanswered += 1
        const isOut = active.at(now()) !== 'true'
        judgeFailure(failure, {
          what: 'a question',
          instance,
          sinceMs: askedAtMs - bounds.reachMs,
          findings,
          // Its connections are ended, too, and with one a question that has just been sent.
          ...(isOut && { expected: ['DEVICE_REVOKED', 'STREAM_ENDED', 'UNAVAILABLE'] }),
        })
        return undefined
      }
    }

    function judge(isAllowed: boolean, facts: Fact[], askedAtMs: number, answeredAtMs: number, why: string): void {
      counts[isAllowed ? 'allowed' : 'denied'] += 1
      const fromMs = askedAtMs - bounds.reachMs - deps.ownLagMs()
      const said = `${id} at ${instance.name}: ${describeFacts(facts, askedAtMs)}${why && `; answered ${why}`}`
      if (isAllowed && !mayStand(facts, fromMs, answeredAtMs)) {
        findings.broken('nothing is allowed whose ground has gone', said)
      }
      if (!isAllowed && mustStand(facts, fromMs, answeredAtMs) && instance.wasCalm(fromMs, answeredAtMs)) {
        findings.broken('what policy allows is allowed', said)
      }
    }

    async function closeOldest(): Promise<void> {
      const [oldest] = leases.keys()
      if (oldest === undefined || leases.size <= leasesPerPostMax || !stream) return
      leases.delete(oldest)
      await stream.closeConnections([oldest]).catch(() => {})
    }

    return {
      instance,
      ask,
      async keepAsking() {
        while (!signal.aborted) {
          const answer = await ask(random.one(deps.permissions))
          await closeOldest()
          await pause(answer === undefined ? againMs : askEveryMs * instances.length * random.between(0.5, 1.5))
        }
        close()
      },
      look() {
        for (const lease of leases.values()) {
          const since = fallenSince(groundOf(lease.permission), lease.grantedAtMs, now())
          if (since === undefined || lease.isLate) continue
          const lateMs = now() - since - deps.ownLagMs()
          const isCalm = instance.wasCalm(since - bounds.reachMs, now())
          const boundMs = isCalm ? bounds.reachMs : bounds.graceMs + 2 * bounds.reachMs
          if (lateMs <= boundMs) continue
          lease.isLate = true
          const rule = isCalm
            ? 'a withdrawal takes effect within a second on an instance that reaches the database'
            : 'an instance that was cut off gives up its leases after the grace time'
          findings.broken(
            rule,
            `${id} at ${instance.name}, ${Math.round(lateMs)} ms: ${describeFacts(groundOf(lease.permission), now())}`,
          )
        }
      },
    }
  })

  // ── Through the front ──

  const travelling = new Map<string, Lease>()
  const kept: Authorizations = keepAuthorizations({
    server: deps.front,
    credentials,
    onEnded({ connectionId, reasons }) {
      const lease = travelling.get(connectionId)
      travelling.delete(connectionId)
      if (!lease) return
      counts.ended += 1
      const why = reasons.map(({ code }) => code).join(',')
      const fromMs = now() - 2 * bounds.reachMs - deps.ownLagMs()
      if (endsOfAbsence.has(why) || !instances.every(instance => instance.wasCalm(fromMs, now()))) return
      if (mustStand(groundOf(lease.permission), fromMs, now())) {
        findings.broken('a connection whose ground holds is not taken back', `${id}, resumed: ${why}`)
      }
    },
  })

  async function keepTravelling(): Promise<void> {
    while (!signal.aborted) {
      const permission = random.one(deps.permissions)
      const askedAtMs = now()
      try {
        if (travelling.size >= leasesPerPostMax) {
          const [oldest] = travelling.keys()
          travelling.delete(oldest!)
          await kept.closeConnections([oldest!])
        }
        const [answer] = await kept.ask([{ user: permission.user, service: permission.service }])
        if (answer?.allowed) {
          const { connectionId, decisionId } = answer
          ledger.allowed({ decisionId, connectionId, deviceId: id })
          if (kept.held().includes(connectionId)) {
            travelling.set(connectionId, { id: connectionId, permission, grantedAtMs: askedAtMs, isLate: false })
          }
          if (!mayStand(groundOf(permission), askedAtMs - bounds.reachMs - deps.ownLagMs(), now())) {
            findings.broken('nothing is allowed whose ground has gone', `${id} through the front`)
          }
        }
      } catch {
        // It is judged where it is known which instance has answered.
      }
      await pause(askEveryMs * 4)
    }
    await kept.close()
  }

  function lookAtTravelling(): void {
    const held = new Set(kept.held())
    for (const lease of travelling.values()) {
      if (!held.has(lease.id)) continue
      const since = fallenSince(groundOf(lease.permission), lease.grantedAtMs, now())
      if (since === undefined || lease.isLate) continue
      // Lost and not resumed by an instance that is cut off: the device gives up after the grace time, too.
      const boundMs = 2 * (bounds.graceMs + 2 * bounds.reachMs)
      if (now() - since - deps.ownLagMs() <= boundMs) continue
      lease.isLate = true
      findings.broken(
        'an instance that was cut off gives up its leases after the grace time',
        `${id} through the front: ${describeFacts(groundOf(lease.permission), now())}`,
      )
    }
  }

  const living = Promise.all([keepReporting(), ...posts.map(post => post.keepAsking()), keepTravelling()])

  return {
    id,
    active,
    setHealthy(is) {
      isHealthy = is
    },
    setSilent(is) {
      isSilent = is
    },
    look() {
      for (const post of posts) post.look()
      lookAtTravelling()
    },
    async allAllowed() {
      const refused: string[] = []
      for (const post of posts) {
        for (const permission of deps.permissions) {
          const answer = await post.ask(permission)
          if (answer !== true)
            refused.push(`${id} at ${post.instance.name}: ${permission.user} to ${permission.service}`)
        }
      }
      return refused
    },
    async stop() {
      stopping.abort()
      await living
    },
  }
}
