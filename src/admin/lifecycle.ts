/**
 * Lifecycle rules: devices that carry certain labels and have not been seen for days are quarantined or deleted, as an
 * operator would, by the service itself. Each change is on record with the rule that it comes from.
 *
 * A device has been seen when it last reported, or enrolled; one that an operator has let in again since has its time anew.
 * One that holds a stream is there. One that was revoked stays out: deleted, it would be free to enroll again.
 */
import { z } from 'zod'
import type { Call, OwnEvents } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import { LifecycleRule } from '../fleet/entities.ts'
import { presentDevices } from '../fleet/presence.ts'
import {
  type DeleteLifecycleRuleRequest,
  type DeleteLifecycleRuleResponse,
  LifecycleAction,
  type LifecycleRule as LifecycleRuleMessage,
  type ListLifecycleRulesRequest,
  type ListLifecycleRulesResponse,
  type SetLifecycleRuleRequest,
  type SetLifecycleRuleResponse,
} from '../gen/edgemesh/v1/admin.ts'
import type { Log } from '../telemetry/log.ts'
import { change } from './change.ts'
import { deviceSteps } from './devices.ts'
import { cutPage, page } from './paging.ts'
import { check, id, labels, specified } from './request.ts'

const unseenDaysMax = 3_650
const actions: Record<LifecycleRule['action'], LifecycleAction> = {
  quarantine: LifecycleAction.QUARANTINE,
  delete: LifecycleAction.DELETE,
}

const rule = z.object(
  {
    id,
    labels,
    action: specified(LifecycleAction),
    unseenDays: z.int().min(1, 'has to be 1 at least').max(unseenDaysMax, `has to be ${unseenDaysMax} at most`),
  },
  { error: 'has to be given' },
)
const setRequest = z.object({ rule })
const listRequest = z.object(page(z.tuple([id])))
const deleteRequest = z.object({ id })

export function lifecycleHandlers({ db, reports, clock }: { db: Database; reports: Reports; clock: Clock }) {
  return {
    async setLifecycleRule(request: SetLifecycleRuleRequest, call: Call): Promise<SetLifecycleRuleResponse> {
      const { action, ...given } = check(setRequest, request).rule
      const kept = {
        ...given,
        action: action === LifecycleAction.DELETE ? ('delete' as const) : ('quarantine' as const),
      }
      call.audit.target = `lifecycle-rule/${given.id}`
      call.audit.detail = { ...kept }
      return change(db, call, async em => {
        const stored = await em.upsert(
          LifecycleRule,
          { ...kept, createdAt: new Date(clock()) },
          { onConflictFields: ['id'], onConflictMergeFields: ['labels', 'action', 'unseenDays'] },
        )
        return { answer: { rule: ruleMessage(stored) }, keys: [] }
      })
    },

    async listLifecycleRules(request: ListLifecycleRulesRequest, call: Call): Promise<ListLifecycleRulesResponse> {
      const { pageSize, pageToken: after } = check(listRequest, request)
      call.audit.target = 'lifecycle-rules'
      const found = await reports.read(em =>
        em.find(LifecycleRule, after ? { id: { $gt: after[0] } } : {}, { orderBy: { id: 'asc' }, limit: pageSize + 1 }),
      )
      const { rows, nextPageToken } = cutPage(found, pageSize, kept => [kept.id])
      return { rules: rows.map(ruleMessage), nextPageToken }
    },

    async deleteLifecycleRule(request: DeleteLifecycleRuleRequest, call: Call): Promise<DeleteLifecycleRuleResponse> {
      const asked = check(deleteRequest, request)
      call.audit.target = `lifecycle-rule/${asked.id}`
      return change(db, call, async em => {
        const deleted = await em.nativeDelete(LifecycleRule, asked)
        if (deleted === 0) {
          throw new Fault('NOT_FOUND', 'LIFECYCLE_RULE_NOT_FOUND', `there is no lifecycle rule ${asked.id}`)
        }
        return { answer: {}, keys: [] }
      })
    },
  }
}

function ruleMessage({ id, labels, action, unseenDays, createdAt }: LifecycleRule): LifecycleRuleMessage {
  return { id, labels, action: actions[action], unseenDays, createdAt }
}

