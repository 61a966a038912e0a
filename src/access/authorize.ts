/**
 * Authorize: may this user, on this device, reach this service, now, and for how long?
 *
 * A question's life: identity of the connection → limit → decide (`decide.ts`) → lease, watched from here on
 * (`leases.ts`) → audit, one row a message however many questions it carried → answer. An allow leaves only when its
 * record is on disk, and not if the lease's ground has gone meanwhile. That record is the connection's, too, until it needs a
 * row of its own (`connection-records.ts`); connections that are closed before that are named in one event a message.
 */
import { callEntry, type Journal, type JournalEntry } from '../audit/journal.ts'
import { type Call, callerName } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { durationOf } from '../duration.ts'
import { Fault, invalidField } from '../fault.ts'
import type { Answer, AuthorizeRequest, AuthorizeResponse, Question } from '../gen/edgemesh/v1/authorize.ts'
import type { MessageStream } from '../message-stream.ts'
import { answerOf, denial, passing, undecided } from './answers.ts'
import { connectionIdOf, decisionOf, newDecisionId } from './connection-id.ts'
import type { AccessQuestion, Decider } from './decide.ts'
import { type DecidedAndLeased, decideAndLease, endingBy } from './decide-and-lease.ts'
import { decisionEntry } from './decision-records.ts'
import type { Facts } from './facts.ts'
import { createLeaseSet } from './lease-set.ts'
import { type Lease, type Leases, newLease, type Revocation } from './leases.ts'
import type { PolicyReason } from './policy-engine.ts'
import { checkQuestion, nameUsers, refusalEntry, refusalOf } from './question.ts'
import type { RevocationWatch } from './revocations.ts'
import { assertionExpired, UserAssertionRefused, type UserAssertions } from './user-assertion.ts'

export type AuthorizeDeps = {
  facts: Facts
  decider: Decider
  leases: Leases
  journal: Journal
  instanceId: string
  clock: Clock
  /**
   * At once, or after a wait. @throws Fault RESOURCE_EXHAUSTED when the caller asks too often, at all instances together
   */
  limit: (caller: string, questions: number) => void | Promise<void>
  /** Undefined where users are known by the caller's word alone. */
  assertions: UserAssertions | undefined
  /** Those of one message, and how long they took. */
  onDecisions: (allowed: number, denied: number, seconds: number) => void
  /** One question has been denied, for these reasons. */
  onDenied: (reasons: readonly Pick<PolicyReason, 'code'>[]) => void
  onConnection: (service: string, status: 'allowed' | 'denied' | 'resumed') => void
  /** Those of one message that can't be decided now. */
  onUndecided: (questions: number, reason: string) => void
}

export type ContinuousDeps = AuthorizeDeps & {
  resume: Resume
  revocations: RevocationWatch
  /** LEASE_GRACE_SECONDS: for how long the leases of a stream that was lost can be resumed. */
  graceMs: number
}

/**
 * One answer for each id.
 *
 * @throws Fault when nothing can be said of any of them now; UserAssertionRefused when all go on waiting because of that
 */
export type Resume = (ids: string[], stream: ResumingStream) => Promise<Answer[]>

/** The stream that resumes. `hold`: the lease is its from now on, and will be answered as allowed. */
export type ResumingStream = Pick<Lease, 'push' | 'moved'> & {
  deviceId: string
  call: Call
  userAssertion: string
  hold: (lease: Lease) => void
}

/** What a message may carry. At 2 kB of audit a question, a full message is a row of a quarter megabyte. */
const questionsMax = 128
/** Leases one stream may hold. */
const leasesPerStreamMax = 4_096

