/** Audit events: who called what, from where, and how it ended. Read only: nobody changes or removes one. */
import { z } from 'zod'
import { AuditEvent } from '../audit/entities.ts'
import type { EventRow } from '../audit/follow.ts'
import type { Call } from '../caller.ts'
import type { Reports } from '../db/replicas.ts'
import type {
  AuditEvent as AuditEventMessage,
  SearchAuditEventsRequest,
  SearchAuditEventsResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { cutPage, page } from './paging.ts'
import { check, text, time } from './request.ts'

/** As long as the longest SPIFFE ID. */
const filterCharactersMax = 2_048

export const filter = text(filterCharactersMax)
/** As `toISOString` writes it, and of a year that PostgreSQL knows: it has no year 0. */
const tokenTime = z.iso.datetime({ precision: 3 }).refine(text => !text.startsWith('0000'))

const searchRequest = z.object({
  ...page(z.tuple([tokenTime, z.guid()])),
  actor: filter,
  method: filter,
  target: filter,
  code: filter,
  after: time.optional(),
  before: time.optional(),
})

export function auditEventHandlers({ reports }: { reports: Reports }) {
  return {
    /**
     * The newest first. Filters match whole values; `after` is the first instant included and `before` the first one
     * not, so that one search can go on where another has ended.
     */
    async searchAuditEvents(request: SearchAuditEventsRequest, call: Call): Promise<SearchAuditEventsResponse> {
      const { pageSize, pageToken, actor, method, target, code, after, before } = check(searchRequest, request)
      call.audit.target = 'audit-events'
      const found = await reports.read(em => {
        const query = em
          .createQueryBuilder(AuditEvent)
          .orderBy({ at: 'desc', id: 'desc' })
          .limit(pageSize + 1)
        if (actor) query.andWhere({ actor })
        if (method) query.andWhere({ method })
        if (target) query.andWhere({ target })
        if (code) query.andWhere({ code })
        if (after) query.andWhere({ at: { $gte: after } })
        if (before) query.andWhere({ at: { $lt: before } })
        if (pageToken) {
          const [at, id] = pageToken
          // PostgreSQL counts microseconds, a Date only milliseconds: the time narrows the search to one partition, the
          // row itself says the rest.
          query.andWhere(
            `(at, id) < (
              select at, id from audit_events
              where id = ? and at >= ?::timestamptz and at < ?::timestamptz + interval '1 millisecond')`,
            [id, at, at],
          )
        }
        return query.getResultList()
      })
      const { rows, nextPageToken } = cutPage(found, pageSize, event => [event.at.toISOString(), event.id])
      return { events: rows.map(eventMessage), nextPageToken }
    },
  }
}

export function eventMessage(event: EventRow): AuditEventMessage {
  return {
    id: event.id,
    at: event.at,
    actor: event.actor,
    method: event.method,
    target: event.target,
    sourceAddress: event.sourceAddress,
    code: event.code,
    reason: event.reason,
    detail: event.detail,
    instanceId: event.instanceId,
  }
}
