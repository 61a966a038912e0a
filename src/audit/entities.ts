/** What audit keeps: one event a call. Partitioned by day of `at`; a trigger refuses to change or remove rows. */
import { defineEntity, type InferEntity, p } from '@mikro-orm/core'

export const AuditEvent = defineEntity({
  name: 'AuditEvent',
  tableName: 'audit_events',
  properties: {
    at: p.datetime().primary(),
    id: p.uuid().primary(),
    actor: p.text(),
    method: p.text(),
    target: p.text(),
    sourceAddress: p.text(),
    code: p.text(),
    reason: p.text(),
    detail: p.json<Record<string, unknown>>(),
    instanceId: p.text(),
    /** Of an event that was committed outside of the journal's batches: see `seals.ts`. */
    mac: p.text().nullable(),
  },
})
export type AuditEvent = InferEntity<typeof AuditEvent>

export const auditEntities = [AuditEvent]
