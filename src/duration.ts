/** Milliseconds as google.protobuf.Duration. */
export function durationOf(ms: number): { seconds: number; nanos: number } {
  const seconds = Math.floor(ms / 1_000)
  return { seconds, nanos: Math.round((ms - seconds * 1_000) * 1e6) }
}
