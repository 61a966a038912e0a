/**
 * Resuming: a device whose stream was lost holds its connections on another one, of any instance.
 *
 * A message's life: limit → the user, where an assertion has to say who it is → the connections become this instance's, on
 * record → each is decided anew, and watched from here on → audit → are they still this instance's? → answer. What can't be
 * decided now goes on waiting, here, for as long as it would have where it was.
 */
import type { Journal } from '../audit/journal.ts'
import { callerName } from '../caller.ts'
import type { Answer } from '../gen/edgemesh/v1/authorize.ts'
import { answerOf, denial, undecided } from './answers.ts'
import type { AuthorizeDeps, Resume, ResumingStream } from './authorize.ts'
import { decisionOf, newDecisionId } from './connection-id.ts'
import { type Claim, connectionEntry } from './connection-records.ts'
import type { AccessQuestion, Verdict } from './decide.ts'
import { decideAndLease } from './decide-and-lease.ts'
import { decisionEntry } from './decision-records.ts'
import { type Lease, type Leases, newLease, type Revocation } from './leases.ts'
import type { PolicyReason } from './policy-engine.ts'
import { UserAssertionRefused } from './user-assertion.ts'

export type ResumeDeps = Pick<
  AuthorizeDeps,
  'facts' | 'decider' | 'assertions' | 'instanceId' | 'clock' | 'limit' | 'onDecisions' | 'onDenied' | 'onConnection'
> & {
  leases: Leases
  journal: Journal
  /** @throws when the database can't be asked */
  claim: (ids: string[], deviceId: string) => Promise<Map<string, Claim>>
}

const uuidPattern = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/

/** What has become of a connection that was claimed. */
type Decided = { claim: Claim; lease: Lease; verdict: Verdict }

