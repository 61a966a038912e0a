/**
 * What is made to happen to a fleet while it runs, as a JSON list:
 *
 *     [{ "at": "10s", "action": "disconnect", "share": 0.5 },
 *      { "at": "20s", "action": "posture", "share": 0.1, "posture": "failing" },
 *      { "at": "30s", "action": "stop-heartbeats", "share": 0.01 }]
 *
 * Moments count from when every device has been enrolled or refused. Whom it hits is drawn anew for each step.
 */
import { z } from 'zod'
import { healths } from './mix.ts'

/** The file is read whole. */
export const scriptBytesMax = 1024 * 1024
const stepsMax = 10_000

const share = z.number().gt(0, 'has to be above 0').max(1, 'has to be at most 1, which is all devices')

/** @throws RangeError that names each step and field that is wrong */
export function parseScript(text: string, parseDuration: (text: string) => number): Step[] {
  const at = z.string().transform((written, context) => {
    try {
      return parseDuration(written)
    } catch {
      context.addIssue({ code: 'custom', message: 'has to be a whole number and a unit, such as 90s or 15m' })
      return z.NEVER
    }
  })
  const step = z.discriminatedUnion('action', [
    z.strictObject({ at, action: z.literal('disconnect'), share }),
    z.strictObject({ at, action: z.literal('posture'), share, posture: z.enum(healths).default('failing') }),
    z.strictObject({ at, action: z.literal('stop-heartbeats'), share }),
  ])
  const { success, data, error } = z.array(step).min(1).max(stepsMax).safeParse(readJson(text))
  if (!success) throw new RangeError(z.prettifyError(error).replace(/\s*\n\s*/g, ' '))
  return data.map(({ at: atMs, ...step }) => ({ atMs, ...step })).sort((a, b) => a.atMs - b.atMs)
}

/** What is done to one device. */
export type Action =
  /** Its streams are ended, and it comes back as one does that has lost its server. */
  | { action: 'disconnect' }
  /** From now on it is like this, and says so at once. */
  | { action: 'posture'; posture: (typeof healths)[number] }
  /** Its streams stay open, and nothing more is said on them. */
  | { action: 'stop-heartbeats' }

export type Step = Action & { atMs: number /** Above 0, up to 1. */; share: number }

function readJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new RangeError('not JSON', { cause })
  }
}
