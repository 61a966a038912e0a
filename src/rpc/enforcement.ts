/**
 * Enforcement on calls that are already open: a stream must not outlive what let it in.
 *
 * A revocation cuts the caller's calls the moment that the change feed tells of it, an expired certificate within half a
 * second. After the feed was lost, everybody with a call open is looked at again.
 */
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { Fault } from '../fault.ts'
import type { Standing } from '../identity/standing.ts'
import type { Log } from '../telemetry/log.ts'
import type { Dispatch } from './dispatch.ts'
import { certificateExpired } from './peer.ts'

/** How often open calls are looked through for certificates that have expired: tens of microseconds each time. */
const expirySweepMs = 500
/** A caller whose standing could not be read is looked at again after this long. */
const recheckRetryMs = 500

/** To be started after `createStanding`, whose memory has to hear of a change first. @returns what ends it */
export function enforceStanding(options: {
  feed: ChangeFeed
  standing: Standing
  dispatch: Dispatch
  /** Tells when other authorities are trusted than before. */
  onTrustChange: (listener: () => void) => void
  clock: Clock
  log: Log
}): () => void {
  const { feed, standing, dispatch, clock, log } = options

  /** @param concerns callers as `<kind>:<id>`; absent: all */
  function recheck(concerns?: ReadonlySet<string>): void {
    for (const caller of dispatch.callers(concerns)) {
      standing.demand(caller).catch(error => {
        if (error instanceof Fault && error.code === 'UNAUTHENTICATED') {
          dispatch.cut(other => other.serial === caller.serial, error)
        } else {
          // As long as its calls are open, it is not known that they may be.
          log.debug({ err: error }, 'a certificate could not be looked at again yet')
          setTimeout(() => recheck(new Set([`${caller.kind}:${caller.id}`])), recheckRetryMs).unref()
        }
      })
    }
  }

  feed.onChange(keys => {
    const concerns = new Set(keys.filter(key => /^(device|operator|service):/.test(key)))
    if (concerns.size > 0) recheck(concerns)
  })
  feed.onReset(() => recheck())
  options.onTrustChange(() => recheck())
  const expiring = setInterval(() => {
    const now = clock()
    dispatch.cut(caller => caller.notAfter <= now, certificateExpired())
  }, expirySweepMs)
  return () => clearInterval(expiring)
}
