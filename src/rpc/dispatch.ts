/**
 * The life of every call, whatever it asks for:
 *
 * 1. the peer of its connection, read when the connection was made
 * 2. whether the method may be called by such a peer, and whether its certificate still stands
 * 3. for operators: whether policy lets their role do this
 * 4. the handler
 * 5. the audit event, on disk before the answer leaves
 * 6. the answer, or a status that says what was wrong; with either the server's time
 */

import type { EventEmitter } from 'node:events'
import type {
  handleBidiStreamingCall,
  handleServerStreamingCall,
  handleUnaryCall,
  MethodDefinition,
  Server,
  ServerDuplexStream,
  ServerUnaryCall,
  ServerWritableStream,
  ServiceDefinition,
  UntypedHandleCall,
} from '@grpc/grpc-js'
import { callEntry, type Journal } from '../audit/journal.ts'
import type { Refusals } from '../audit/refusals.ts'
import { type Call, type CallAudit, callerName, type Identified, type OwnEvents } from '../caller.ts'
import { type Clock, clockOffsetMs } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { MessageStream } from '../message-stream.ts'
import type { Log } from '../telemetry/log.ts'
import { type CallTrace, traceCall } from '../telemetry/tracing.ts'
import { callerOf, demandIdentity, demandRenewable, type Peer } from './peer.ts'
import { serverTimeFrom } from './server-time.ts'
import { faultOf, type InternalError, namingClock, statusOf } from './status.ts'

/**
 * Who may call a method. `anyone`: no certificate is needed. `…, even expired`: a device also with a certificate that has
 * expired, of which nothing is known then but that it was ours and that the caller holds its key.
 */
export type Access =
  | 'anyone'
  | 'identified'
  | 'device'
  | 'operator'
  | 'device, operator or service'
  | 'device or service'
  | typeof evenExpired

const evenExpired = 'operator or device, even expired'

export type MethodHandler =
  // biome-ignore lint/suspicious/noExplicitAny: the messages' types are checked where a service's handlers are given
  | { kind: 'unary'; access: Access; handle: (request: any, call: Call) => Promise<unknown> }
  // biome-ignore lint/suspicious/noExplicitAny: as above
  | { kind: 'serverStream'; access: Access; handle: (request: any, call: Call) => AsyncIterable<unknown> }
  // biome-ignore lint/suspicious/noExplicitAny: as above
  | { kind: 'bidi'; access: Access; handle: (stream: MessageStream<any, any>, call: Call) => Promise<void> }
  /** Others' handlers (health, reflection): admitted like ours, not audited. */
  | { kind: 'foreign'; access: Access; handle: UntypedHandleCall }

export type Dispatch = {
  /** Adds a service. Methods without a handler answer UNIMPLEMENTED, to those who may call the service at all. */
  add(definition: ServiceDefinition, handlers: Record<string, MethodHandler>, unimplemented: Access): void
  /** Ends all open calls of those callers with a fault. */
  cut(concerns: (caller: Identified) => boolean, fault: Fault): void
  /** Open calls by method. */
  streamsOpen(): Map<string, number>
  /** Ends every stream with a fault, once what it has received is answered. Other calls end by themselves. */
  finishAll(fault: Fault): void
}

export type DispatchOptions = {
  server: Server
  peerAt: (address: string) => Peer | undefined
  /** @throws Fault UNAUTHENTICATED when the certificate or its holder has been revoked */
  demandStanding: (caller: Identified) => void | Promise<void>
  /** @throws Fault PERMISSION_DENIED when policy does not let the operator call the method */
  demandPermission: (caller: Identified, method: string) => Promise<void>
  journal: Journal
  /** Where those who flood are counted. */
  refusals: Refusals
  instanceId: string
  clock: Clock
  log: Log
  onCall: (method: string, code: string) => void
}

/** Messages of one stream that are being worked on; the stream is not read beyond that. */
const messagesUnderWayMax = 32
/** Messages pushed to a client that does not read them, such as revocations; more end its stream. */
const messagesUnreadMax = 1_024

/** What stands in for a message that is not what its method takes. */
const malformed = Symbol('malformed message')

const wentWell = { code: 'OK', reason: '' }
const streamLost = { code: 'CANCELLED', reason: 'STREAM_LOST' }

type Begun = { peer: Peer; call: Call; opened: OpenCall }

