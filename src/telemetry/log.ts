/**
 * The log: one JSON document a line, on stdout unless told otherwise.
 *
 *     const log = createLog({ level: 'info' })
 *     log.info({ device: 'alpha', serial }, 'certificate issued')
 *     log.error({ err }, 'journal cannot be written')
 *
 * Facts go into fields, the message stays the same for the same event. Fields with the names below never reach the
 * output; that is a second fence, the first is not to hand them over. A line that is written for a call that is traced has
 * the call's `trace_id` and `span_id`. For operators: docs/logs.md.
 */
import { type DestinationStream, destination, type Logger, pino, stdSerializers, stdTimeFunctions } from 'pino'
import type { LogLevel } from '../settings.ts'
import { traceFields } from './tracing.ts'

export type Log = Logger

export type LogOptions = {
  level: LogLevel | 'silent'
  /** Default stdout. Whoever prints for people on stdout directs the log to stderr with `destination(2)` of pino. */
  destination?: DestinationStream
  /** For a person at a terminal instead of a collector. Needs pino-pretty, a development dependency. */
  pretty?: boolean
}

const SECRET_FIELDS = [
  'token',
  'enrollmentToken',
  'enrollmentTokenSecret',
  'bearerToken',
  'secret',
  'password',
  'passphrase',
  'caKeyPassphrase',
  'privateKey',
  'privateKeyPem',
  'csr',
  'authorization',
  'cookie',
]

// Paths are fixed ones, not patterns, and pino's wildcard stands for one level: these reach three levels down.
const REDACTED_PATHS = SECRET_FIELDS.flatMap(field => [field, `*.${field}`, `*.*.${field}`])

export function createLog({ level, destination: output, pretty = false }: LogOptions): Log {
  const options = {
    level,
    base: undefined, // pid and host name are the collector's to add
    timestamp: stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
    mixin: () => traceFields() ?? {},
    redact: { paths: REDACTED_PATHS, censor: '***' },
    serializers: { err: stdSerializers.errWithCause, error: stdSerializers.errWithCause },
  }
  if (pretty) return pino({ ...options, transport: { target: 'pino-pretty', options: { destination: 2 } } })
  return pino(options, output ?? destination(1))
}
