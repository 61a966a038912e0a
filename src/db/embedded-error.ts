/**
 * Why the embedded PostgreSQL could not start. Tell them apart by `code`:
 *
 * - `IN_USE`: a live edgemesh owns the data folder
 * - `NO_BINARIES`: the npm package has none for this platform, or its install was left half done
 * - `UNREACHABLE`: started by root, and the user that PostgreSQL must run as cannot reach a folder
 * - `FAILED`: PostgreSQL itself refused; the message ends with what it said
 */
export class EmbeddedPostgresError extends Error {
  readonly code: 'IN_USE' | 'NO_BINARIES' | 'UNREACHABLE' | 'FAILED'
  /** How to mend it, for a person. */
  readonly hint: string | undefined

  constructor(code: EmbeddedPostgresError['code'], message: string, hint?: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause })
    this.name = 'EmbeddedPostgresError'
    this.code = code
    this.hint = hint
  }
}