type OpenCall = {
  call: ServedCall
  trace: CallTrace | undefined
  finish: (fault: Fault) => void
  /** How it ends, unless something comes between. */
  outcome: { code: string; reason: string }
}

type AnyCall =
  | ServerUnaryCall<unknown, unknown>
  | ServerWritableStream<unknown, unknown>
  | ServerDuplexStream<unknown, unknown>

export function createDispatch(options: DispatchOptions): Dispatch {
  const { server, journal, refusals, clock, log, instanceId } = options
  const open = new Set<OpenCall>()
  const serverTime = serverTimeFrom(clock)

  /** Steps 1 to 3. @returns nothing to wait for, mostly: whoever called a moment ago is known to stand */
  function admit(peer: Peer, call: Call, access: Access): void | Promise<void> {
    if (access === 'anyone') return
    const demand = access === evenExpired ? demandRenewable : demandIdentity
    const caller = demand(peer, call.startedAt)
    call.caller = caller
    // Whether one that has expired would still stand is for the handler to find out, with all else that it takes.
    const standing = caller.notAfter > call.startedAt ? options.demandStanding(caller) : undefined
    return standing ? standing.then(() => demandAccess(caller, call, access)) : demandAccess(caller, call, access)
  }

  function demandAccess(caller: Identified, call: Call, access: Access): void | Promise<void> {
    if (access !== 'identified' && !access.includes(caller.kind)) {
      throw new Fault('PERMISSION_DENIED', 'WRONG_CALLER', `this is for a ${access}, not for a ${caller.kind}`)
    }
    if (access === 'operator') return options.demandPermission(caller, call.method)
  }

  function begin(grpcCall: AnyCall, method: string, isTraced = true): Begun {
    const peer = options.peerAt(grpcCall.getPeer()) ?? gonePeer
    const startedAt = clock()
    const call = new ServedCall(grpcCall, journal.ownEvents, {
      caller: callerOf(peer, startedAt),
      address: peer.address,
      method,
      startedAt,
      instanceId,
      clockOffsetMs: clockOffsetMs(sentAtOf(grpcCall), startedAt),
    })
    // Anybody may call without a certificate. What is sampled is not for them to say.
    const carrier = call.caller.kind === 'anonymous' ? undefined : grpcCall.metadata
    const trace = isTraced ? traceCall(method, carrier) : undefined
    const opened: OpenCall = { call, trace, finish: () => {}, outcome: wentWell }
    open.add(opened)
    return { peer, call, opened }
  }

  function close(opened: OpenCall): void {
    open.delete(opened)
    const { call, trace, outcome } = opened
    trace?.end(outcome, factsOf(call))
    if (log.isLevelEnabled('debug')) {
      const { method, address, caller, audit, startedAt } = call
      const about = { method, ...outcome, caller: callerName(caller), address, target: audit.target }
      log.debug({ ...about, ms: clock() - startedAt }, 'a call has ended')
    }
  }

  /** Step 5 for a call that goes well, once. */
  async function auditSuccess(call: Call): Promise<void> {
    if (call.audit.written) return
    await journal.append([callEntry(call, { code: 'OK' })])
    call.audit.written = true
  }

  /** Steps 5 and 6 for one that did not: even a refusal is not answered before it is on record. */
  async function auditFailure(opened: OpenCall, error: unknown): Promise<Fault | InternalError> {
    const { call } = opened
    let fault = namingClock(faultOf(error, log), call.clockOffsetMs)
    try {
      // What could not be written a moment ago needn't hold up the refusal a second time.
      const entry = callEntry(atItsEnd(call), { code: fault.code, reason: fault.reason })
      if (refusals.areCounted(call, fault)) await refusals.record(call, fault)
      else if (fault.code === 'UNAVAILABLE') journal.appendLater([entry])
      else await journal.append([entry])
    } catch (auditError) {
      fault = faultOf(auditError, log)
    }
    options.onCall(call.method, fault.code)
    opened.outcome = { code: fault.code, reason: fault.reason }
    return fault
  }

  /** How the audit dates the end of a call: as its begin, unless that has an event already. */
  function atItsEnd(call: Call): Call {
    return call.audit.written ? { ...call, startedAt: clock() } : call
  }

  function unary(method: string, { access, handle }: Extract<MethodHandler, { kind: 'unary' }>) {
    type Given = Parameters<handleUnaryCall<unknown, unknown>>
    const serve = async ({ peer, call, opened }: Begun, grpcCall: Given[0], callback: Given[1]) => {
      try {
        const admission = admit(peer, call, access)
        if (admission) await admission
        const response = await handle(wellFormed(grpcCall.request), call)
        if (!call.audit.written) await auditSuccess(call)
        options.onCall(method, 'OK')
        callback(null, response, tellsTime(response) ? undefined : serverTime())
      } catch (error) {
        const failure = await auditFailure(opened, error)
        callback(statusOf(failure, serverTime()))
      } finally {
        close(opened)
      }
    }
    return (...[grpcCall, callback]: Given) => inTrace(begin(grpcCall, method), serve, grpcCall, callback)
  }

  function serverStream(method: string, { access, handle }: Extract<MethodHandler, { kind: 'serverStream' }>) {
    const serve = async ({ peer, call, opened }: Begun, grpcCall: ServerWritableStream<unknown, unknown>) => {
      try {
        await admit(peer, call, access)
        for await (const response of handle(wellFormed(grpcCall.request), call)) {
          if (call.signal.aborted) throw call.signal.reason
          await auditSuccess(call)
          if (!grpcCall.write(response)) await drained(grpcCall, call.signal)
        }
        options.onCall(method, 'OK')
        grpcCall.end(serverTime())
      } catch (error) {
        if (grpcCall.cancelled && call.audit.written) {
          journal.appendLater([callEntry(atItsEnd(call), streamLost)])
          options.onCall(method, 'CANCELLED')
          opened.outcome = streamLost
        } else {
          const failure = await auditFailure(opened, error)
          grpcCall.emit('error', statusOf(failure, serverTime()))
        }
      } finally {
        close(opened)
      }
    }
    const lead: handleServerStreamingCall<unknown, unknown> = grpcCall =>
      inTrace(begin(grpcCall, method), serve, grpcCall)
    return lead
  }

  function bidi(method: string, { access, handle }: Extract<MethodHandler, { kind: 'bidi' }>) {
    const serve = async ({ peer, call, opened }: Begun, grpcCall: ServerDuplexStream<unknown, unknown>) => {
      const messages = messageStream(grpcCall, call, opened.trace)
      opened.finish = messages.finish
      try {
        await admit(peer, call, access)
        if (call.caller.kind !== 'anonymous') call.audit.target = `${call.caller.kind}/${call.caller.id}`
        call.audit.detail = { stream: 'opened' }
        await journal.append([callEntry(call, { code: 'OK' })])
        call.audit.detail = { stream: 'ended' }
        await handle(messages, call)
        journal.appendLater([callEntry({ ...call, startedAt: clock() }, { code: 'OK', reason: 'STREAM_ENDED' })])
        options.onCall(method, 'OK')
        grpcCall.end(serverTime())
      } catch (error) {
        if (grpcCall.cancelled) {
          journal.appendLater([callEntry({ ...call, startedAt: clock() }, streamLost)])
          options.onCall(method, 'CANCELLED')
          opened.outcome = streamLost
        } else {
          const failure = await auditFailure(opened, error)
          grpcCall.emit('error', statusOf(failure, serverTime()))
        }
      } finally {
        close(opened)
      }
    }
    const lead: handleBidiStreamingCall<unknown, unknown> = grpcCall =>
      inTrace(begin(grpcCall, method), serve, grpcCall)
    return lead
  }

  function foreign(method: string, { access, handle }: Extract<MethodHandler, { kind: 'foreign' }>): UntypedHandleCall {
    // biome-ignore lint/suspicious/noExplicitAny: the four shapes of a gRPC handler have no type in common
    return (grpcCall: any, callback: any) => {
      // Probes and reflection tell nothing of how calls fare.
      const { peer, call, opened } = begin(grpcCall, method, false)
      open.delete(opened)
      Promise.try(admit, peer, call, access)
        .then(() => {
          wellFormed(grpcCall.request)
          const answer = (error: unknown, value: unknown) => callback(error, value, serverTime())
          // biome-ignore lint/suspicious/noExplicitAny: as above
          ;(handle as any)(grpcCall, callback && answer)
        })
        .catch(async error => {
          const failure = await auditFailure(opened, error)
          const refusal = statusOf(failure, serverTime())
          if (callback) callback(refusal)
          else grpcCall.emit('error', refusal)
        })
    }
  }

  function serverHandler(method: string, handler: MethodHandler): UntypedHandleCall {
    switch (handler.kind) {
      case 'unary':
        return unary(method, handler)
      case 'serverStream':
        return serverStream(method, handler)
      case 'bidi':
        return bidi(method, handler)
      case 'foreign':
        return foreign(method, handler)
    }
  }

  return {
    add(definition, handlers, unimplemented) {
      const tolerant: Record<string, MethodDefinition<unknown, unknown>> = {}
      const implementation: Record<string, UntypedHandleCall> = {}
      for (const [name, method] of Object.entries(definition)) {
        tolerant[name] = { ...method, requestDeserialize: tolerantly(method.requestDeserialize) }
        implementation[name] = serverHandler(method.path, handlers[name] ?? notImplemented(method, unimplemented))
      }
      server.addService(tolerant, implementation)
    },
    cut(concerns, fault) {
      for (const { call } of open) {
        if (call.caller.kind !== 'anonymous' && concerns(call.caller)) call.cut(fault)
      }
    },
    finishAll(fault) {
      for (const { finish } of open) finish(fault)
    },
    streamsOpen() {
      const counts = new Map<string, number>()
      for (const { call } of open) counts.set(call.method, (counts.get(call.method) ?? 0) + 1)
      return counts
    },
  }
}

