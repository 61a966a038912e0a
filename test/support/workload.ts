/**
 * Everybody at work at once, all along, whatever happens to the database: devices report, ask and enroll, operators change
 * things. What was acknowledged is kept, to be looked for afterwards.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { ExecutionContext } from 'ava'
import type pg from 'pg'
import { sealKeyFrom } from '../../src/audit/seals.ts'
import { verifyAudit } from '../../src/audit/verify.ts'
import { createKey } from '../../src/client/csr.ts'
import type { Answer } from '../../src/gen/edgemesh/v1/authorize.ts'
import { authorizations, heartbeats } from './device.ts'
import {
  type EdgeMesh,
  enrollClientOf,
  enrollOnce,
  eventually,
  type Refusal,
  refusal,
  secrets,
  unary,
} from './edgemesh.ts'
import { healthy } from './healthy.ts'

export type Workload = {
  /** How much was acknowledged so far, by what it was. */
  counts(): Record<Work, number>
  /** What was refused so far. */
  refusals: { work: Work; refusal: Refusal }[]
  /** How streams ended that were to stay open. */
  streamsLost: (Refusal | undefined)[]
  /** Resolves once each kind of work has been acknowledged anew. */
  goesOn(withinMs?: number): Promise<void>
  stop(): Promise<void>
}

type Work = 'heartbeat' | 'allow' | 'connection' | 'enrollment' | 'change'

const tokenUsesMax = 10_000
/** More than a stream holds are not asked for. */
const connectionsMax = 200

/** Where work is done: an instance, or a balancer before several. */
export type Workplace = Pick<EdgeMesh, 'admin' | 'anonymous' | 'clients' | 'enroll' | 'token'>

/** @param meshes instances of one database, among which the work is spread */
export function work(file: ExecutionContext, ...meshes: [Workplace, ...Workplace[]]) {
  return workEvery(25, file, ...meshes)
}

