/** Services: what users want to reach. */
import { UniqueConstraintViolationException } from '@mikro-orm/core'
import { z } from 'zod'
import { RoleGrant, Service } from '../access/entities.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import {
  type CreateServiceRequest,
  type CreateServiceResponse,
  type DeleteServiceRequest,
  type DeleteServiceResponse,
  type GetServiceRequest,
  type GetServiceResponse,
  type ListServicesRequest,
  type ListServicesResponse,
  type Service as ServiceMessage,
  ServiceStatus,
  type UpdateServiceRequest,
  type UpdateServiceResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, id, labels, name, role, specified } from './request.ts'

const rolesMax = 64

const createRequest = z.object({
  id,
  name,
  labels,
  owner: name,
  roles: z.array(role).max(rolesMax, `has to have at most ${rolesMax} entries`),
})
const listRequest = z.object(page(z.tuple([id])))
const idRequest = z.object({ id })
const updateRequest = z.object({
  id,
  name: name.optional(),
  owner: name.optional(),
  status: specified(ServiceStatus).optional(),
})

export function serviceHandlers({ db, reports, clock }: { db: Database; reports: Reports; clock: Clock }) {
  return {
    async createService(request: CreateServiceRequest, call: Call): Promise<CreateServiceResponse> {
      const asked = check(createRequest, request)
      const createdAt = new Date(clock())
      const roles = [...new Set(asked.roles)].sort()
      const service: Service = {
        id: asked.id,
        name: asked.name,
        labels: asked.labels,
        owner: asked.owner,
        status: 'active',
        createdAt,
      }
      call.audit.target = `service/${service.id}`
      call.audit.detail = { name: service.name, owner: service.owner, labels: service.labels, roles }
      await change(db, call, async em => {
        try {
          await em.insert(Service, service)
        } catch (error) {
          throw error instanceof UniqueConstraintViolationException ? serviceExists(service.id, error) : error
        }
        const grants = roles.map(role => ({ role, service: service.id, actions: ['connect'], createdAt }))
        if (grants.length > 0) await em.upsertMany(RoleGrant, grants)
        return { answer: undefined, keys: [`service:${service.id}`, ...roles.map(role => `grants:${role}`)] }
      })
      return { service: serviceMessage(service) }
    },

    async listServices(request: ListServicesRequest, call: Call): Promise<ListServicesResponse> {
      const { pageSize, pageToken: after } = check(listRequest, request)
      call.audit.target = 'services'
      const found = await reports.read(em =>
        em.find(Service, after ? { id: { $gt: after[0] } } : {}, { orderBy: { id: 'asc' }, limit: pageSize + 1 }),
      )
      const { rows, nextPageToken } = cutPage(found, pageSize, service => [service.id])
      return { services: rows.map(serviceMessage), nextPageToken }
    },

    async getService(request: GetServiceRequest, call: Call): Promise<GetServiceResponse> {
      const asked = check(idRequest, request)
      call.audit.target = `service/${asked.id}`
      const service = await db.em().findOne(Service, asked.id)
      if (!service) throw serviceNotFound(asked.id)
      return { service: serviceMessage(service) }
    },

    async updateService(request: UpdateServiceRequest, call: Call): Promise<UpdateServiceResponse> {
      const asked = check(updateRequest, request)
      call.audit.target = `service/${asked.id}`
      const service = await change(db, call, async em => {
        const service = await em.findOne(Service, asked.id, { lockMode: LockMode.PESSIMISTIC_WRITE })
        if (!service) throw serviceNotFound(asked.id)
        service.name = asked.name ?? service.name
        service.owner = asked.owner ?? service.owner
        if (asked.status !== undefined) service.status = asked.status === ServiceStatus.ACTIVE ? 'active' : 'disabled'
        call.audit.detail = { name: service.name, owner: service.owner, status: service.status }
        return { answer: service, keys: [`service:${service.id}`] }
      })
      return { service: serviceMessage(service) }
    },

    async deleteService(request: DeleteServiceRequest, call: Call): Promise<DeleteServiceResponse> {
      const asked = check(idRequest, request)
      call.audit.target = `service/${asked.id}`
      return change(db, call, async em => {
        // The service first: its row is what a grant being made at the same time waits for.
        const deleted = await em.nativeDelete(Service, { id: asked.id })
        if (deleted === 0) throw serviceNotFound(asked.id)
        const grants = await em.find(RoleGrant, { service: asked.id }, { orderBy: { role: 'asc' } })
        await em.nativeDelete(RoleGrant, { service: asked.id })
        const roles = grants.map(grant => grant.role)
        call.audit.detail = { roles }
        return { answer: {}, keys: [`service:${asked.id}`, ...roles.map(role => `grants:${role}`)] }
      })
    },
  }
}

export function serviceNotFound(id: string): Fault {
  return new Fault('NOT_FOUND', 'SERVICE_NOT_FOUND', `there is no service ${id}`)
}

function serviceExists(id: string, cause: unknown): Fault {
  return new Fault('ALREADY_EXISTS', 'SERVICE_EXISTS', `there is a service with the id ${id} already`, { cause })
}

function serviceMessage(service: Service): ServiceMessage {
  return {
    id: service.id,
    name: service.name,
    labels: service.labels,
    owner: service.owner,
    status: service.status === 'active' ? ServiceStatus.ACTIVE : ServiceStatus.DISABLED,
    createdAt: service.createdAt,
  }
}
