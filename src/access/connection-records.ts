/**
 * Connections on record, and whose they are: a row is its instance's, until another takes it over.
 *
 * A new connection has none. Its decision, on disk before it was allowed, is its record: the ids of both differ in their last
 * byte, the place of the question in its message. Most connections are over before they would be looked for; one that lasts, is
 * taken back, or has lost its stream gets a row (`leases.ts`). Who needs that of another one makes it from its decision.
 */
import type pg from 'pg'
import type { JournalEntry } from '../audit/journal.ts'
import type { JournalTable } from '../audit/journal-table.ts'
import { canonicalJson } from '../audit/seals.ts'
import { announcing } from '../db/change-feed.ts'
import { untilCommitted } from '../db/failure.ts'
import { AuthorizeServiceService } from '../gen/edgemesh/v1/authorize.ts'
import { decisionIdOf, decisionOf, placeOf } from './connection-id.ts'
import { joinInput } from './decision-records.ts'
import type { Lease } from './leases.ts'
import type { PolicyReason } from './policy-engine.ts'

/** A connection that lasts longer than this gets a row. */
export const recordedAfterMs = 2_000
/** By how much the clocks of instances and database may differ, and how long a lost one may go unnoticed. */
const unnoticedMs = 60_000

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
  const { id, question, userId, serviceId, grantedAtMs } = lease
  const status = lease.state === 'suspended' ? 'active' : lease.state
  const ended = status !== 'active'
  const endReasons = ended ? canonicalJson(reasons) : null
  const resumeBy = lease.state === 'suspended' && lease.resumeBy ? lease.resumeBy : null
  const holder = [id, question.deviceId, userId, serviceId, question.action, instanceId]
  const [grantedAt, endedAt] = [new Date(grantedAtMs), ended ? new Date(nowMs) : null]
  return {
    table: connectionsTable,
    row: [...holder, status, grantedAt, endedAt, endReasons, decisionOf(lease), resumeBy],
  }
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
  asked: { ids: string[]; deviceId: string; instanceId: string; graceMs: number },
): Promise<Map<string, Claim>> {
  const { ids, deviceId, instanceId, graceMs } = asked
  const found = new Map<string, Claim>()
  const look = async (wanted: string[]) => {
    const { rows } = await untilCommitted(() => pool.query<Claim>(claim, [wanted, deviceId, instanceId]))
    for (const row of rows) found.set(row.id, row)
  }
  await look(ids)
  const without = ids.filter(id => !found.has(id))
  if (without.length > 0 && (await recordFromDecisions(pool, without, graceMs, deviceId)) > 0) await look(without)
  return found
}

/**
 * Gives those connections a row that have none yet and were not closed, from the decisions that allowed them, as their
 * instance would have done.
 *
 * @param graceMs how long a connection can wait to be resumed
 * @param deviceId whose they have to be; default: anybody's
 * @returns how many there were
 */
export async function recordFromDecisions(
  pool: pg.Pool,
  ids: string[],
  graceMs: number,
  deviceId: string | null = null,
): Promise<number> {
  const within = (recordedAfterMs + graceMs + unnoticedMs) / 1_000
  const asked = ids.filter(id => placeOf(id) >= 0)
  const [decisions, places] = [asked.map(decisionIdOf), asked.map(placeOf)]
  const { rowCount } = await pool.query(fromDecisions, [
    asked,
    decisions,
    places,
    deviceId,
    within,
    AuthorizeServiceService.authorize.path,
  ])
  return rowCount ?? 0
}

// Where its user and service were asked for by name, policy's input has their ids.
const fromDecisions = `
  insert into connections (id, device_id, user_id, service_id, action, instance_id, status, granted_at, decision_id)
  select wanted.id, decision.device_id, coalesce(known.input #>> '{user,id}', asked.question ->> 'user'),
    coalesce(known.input #>> '{service,id}', asked.question ->> 'service'), asked.question ->> 'action',
    decision.instance_id, 'active', decision.at, decision.id || '.' || wanted.place
  from unnest($1::uuid[], $2::uuid[], $3::int[]) as wanted (id, decision, place)
  join decisions decision on decision.id = wanted.decision and decision.at > now() - make_interval(secs => $5)
    and decision.method = $6 and ($4::text is null or decision.device_id = $4)
  cross join lateral (select decision.questions -> wanted.place as question) asked
  ${joinInput('asked.question')}
  where (asked.question ->> 'allow')::boolean and not exists (
    select from audit_events event
    where event.target = 'device/' || decision.device_id and event.at > now() - make_interval(secs => $5)
      and event.method = $6 and event.detail -> 'closed' ? wanted.id::text
  )
  on conflict (id) do nothing`

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

/** Which of the connections are not this instance's any more. Those that have no row yet are. */
export async function departedConnections(pool: pg.Pool, ids: string[], instanceId: string): Promise<Departure[]> {
  const { rows } = await pool.query<Departure>(
    `select id, status, end_reasons as "endReasons" from connections
     where id = any($1::uuid[]) and (status <> 'active' or instance_id <> $2)`,
    [ids, instanceId],
  )
  return rows
}
