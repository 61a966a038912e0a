/**
 * Decisions: what was asked, what was answered and why.
 *
 * All that one message asked is one row. Each question in it is a decision of its own, whose id is the row's id and the
 * question's position: `0199c0de-….0` is the first.
 */
import { z } from 'zod'
import { joinInput } from '../access/decision-records.ts'
import type { DecidedQuestion } from '../access/entities.ts'
import type { AuthzInput, PolicyEngine } from '../access/policy-engine.ts'
import type { Call } from '../caller.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import type {
  Decision as DecisionMessage,
  GetDecisionRequest,
  GetDecisionResponse,
  ListDecisionsRequest,
  ListDecisionsResponse,
} from '../gen/edgemesh/v1/admin.ts'
import { cutPage, page } from './paging.ts'
import { check, optionalId, time } from './request.ts'

const rowId = z.guid()
/** Counted from 0; six digits fit any message and any integer of PostgreSQL. */
const position = z.string().regex(/^(?:0|[1-9][0-9]{0,5})$/)
const rowAndPosition = z.tuple([rowId, position])

const listRequest = z.object({
  ...page(rowAndPosition),
  deviceId: optionalId,
  after: time.optional(),
  before: time.optional(),
})
const getRequest = z.object({
  explain: z.boolean(),
  id: z.string().transform((given, context) => {
    const parts = rowAndPosition.safeParse(given.split('.', 3))
    if (parts.success) return parts.data
    const message = 'has to be the id of a decision: a UUID, a dot and the position of the question, such as ….0'
    context.addIssue({ code: 'custom', message })
    return z.NEVER
  }),
})

type DecisionRow = {
  id: string
  position: string
  at: Date
  device_id: string
  caller: string
  instance_id: string
  policy_revision: string
  question: DecidedQuestion
  input: AuthzInput | null
}

/** Ordinality counts from 1. */
const selectDecisions = `
  select decision.id, (asked.ordinality - 1)::text as position, decision.at, decision.device_id, decision.caller,
    decision.instance_id, decision.policy_revision, asked.question, known.input
  from decisions decision
  cross join lateral jsonb_array_elements(decision.questions) with ordinality as asked (question, ordinality)
  ${joinInput('asked.question')}`

export function decisionHandlers({
  reports,
  policy,
}: {
  reports: Reports
  policy: Pick<PolicyEngine, 'revision' | 'explain'>
}) {
  return {
    /**
     * The newest first; the questions of one message in the order in which they were asked. `after` is the first instant
     * included and `before` the first one not.
     */
    async listDecisions(request: ListDecisionsRequest, call: Call): Promise<ListDecisionsResponse> {
      const { pageSize, pageToken, deviceId, after = null, before = null } = check(listRequest, request)
      call.audit.target = deviceId ? `device/${deviceId}` : 'decisions'
      const [lastRow = null, lastPosition = null] = pageToken ?? []
      // The rest of the row where the page before ended, and the rows older than that. The time is looked up rather
      // than carried: PostgreSQL counts microseconds, a Date only milliseconds.
      const { rows: found } = await reports.query<DecisionRow>(
        `${selectDecisions}
         where ($1 = '' or decision.device_id = $1)
           and ($2::uuid is null
             or (decision.at, decision.id) <= (select at, id from decisions where id = $2)
               and (decision.id <> $2 or asked.ordinality - 1 > $3::int))
           and ($5::timestamptz is null or decision.at >= $5)
           and ($6::timestamptz is null or decision.at < $6)
         order by decision.at desc, decision.id desc, asked.ordinality
         limit $4`,
        [deviceId, lastRow, lastPosition, pageSize + 1, after, before],
      )
      const { rows, nextPageToken } = cutPage(found, pageSize, row => [row.id, row.position])
      return { decisions: rows.map(decisionMessage), nextPageToken }
    },

    async getDecision(request: GetDecisionRequest, call: Call): Promise<GetDecisionResponse> {
      const { id, explain } = check(getRequest, request)
      call.audit.target = `decision/${id.join('.')}`
      const { rows } = await reports.query<DecisionRow>(
        `${selectDecisions} where decision.id = $1 and asked.ordinality - 1 = $2::int`,
        id,
      )
      const [row] = rows
      if (!row) throw new Fault('NOT_FOUND', 'DECISION_NOT_FOUND', `there is no decision ${id.join('.')}`)
      const decision = decisionMessage(row)
      if (!explain || row.input === null) return { decision, explanation: undefined }
      // Of what was recorded, not of what is so now: the input is all that policy ever saw.
      const policyRevision = policy.revision()
      const rules = await policy.explain(row.input)
      return { decision, explanation: rules && { policyRevision, rules } }
    },
  }
}

export function decisionMessage({ question, ...row }: DecisionRow): DecisionMessage {
  return {
    id: `${row.id}.${row.position}`,
    decidedAt: new Date(row.at),
    deviceId: row.device_id,
    user: question.user,
    service: question.service,
    action: question.action,
    allowed: question.allow,
    reasons: question.reasons,
    // While a policy is replaced, the questions of one message may be decided by different ones.
    policyRevision: question.policyRevision ?? row.policy_revision,
    caller: row.caller,
    instanceId: row.instance_id,
    input: row.input ?? undefined,
    inputOf: row.input ? '' : (question.inputOf ?? ''),
    evaluatedAt: question.evaluatedAt === undefined ? undefined : new Date(question.evaluatedAt),
    expiresAt: question.expiresAt === undefined ? undefined : new Date(question.expiresAt),
  }
}
