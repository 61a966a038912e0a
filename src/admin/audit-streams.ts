/**
 * The audit log as a stream: followed as it is written, or exported.
 *
 * Both read it in the order of `audit/follow.ts`, in which nothing that commits late is passed over, and both tell where
 * they are by checkpoints, so that whoever lost the stream goes on at any instance.
 */
import { z } from 'zod'
import type { DecidedQuestion } from '../access/entities.ts'
import {
  type AuditRecord,
  type AuditTable,
  type Checkpoint,
  checkpointAt,
  checkpointOfNow,
  checkpointText,
  type EventRow,
  readCheckpoint,
} from '../audit/follow.ts'
import { type AuditFollower, inOneSnapshot } from '../audit/follower.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import {
  AuditRecordKind,
  type ExportAuditRecordsRequest,
  type ExportAuditRecordsResponse,
  type TailAuditEventsRequest,
  type TailAuditEventsResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { eventMessage, filter } from './audit-events.ts'
import { decisionMessage } from './decisions.ts'
import { check, specified, time } from './request.ts'

const lastMax = 1_000
/** How old the checkpoint of a reader may be at most, while nothing of what is committed is for it. */
const checkpointEveryMs = 10_000
const kindsMax = 2

const checkpoint = z.string().transform((text, context): Checkpoint | undefined => {
  if (text === '') return undefined
  const read = readCheckpoint(text)
  if (read) return read
  context.addIssue({ code: 'custom', message: 'has to be empty or a checkpoint that was given by such a stream' })
  return z.NEVER
})

const tailRequest = z.object({
  actor: filter,
  method: filter,
  target: filter,
  code: filter,
  last: z.int().min(0).max(lastMax, `has to be ${lastMax} at most`),
  since: time.optional(),
  afterCheckpoint: checkpoint,
})

const exportRequest = z
  .object({
    kinds: z.array(specified(AuditRecordKind)).max(kindsMax, `has to be of at most ${kindsMax} kinds`),
    since: time.optional(),
    until: time.optional(),
    afterCheckpoint: checkpoint,
    follow: z.boolean(),
  })
  .refine(({ until, follow }) => !(until && follow), { path: ['until'], message: 'must not be given with follow' })

const tableOf: Partial<Record<AuditRecordKind, AuditTable>> = {
  [AuditRecordKind.EVENT]: 'audit_events',
  [AuditRecordKind.DECISION]: 'decisions',
}
const allTables: readonly AuditTable[] = ['audit_events', 'decisions']

export type AuditStreamDeps = { db: Database; clock: Clock; follower: AuditFollower }