/** Devices moved by one rule in one run; the rest come with the next. */
const devicesPerRunMax = 1_000
const everyMs = 600_000
/**
 * How long an instance has to have served before it applies rules: after an outage of the service nobody has been seen, and
 * devices need their time to come back.
 */
const firstAfterMs = 3_600_000

/** By the database's clock: an instance whose own is wrong must not throw a fleet out. */
const unseen = `
  select d.id from devices d left join device_postures p on p.device_id = d.id
  where d.labels @> $1::jsonb and d.status in (select jsonb_array_elements_text($2::jsonb))
    and greatest(d.enrolled_at, p.received_at, case when d.status = 'active' then d.updated_at end)
      < now() - make_interval(days => $3::int)
    and not exists (select from (${presentDevices}) here where here.device_id = d.id)`

type LifecycleDeps = {
  db: Database
  clock: Clock
  instanceId: string
  trustDomain: string
  ownEvents: () => OwnEvents
  log: Log
}

/** Applies all rules now. Safe to run at several instances at once: who comes second finds the device moved. */
export async function applyLifecycleRules(deps: LifecycleDeps): Promise<{ quarantined: number; deleted: number }> {
  const { db, log } = deps
  const moved = { quarantined: 0, deleted: 0 }
  const { take } = deviceSteps(deps)
  for (const kept of await db.em().find(LifecycleRule, {}, { orderBy: { id: 'asc' } })) {
    const { id, labels, action, unseenDays } = kept
    const movable = action === 'delete' ? ['pending', 'active', 'quarantined'] : ['pending', 'active']
    const parameters = [JSON.stringify(labels), JSON.stringify(movable), unseenDays]
    const { rows } = await db.pool.query<{ id: string }>(
      `${unseen} order by d.id limit ${devicesPerRunMax}`,
      parameters,
    )
    for (const device of rows) {
      const why = `not seen for ${unseenDays} days (rule ${id})`
      const call = serviceCall(deps)
      try {
        await take(action, device.id, why, call, async em => {
          const still = await em.execute(`${unseen.replaceAll(/\$\d/g, '?')} and d.id = ?`, [...parameters, device.id])
          if (still.length === 0) throw new Fault('FAILED_PRECONDITION', 'DEVICE_SEEN', 'the device has come back')
        })
        moved[action === 'delete' ? 'deleted' : 'quarantined']++
      } catch (error) {
        // It has come back, was moved or removed meanwhile.
        const isGone = error instanceof Fault && (error.code === 'NOT_FOUND' || error.code === 'FAILED_PRECONDITION')
        if (!isGone) throw error
      }
    }
  }
  if (moved.quarantined + moved.deleted > 0) log.info(moved, 'devices that were not seen for long')
  return moved
}

/** What the service does of its own accord is on record like what it is asked to do. */
function serviceCall({ clock, instanceId, trustDomain, ownEvents }: LifecycleDeps): Call {
  const id = 'edgemesh'
  return {
    caller: {
      kind: 'service',
      id,
      spiffeId: `spiffe://${trustDomain}/service/${id}`,
      issuerKeyId: '',
      serial: '',
      notBefore: 0,
      notAfter: Number.POSITIVE_INFINITY,
      role: '',
      publicKeySha256: '',
    },
    address: '',
    method: 'lifecycle',
    startedAt: clock(),
    instanceId,
    signal: new AbortController().signal,
    audit: { target: '', detail: {}, written: false, own: ownEvents() },
  }
}

/** Applies the rules every ten minutes, from an hour after the start on. */
export function keepLifecycle(deps: LifecycleDeps): { stop(): Promise<void> } {
  const startedAt = deps.clock()
  let applying: Promise<unknown> = Promise.resolve()
  const timer = setInterval(() => {
    if (deps.clock() - startedAt < firstAfterMs) return
    applying = applying
      .then(() => applyLifecycleRules(deps))
      .catch(error => deps.log.warn({ err: error }, 'lifecycle rules could not be applied'))
  }, everyMs)
  timer.unref()
  return {
    async stop() {
      clearInterval(timer)
      await applying
    },
  }
}
