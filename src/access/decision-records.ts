/** Decisions on record: one row a message, however many questions it carried. A decision's id is the row's and its place. */
import type { Attributes } from '@opentelemetry/api'
import type { JournalEntry } from '../audit/journal.ts'
import type { JournalTable } from '../audit/journal-table.ts'
import { type Call, callerName } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { describeSpan } from '../telemetry/tracing.ts'
import { newDecisionId } from './connection-id.ts'
import { keepsOnRecord, recordText, type Verdict } from './decide.ts'
import type { Lease } from './leases.ts'

/** What was answered; the verdict says to which question. */
export type Decided = { verdict: Verdict }

/** `committed`, if there is one, has to be called once the entry is on disk: later answers by the same verdicts refer to it. */
export type DecisionRecord = { entry: JournalEntry; committed: (() => void) | undefined }

const decisionsTable: JournalTable = {
  name: 'decisions',
  columns: [
    { name: 'at', type: 'timestamptz' },
    { name: 'id', type: 'uuid' },
    { name: 'device_id', type: 'text' },
    { name: 'caller', type: 'text' },
    { name: 'method', type: 'text' },
    { name: 'source_address', type: 'text' },
    { name: 'instance_id', type: 'text' },
    { name: 'policy_revision', type: 'text' },
    { name: 'latency_us', type: 'int' },
    { name: 'questions', type: 'jsonb' },
  ],
}

/**
 * Lateral join of SQL that finds the input of an answered question as `known.input`: with itself, or with the earlier decision
 * that has it. Its exact time spares a look into the partitions of all other days. Retention may have taken it away, if it lies
 * within the oldest day's first hour.
 *
 * @param question an expression: an element of `decisions.questions`
 */
export function joinInput(question: string): string {
  return `left join lateral (
    select earlier.questions -> split_part(${question} ->> 'inputOf', '.', 2)::int -> 'input' as input
    from decisions earlier
    where earlier.id = split_part(${question} ->> 'inputOf', '.', 1)::uuid
      and earlier.at = (${question} ->> 'inputAt')::timestamptz
  ) first on true
  cross join lateral (select coalesce(${question} -> 'input', first.input) as input) known`
}

/**
 * @param id by `newDecisionId`
 * @param startedAt when the work on the message began, as `performance.now()`
 */
export function decisionEntry(
  id: string,
  call: Call,
  deviceId: string,
  decided: Decided[],
  nowMs: number,
  startedAt: number,
): DecisionRecord {
  const { method, address, instanceId } = call
  const latencyUs = Math.round((performance.now() - startedAt) * 1_000)
  describeSpan(spanFacts, id, deviceId, decided)
  const by = { caller: callerName(call.caller), method, address, instanceId }
  return decisionRow(id, by, deviceId, decided, nowMs, latencyUs)
}

function decisionRow(
  id: string,
  by: { caller: string; method: string; address: string; instanceId: string },
  deviceId: string,
  decided: Decided[],
  nowMs: number,
  latencyUs: number,
): DecisionRecord {
  const at = new Date(nowMs)
  const row = [
    at,
    id,
    deviceId,
    by.caller,
    by.method,
    by.address,
    by.instanceId,
    decided[0]?.verdict.policyRevision ?? '',
    latencyUs,
    decided.map(({ verdict }) => recordText(verdict)),
  ]
  const areKnown = decided.every(({ verdict }) => verdict.onRecord.place !== undefined)
  return { entry: { table: decisionsTable, row }, committed: areKnown ? undefined : keepingOnRecord(decided, id, at) }
}

function keepingOnRecord(decided: Decided[], id: string, at: Date): () => void {
  return () =>
    decided.forEach(({ verdict }, place) => {
      if (verdict.onRecord.place === undefined) keepsOnRecord(verdict, `${id}.${place}`, at)
    })
}

/** What the span of a message says of its decisions: by the id all else is found. */
function spanFacts(id: string, deviceId: string, decided: Decided[]): Attributes {
  const allowed = decided.filter(({ verdict }) => verdict.allow).length
  return {
    'edgemesh.decision': id,
    'edgemesh.device': deviceId,
    'edgemesh.allowed': allowed,
    'edgemesh.denied': decided.length - allowed,
    'edgemesh.reasons': [...new Set(decided.flatMap(({ verdict }) => verdict.reasons.map(({ code }) => code)))],
    'edgemesh.policy.revision': decided[0]?.verdict.policyRevision ?? '',
  }
}

/** The decision that ended a lease, made by the server itself. */
export function revocationEntry(instanceId: string, clock: Clock) {
  return (lease: Lease, verdict: Verdict): { entry: JournalEntry; decisionId: string } => {
    const id = newDecisionId()
    const by = { caller: `instance/${instanceId}`, method: 'lease', address: '', instanceId }
    const { entry } = decisionRow(id, by, lease.question.deviceId, [{ verdict }], clock(), 0)
    return { entry, decisionId: `${id}.0` }
  }
}
