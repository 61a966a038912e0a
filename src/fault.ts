/**
 * What a caller is told when a call is refused or fails in a way that the caller can act on.
 *
 * A `Fault` is made where the problem is known and rendered to a gRPC status with `google.rpc` details in one place,
 * `rpc/status.ts`. Any other error that reaches that place is a bug or an outage: it is logged whole, and the caller
 * sees INTERNAL and an id, nothing more.
 */
export type FaultCode =
  | 'INVALID_ARGUMENT'
  | 'UNAUTHENTICATED'
  | 'PERMISSION_DENIED'
  | 'NOT_FOUND'
  | 'ALREADY_EXISTS'
  | 'FAILED_PRECONDITION'
  | 'RESOURCE_EXHAUSTED'
  | 'ABORTED'
  | 'UNAVAILABLE'
  | 'UNIMPLEMENTED'

/** One field of the request that is wrong: its path as the proto spells it, and what would be right. */
export type FieldViolation = { field: string; description: string }

export type FaultDetails = {
  /** Every field that is wrong, for INVALID_ARGUMENT. Rendered as `google.rpc.BadRequest`. */
  violations?: FieldViolation[]
  /** How long to wait before the same call may succeed. Rendered as `google.rpc.RetryInfo`. */
  retryAfterMs?: number
  /** Facts for programs, as `google.rpc.ErrorInfo` metadata. Never a secret. */
  metadata?: Record<string, string>
  cause?: unknown
}

export class Fault extends Error {
  readonly code: FaultCode
  /** Stable, UPPER_SNAKE_CASE: what programs compare. Rendered as `google.rpc.ErrorInfo.reason`. */
  readonly reason: string
  readonly violations: FieldViolation[]
  readonly retryAfterMs: number | undefined
  readonly metadata: Record<string, string>

  /** @param message one sentence for a person: what was wrong, and what would be right */
  constructor(code: FaultCode, reason: string, message: string, details: FaultDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.name = 'Fault'
    this.code = code
    this.reason = reason
    this.violations = details.violations ?? []
    this.retryAfterMs = details.retryAfterMs
    this.metadata = details.metadata ?? {}
  }
}

/** INVALID_ARGUMENT for one field. `field` is the path as the proto spells it, such as `device.labels`. */
export function invalidField(field: string, description: string): Fault {
  return invalidFields([{ field, description }])
}

/** The same for all that is wrong with a request. */
export function invalidFields(violations: FieldViolation[]): Fault {
  const message = violations.map(({ field, description }) => `${field} ${description}`).join('; ')
  return new Fault('INVALID_ARGUMENT', 'INVALID_FIELD', message, { violations })
}
