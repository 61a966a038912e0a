/**
 * The server's clock beside this host's.
 *
 * A host that thinks it is 1970 (a board without a battery, before it has found the network's time) takes every
 * certificate for one of the future, and TLS says no more than that. So where a connection fails for a certificate's
 * dates, the server is asked for its time over a connection that verifies nothing: whoever is in the middle can forge
 * the answer, and has gained a wrong sentence in an error.
 */
import { type Clock, clockOffsetSentence, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { type DescribedError, describeCallError, type Server } from './channel.ts'
import { unverifiedServerTime } from './first-contact.ts'

const datesRefused: ReadonlySet<string> = new Set(['SERVER_CERTIFICATE_EXPIRED', 'SERVER_CERTIFICATE_NOT_YET_VALID'])

/** The error is about something else: not worth keeping anybody waiting for long. */
const serverTimeTimeoutMs = 5_000

/** The failure of a call to `server`: as it is, or as the Fault CLOCK_WRONG where this host's clock is to blame for it. */
export async function withClocksCompared(failure: unknown, server: Server, clock: Clock): Promise<unknown> {
  const { reason, message } = describeCallError(failure, clock)
  if (!datesRefused.has(reason)) return failure
  const serverTime = await unverifiedServerTime(server, serverTimeTimeoutMs).catch(() => undefined)
  if (!serverTime) return failure
  const offsetMs = clock() - serverTime.getTime()
  const sentence = clockOffsetSentence(offsetMs)
  if (!sentence) return failure
  return new Fault(
    'UNAVAILABLE',
    'CLOCK_WRONG',
    `${message}, ${new Date(clock()).toISOString()}; it seems that ${sentence}, though that could not ` +
      'be verified without the certificate',
    { cause: failure, metadata: { clockOffsetMs: String(offsetMs) } },
  )
}

/** What `call` to `server` resolves to; what it rejects with is told with the clocks compared. */
export async function comparingClocks<T>(server: Server, call: Promise<T>, clock: Clock = systemClock): Promise<T> {
  try {
    return await call
  } catch (failure) {
    throw await withClocksCompared(failure, server, clock)
  }
}

/** What a person is told of an error: its message, and how wrong the clock is where that may have to do with it. */
export function sentenceOf({ reason, message, clockOffsetMs }: DescribedError): string {
  const sentence = clockOffsetSentence(clockOffsetMs)
  // The server says so itself where the clock is likely to be the reason.
  const said = reason === 'CLOCK_WRONG' || message.includes('your clock is')
  return sentence && !said ? `${message}; ${sentence}` : message
}
