/** Grants: what a role may do on a service, or on every service. */
import { z } from 'zod'
import { RoleGrant, Service } from '../access/entities.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import type {
  DeleteRoleGrantRequest,
  DeleteRoleGrantResponse,
  ListRoleGrantsRequest,
  ListRoleGrantsResponse,
  RoleGrant as RoleGrantMessage,
  SetRoleGrantRequest,
  SetRoleGrantResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, id, role } from './request.ts'
import { serviceNotFound } from './services.ts'

const actionsMax = 32
/** As long as the action of a question may be. */
const actionPattern = /^(?:\*|[A-Za-z0-9][A-Za-z0-9._:-]{0,31})$/

const anyService = '*'

const service = z.union([z.literal(anyService), id], {
  error: 'has to be the id of a service, or "*" for every service',
})
const actions = z
  .array(z.string().regex(actionPattern, 'has to be "*" or 1 to 32 letters, digits, ".", "_", ":" and "-"'))
  .min(1, 'has to name at least one action; use DeleteRoleGrant to take all away')
  .max(actionsMax, `has to have at most ${actionsMax} entries`)
  .transform(given => [...new Set(given)])

const setRequest = z.object({ grant: z.object({ role, service, actions }, { error: 'has to be given' }) })
const listRequest = z.object(page(z.tuple([role, service])))
const deleteRequest = z.object({ role, service })

export function grantHandlers({ db, reports, clock }: { db: Database; reports: Reports; clock: Clock }) {
  return {
    async setRoleGrant(request: SetRoleGrantRequest, call: Call): Promise<SetRoleGrantResponse> {
      const { grant } = check(setRequest, request)
      call.audit.target = `grant/${grant.role}/${grant.service}`
      call.audit.detail = { actions: grant.actions }
      return change(db, call, async em => {
        if (grant.service !== anyService) {
          // The lock keeps the service from being deleted before its grant is there to be deleted with it.
          const granted = await em.findOne(Service, grant.service, { lockMode: LockMode.PESSIMISTIC_READ })
          if (!granted) throw serviceNotFound(grant.service)
        }
        await em.upsert(
          RoleGrant,
          { ...grant, createdAt: new Date(clock()) },
          { onConflictFields: ['role', 'service'], onConflictMergeFields: ['actions'] },
        )
        return { answer: { grant }, keys: [`grants:${grant.role}`] }
      })
    },

    async listRoleGrants(request: ListRoleGrantsRequest, call: Call): Promise<ListRoleGrantsResponse> {
      const { pageSize, pageToken: after } = check(listRequest, request)
      call.audit.target = 'grants'
      const found = await reports.read(em => {
        const query = em
          .createQueryBuilder(RoleGrant)
          .orderBy({ role: 'asc', service: 'asc' })
          .limit(pageSize + 1)
        if (after) query.where('(role, service) > (?, ?)', after)
        return query.getResultList()
      })
      const { rows, nextPageToken } = cutPage(found, pageSize, grant => [grant.role, grant.service])
      return { grants: rows.map(grantMessage), nextPageToken }
    },

    async deleteRoleGrant(request: DeleteRoleGrantRequest, call: Call): Promise<DeleteRoleGrantResponse> {
      const asked = check(deleteRequest, request)
      call.audit.target = `grant/${asked.role}/${asked.service}`
      return change(db, call, async em => {
        const deleted = await em.nativeDelete(RoleGrant, asked)
        if (deleted === 0) throw grantNotFound(asked)
        return { answer: {}, keys: [`grants:${asked.role}`] }
      })
    },
  }
}

function grantNotFound({ role, service }: { role: string; service: string }): Fault {
  return new Fault('NOT_FOUND', 'GRANT_NOT_FOUND', `role ${role} has no grant on service ${service}`)
}

function grantMessage({ role, service, actions }: RoleGrant): RoleGrantMessage {
  return { role, service, actions }
}