export function createAuthorize(deps: ContinuousDeps) {
  const resumeWithin = durationOf(deps.graceMs)
  return async (stream: MessageStream<AuthorizeRequest, AuthorizeResponse>, call: Call): Promise<void> => {
    if (call.caller.kind !== 'device') throw new Error('the method is for devices only')
    const deviceId = call.caller.id
    call.audit.target = `device/${deviceId}`
    /** The leases of this stream that its device has been told of. */
    const held = createLeaseSet<'atStream', Lease>('atStream')
    /** What was taken back before that. */
    const untold = new WeakMap<Lease, Revocation>()
    /** Once the stream has ended; questions may still be under way. */
    let over = false
    /** It has ended by what passes: its device will be back. */
    let lost = false
    const pushed = deps.revocations.ofStream()
    let greeting: AuthorizeResponse['resumeWithin'] = resumeWithin
    const send = (kind: NonNullable<AuthorizeResponse['kind']>) => {
      stream.send({ kind, serverTime: new Date(deps.clock()), resumeWithin: greeting })
      greeting = undefined
    }

    const sendAnswers = (answers: Answer[]) => send({ $case: 'answers', value: { answers } })

    function revoked(revocation: Revocation): void {
      const { lease, reasons, policyRevision, decisionId, sinceMs } = revocation
      if (!held.remove(lease)) {
        // It turns into a denial instead (see `answersTo`).
        untold.set(lease, revocation)
        return
      }
      const value = { connectionId: lease.id, questionId: lease.questionId, reasons, policyRevision, decisionId }
      send({ $case: 'revoked', value })
      pushed.add(lease.id, sinceMs)
    }

    function moved(lease: Lease): void {
      held.remove(lease)
    }

    /** The life of a message of questions. */
    async function ask(questions: Question[], userAssertion: string): Promise<void> {
      bounded('questions.questions', questions.length)
      let answers: Answer[]
      try {
        const startedAt = performance.now()
        const asserting = deps.assertions?.demanded(userAssertion, 'device')
        const asked = questions.map((question, at) => checkQuestion(question, deviceId, at, asserting))
        if (held.size + asked.length > leasesPerStreamMax) throw tooManyConnections()
        const wait = deps.limit(callerName(call.caller), asked.length)
        if (wait) await wait
        const named = asserting
          ? await nameUsers(deps, userAssertion, asked).catch(refusalOf)
          : Number.POSITIVE_INFINITY
        if (named instanceof UserAssertionRefused) {
          answers = await refused(questions, asked, named, startedAt)
        } else {
          const now = deps.clock()
          const id = newDecisionId(now)
          const deciding = decideAll(id, questions, asked, named, now)
          const decided = deciding instanceof Promise ? await deciding : deciding
          const decision = decisionEntry(id, call, deviceId, decided, deps.clock(), startedAt)
          try {
            await deps.journal.append([decision.entry])
          } catch (error) {
            decided.forEach(dropUntold)
            throw error
          }
          decision.committed?.()
          answers = answersTo(questions, id, decided, startedAt)
        }
      } catch (error) {
        answers = noneDecided(questions.map(({ id }) => undecided(id, error)))
      }
      sendAnswers(answers)
    }

    /** Of a message whose assertion does not name the users that it asks about. */
    async function refused(
      questions: Question[],
      asked: AccessQuestion[],
      refusal: UserAssertionRefused,
      startedAt: number,
    ): Promise<Answer[]> {
      await deps.journal.append([refusalEntry({ ...call, startedAt: deps.clock() }, asked, refusal)])
      deps.onDecisions(0, asked.length, (performance.now() - startedAt) / 1_000)
      for (const _ of asked) deps.onDenied([refusal.why])
      return questions.map(({ id }) => denial(id, refusal.why))
    }

    /** All or none of them, at once where all can be decided at once. */
    function decideAll(
      id: string,
      questions: Question[],
      asked: AccessQuestion[],
      assertedUntilMs: number,
      now: number,
    ): DecidedAndLeased[] | Promise<DecidedAndLeased[]> {
      const deciding = new Array<DecidedAndLeased | Promise<DecidedAndLeased>>(asked.length)
      let waits = false
      try {
        for (let at = 0; at < asked.length; at++) {
          const wanted = newLease({
            id: connectionIdOf(id, at),
            questionId: questions[at]?.id ?? '',
            question: asked[at] as AccessQuestion,
            decisionId: undefined,
            userId: '',
            role: '',
            serviceId: '',
            grantedAtMs: now,
            recorded: false,
            expiresAtMs: now,
            assertedUntilMs,
            push: revoked,
            moved,
          })
          const decided = decideAndLease(deps, wanted, now)
          if (decided instanceof Promise) waits = true
          deciding[at] = decided
        }
      } catch (error) {
        // The places of those that were not tried are empty.
        return allOrNone([...deciding.filter(() => true), Promise.reject(error)], dropUntold)
      }
      return waits ? allOrNone(deciding, dropUntold) : (deciding as DecidedAndLeased[])
    }

    function dropUntold({ lease }: DecidedAndLeased): void {
      if (lease) deps.leases.drop(lease)
    }

    /** Once it is on record. What has been taken back meanwhile is denied. */
    function answersTo(questions: Question[], id: string, decided: DecidedAndLeased[], startedAt: number): Answer[] {
      const answers = new Array<Answer>(decided.length)
      let allowed = 0
      for (let at = 0; at < decided.length; at++) {
        const { verdict, lease } = decided[at] as DecidedAndLeased
        const questionId = questions[at]?.id ?? ''
        if (verdict.allow) allowed++
        else deps.onDenied(verdict.reasons)
        deps.onConnection(verdict.question.service, verdict.allow ? 'allowed' : 'denied')
        const revocation = lease?.state === 'revoked' ? untold.get(lease) : undefined
        if (revocation) {
          const { reasons, policyRevision, decisionId } = revocation
          answers[at] = answerOf(questionId, { ...verdict, allow: false, reasons, policyRevision }, decisionId, '')
        } else {
          if (lease) hold(lease, false)
          answers[at] = answerOf(questionId, verdict, `${id}.${at}`, lease?.id ?? '')
        }
      }
      deps.onDecisions(allowed, decided.length - allowed, (performance.now() - startedAt) / 1_000)
      return answers
    }

    /** @param isKnown whether its device knows of it, and may come back for it, if the stream was cut while it was decided */
    function hold(lease: Lease, isKnown: boolean): void {
      held.add(lease)
      // Such a stream holds nothing any more, and nobody will end it there.
      if (over) letGo([lease], isKnown)
    }

    function heldAs(connectionId: string): Lease | undefined {
      const lease = deps.leases.find(connectionId)
      return lease && held.has(lease) ? lease : undefined
    }

    function close(ids: string[]): string[] {
      bounded('close.connection_ids', ids.length)
      const leases: Lease[] = []
      for (const id of ids) {
        const lease = heldAs(id)
        if (lease && held.remove(lease)) leases.push(lease)
      }
      return deps.leases.close(leases, closedEntry).map(({ id }) => id)
    }

    /** The stream is over: its leases wait for its device, are closed with it, or taken back if that was thrown out. */
    function letGo(leases: Lease[], isKnown: boolean): void {
      for (const lease of leases) held.remove(lease)
      const cut: unknown = call.signal.reason
      if (cut instanceof Fault && cut.code === 'UNAUTHENTICATED') {
        for (const lease of leases) deps.leases.revoke(lease, [thrownOut(cut)])
      } else if (lost && isKnown) {
        deps.leases.suspend(leases)
      } else {
        deps.leases.close(leases, closedEntry)
      }
    }

    /** The event of connections that have no row. */
    function closedEntry(closed: string[]): JournalEntry {
      return callEntry(
        { ...call, startedAt: deps.clock(), audit: { ...call.audit, detail: { closed } } },
        { code: 'OK' },
      )
    }

    /** Of a message nothing can be decided now, all for the same reason. */
    function noneDecided(denials: Answer[]): Answer[] {
      deps.onUndecided(denials.length, denials[0]?.reasons[0]?.code ?? '')
      return denials
    }

    /** Holds again what was held on a stream that was lost. */
    async function resume(ids: string[], userAssertion: string): Promise<void> {
      const answers = await resumed(ids, userAssertion).catch(error =>
        noneDecided(ids.map(id => ({ ...undecided('', error), connectionId: id }))),
      )
      sendAnswers(answers)
    }

    async function resumed(ids: string[], userAssertion: string): Promise<Answer[]> {
      bounded('resume.connection_ids', ids.length)
      if (held.size + ids.length > leasesPerStreamMax) throw tooManyConnections()
      const resuming = {
        deviceId,
        call,
        userAssertion,
        push: revoked,
        moved,
        hold: (lease: Lease) => hold(lease, true),
      }
      try {
        return await deps.resume(ids, resuming)
      } catch (error) {
        if (!(error instanceof UserAssertionRefused)) throw error
        await deps.journal.append([refusalEntry({ ...call, startedAt: deps.clock() }, [], error)])
        return ids.map(id => ({ ...denial('', error.why), connectionId: id }))
      }
    }

    /** Asks again for what is held; a renewed lease keeps its id, and what has ended meanwhile is denied. */
    async function renew(ids: string[], userAssertion: string): Promise<void> {
      bounded('renew.connection_ids', ids.length)
      sendAnswers(await Promise.all(ids.map(id => renewOne(id, heldAs(id), userAssertion))))
    }

    async function renewOne(id: string, lease: Lease | undefined, userAssertion: string): Promise<Answer> {
      if (!lease) return { ...denial('', notHeld), connectionId: id }
      const { questionId, turn } = lease
      const decisionId = decisionOf(lease)
      try {
        await renewAssertion(deps, lease, userAssertion)
        const decided = await deps.decider.decide(lease.question)
        const verdict = endingBy(decided.verdict, lease.assertedUntilMs)
        // A denial is told here and pushed by the lease's own watch: whichever comes first ends the connection.
        const allow = verdict.allow && lease.state === 'active'
        // What has been decided anew meanwhile knows more than this does.
        if (allow && lease.turn === turn) lease.expiresAtMs = verdict.expiresAtMs
        return answerOf(questionId, { ...verdict, allow }, decisionId, id)
      } catch (error) {
        if (error instanceof UserAssertionRefused) {
          deps.leases.revoke(lease, [error.why])
          deps.journal.appendLater([refusalEntry({ ...call, startedAt: deps.clock() }, [lease.question], error)])
          return { ...denial(questionId, error.why), connectionId: id }
        }
        // It stands as it stood: its watch goes on trying, and gives it up when the grace time is over.
        const { retryAfter, policyRevision } = undecided(questionId, error)
        const expiresAt = new Date(lease.expiresAtMs)
        const allowed = lease.state === 'active'
        return { questionId, allowed, reasons: [], policyRevision, expiresAt, decisionId, connectionId: id, retryAfter }
      }
    }

    try {
      await stream.receive(({ kind }): void | Promise<void> => {
        if (kind?.$case === 'questions') {
          return ask(kind.value.questions, kind.value.userAssertion ?? '')
        } else if (kind?.$case === 'renew') {
          return renew(kind.value.connectionIds, kind.value.userAssertion ?? '')
        } else if (kind?.$case === 'close') {
          send({ $case: 'closed', value: { connectionIds: close(kind.value.connectionIds) } })
        } else if (kind?.$case === 'list') {
          send({ $case: 'connections', value: { connections: held.values().map(openConnection) } })
        } else if (kind?.$case === 'resume') {
          return resume(kind.value.connectionIds, kind.value.userAssertion ?? '')
        } else if (kind?.$case === 'acknowledge') {
          bounded('acknowledge.connection_ids', kind.value.connectionIds.length)
          pushed.acknowledge(kind.value.connectionIds)
        } else {
          throw invalidField('kind', 'has to be one of questions, renew, close, list, resume, acknowledge')
        }
      })
    } catch (error) {
      lost = error instanceof Fault && passing.has(error.code)
      throw error
    } finally {
      over = true
      pushed.end()
      letGo(held.values(), true)
    }
  }
}

