/**
 * The server's time in the trailing metadata of every answer, refusals included, so that whoever is told something can
 * see how wrong its own clock is: a device that believes it is 1970 takes every certificate for not yet valid.
 */
import { Metadata } from '@grpc/grpc-js'
import type { Clock } from '../clock.ts'

/** ISO 8601 with milliseconds, in UTC. */
const serverTimeKey = 'edgemesh-server-time'

/** @returns what makes the metadata: one object for all answers of a millisecond, to be copied before anything is added */
export function serverTimeFrom(clock: Clock): () => Metadata {
  let madeAt = Number.NaN
  let metadata = new Metadata()
  return () => {
    const now = clock()
    if (now !== madeAt) {
      madeAt = now
      metadata = new Metadata()
      metadata.set(serverTimeKey, new Date(now).toISOString())
    }
    return metadata
  }
}