/** Runs what serves a call in the context of its trace, where it has one. */
function inTrace<Given extends unknown[]>(
  begun: Begun,
  serve: (begun: Begun, ...given: Given) => Promise<void>,
  ...given: Given
): void {
  const { trace } = begun.opened
  if (trace) void trace.run(serve, begun, ...given)
  else void serve(begun, ...given)
}

/** What a call's span says of it beside the outcome. */
function factsOf({ caller, address, audit }: Call): Record<string, string> {
  return { 'client.address': address, 'edgemesh.caller': callerName(caller), 'edgemesh.target': audit.target }
}

/** A call as its handler sees it. What most calls are over without is made when somebody asks for it. */
class ServedCall implements Call {
  caller: Call['caller']
  readonly address: string
  readonly method: string
  readonly startedAt: number
  readonly instanceId: string
  readonly clockOffsetMs: number | undefined
  readonly audit: Call['audit']
  readonly #grpcCall: AnyCall
  #ending: AbortController | undefined
  #cutBy: Fault | undefined

  constructor(grpcCall: AnyCall, ownEvents: () => OwnEvents, known: Omit<Call, 'signal' | 'audit'>) {
    this.#grpcCall = grpcCall
    this.caller = known.caller
    this.address = known.address
    this.method = known.method
    this.startedAt = known.startedAt
    this.instanceId = known.instanceId
    this.clockOffsetMs = known.clockOffsetMs
    this.audit = new ServedCallAudit(ownEvents)
  }

