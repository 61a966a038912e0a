/**
 * Authorizations that outlive a stream: what is held when one is lost is resumed on the next, of whichever instance.
 *
 *     const authorizations = keepAuthorizations({ server, credentials, onEnded: ({ connectionId }) => cut(connectionId) })
 *     const [answer] = await authorizations.ask([{ user: 'ada', service: 'wiki' }])
 *     if (answer?.allowed) connect(answer.connectionId)
 *
 * The caller hears only of what has ended: because the server took it back, or because nothing could be resumed within the
 * time that the server has set for it. Until then a connection goes on while there is no stream. Its states:
 *
 *     idle       no stream is needed. A question is asked → open.
 *     open       there is a stream, on which everything is held. It is lost → resuming; `moveTo` → resuming on another,
 *                and only then this one is ended.
 *     resuming   opens streams, with pauses, until one holds what was held → open. The time is over → everything that was
 *                held has ended → idle.
 *     closed     for good, and with it all that was held.
 */
import type { Channel, ServiceError } from '@grpc/grpc-js'
import { Fault } from '../fault.ts'
import type { Reason } from '../gen/edgemesh/v1/types.ts'
import { type Answer, type AskedQuestion, type AuthorizationStream, openAuthorizations } from './authorize-stream.ts'
import { type Credentials, describeCallError, millisecondsOf, type Server } from './channel.ts'
import { backoffDelayMs, systemTimer, type Timer } from './waiting.ts'

/** Why a connection has ended. */
export type EndedConnection = { connectionId: string; reasons: Reason[]; decisionId: string }

/** Where streams lead, and who opens them. `channel`: a connection to share, made by `openChannel`; left open. */
export type Target = { server: Server; credentials: Credentials; channel?: Channel }

export type Authorizations = {
  /**
   * Answers in the order of the questions. Rejects when the stream breaks before they are all there.
   *
   * @param userAssertion a JWT of the user's issuer: kept as long as its connections, which are resumed by it
   */
  ask(questions: AskedQuestion[], userAssertion?: string): Promise<Answer[]>
  /** Holds connections beyond the end of the assertion that they rest on, by a fresh one. Answers for those still held. */
  renew(connectionIds: string[], userAssertion?: string): Promise<Answer[]>
  /** The connections have ended on this side. */
  closeConnections(connectionIds: string[]): Promise<void>
  /** What was allowed and has not ended. */
  held(): string[]
  /** Holds everything on a stream to `target` from now on. Resolves when it does, or when what could not move has ended. */
  moveTo(target: Target): Promise<void>
  /** Ends everything that is held. */
  close(): Promise<void>
}

/** Resuming has the grace time of the server, of 30 seconds or so: pauses are shorter than what an agent allows itself. */
const pauseMsMax = 2_000

/** What no other stream would mend: the device is out. */
const final = 'UNAUTHENTICATED'

