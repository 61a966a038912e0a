/**
 * Authorization, from the device's side: questions, and the leases that the answers give.
 *
 *     const authorizations = openAuthorizations({ server, credentials, onRevoked: ({ connectionId }) => cut(connectionId) })
 *     const [answer] = await authorizations.ask([{ user: 'ada', service: 'wiki' }])
 *     if (answer?.allowed) connect(answer.connectionId)
 *
 * A connection that was allowed is a lease held on this stream. It ends when it is closed, when the server revokes it, or
 * when the stream is closed. Whoever loses the stream resumes the connections on the next, or cuts them: see
 * `authorizations.ts`, which does so by itself.
 */
import { type Channel, Metadata, type ServiceError } from '@grpc/grpc-js'
import { Fault, invalidField } from '../fault.ts'
import {
  type Answer,
  type AuthorizeRequest,
  type AuthorizeResponse,
  AuthorizeServiceClient,
  type CheckResponse,
  type ConnectionRevoked,
  type OpenConnection,
  type Question,
} from '../gen/edgemesh/v1/authorize.ts'
import { answerOf, type Credentials, clientTarget, endOf, millisecondsOf, type Server } from './channel.ts'

export type { Answer, ConnectionRevoked, OpenConnection }

export type AskedQuestion = {
  /** Unique among what is in flight. Default: one that this side chooses. */
  id?: string
  /** The user's id or e-mail address; may be empty where an assertion says who it is. */
  user: string
  /** The service's id. */
  service: string
  /** Default `connect`. */
  action?: string
}

export type AuthorizationStream = {
  /**
   * Answers in the order of the questions. Any number: they are sent in messages of as many as one may carry.
   *
   * @param userAssertion a JWT of the user's issuer; the leases end with it unless they are renewed with a fresh one
   */
  ask(questions: AskedQuestion[], userAssertion?: string): Promise<Answer[]>
  /** Asks anew for leases that would expire. Answers in the order of the ids; one that is not allowed has ended. */
  renew(connectionIds: string[], userAssertion?: string): Promise<Answer[]>
  /**
   * Holds connections of a stream that was lost on this one. Answers in the order of the ids; one that is not allowed has
   * ended, unless it has `retryAfter`. Rejects with INVALID_ARGUMENT where the server is of before there was such a thing.
   */
  resume(connectionIds: string[], userAssertion?: string): Promise<Answer[]>
  /** The connections have ended. @returns the ids of those that were open */
  closeConnections(connectionIds: string[]): Promise<string[]>
  /** The leases that this stream holds. */
  list(): Promise<OpenConnection[]>
  /** For how long its leases can be resumed once it is lost; absent until the server has said it. */
  resumeWithinMs(): number | undefined
  /** Resolves when no question is in flight, and whoever has asked one has gone on with its answer. */
  settled(): Promise<void>
  /** Ends the stream, and with it all its leases. */
  close(): Promise<void>
  /** Resolves when the stream has ended: with the error, or with nothing when either side ended it in order. */
  closed: Promise<ServiceError | undefined>
}

/** What one message may carry: the bound of the wire. */
const itemsPerMessageMax = 128

/** Answers take milliseconds at 100,000 questions a second; who waits for more than this has lost the server. */
const questionsInFlightMax = 16_384

type Waiting<T> = { resolve: (value: T) => void; reject: (error: Error) => void }