  get signal(): AbortSignal {
    if (this.#ending) return this.#ending.signal
    const ending = new AbortController()
    this.#ending = ending
    if (this.#cutBy) ending.abort(this.#cutBy)
    else if (this.#grpcCall.cancelled) ending.abort(callerGone())
    // The three kinds of call are all emitters, but share no overload of `on`.
    else (this.#grpcCall as EventEmitter).on('cancelled', () => ending.abort(callerGone()))
    return ending.signal
  }

  cut(fault: Fault): void {
    this.#cutBy ??= fault
    this.#ending?.abort(fault)
  }
}

class ServedCallAudit implements CallAudit {
  target = ''
  detail: Record<string, unknown> = {}
  written = false
  readonly #ownEvents: () => OwnEvents
  #own: OwnEvents | undefined

  constructor(ownEvents: () => OwnEvents) {
    this.#ownEvents = ownEvents
  }

  get own(): OwnEvents {
    this.#own ??= this.#ownEvents()
    return this.#own
  }
}

const callerGone = () => new Fault('ABORTED', 'CANCELLED', 'the caller has gone')

/** Whether a message says itself what the trailing metadata would say. */
function tellsTime(message: unknown): boolean {
  return (message as { serverTime?: unknown }).serverTime instanceof Date
}

const gonePeer: Peer = {
  address: '',
  identity: { refused: 'CERTIFICATE_MISSING', message: 'the connection has gone' },
}

/** Resolves when the caller has taken what was sent, or when the call is over: whoever writes on finds that out. */
function drained(stream: ServerWritableStream<unknown, unknown>, signal: AbortSignal): Promise<void> {
  return new Promise(resolve => {
    const done = () => {
      stream.off('drain', done)
      signal.removeEventListener('abort', done)
      resolve()
    }
    stream.once('drain', done)
    signal.addEventListener('abort', done)
    if (signal.aborted) done()
  })
}

/** The caller's clock, by a call whose one request says when it was sent. */
function sentAtOf(grpcCall: AnyCall): Date | undefined {
  const request = 'request' in grpcCall ? (grpcCall.request as { sentAt?: unknown }) : undefined
  return request?.sentAt instanceof Date ? request.sentAt : undefined
}

/** grpc-js would answer INTERNAL for bytes that are no message; the caller is told that it is the caller's mistake. */
function tolerantly(deserialize: (bytes: Buffer) => unknown): (bytes: Buffer) => unknown {
  return bytes => {
    try {
      return deserialize(bytes)
    } catch {
      return malformed
    }
  }
}

function wellFormed(message: unknown): unknown {
  if (message !== malformed) return message
  const description = 'is not a message of the type that this method takes'
  throw new Fault('INVALID_ARGUMENT', 'MALFORMED_MESSAGE', `the request ${description}`, {
    violations: [{ field: 'request', description }],
  })
}

function notImplemented(method: MethodDefinition<unknown, unknown>, access: Access): MethodHandler {
  const refuse = () => {
    const name = method.path.slice(1)
    throw new Fault('UNIMPLEMENTED', 'UNIMPLEMENTED', `${name} is not available in this version of EdgeMesh`)
  }
  if (!method.responseStream) return { kind: 'unary', access, handle: async () => refuse() }
  return {
    kind: 'serverStream',
    access,
    // biome-ignore lint/correctness/useYield: it refuses before the first
    async *handle() {
      refuse()
    },
  }
}

function messageStream(
  grpcCall: ServerDuplexStream<unknown, unknown>,
  call: Call,
  trace: CallTrace | undefined,
): MessageStream<unknown, unknown> & { finish: (fault: Fault) => void } {
  /** By what the stream ends when nothing is under way any more; no more is read. */
  let finishing: Fault | undefined
  let onFinish = () => {}
  let onUnread = () => {}
  const { signal } = call
  return {
    finish(fault) {
      finishing = fault
      onFinish()
    },
    send(message) {
      if (signal.aborted || grpcCall.writableEnded) return
      grpcCall.write(message)
      if (grpcCall.writableLength > messagesUnreadMax) onUnread()
    },
    receive(onMessage, underWayMax = messagesUnderWayMax) {
      return new Promise((resolve, reject) => {
        let underWay = 0
        let ended = false
        let failed = false
        const fail = (error: unknown) => {
          failed = true
          grpcCall.pause()
          reject(error)
        }
        /** Who does not take answers gets no more questions answered: the client's pace bounds what waits here. */
        const busy = () => underWay >= underWayMax || grpcCall.writableNeedDrain
        const readOn = () => {
          if (!failed && !finishing && grpcCall.isPaused() && !busy()) grpcCall.resume()
        }
        const done = () => {
          underWay--
          // What follows a message that was refused is not taken, even if it has arrived.
          if (failed) return
          if (ended && underWay === 0) resolve()
          else if (finishing) onFinish()
          else readOn()
        }
        onUnread = () =>
          fail(new Fault('RESOURCE_EXHAUSTED', 'NOT_READING', 'what this stream sends is not being read'))
        grpcCall.on('drain', readOn)
        onFinish = () => {
          grpcCall.pause()
          if (underWay === 0) fail(finishing)
        }
        if (signal.aborted) return fail(signal.reason)
        if (finishing) return fail(finishing)
        signal.addEventListener('abort', () => fail(signal.reason), { once: true })
        grpcCall.on('error', fail)
        // A stream that is lost ends too; that it was cancelled is told later, but in the same turn of the event loop.
        grpcCall.on('end', () =>
          setImmediate(() => {
            ended = true
            if (underWay === 0) resolve()
          }),
        )
        grpcCall.on('data', message => {
          if (failed || finishing) return
          underWay++
          if (busy()) grpcCall.pause()
          try {
            const pending = trace ? trace.message(() => onMessage(wellFormed(message))) : onMessage(wellFormed(message))
            if (pending) pending.then(done, fail)
            else done()
          } catch (error) {
            fail(error)
          }
        })
      })
    },
  }
}
