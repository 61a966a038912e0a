/** Which policy decides, and the data that it rests on: posture requirements and business hours. */
import { z } from 'zod'
import { PolicyData } from '../access/entities.ts'
import type { PolicyStatus } from '../access/policy-engine.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import type {
  GetPolicyStateRequest,
  GetPolicyStateResponse,
  PolicyData as PolicyDataMessage,
  UpdatePolicyDataRequest,
  UpdatePolicyDataResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { change } from './change.ts'
import { check, role } from './request.ts'

const rolesMax = 64
const minutesOfDay = 24 * 60
const weekdays = ['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun'] as const

/** The only row of its table, which the first migration makes. */
const theOnlyRow = 1

const percentMax = z
  .number('has to be from 0 to 100')
  .min(0, 'has to be from 0 to 100')
  .max(100, 'has to be from 0 to 100')
  .optional()

const hours = z
  .object({
    timezone: z.string().refine(isTimeZone, 'has to be the IANA name of a time zone, such as "Europe/Berlin"'),
    days: z
      .array(z.enum(weekdays, { error: `has to be one of ${weekdays.join(', ')}` }))
      .min(1, 'has to name at least one day')
      .max(weekdays.length, `has to have at most ${weekdays.length} entries`),
    startMinute: z.int().min(0),
    endMinute: z.int().max(minutesOfDay, `has to be at most ${minutesOfDay}`),
    exemptRoles: z.array(role).max(rolesMax, `has to have at most ${rolesMax} entries`),
  })
  // Also looked at when other fields are wrong, so that the answer names everything at once.
  .refine(({ startMinute, endMinute }) => startMinute < endMinute, {
    path: ['endMinute'],
    message: 'has to be greater than start_minute',
    when: () => true,
  })

const updateRequest = z.object({
  data: z.object(
    {
      requirements: z.object(
        {
          patchesCurrent: z.boolean(),
          antivirusEnabled: z.boolean(),
          diskEncrypted: z.boolean(),
          firewallEnabled: z.boolean(),
          cpuPercentMax: percentMax,
          memoryPercentMax: percentMax,
          diskPercentMax: percentMax,
        },
        // Everything is replaced, so what is left out by mistake would require nothing of anybody.
        { error: 'has to be given; an empty message requires nothing' },
      ),
      hours: hours.optional(),
    },
    { error: 'has to be given' },
  ),
})

export function policyDataHandlers({
  db,
  clock,
  policy,
}: {
  db: Database
  clock: Clock
  policy: { status(): PolicyStatus; engine: 'in-process' | 'opa-server' }
}) {
  return {
    async getPolicyState(_request: GetPolicyStateRequest, call: Call): Promise<GetPolicyStateResponse> {
      call.audit.target = 'policy/data'
      const data = await db.em().findOneOrFail(PolicyData, theOnlyRow)
      const { revision, activatedAtMs, checkedAtMs, refused } = policy.status()
      return {
        revision,
        engine: policy.engine,
        data: policyDataMessage(data),
        activatedAt: activatedAtMs === undefined ? undefined : new Date(activatedAtMs),
        checkedAt: checkedAtMs === undefined ? undefined : new Date(checkedAtMs),
        refused: refused && { problem: refused.problem, hint: refused.hint, since: new Date(refused.sinceMs) },
        instanceId: call.instanceId,
      }
    },

    async updatePolicyData(request: UpdatePolicyDataRequest, call: Call): Promise<UpdatePolicyDataResponse> {
      const { data: asked } = check(updateRequest, request)
      call.audit.target = 'policy/data'
      const data = await change(db, call, async em => {
        const data = await em.findOneOrFail(PolicyData, theOnlyRow, { lockMode: LockMode.PESSIMISTIC_WRITE })
        data.requirements = {
          patches_current: asked.requirements.patchesCurrent,
          antivirus_enabled: asked.requirements.antivirusEnabled,
          disk_encrypted: asked.requirements.diskEncrypted,
          firewall_enabled: asked.requirements.firewallEnabled,
          cpu_percent_max: asked.requirements.cpuPercentMax ?? null,
          memory_percent_max: asked.requirements.memoryPercentMax ?? null,
          disk_percent_max: asked.requirements.diskPercentMax ?? null,
        }
        data.hours = asked.hours
          ? {
              timezone: asked.hours.timezone,
              days: asked.hours.days,
              start_minute: asked.hours.startMinute,
              end_minute: asked.hours.endMinute,
              exempt_roles: asked.hours.exemptRoles,
            }
          : null
        data.updatedAt = new Date(clock())
        call.audit.detail = { requirements: data.requirements, hours: data.hours }
        return { answer: data, keys: ['policy:data'] }
      })
      return { data: policyDataMessage(data) }
    },
  }
}

/** A name, not an offset such as `+01:00`, which `Intl` takes too but policies don't. */
function isTimeZone(name: string): boolean {
  if (!/^[A-Z][A-Za-z0-9_+/-]{1,63}$/.test(name)) return false
  try {
    new Intl.DateTimeFormat('en', { timeZone: name })
    return true
  } catch {
    return false
  }
}

function policyDataMessage({ requirements, hours }: PolicyData): PolicyDataMessage {
  return {
    requirements: {
      patchesCurrent: requirements.patches_current,
      antivirusEnabled: requirements.antivirus_enabled,
      diskEncrypted: requirements.disk_encrypted,
      firewallEnabled: requirements.firewall_enabled,
      cpuPercentMax: requirements.cpu_percent_max ?? undefined,
      memoryPercentMax: requirements.memory_percent_max ?? undefined,
      diskPercentMax: requirements.disk_percent_max ?? undefined,
    },
    hours: hours
      ? {
          timezone: hours.timezone,
          days: hours.days,
          startMinute: hours.start_minute,
          endMinute: hours.end_minute,
          exemptRoles: hours.exempt_roles,
        }
      : undefined,
  }
}