export function keepAuthorizations({
  onEnded,
  timer = systemTimer,
  random = Math.random,
  ...first
}: Target & {
  /** Cut the connection now. When that is done, the server is told. */
  onEnded: (ended: EndedConnection) => void | Promise<void>
  timer?: Timer
  /** 0 to 1, exclusive. */
  random?: () => number
}): Authorizations {
  let target: Target = first
  let stream: AuthorizationStream | undefined
  /** Connection ids, each with the assertion by which it is held. */
  const held = new Map<string, string | undefined>()
  /** Since when there was no stream that holds them, by `timer`. */
  let lostAtMs: number | undefined
  let resumeWithinMs: number | undefined
  let resuming: Promise<void> | undefined
  let moving: Promise<void> = Promise.resolve()
  /** Calls of `ask` under way, and what has ended that they may be about to allow. */
  let asking = 0
  const endedBefore = new Map<string, EndedConnection>()
  const closing = new AbortController()

  function open(): AuthorizationStream {
    const opened: AuthorizationStream = openAuthorizations({
      ...target,
      onRevoked({ connectionId, reasons, decisionId }) {
        // The next stream may hold it by now. If it can't be told, that one is lost too.
        if (stream && stream !== opened) stream.closeConnections([connectionId]).catch(() => {})
        return end({ connectionId, reasons, decisionId })
      },
      onClosed: error => lost(opened, error),
    })
    return opened
  }

  async function end(ended: EndedConnection): Promise<void> {
    if (held.delete(ended.connectionId)) await onEnded(ended)
    // Taken back before the answer that allowed it has been handed on: it turns into a denial.
    else if (asking > 0) endedBefore.set(ended.connectionId, ended)
  }

  function endAll(reason: Reason): void {
    for (const connectionId of [...held.keys()]) void end({ connectionId, reasons: [reason], decisionId: '' })
  }

  function lost(which: AuthorizationStream, error: ServiceError | undefined): void {
    resumeWithinMs = which.resumeWithinMs() ?? resumeWithinMs
    if (which !== stream || closing.signal.aborted) return
    stream = undefined
    if (held.size === 0) return
    lostAtMs ??= timer.uptime()
    if (resumeWithinMs === undefined || isFinal(error)) endAll(reasonOf(error))
    else resumeSoon()
  }

  function resumeSoon(): void {
    resuming ??= keepResuming().finally(() => {
      resuming = undefined
      // Lost again in the last moment of it.
      if (held.size > 0 && !stream && !closing.signal.aborted) resumeSoon()
    })
  }

  /** Until everything that was held is held again, or has ended. */
  async function keepResuming(): Promise<void> {
    for (let failures = 0; held.size > 0 && !closing.signal.aborted; failures++) {
      let pauseMs = 0
      try {
        stream ??= open()
        const waitMs = await resumeOn(stream)
        if (waitMs === undefined) {
          lostAtMs = undefined
          return
        }
        pauseMs = waitMs
      } catch (error) {
        // It was tried, so the next attempt is on a stream of its own.
        stream = undefined
        if (isFinal(error) || isUnknownToServer(error)) return endAll(reasonOf(error))
      }
      lostAtMs ??= timer.uptime()
      const leftMs = lostAtMs + (resumeWithinMs ?? 0) - timer.uptime()
      if (leftMs <= 0) return endAll(notResumed)
      const backoffMs = Math.min(pauseMsMax, backoffDelayMs(failures, random))
      await timer.sleep(Math.min(leftMs, Math.max(pauseMs, backoffMs)), closing.signal)
    }
  }

  /** @returns how long to wait before those that could not be decided are tried again; absent: there are none */
  async function resumeOn(next: AuthorizationStream): Promise<number | undefined> {
    let waitMs: number | undefined
    const byAssertion = Map.groupBy(held.keys(), id => held.get(id))
    const resumed = [...byAssertion].map(([userAssertion, ids]) => next.resume(ids, userAssertion))
    for (const answer of (await Promise.all(resumed)).flat()) {
      const { connectionId, allowed, retryAfter, reasons, decisionId } = answer
      if (retryAfter) waitMs = Math.max(waitMs ?? 0, millisecondsOf(retryAfter))
      else if (!allowed) void end({ connectionId, reasons, decisionId })
      // It has ended on this side while it was asked for.
      else if (!held.has(connectionId)) await next.closeConnections([connectionId])
    }
    return waitMs
  }

  async function move(): Promise<void> {
    while (resuming) await resuming
    const before = stream
    if (!before || closing.signal.aborted) return
    const opened = open()
    // What is asked from now on is asked there; what has been asked is answered here, and moves with the rest.
    stream = opened
    await before.settled()
    try {
      if (held.size > 0 && (await resumeOn(opened)) !== undefined) resumeSoon()
    } catch {
      // What this stream could not do, the next may.
      if (stream === opened) stream = undefined
      lostAtMs ??= timer.uptime()
      if (held.size > 0) resumeSoon()
    }
    // Not before all is held elsewhere: it would end with the stream.
    while (resuming) await resuming
    await before.close()
  }

  return {
    held: () => [...held.keys()],

    async ask(questions, userAssertion) {
      if (closing.signal.aborted) throw closed()
      stream ??= open()
      asking++
      try {
        return (await stream.ask(questions, userAssertion)).map(answer => {
          const ended = endedBefore.get(answer.connectionId)
          if (ended) return { ...answer, allowed: false, reasons: ended.reasons, decisionId: ended.decisionId }
          if (answer.allowed) held.set(answer.connectionId, userAssertion)
          return answer
        })
      } finally {
        asking--
        if (asking === 0) endedBefore.clear()
      }
    },

    async renew(connectionIds, userAssertion) {
      if (closing.signal.aborted) throw closed()
      // What waits to be resumed is renewed by it.
      if (userAssertion !== undefined) {
        for (const id of connectionIds) if (held.has(id)) held.set(id, userAssertion)
      }
      while (resuming) await resuming
      const known = connectionIds.filter(id => held.has(id))
      if (!stream || known.length === 0) return []
      return stream.renew(known, userAssertion)
    },

    async closeConnections(connectionIds) {
      for (const id of connectionIds) held.delete(id)
      // What waits to be resumed is closed by not being resumed.
      if (stream && connectionIds.length > 0) await stream.closeConnections(connectionIds)
    },

    moveTo(next) {
      target = next
      moving = moving.then(move)
      return moving
    },

    async close() {
      closing.abort()
      held.clear()
      await resuming
      await stream?.close()
      stream = undefined
    },
  }
}

function isFinal(error: unknown): boolean {
  return error !== undefined && describeCallError(error).code === final
}

/** A server of the version before does not know what it was asked. */
function isUnknownToServer(error: unknown): boolean {
  return describeCallError(error).code === 'INVALID_ARGUMENT'
}

function reasonOf(error: unknown): Reason {
  const { reason: code, message } = error === undefined ? streamEnded : describeCallError(error)
  return { code, field: 'stream', actual: 'ended', required: 'open', message }
}

const streamEnded = { reason: 'STREAM_ENDED', message: 'The server ended the stream.' }

const notResumed: Reason = {
  code: 'NOT_RESUMED',
  field: 'stream',
  actual: 'lost',
  required: 'resumed in time',
  message: 'No stream could be opened again in time.',
}

function closed(): Fault {
  return new Fault('FAILED_PRECONDITION', 'AUTHORIZATIONS_CLOSED', 'the authorizations have been closed')
}