export function openAuthorizations({
  server,
  credentials: shown,
  onRevoked,
  onClosed,
  channel,
}: {
  server: Server
  credentials: Credentials
  /** The ground of a lease has gone: cut the connection now. When that is done, the server is told. */
  onRevoked: (revoked: ConnectionRevoked) => void | Promise<void>
  onClosed?: (error: ServiceError | undefined) => void
  /** A connection to share, made by `openChannel`; left open. Default: one of its own. */
  channel?: Channel
}): AuthorizationStream {
  const { address, credentials, options } = clientTarget(server, shown, channel)
  const client = new AuthorizeServiceClient(address, credentials, options)
  const call = client.authorize()
  const { closed, close } = endOf(call, () => {
    if (!channel) client.close()
  })

  /** By question id. */
  const asked = new Map<string, Waiting<Answer>>()
  /** Who waits until no question is in flight. */
  const settling = new Set<() => void>()
  /** By connection id, with the id of the question that gave the lease. */
  const renewing = new Map<string, Waiting<Answer> & { questionId: string | undefined }>()
  /** The leases: connection id to question id. */
  const leases = new Map<string, string>()
  // Their answers name no request, so only one of each kind is in flight; the next waits.
  let closing: Waiting<string[]> | undefined
  let listing: Waiting<OpenConnection[]> | undefined
  const closes = oneAtATime()
  const lists = oneAtATime()
  let ended = false
  let resumeWithinMs: number | undefined
  let questionsNumbered = 0

  call.on('data', ({ kind, resumeWithin }: AuthorizeResponse) => {
    if (resumeWithin) resumeWithinMs = millisecondsOf(resumeWithin)
    if (kind?.$case === 'answers') for (const answer of kind.value.answers) take(answer)
    if (kind?.$case === 'revoked') revoke(kind.value)
    if (kind?.$case === 'closed') {
      for (const id of kind.value.connectionIds) leases.delete(id)
      closing?.resolve(kind.value.connectionIds)
      closing = undefined
    }
    if (kind?.$case === 'connections') {
      listing?.resolve(kind.value.connections)
      listing = undefined
    }
  })
  closed.then(error => {
    ended = true
    for (const waiting of [...asked.values(), ...renewing.values(), closing, listing])
      waiting?.reject(error ?? streamEnded())
    asked.clear()
    settle()
    renewing.clear()
    leases.clear()
    onClosed?.(error)
  })

  function settle(): void {
    for (const resolve of settling) afterAnswers(resolve)
    settling.clear()
  }

  /** Gives an answer to who waits for it: a renewal by its connection or, where that has ended, by its question. */
  function take(answer: Answer): void {
    if (answer.allowed && answer.connectionId) leases.set(answer.connectionId, answer.questionId)
    const renewed = renewing.has(answer.connectionId) ? answer.connectionId : undefined
    const question = renewed === undefined ? asked.get(answer.questionId) : undefined
    if (question) {
      asked.delete(answer.questionId)
      question.resolve(answer)
      if (asked.size === 0) settle()
      return
    }
    const id = renewed ?? [...renewing].find(([, { questionId }]) => questionId === answer.questionId)?.[0]
    if (id === undefined) return
    const renewal = renewing.get(id)
    renewing.delete(id)
    if (!answer.allowed) leases.delete(id)
    renewal?.resolve(answer)
  }

  function revoke(revoked: ConnectionRevoked): void {
    const { connectionId, questionId, reasons, policyRevision, decisionId } = revoked
    leases.delete(connectionId)
    void cut(revoked)
    // A renewal that crossed it on the way has its answer too.
    const renewal = renewing.get(connectionId)
    renewing.delete(connectionId)
    renewal?.resolve({
      questionId,
      allowed: false,
      reasons,
      policyRevision,
      expiresAt: undefined,
      decisionId,
      connectionId,
      retryAfter: undefined,
    })
  }

  async function cut(revoked: ConnectionRevoked): Promise<void> {
    await onRevoked(revoked)
    // A server of before there were acknowledgements would end the stream.
    if (resumeWithinMs === undefined || ended || call.writableEnded) return
    send({ $case: 'acknowledge', value: { connectionIds: [revoked.connectionId] } })
  }

  function send(kind: NonNullable<AuthorizeRequest['kind']>): void {
    demandOpen()
    call.write({ kind })
  }

  function demandOpen(): void {
    if (ended || call.writableEnded) throw streamEnded()
  }

  /** Gives ids to the questions that have none, so that every answer has one meaning. */
  function numbered(questions: AskedQuestion[]): Question[] {
    const given = new Set(questions.map(({ id }) => id))
    return questions.map(({ id, user, service, action = '' }) => {
      if (id) return { id, user, service, action }
      do questionsNumbered += 1
      while (given.has(`q${questionsNumbered}`) || asked.has(`q${questionsNumbered}`))
      return { id: `q${questionsNumbered}`, user, service, action }
    })
  }

  return {
    closed,
    close,

    async ask(questions, userAssertion) {
      demandOpen()
      if (asked.size + questions.length > questionsInFlightMax) throw questionsUnanswered()
      const sent = numbered(questions)
      const ids = new Set(sent.map(({ id }) => id))
      if (ids.size < sent.length || sent.some(({ id }) => asked.has(id))) {
        throw invalidField('questions.id', 'has to be unique among the questions in flight')
      }
      const answers = sent.map(({ id }) => waitingIn(asked, id, {}))
      for (const some of chunked(sent)) send({ $case: 'questions', value: { questions: some, userAssertion } })
      return Promise.all(answers)
    },

    async renew(connectionIds, userAssertion) {
      demandOpen()
      const ids = [...new Set(connectionIds)]
      // The server ends the stream of a client that renews what it does not hold.
      const unknown = ids.find(id => !leases.has(id))
      if (unknown !== undefined) throw invalidField('connection_ids', `${unknown} is not held on this stream`)
      const busy = ids.find(id => renewing.has(id))
      if (busy !== undefined) throw invalidField('connection_ids', `${busy} is being renewed already`)
      const answers = new Map(ids.map(id => [id, waitingIn(renewing, id, { questionId: leases.get(id) })]))
      for (const some of chunked(ids)) send({ $case: 'renew', value: { connectionIds: some, userAssertion } })
      return Promise.all(connectionIds.map(id => answers.get(id)!))
    },

    async resume(connectionIds, userAssertion) {
      demandOpen()
      const ids = [...new Set(connectionIds)]
      const busy = ids.find(id => renewing.has(id))
      if (busy !== undefined) throw invalidField('connection_ids', `${busy} is being resumed already`)
      const answers = new Map(ids.map(id => [id, waitingIn(renewing, id, { questionId: undefined })]))
      for (const some of chunked(ids)) send({ $case: 'resume', value: { connectionIds: some, userAssertion } })
      return Promise.all(connectionIds.map(id => answers.get(id)!))
    },

    resumeWithinMs: () => resumeWithinMs,

    settled: () => new Promise(resolve => void (asked.size === 0 ? afterAnswers(resolve) : settling.add(resolve))),

    async closeConnections(connectionIds) {
      const closedIds = chunked([...new Set(connectionIds)]).map(some =>
        closes(
          () =>
            new Promise<string[]>((resolve, reject) => {
              send({ $case: 'close', value: { connectionIds: some } })
              closing = { resolve, reject }
            }),
        ),
      )
      return (await Promise.all(closedIds)).flat()
    },

    list() {
      return lists(
        () =>
          new Promise<OpenConnection[]>((resolve, reject) => {
            send({ $case: 'list', value: {} })
            listing = { resolve, reject }
          }),
      )
    },
  }
}

