/** Connections on record, and whose they are: a row is its instance's, until another takes it over. */
import type pg from 'pg'
import type { JournalEntry } from '../audit/journal.ts'
import type { JournalTable } from '../audit/journal-table.ts'
import { canonicalJson } from '../audit/seals.ts'
import { announcing } from '../db/change-feed.ts'
import type { Lease } from './leases.ts'
import type { PolicyReason } from './policy-engine.ts'

const connectionsTable: JournalTable = {
  name: 'connections',
  columns: [
    { name: 'id', type: 'uuid' },
    { name: 'device_id', type: 'text' },
    { name: 'user_id', type: 'text' },
    { name: 'service_id', type: 'text' },
    { name: 'action', type: 'text' },
    { name: 'instance_id', type: 'text' },
    { name: 'status', type: 'text' },
    { name: 'granted_at', type: 'timestamptz' },
    { name: 'ended_at', type: 'timestamptz' },
    { name: 'end_reasons', type: 'jsonb' },
    { name: 'decision_id', type: 'text' },
    { name: 'resume_by', type: 'timestamptz' },
  ],
  key: row => String(row[0]),
  // A connection ends once: what came first stays. And what another instance holds by now is not ours to write.
  onConflict: `on conflict (id) do update set status = excluded.status, ended_at = excluded.ended_at,
    end_reasons = excluded.end_reasons, decision_id = excluded.decision_id, resume_by = excluded.resume_by
    where connections.status = 'active' and connections.instance_id = excluded.instance_id`,
}

/** The row of a connection as it stands. */
export function connectionEntry(
  lease: Lease,
  instanceId: string,
  nowMs: number,
  reasons: PolicyReason[],
): JournalEntry {
  const { id, question, userId, serviceId, grantedAtMs, decisionId } = lease
  const status = lease.state === 'suspended' ? 'active' : lease.state
  const ended = status !== 'active'
  const endReasons = ended ? canonicalJson(reasons) : null
  const resumeBy = lease.state === 'suspended' && lease.resumeBy ? lease.resumeBy : null
  const { deviceId, action } = question
  const [grantedAt, endedAt] = [new Date(grantedAtMs), ended ? new Date(nowMs) : null]
  const holder = [id, deviceId, userId, serviceId, action, instanceId]
  const row = [...holder, status, grantedAt, endedAt, endReasons, decisionId, resumeBy]
  // What `rowText` would make of it, at a third of the cost: two rows a connection are most of what one costs.
  const end = ended ? `"end_reasons":${endReasons},"ended_at":${nowMs * 1_000},` : ''
  const resume = resumeBy ? `"resume_by":${resumeBy.getTime() * 1_000},` : ''
  const text = `{"action":${quoted(action)},"decision_id":"${decisionId}","device_id":${quoted(deviceId)},${end}"granted_at":${grantedAtMs * 1_000},"id":"${id}","instance_id":${quoted(instanceId)},${resume}"service_id":${quoted(serviceId)},"status":"${status}","user_id":${quoted(userId)}}`
  return { table: connectionsTable, row, text }
}

const plain = /^[\w .:@/-]*$/

/** As JSON. Most names are such as stand for themselves. */
function quoted(name: string): string {
  return plain.test(name) ? `"${name}"` : JSON.stringify(name.toWellFormed())
}

/** A connection that its device wants to resume. */
export type Claim = {
  id: string
  /** It is this instance's from now on, and nobody else's. */
  claimed: boolean
  status: 'active' | 'revoked' | 'closed'
  userId: string
  serviceId: string
  action: string
  grantedAtMs: number
  decisionId: string
  /** Until when it could be resumed, by the database's clock; null: nobody had noticed yet that its stream is gone. */
  resumeByMs: number | null
  endReasons: PolicyReason[] | null
}

/**
 * Makes those of the connections that can be resumed this instance's, whoever had them; the instance that did hears of it by
 * `connection:<id>`. Of several that do this at once for the same connection the last has it.
 *
 * @returns what is on record of those that are the device's, by id
 */
export async function claimConnections(
  pool: pg.Pool,
  asked: { ids: string[]; deviceId: string; instanceId: string },
): Promise<Map<string, Claim>> {
  const { rows } = await pool.query<Claim>(claim, [asked.ids, asked.deviceId, asked.instanceId])
  return new Map(rows.map(row => [row.id, row]))
}

// An instance of the version before does not hand over: it would write an end of what it has lost. The lock makes who claims
// the same rows wait, in one order; so the one behind sees whose they have become.
const claim = `
  with asked as (
    select c.id, c.status, c.user_id, c.service_id, c.action, c.instance_id, c.granted_at, c.decision_id, c.resume_by,
      c.end_reasons,
      c.status = 'active' and case when c.resume_by is not null then c.resume_by > now()
        else exists (select from instances i where i.id = c.instance_id and i.hands_over) end as resumable
    from connections c where c.id = any($1::uuid[]) and c.device_id = $2
    order by c.id for update of c
  ), claimed as (
    update connections c set instance_id = $3, resume_by = null
    from asked where c.id = asked.id and asked.resumable
    returning c.id
  )
  select asked.id, claimed.id is not null as claimed, asked.status, asked.user_id as "userId",
    asked.service_id as "serviceId", asked.action,
    (extract(epoch from asked.granted_at) * 1000)::float8 as "grantedAtMs", asked.decision_id as "decisionId",
    (extract(epoch from asked.resume_by) * 1000)::float8 as "resumeByMs", asked.end_reasons as "endReasons",
    case when claimed.id is not null and asked.instance_id <> $3
      then ${announcing(`'connection:' || asked.id`)} end as told
  from asked left join claimed on claimed.id = asked.id`

/** A connection that is not held here any more: it has ended, or another instance has it. */
export type Departure = { id: string; status: 'active' | 'revoked' | 'closed'; endReasons: PolicyReason[] | null }

/** Which of the connections are not this instance's any more. Those that are not on record yet are. */
export async function departedConnections(pool: pg.Pool, ids: string[], instanceId: string): Promise<Departure[]> {
  const { rows } = await pool.query<Departure>(
    `select id, status, end_reasons as "endReasons" from connections
     where id = any($1::uuid[]) and (status <> 'active' or instance_id <> $2)`,
    [ids, instanceId],
  )
  return rows
}