/** All results, or the first failure; then the others are undone once they are there. */
async function allOrNone<T>(work: (T | Promise<T>)[], undo: (done: T) => void): Promise<T[]> {
  try {
    return await Promise.all(work)
  } catch (error) {
    for (const outcome of await Promise.allSettled(work)) if (outcome.status === 'fulfilled') undo(outcome.value)
    throw error
  }
}

/** A lease lasts as long as the best assertion that was shown for it. @throws as `nameUsers` */
async function renewAssertion(
  { assertions, clock }: AuthorizeDeps,
  lease: Lease,
  userAssertion: string,
): Promise<void> {
  if (assertions && userAssertion !== '') {
    const { expiresAtMs } = await assertions.identify(userAssertion, [lease.question.user])
    lease.assertedUntilMs = Math.max(lease.assertedUntilMs, expiresAtMs)
  }
  if (lease.assertedUntilMs <= clock()) throw new UserAssertionRefused(assertionExpired(lease.assertedUntilMs))
}

function bounded(field: string, length: number): void {
  if (length === 0) throw invalidField(field, 'is empty')
  if (length > questionsMax) throw invalidField(field, `has to have at most ${questionsMax} entries`)
}

function tooManyConnections(): Fault {
  const message = `a stream holds at most ${leasesPerStreamMax} connections; close some first`
  return new Fault('RESOURCE_EXHAUSTED', 'TOO_MANY_CONNECTIONS', message)
}

const notHeld: PolicyReason = {
  code: 'CONNECTION_NOT_HELD',
  field: 'renew.connection_ids',
  actual: 'ended',
  required: 'held on this stream',
  message: 'The connection has ended; ask anew.',
}

function thrownOut({ reason: code, message }: Fault): PolicyReason {
  return { code, field: 'device.certificate', actual: 'refused', required: 'in force', message: `${message}.` }
}

const openConnection = (lease: Lease) => ({
  connectionId: lease.id,
  questionId: lease.questionId,
  user: lease.question.user,
  service: lease.question.service,
  action: lease.question.action,
  grantedAt: new Date(lease.grantedAtMs),
  expiresAt: new Date(lease.expiresAtMs),
})
