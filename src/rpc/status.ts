/** How an error becomes what the caller sees: a canonical code, one sentence, and `google.rpc` details (AIP-193). */
import { randomBytes } from 'node:crypto'
import { Metadata, type StatusObject, status } from '@grpc/grpc-js'
import { clockOffsetSentence } from '../clock.ts'
import { databaseUnavailable, isDatabaseOutage } from '../db/failure.ts'
import { durationOf } from '../duration.ts'
import { Fault } from '../fault.ts'
import { BadRequest, ErrorInfo, RetryInfo } from '../gen/google/rpc/error_details.ts'
import { Status } from '../gen/google/rpc/status.ts'
import type { Log } from '../telemetry/log.ts'

const errorDomain = 'edgemesh.v1'

/**
 * The fault that the caller is told of. A fault is told as it is; an outage of the database is UNAVAILABLE; everything
 * else is a bug, logged whole under an id, of which the caller sees nothing but that id.
 */
export function faultOf(error: unknown, log: Log): Fault | InternalError {
  if (error instanceof Fault) return error
  if (isDatabaseOutage(error)) {
    log.warn({ err: error }, 'database unavailable')
    return databaseUnavailable(error)
  }
  const id = randomBytes(6).toString('hex')
  log.error({ err: error, errorId: id }, 'a call failed')
  return { code: 'INTERNAL', reason: 'INTERNAL', message: `internal error; the log has it under ${id}` }
}

/** Refusals behind which there may be a wrong clock of the caller. */
const clockReasons: ReadonlySet<string> = new Set([
  'CERTIFICATE_EXPIRED',
  'CERTIFICATE_NOT_YET_VALID',
  'CSR_CHALLENGE_STALE',
  'RECOVERY_WINDOW_OVER',
  'TOKEN_EXPIRED',
])

/** Says that the caller's clock is wrong, where it is known to be and may be the cause. */
export function namingClock(fault: Fault | InternalError, clockOffsetMs: number | undefined): Fault | InternalError {
  const sentence = clockOffsetSentence(clockOffsetMs)
  if (!sentence || !(fault instanceof Fault) || !clockReasons.has(fault.reason)) return fault
  // A new one: the same fault may be told to others, whose clocks are right.
  const { code, reason, message } = fault
  return new Fault(code, reason, `${message}; ${sentence}`, fault)
}

export type InternalError = { code: 'INTERNAL'; reason: 'INTERNAL'; message: string }

/**
 * The gRPC status with its details in `grpc-status-details-bin`.
 *
 * Of an outage everybody is told at the same time, and not every client adds a jitter of its own: each is told another time,
 * up to twice as long, so that they don't come back together.
 *
 * @param trailer what every answer carries
 * @param random 0 to 1, exclusive
 */
export function statusOf(
  fault: Fault | InternalError,
  trailer = new Metadata(),
  random: () => number = Math.random,
): StatusObject {
  const code = status[fault.code]
  const metadata = trailer.clone()
  const details = [
    packed('google.rpc.ErrorInfo', ErrorInfo, {
      reason: fault.reason,
      domain: errorDomain,
      metadata: fault instanceof Fault ? fault.metadata : {},
    }),
  ]
  if (fault instanceof Fault && fault.violations.length > 0) {
    const fieldViolations = fault.violations.map(violation => ({
      reason: '',
      localizedMessage: undefined,
      ...violation,
    }))
    details.push(packed('google.rpc.BadRequest', BadRequest, { fieldViolations }))
  }
  if (fault instanceof Fault && fault.retryAfterMs !== undefined) {
    const spread = fault.code === 'UNAVAILABLE' ? 1 + random() : 1
    details.push(packed('google.rpc.RetryInfo', RetryInfo, { retryDelay: durationOf(fault.retryAfterMs * spread) }))
  }
  const encoded = Status.encode({ code, message: fault.message, details }).finish()
  metadata.set('grpc-status-details-bin', Buffer.from(encoded))
  return { code, details: fault.message, metadata }
}

function packed<T>(type: string, codec: { encode(message: T): { finish(): Uint8Array } }, message: T) {
  return { typeUrl: `type.googleapis.com/${type}`, value: Buffer.from(codec.encode(message).finish()) }
}
