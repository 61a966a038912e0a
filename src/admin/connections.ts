/** Connections: the leases that devices hold, and the ones that have ended. */
import { z } from 'zod'
import { recordFromDecisions } from '../access/connection-records.ts'
import { Connection } from '../access/entities.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import {
  type CloseConnectionRequest,
  type CloseConnectionResponse,
  type Connection as ConnectionMessage,
  ConnectionStatus,
  type ListConnectionsRequest,
  type ListConnectionsResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, enumValue, optionalId, reason } from './request.ts'

const statuses: Record<Connection['status'], ConnectionStatus> = {
  active: ConnectionStatus.ACTIVE,
  revoked: ConnectionStatus.REVOKED,
  closed: ConnectionStatus.CLOSED,
}

const connectionId = z.guid('has to be the id of a connection, a UUID')

const listRequest = z.object({
  ...page(z.tuple([connectionId])),
  deviceId: optionalId,
  status: enumValue(ConnectionStatus),
})
const closeRequest = z.object({ id: connectionId, reason })

type Deps = { db: Database; reports: Reports; clock: Clock; leaseGraceMs: number }

export function connectionHandlers({ db, reports, clock, leaseGraceMs }: Deps) {
  return {
    /** The newest first. Those that were closed in their first seconds are in none of the lists. */
    async listConnections(request: ListConnectionsRequest, call: Call): Promise<ListConnectionsResponse> {
      const { pageSize, pageToken: after, deviceId, status } = check(listRequest, request)
      call.audit.target = deviceId ? `device/${deviceId}` : 'connections'
      const found = await reports.read(em => {
        const query = em
          .createQueryBuilder(Connection)
          .orderBy({ grantedAt: 'desc', id: 'desc' })
          .limit(pageSize + 1)
        if (deviceId) query.andWhere({ deviceId })
        if (status !== ConnectionStatus.UNSPECIFIED) query.andWhere({ status: statusName(status) })
        // The time is looked up rather than carried: PostgreSQL counts microseconds, a Date only milliseconds.
        if (after) query.andWhere('(granted_at, id) < (select granted_at, id from connections where id = ?)', after)
        return query.getResultList()
      })
      const { rows, nextPageToken } = cutPage(found, pageSize, connection => [connection.id])
      return { connections: rows.map(connectionMessage), nextPageToken }
    },

    async closeConnection(request: CloseConnectionRequest, call: Call): Promise<CloseConnectionResponse> {
      const asked = check(closeRequest, request)
      call.audit.target = `connection/${asked.id}`
      const connection = await change(db, call, async em => {
        const find = () => em.findOne(Connection, asked.id, { lockMode: LockMode.PESSIMISTIC_WRITE })
        let connection = await find()
        // One that has just been allowed has no row yet.
        if (!connection && (await recordFromDecisions(db.pool, [asked.id], leaseGraceMs)) > 0) connection = await find()
        if (!connection) {
          throw new Fault('NOT_FOUND', 'CONNECTION_NOT_FOUND', `there is no connection ${asked.id}`)
        }
        call.audit.detail = { before: connection.status, reason: asked.reason }
        // One that has ended stays as it ended: that is what was wanted, and its own reasons are the true ones.
        if (connection.status !== 'active') return { answer: connection, keys: [] }
        connection.status = 'revoked'
        connection.endedAt = new Date(clock())
        connection.endReasons = [
          {
            code: 'CLOSED_BY_OPERATOR',
            field: 'connection.id',
            actual: asked.reason,
            required: '',
            message: `An operator closed the connection${asked.reason && `: ${asked.reason}`}.`,
          },
        ]
        // The instance that holds the lease hears of it and tells the device.
        return { answer: connection, keys: [`connection:${connection.id}`] }
      })
      return { connection: connectionMessage(connection) }
    },
  }
}

function statusName(status: ConnectionStatus): Connection['status'] {
  const names = Object.keys(statuses) as Connection['status'][]
  return names.find(name => statuses[name] === status)!
}

function connectionMessage(connection: Connection): ConnectionMessage {
  return {
    id: connection.id,
    deviceId: connection.deviceId,
    userId: connection.userId,
    serviceId: connection.serviceId,
    action: connection.action,
    status: statuses[connection.status],
    grantedAt: connection.grantedAt,
    endedAt: connection.endedAt ?? undefined,
    reasons: connection.endReasons ?? [],
    decisionId: connection.decisionId,
    instanceId: connection.instanceId,
    resumeBy: (connection.status === 'active' && connection.resumeBy) || undefined,
  }
}
