/**
 * The facts that decisions rest on: devices with their posture, users, services, grants, policy data.
 *
 * From memory, loaded on a miss, kept fresh by the change feed. Heartbeats that change nothing that policy can see are
 * not announced to other instances; so a device that looks stale here is looked at once more in the database before
 * anyone says so.
 */
import type pg from 'pg'
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { type Fact, keepFacts, loadedTogether } from '../db/kept-facts.ts'
import type { PostureRequirements, PostureValues } from '../fleet/posture.ts'
import type { BusinessHours } from './entities.ts'
import type { AuthzInput } from './policy-engine.ts'

export type DeviceFacts = {
  id: string
  type: string
  status: AuthzInput['device']['status']
  statusReason: string
  labels: Record<string, string>
  posture: PostureValues | undefined
  /** When the posture was measured, ms since epoch; 0 if never. Moves on with each heartbeat. */
  measuredAtMs: number
}
export type UserFacts = { id: string; role: string; status: 'active' | 'disabled' }
export type ServiceFacts = { id: string; labels: Record<string, string>; status: 'active' | 'disabled' }
export type PolicyFacts = { requirements: PostureRequirements; hours: BusinessHours | null }

/** All that one question rests on. */
export type Ground = {
  device: Fact<DeviceFacts | undefined>
  user: Fact<UserFacts | undefined>
  service: Fact<ServiceFacts | undefined>
  /** What the user's role may do, by service. */
  grants: Fact<Map<string, string[]>>
  policy: Fact<PolicyFacts>
}

export type Facts = {
  /**
   * At once where all of it is in memory.
   *
   * @param nowMs default: by the clock
   * @throws Fault UNAVAILABLE when memory can't be trusted and the database can't be asked
   */
  ground(question: { deviceId: string; user: string; service: string }, nowMs?: number): Ground | Promise<Ground>
  /** Whether nothing of it has changed since. */
  isCurrent(question: { deviceId: string; user: string; service: string }, ground: Ground): boolean
  policyData(): Promise<PolicyFacts>
  device(id: string): Promise<DeviceFacts | undefined>
  /** By id or e-mail address. @throws Fault UNAVAILABLE when memory can't be trusted */
  user(name: string): Promise<UserFacts | undefined>
  /** A heartbeat that changed nothing but the time is durable. */
  reported(deviceId: string, measuredAtMs: number): void
  maxAgeMs: number
}

/** Facts of each kind kept at most; a device with posture and labels is about 1 kB. */
const devicesMax = 100_000
const usersMax = 50_000
const servicesMax = 20_000
const rolesMax = 1_000

