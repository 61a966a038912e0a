/** What every promise of the client rejects with, as far as it has to do with EdgeMesh. */
import type { FieldViolation } from '../fault.ts'
import { type DescribedError, describeCallError, isCallError } from './channel.ts'
import { sentenceOf } from './server-clock.ts'

/**
 * A call was refused or failed.
 *
 *     catch (error) {
 *       if (error instanceof EdgeMeshError && error.reason === 'TOKEN_EXPIRED') askForAnotherToken()
 *     }
 *
 * Anything else that is thrown is a bug, or comes from a function that was passed in.
 */
export class EdgeMeshError extends Error {
  /** Canonical gRPC code, such as `UNAUTHENTICATED`; `UNAVAILABLE` and `RESOURCE_EXHAUSTED` pass, the others hardly do. */
  readonly code: string
  /** Stable, UPPER_SNAKE_CASE, such as `TOKEN_EXPIRED`: what programs compare. The code again where the server gave none. */
  readonly reason: string
  /** Each field of the request that is wrong, as the proto spells it. */
  readonly violations: FieldViolation[]
  /** How long the server wants to be left alone, in milliseconds; absent where it did not say. */
  readonly retryAfterMs: number | undefined
  /** How far this host's clock is ahead of the server's, negative where behind; absent where the server did not say. */
  readonly clockOffsetMs: number | undefined
  /** Facts for programs, as `google.rpc.ErrorInfo` carries them. */
  readonly metadata: Record<string, string>

  constructor(described: DescribedError, cause?: unknown) {
    super(sentenceOf(described), cause === undefined ? undefined : { cause })
    this.name = 'EdgeMeshError'
    this.code = described.code
    this.reason = described.reason
    this.violations = described.violations
    this.retryAfterMs = described.retryAfterMs
    this.clockOffsetMs = described.clockOffsetMs
    this.metadata = described.metadata
  }
}

/** The failure of a call as an EdgeMeshError; whatever is none, as it is. */
export function asEdgeMeshError(failure: unknown): unknown {
  return isCallError(failure) ? new EdgeMeshError(describeCallError(failure), failure) : failure
}

/** What `call` gives; what it throws or rejects with is an EdgeMeshError where it has to do with EdgeMesh. */
export async function withTypedErrors<T>(call: () => T | Promise<T>): Promise<T> {
  try {
    return await call()
  } catch (failure) {
    throw asEdgeMeshError(failure)
  }
}