export function createResume(deps: ResumeDeps): Resume {
  const { leases, journal, instanceId, clock } = deps

  return async (ids, stream) => {
    const { call, deviceId } = stream
    const startedAt = performance.now()
    await deps.limit(callerName(call.caller), ids.length)

    // Step 1: The user is there. Who does not show that claims nothing: all go on waiting where they are.
    const asserting = deps.assertions?.demanded(stream.userAssertion, 'device')
    if (asserting) await deps.assertions?.identify(stream.userAssertion, [])

    // Step 2: They are this instance's, and no other's. Where they were it is noticed by the change feed.
    const distinct = [...new Set(ids)].filter(id => uuidPattern.test(id))
    const claims = await deps.claim(distinct, deviceId)
    const answers = new Map<string, Answer>()
    const claimed: Claim[] = []
    for (const id of ids) {
      const claim = claims.get(id)
      if (!claim?.claimed) answers.set(id, denialOf(id, claim))
      else if (!claimed.includes(claim)) claimed.push(claim)
    }

    // Step 3: Decided anew, and watched. From here on a lease that is not told of turns into a denial.
    const revocations = new Map<string, Revocation>()
    const push = (revocation: Revocation) => {
      revocations.set(revocation.lease.id, revocation)
      stream.push(revocation)
    }
    const outcomes = await Promise.allSettled(claimed.map(claim => decide(claim, stream, push)))
    const decided = outcomes.flatMap(outcome => (outcome.status === 'fulfilled' ? [outcome.value] : []))
    outcomes.forEach((outcome, at) => {
      if (outcome.status === 'rejected') waitHere(claimed[at] as Claim, deviceId)
    })

    try {
      outcomes.forEach((outcome, at) => {
        const { id } = claimed[at] as Claim
        if (outcome.status === 'rejected') answers.set(id, { ...undecidedOrRefused(outcome.reason), connectionId: id })
      })
      if (decided.length === 0) return inOrder(ids, answers)

      // Step 4: On record before it is allowed. A denial ends the connection.
      const decision = newDecisionId()
      const { entry, committed } = decisionEntry(decision, call, deviceId, decided, clock(), startedAt)
      decided.forEach(({ lease, verdict }, at) => {
        lease.decisionId = `${decision}.${at}`
        if (!verdict.allow) leases.revoke(lease, verdict.reasons)
      })
      const allowed = decided.map(({ lease }) => lease).filter(({ state }) => state === 'active')
      await journal.append([entry, ...allowed.map(lease => connectionEntry(lease, instanceId, clock(), []))])
      committed?.()

      // Step 5: Another may have claimed it, or an operator closed it, before it was watched here.
      await leases.reconcile(allowed.map(({ id }) => id))
    } catch (error) {
      for (const { claim, lease } of decided) leases.suspend([lease], waitsUntilMs(claim))
      lookAgain(decided.map(({ lease }) => lease.id))
      throw error
    }

    // Step 6: What is still active is allowed.
    const count = decided.filter(({ verdict }) => verdict.allow).length
    deps.onDecisions(count, decided.length - count, (performance.now() - startedAt) / 1_000)
    for (const { lease, verdict } of decided) {
      deps.onConnection(verdict.question.service, verdict.allow ? 'resumed' : 'denied')
      if (!verdict.allow) deps.onDenied(verdict.reasons)
      answers.set(lease.id, answerFor(lease, verdict, revocations.get(lease.id)))
      if (lease.state === 'active') stream.hold(lease)
    }
    return inOrder(ids, answers)
  }

  /** @throws Fault when it can't be decided now; UserAssertionRefused when it is not the connection of this user */
  async function decide(claim: Claim, stream: ResumingStream, push: Lease['push']): Promise<Decided> {
    const assertedUntilMs = await assertedUntil(claim, stream.userAssertion)
    const { moved } = stream
    const wanted = newLease({
      ...unleased(claim, questionOf(claim, stream.deviceId)),
      assertedUntilMs,
      push,
      moved,
    })
    const { verdict, lease } = await decideAndLease(deps, wanted, clock())
    // A denial ends what there is of it here too: another stream may be resuming the same at this moment.
    return { claim, verdict, lease: lease ?? leases.grant(wanted) }
  }

  /** Until when the user of a connection is known, ms since epoch. @throws UserAssertionRefused when it is another one */
  async function assertedUntil({ userId }: Claim, userAssertion: string): Promise<number> {
    const { assertions } = deps
    if (!assertions?.demanded(userAssertion, 'device')) return Number.POSITIVE_INFINITY
    return (await assertions.identify(userAssertion, [userId])).expiresAtMs
  }

  /** It can't be decided, so it waits here from now on, and its watch goes on trying. */
  function waitHere(claim: Claim, deviceId: string): void {
    const lease = leases.grant(newLease({ ...unleased(claim, questionOf(claim, deviceId)), push() {}, moved() {} }))
    leases.suspend([lease], waitsUntilMs(claim))
    lookAgain([claim.id])
  }

  /** It may have ended here when it was claimed, and only its record was not there yet. */
  function lookAgain(ids: string[]): void {
    const drained = journal.drained().then(() => leases.reconcile(ids))
    // What is not noticed now is when it is resumed, or when its time is over.
    drained.catch(() => {})
  }

  function waitsUntilMs({ resumeByMs }: Claim): number | undefined {
    return resumeByMs ?? undefined
  }

  function unleased({ id, grantedAtMs, userId, serviceId, decisionId }: Claim, question: AccessQuestion) {
    const [expiresAtMs, assertedUntilMs] = [clock(), Number.POSITIVE_INFINITY]
    return {
      id,
      grantedAtMs,
      recorded: true,
      userId,
      serviceId,
      decisionId,
      question,
      questionId: '',
      role: '',
      expiresAtMs,
      assertedUntilMs,
    }
  }
}

/** What was asked once. The user is named by id now. */
function questionOf({ userId, serviceId, action }: Claim, deviceId: string): AccessQuestion {
  return { deviceId, user: userId, service: serviceId, action }
}

function answerFor(lease: Lease, verdict: Verdict, revocation: Revocation | undefined): Answer {
  if (revocation) {
    const { reasons, policyRevision, decisionId } = revocation
    return answerOf('', { ...verdict, allow: false, reasons, policyRevision }, decisionId, lease.id)
  }
  if (verdict.allow && lease.state !== 'active') return denialOf(lease.id, undefined)
  return answerOf('', verdict, decisionOf(lease), lease.id)
}

/** Of a connection that can't be resumed. One that was taken back was so for these reasons. */
function denialOf(id: string, claim: Claim | undefined): Answer {
  if (claim?.status !== 'revoked') return { ...denial('', notHeld), connectionId: id }
  return { ...denial('', notHeld), reasons: claim.endReasons ?? [], decisionId: claim.decisionId, connectionId: id }
}

function inOrder(ids: string[], answers: Map<string, Answer>): Answer[] {
  return ids.map(id => answers.get(id) ?? denialOf(id, undefined))
}

const notHeld: PolicyReason = {
  code: 'CONNECTION_NOT_HELD',
  field: 'resume.connection_ids',
  actual: 'ended',
  required: 'waiting to be resumed',
  message: 'The connection has ended, or was resumed elsewhere or too late; ask anew.',
}

function undecidedOrRefused(error: unknown): Answer {
  return error instanceof UserAssertionRefused ? denial('', error.why) : undecided('', error)
}