/**
 * An answer reaches who has asked some promises later. Who moves in between would leave behind what has just been allowed: its
 * lease would end with the stream, and its holder would not hear of that.
 */
function afterAnswers(resolve: () => void): void {
  setImmediate(resolve)
}

const checkTimeoutMs = 10_000

/** One question, one answer, no lease. Operators and services name the device that they ask about. */
export async function check({
  server,
  credentials: shown,
  question: { id = '', user, service, action = '' },
  deviceId = '',
  userAssertion,
  timeoutMs = checkTimeoutMs,
  channel,
}: {
  server: Server
  credentials: Credentials
  question: AskedQuestion
  deviceId?: string
  userAssertion?: string | undefined
  timeoutMs?: number
  /** A connection to share, made by `openChannel`; left open. Default: one of its own. */
  channel?: Channel
}): Promise<Answer> {
  const { address, credentials, options } = clientTarget(server, shown, channel)
  const client = new AuthorizeServiceClient(address, credentials, options)
  try {
    const request = { question: { id, user, service, action }, deviceId, userAssertion }
    const deadline = Date.now() + timeoutMs
    const { answer } = await answerOf<CheckResponse>(done => client.check(request, new Metadata(), { deadline }, done))
    if (!answer)
      throw new Fault('UNAVAILABLE', 'ANSWER_MISSING', 'the server answered without a decision: take it as a no')
    return answer
  } finally {
    if (!channel) client.close()
  }
}

/** Registers who waits for an answer. Its rejection is always handled, because a stream may end before it is awaited. */
function waitingIn<Extra>(map: Map<string, Waiting<Answer> & Extra>, id: string, extra: Extra): Promise<Answer> {
  const answer = new Promise<Answer>((resolve, reject) => map.set(id, { resolve, reject, ...extra }))
  answer.catch(() => undefined)
  return answer
}

function chunked<T>(items: T[]): T[][] {
  const chunks: T[][] = []
  for (let at = 0; at < items.length; at += itemsPerMessageMax) chunks.push(items.slice(at, at + itemsPerMessageMax))
  return chunks
}

/** Runs what it is given one after another, whether or not the one before succeeded. */
function oneAtATime(): <T>(run: () => Promise<T>) => Promise<T> {
  let last: Promise<unknown> = Promise.resolve()
  return run => {
    const next = last.then(run, run)
    last = next.catch(() => undefined)
    return next
  }
}

function streamEnded(): Fault {
  return new Fault(
    'UNAVAILABLE',
    'STREAM_ENDED',
    'the authorization stream has ended, and its leases with it; open another',
  )
}

function questionsUnanswered(): Fault {
  const message = `${questionsInFlightMax} questions wait for an answer; wait for it too`
  return new Fault('RESOURCE_EXHAUSTED', 'QUESTIONS_UNANSWERED', message)
}
