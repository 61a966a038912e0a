/**
 * Check: may this user, on this device, reach this service, now? One question, and no lease.
 *
 * Its life: limit → decide (`decide.ts`) → audit → answer, which leaves only when its record is on disk.
 */
import { type Call, callerName } from '../caller.ts'
import { Fault, invalidField } from '../fault.ts'
import type { CheckRequest, CheckResponse } from '../gen/edgemesh/v1/authorize.ts'
import { answerOf, denial } from './answers.ts'
import type { AuthorizeDeps } from './authorize.ts'
import { newDecisionId } from './connection-id.ts'
import { endingBy } from './decide-and-lease.ts'
import { decisionEntry } from './decision-records.ts'
import { checkName, checkQuestion, nameUsers, refusalEntry } from './question.ts'
import { UserAssertionRefused } from './user-assertion.ts'

export function createCheck(deps: AuthorizeDeps) {
  return async (request: CheckRequest, call: Call): Promise<CheckResponse> => {
    const startedAt = performance.now()
    if (!request.question) throw invalidField('question', 'is missing')
    const deviceId = deviceAsked(request, call)
    const { userAssertion = '' } = request
    const asserting = deps.assertions?.demanded(userAssertion, call.caller.kind)
    const question = checkQuestion(request.question, deviceId, 'question', asserting)
    call.audit.target = `device/${deviceId}`
    const wait = deps.limit(callerName(call.caller), 1)
    if (wait) await wait
    let assertedUntilMs = Number.POSITIVE_INFINITY
    if (asserting) {
      try {
        assertedUntilMs = await nameUsers(deps, userAssertion, [question])
      } catch (error) {
        if (!(error instanceof UserAssertionRefused)) throw error
        await deps.journal.append([refusalEntry(call, [question], error)])
        call.audit.written = true
        deps.onDecisions(0, 1, (performance.now() - startedAt) / 1_000)
        deps.onDenied([error.why])
        return { answer: denial(request.question.id, error.why), serverTime: new Date(deps.clock()) }
      }
    }
    const decided = deps.decider.decide(question)
    const verdict = endingBy((decided instanceof Promise ? await decided : decided).verdict, assertedUntilMs)
    const decisionId = newDecisionId()
    const decision = decisionEntry(decisionId, call, deviceId, [{ verdict }], deps.clock(), startedAt)
    await deps.journal.append([decision.entry])
    decision.committed?.()
    call.audit.written = true
    deps.onDecisions(verdict.allow ? 1 : 0, verdict.allow ? 0 : 1, (performance.now() - startedAt) / 1_000)
    if (!verdict.allow) deps.onDenied(verdict.reasons)
    const answer = answerOf(request.question.id, verdict, `${decisionId}.0`, '')
    return { answer, serverTime: new Date(deps.clock()) }
  }
}

/** Who a question is about is who asks; only operators and services ask about others. */
function deviceAsked(request: CheckRequest, { caller }: Call): string {
  if (caller.kind !== 'device') {
    if (request.deviceId) {
      checkName(request.deviceId, () => 'device_id')
      return request.deviceId
    }
    throw invalidField('device_id', `is missing: a ${caller.kind} has to say which device it asks about`)
  }
  if (request.deviceId && request.deviceId !== caller.id) {
    const message = `device_id: a device asks about itself only, and this certificate is ${caller.spiffeId}`
    throw new Fault('PERMISSION_DENIED', 'OTHER_DEVICE', message)
  }
  return caller.id
}