export function auditStreamHandlers({ db, clock, follower }: AuditStreamDeps) {
  type TailFilter = Pick<z.output<typeof tailRequest>, 'actor' | 'method' | 'target' | 'code'>

  /** The oldest first. */
  async function newest({ actor, method, target, code }: TailFilter, last: number) {
    return inOneSnapshot(db.pool, async client => {
      const at = await checkpointOfNow(client, clock())
      if (last === 0) return { at, events: [] }
      const { rows } = await client.query<Omit<EventRow, 'at'> & { at: string }>(
        `select id, at, actor, method, target, source_address as "sourceAddress", code, reason, detail,
           instance_id as "instanceId"
         from audit_events
         where ($1 = '' or actor = $1) and ($2 = '' or method = $2) and ($3 = '' or target = $3)
           and ($4 = '' or code = $4)
         order by at desc, id desc limit $5`,
        [actor, method, target, code, last],
      )
      return { at, events: rows.reverse().map((row): EventRow => ({ ...row, at: new Date(row.at) })) }
    })
  }

  return {
    async *tailAuditEvents(request: TailAuditEventsRequest, call: Call): AsyncGenerator<TailAuditEventsResponse> {
      // Step 1: Where it begins.
      const { last, since, afterCheckpoint, ...filters } = check(tailRequest, request)
      call.audit.target = 'audit-events'
      call.audit.detail = { follow: true }
      const backlog = afterCheckpoint || since ? undefined : await newest(filters, last)
      const at = afterCheckpoint ?? backlog?.at ?? checkpointAt(since?.getTime() ?? 0)

      // Step 2: What there was. The checkpoint comes first: who loses the stream from here on misses nothing new.
      yield { event: undefined, checkpoint: checkpointText(at) }
      for (const row of backlog?.events ?? []) yield { event: eventMessage(row), checkpoint: '' }
      const alreadyGiven = new Set(backlog?.events.map(({ id }) => id))

      // Step 3: What comes.
      const isWanted = (row: EventRow) =>
        !alreadyGiven.has(row.id) &&
        (!since || row.at >= since) &&
        (['actor', 'method', 'target', 'code'] as const).every(name => !filters[name] || filters[name] === row[name])
      const due = checkpointTimer(clock)
      const following = { checkpoint: at, tables: new Set<AuditTable>(['audit_events']), signal: call.signal }
      for await (const { records, whole } of follower.follow(following)) {
        for (const { row } of records) {
          if (isWanted(row as EventRow)) yield { event: due.given(eventMessage(row as EventRow)), checkpoint: '' }
        }
        if (whole && due.isDue()) yield { event: undefined, checkpoint: due.told(checkpointText(at)) }
      }
    },

    /**
     * Without `follow` it ends with what was committed when it came to the end; the checkpoint in its last message says
     * that it is whole.
     */
    async *exportAuditRecords(
      request: ExportAuditRecordsRequest,
      call: Call,
    ): AsyncGenerator<ExportAuditRecordsResponse> {
      const { kinds, since, until, afterCheckpoint, follow } = check(exportRequest, request)
      call.audit.target = 'audit-records'
      call.audit.detail = { since, until, goesOn: afterCheckpoint !== undefined, follow }
      const at = afterCheckpoint ?? checkpointAt(since?.getTime() ?? 0)
      const tables = new Set(kinds.length > 0 ? kinds.flatMap(kind => tableOf[kind] ?? []) : allTables)
      const isWanted = ({ row }: AuditRecord) => (!since || row.at >= since) && (!until || row.at < until)
      const here = (): ExportAuditRecordsResponse => ({ record: undefined, checkpoint: checkpointText(at) })

      const following = { checkpoint: at, tables, signal: call.signal }
      const due = checkpointTimer(clock)
      for await (const { records, whole } of follow ? follower.follow(following) : follower.rest(following)) {
        for (const record of records) if (isWanted(record)) yield* recordMessages(due.given(record))
        if (whole && !until && due.isDue()) yield due.told(here())
      }
      yield until ? { record: undefined, checkpoint: '' } : here()
    },
  }
}

/** A checkpoint is told behind what was given, else every now and then. */
function checkpointTimer(clock: Clock) {
  let toldAt = clock()
  let isBehind = false
  return {
    given<T>(record: T): T {
      isBehind = true
      return record
    },
    isDue: () => isBehind || clock() - toldAt >= checkpointEveryMs,
    told<T>(message: T): T {
      isBehind = false
      toldAt = clock()
      return message
    },
  }
}

function* recordMessages({ table, row }: AuditRecord): Generator<ExportAuditRecordsResponse> {
  if (table === 'audit_events') {
    yield { record: { $case: 'event', value: eventMessage(row) }, checkpoint: '' }
    return
  }
  for (const [position, question] of (row.questions as DecidedQuestion[]).entries()) {
    const decision = decisionMessage({
      ...{ id: row.id, position: String(position), at: row.at, device_id: row.deviceId, caller: row.caller },
      ...{ instance_id: row.instanceId, policy_revision: row.policyRevision },
      // An input that an earlier decision has is not looked up: who takes all of it has had that.
      ...{ question, input: question.input ?? null },
    })
    yield { record: { $case: 'decision', value: decision }, checkpoint: '' }
  }
}