/** @param paceMs how long each of the workers rests after each piece of work */
export async function workEvery(paceMs: number, file: ExecutionContext, ...meshes: [Workplace, ...Workplace[]]) {
  const [mesh] = meshes
  const at = (n: number) => meshes[n % meshes.length] as Workplace
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const token = await mesh.token({ usesMax: tokenUsesMax })
  const devices = await Promise.all(['alpha', 'beta'].map(id => mesh.enroll({ device: { id } })))

  const acknowledged: Record<Work, string[]> = { heartbeat: [], allow: [], connection: [], enrollment: [], change: [] }
  const refusals: Workload['refusals'] = []
  const streamsLost: Workload['streamsLost'] = []
  let stopped = false

  /** Does a kind of work over and over. Who is refused tries the same again, as a caller does that is told to. */
  async function overAndOver(kind: Work, once: (n: number, attempt: number) => Promise<string | undefined>) {
    for (let n = 0; !stopped; n++) {
      for (let attempt = 0; !stopped; attempt++) {
        try {
          const done = await once(n, attempt)
          if (done !== undefined) acknowledged[kind].push(done)
          break
        } catch (error) {
          // That a stream has ended is told by what it has ended with; one that waits for long may go on doing so.
          const isStreamEnd = /stream ended|did not happen: acknowledgement/.test((error as Error).message)
          if (!stopped && !isStreamEnd) refusals.push({ work: kind, refusal: refusal(error) })
          await sleep(paceMs)
        }
      }
      await sleep(paceMs)
    }
  }

  function staysOpen<S extends { ended: Promise<Refusal | undefined> }>(stream: S): S {
    void stream.ended.then(end => {
      if (!stopped) streamsLost.push(end)
    })
    return stream
  }

  /** Whether it is; a denial has to be one of the moment. */
  function allowed(answer: Answer | undefined): boolean {
    if (answer?.allowed) return true
    const [reason] = answer?.reasons ?? []
    const retryAfterMs = answer?.retryAfter && answer.retryAfter.seconds * 1_000 + answer.retryAfter.nanos / 1e6
    const code = retryAfterMs ? 'UNAVAILABLE' : 'DENIED'
    const { code: why = '', message = '' } = reason ?? {}
    refusals.push({ work: 'connection', refusal: { code, reason: why, message, retryAfterMs, fields: [] } })
    return false
  }

  const hearts = devices.map((device, index) => staysOpen(heartbeats(file, at(index), device)))
  // What is not known to be healthy is denied.
  await Promise.all(hearts.map(heart => heart.beat(healthy)))
  const loops = devices.flatMap((device, index) => {
    const id = device.identity.deviceId
    let heart = hearts[index]!
    let access = staysOpen(authorizations(file, at(index), device))
    const check = at(index + 1).clients(device).authorize
    return [
      overAndOver('heartbeat', async n => {
        const mark = `${id}-${n}`
        await heart.beat({ ...healthy, attributes: { mark } }).catch(error => {
          if (!/stream ended/.test(error.message)) throw error
          heart = staysOpen(heartbeats(file, at(index), device))
          throw error
        })
        return mark
      }),
      overAndOver('allow', async () => {
        const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
        const { answer } = await unary(check, 'check', { question, deviceId: '' })
        return allowed(answer) ? answer?.decisionId.split('.')[0] : undefined
      }),
      overAndOver('connection', async n => {
        if (n >= connectionsMax) return undefined
        const answer = await access.ask('ada', 'payroll').catch(error => {
          access = staysOpen(authorizations(file, at(index), device))
          throw error
        })
        return allowed(answer) ? answer.connectionId : undefined
      }),
    ]
  })
  const anonymous = enrollClientOf(mesh)
  const keys = new Map<number, string>()
  loops.push(
    overAndOver('enrollment', async n => {
      const keyPem = keys.get(n) ?? createKey()
      keys.set(n, keyPem)
      return (await enrollOnce(anonymous, token, keyPem)).deviceId
    }),
    overAndOver('change', async (n, attempt) => {
      const id = `user-${n}`
      await unary(at(n).admin, 'createUser', { id, email: `${id}@example.com`, name: id, role: 'viewer' }).catch(
        error => {
          // The answer was lost, and not what it was about.
          if (attempt === 0 || refusal(error).code !== 'ALREADY_EXISTS') throw error
        },
      )
      return id
    }),
  )

  const counts = () =>
    Object.fromEntries(Object.entries(acknowledged).map(([kind, done]) => [kind, done.length])) as Record<Work, number>
  const workload: Workload = {
    counts,
    refusals,
    streamsLost,
    async goesOn(withinMs) {
      const before = counts()
      const again = () => {
        const now = counts()
        return (['heartbeat', 'allow', 'enrollment', 'change'] as const).every(kind => now[kind] > before[kind] + 1)
      }
      await eventually('each kind of work is acknowledged again', again, withinMs)
    },
    async stop() {
      stopped = true
      await Promise.all(loops)
    },
  }
  file.teardown(workload.stop)

  /** Nothing that was acknowledged is missing, nothing was done more often than it may be, and the record is whole. */
  async function account(t: ExecutionContext, pool: pg.Pool): Promise<void> {
    const missing = async (kind: Work, statement: string) => {
      const { rows } = await pool.query<{ mark: string }>(
        `select mark from unnest($1::text[]) as told (mark) where not exists (${statement})`,
        [acknowledged[kind]],
      )
      t.deepEqual(rows, [], `${kind}: of ${acknowledged[kind].length} none is missing`)
    }
    const reasons = Object.groupBy(refusals, ({ refusal }) => refusal.reason)
    const refused = Object.entries(reasons).map(([reason, all]) => `${reason} ${all?.length}`)
    t.log(`acknowledged: ${JSON.stringify(counts())}; refused: ${refused.join(', ') || 'none'}`)
    await missing('heartbeat', `select from health_reports where posture #>> '{attributes,mark}' = told.mark`)
    await missing('allow', 'select from decisions where id = told.mark::uuid')
    // Until it has a row of its own, the decision that allowed it is its record.
    await missing('connection', `select from decisions where id = (left(told.mark, -2) || '00')::uuid`)
    await missing(
      'enrollment',
      'select from devices join certificates on subject_id = devices.id where devices.id = told.mark',
    )
    await missing('change', 'select from users where id = told.mark')

    const { rows: uses } = await pool.query(
      `select uses, (select count(*)::int from token_redemptions where token_id = enrollment_tokens.id) as redemptions,
         (select count(*)::int from devices join token_redemptions on device_id = devices.id
          where token_id = enrollment_tokens.id) as devices
       from enrollment_tokens where uses_max = $1`,
      [tokenUsesMax],
    )
    t.is(uses[0].uses, uses[0].redemptions, 'a use for every redemption')
    t.is(uses[0].uses, uses[0].devices, 'a device for every use')
    t.is(uses[0].uses, keys.size - (uses[0].uses < keys.size ? 1 : 0), 'a use for every key, whoever asked how often')

    const { rows: calls } = await pool.query(
      `select target, count(*)::int from audit_events
       where method like '%/CreateUser' and code = 'OK' group by 1 having count(*) > 1`,
    )
    t.deepEqual(calls, [], 'no change is on record twice')
    const key = sealKeyFrom(secrets.ENROLLMENT_TOKEN_SECRET)
    const { ok, findings } = await verifyAudit({ pool, key, retentionDays: 90, nowMs: Date.now() })
    t.deepEqual(findings, [])
    t.true(ok)
  }

  return { ...workload, account }
}

/** What an outage of the database may look like to callers: they are told to come back, when, and nothing of the inside. */
export function isToldToComeBack(refusal: Refusal): boolean {
  const { code, reason, retryAfterMs, message } = refusal
  return (
    code === 'UNAVAILABLE' &&
    /^(DATABASE_UNAVAILABLE|AUDIT_UNAVAILABLE|AUDIT_BEHIND|FACTS_BEHIND|REPORTS_BEHIND)$/.test(reason) &&
    (retryAfterMs ?? 0) > 0 &&
    !/select|insert|update|relation|connection|postgres|sql/i.test(message)
  )
}