export function createFacts(options: {
  pool: pg.Pool
  feed: Pick<ChangeFeed, 'onChange' | 'onReset' | 'isLive' | 'caughtUp'>
  maxAgeMs: number
  clock: Clock
}): Facts {
  const { pool, feed, maxAgeMs, clock } = options

  const devices = keepFacts<DeviceFacts | undefined>({
    feed,
    clock,
    kind: 'device',
    max: devicesMax,
    load: loadedTogether(async ids => {
      const { rows } = await pool.query<Omit<DeviceFacts, 'posture'> & { posture: PostureValues | null }>(
        `select d.id, d.type, d.status, d.status_reason as "statusReason", d.labels, p.posture,
           coalesce((extract(epoch from p.measured_at) * 1000)::float8, 0) as "measuredAtMs"
         from devices d left join device_postures p on p.device_id = d.id where d.id = any($1)`,
        [ids],
      )
      return new Map(rows.map(row => [row.id, { ...row, posture: row.posture ?? undefined }]))
    }),
  })
  const users = keepFacts<UserFacts | undefined>({
    feed,
    clock,
    kind: 'user',
    max: usersMax,
    async load(name) {
      const { rows } = await pool.query<UserFacts>(
        'select id, role, status from users where id = $1 or lower(email) = lower($1) order by id = $1 desc limit 1',
        [name],
      )
      return rows[0]
    },
    // Users are asked for by e-mail address too, and a name that nobody had may be somebody's now.
    concerns: (changed, user) => user === undefined || user.id === changed,
  })
  const services = keepFacts<ServiceFacts | undefined>({
    feed,
    clock,
    kind: 'service',
    max: servicesMax,
    async load(id) {
      const { rows } = await pool.query<ServiceFacts>('select id, labels, status from services where id = $1', [id])
      return rows[0]
    },
  })
  const grants = keepFacts<Map<string, string[]>>({
    feed,
    clock,
    kind: 'grants',
    max: rolesMax,
    async load(role) {
      const { rows } = await pool.query<{ service: string; actions: string[] }>(
        'select service, actions from role_grants where role = $1',
        [role],
      )
      return new Map(rows.map(row => [row.service, row.actions]))
    },
  })
  const policy = keepFacts<PolicyFacts>({
    feed,
    clock,
    kind: 'policy',
    max: 1,
    async load() {
      const { rows } = await pool.query<PolicyFacts>('select requirements, hours from policy_data where id = 1')
      if (!rows[0]) throw new Error('the table policy_data is empty; migrate the database')
      return rows[0]
    },
  })

  const nobody = ''

  function freshDevice(
    id: string,
    nowMs: number,
  ): Fact<DeviceFacts | undefined> | Promise<Fact<DeviceFacts | undefined>> {
    const fact = devices.get(id)
    if (fact instanceof Promise) return fact.then(loaded => (looksStale(loaded, clock()) ? loadAgain(id) : loaded))
    return looksStale(fact, nowMs) ? loadAgain(id) : fact
  }

  /** And may have reported since to another instance. */
  function looksStale({ value, loadedAt }: Fact<DeviceFacts | undefined>, nowMs: number): boolean {
    if (!value?.measuredAtMs) return false
    const staleAt = value.measuredAtMs + maxAgeMs
    return nowMs >= staleAt && loadedAt < staleAt
  }

  function loadAgain(id: string) {
    devices.forget(id)
    return devices.get(id)
  }

  function ground(question: Parameters<Facts['ground']>[0], nowMs = clock()): Ground | Promise<Ground> {
    if (!feed.isLive(nowMs)) return feed.caughtUp().then(() => ground(question))
    const device = freshDevice(question.deviceId, nowMs)
    const user = users.get(question.user)
    const service = services.get(question.service)
    const data = policy.get('data')
    const inMemory =
      !(device instanceof Promise) &&
      !(user instanceof Promise) &&
      !(service instanceof Promise) &&
      !(data instanceof Promise)
    if (!inMemory) {
      return Promise.all([device, user, service, data]).then(async ([device, user, service, policy]) => {
        return { device, user, service, policy, grants: await grants.get(user.value?.role ?? nobody) }
      })
    }
    const granted = grants.get(user.value?.role ?? nobody)
    if (granted instanceof Promise) return granted.then(grants => ({ device, user, service, policy: data, grants }))
    return { device, user, service, policy: data, grants: granted }
  }

  return {
    maxAgeMs,
    ground,
    isCurrent({ deviceId, user, service }, ground) {
      return (
        devices.isCurrent(deviceId, ground.device) &&
        users.isCurrent(user, ground.user) &&
        services.isCurrent(service, ground.service) &&
        grants.isCurrent(ground.user.value?.role ?? nobody, ground.grants) &&
        policy.isCurrent('data', ground.policy)
      )
    },
    policyData: async () => (await policy.get('data')).value,
    device: async id => (await devices.get(id)).value,
    async user(name) {
      if (!feed.isLive()) await feed.caughtUp()
      return (await users.get(name)).value
    },
    reported(deviceId, measuredAtMs) {
      const device = devices.peek(deviceId)?.value
      if (device && device.measuredAtMs < measuredAtMs) device.measuredAtMs = measuredAtMs
    },
  }
}
