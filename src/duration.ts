/** Milliseconds as google.protobuf.Duration, whose two parts have the same sign. */
export function durationOf(ms: number): { seconds: number; nanos: number } {
  const seconds = Math.trunc(ms / 1_000)
  return { seconds, nanos: Math.round((ms - seconds * 1_000) * 1e6) }
}
