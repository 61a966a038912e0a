/**
 * Heartbeats, from the device's side: what it reports, and what the server asks of it.
 *
 *     const heartbeats = openHeartbeats({ server, credentials, onDirective: ({ $case }) => console.log($case) })
 *     const { nextInterval, failingPosture } = await heartbeats.report({ diskEncrypted: true, cpuPercent: 12 })
 *     await heartbeats.close()
 *
 * A report is acknowledged once it is durable. Reports that were not acknowledged when the stream ends are rejected, and
 * may or may not have been taken; the first report of the next stream says everything anyway.
 */
import type { Channel, ServiceError } from '@grpc/grpc-js'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { type Directive, type HeartbeatResponse, HeartbeatServiceClient } from '../gen/edgemesh/v1/heartbeat.ts'
import { Posture } from '../gen/edgemesh/v1/types.ts'
import { type Credentials, clientTarget, endOf, type Server } from './channel.ts'

/** What the server asks a device to do: `{ $case: 'reconnect', value: { delay } }` and the like. */
export type DirectiveKind = NonNullable<Directive['kind']>

export type HeartbeatStream = {
  /**
   * Reports how the device is. A stream's first report carries the whole posture, later ones may leave out what has not
   * changed. Resolves when the server has acknowledged this report or a later one; rejects when the stream ends before.
   */
  report(posture: Partial<Posture>, openConnectionIds?: string[]): Promise<HeartbeatResponse>
  /** Ends the stream. Reports in flight are still acknowledged, if the server is there. */
  close(): Promise<void>
  /** Resolves when the stream has ended: with the error, or with nothing when either side ended it in order. */
  closed: Promise<ServiceError | undefined>
}

/** A server that is this far behind will not catch up; the database takes a batch of reports in a tenth of a second. */
const reportsInFlightMax = 256

export function openHeartbeats({
  server,
  credentials: shown,
  trustBundleId = () => shown.trustBundleId ?? '',
  onDirective,
  onClosed,
  channel,
  clock = systemClock,
}: {
  server: Server
  credentials: Credentials & { trustBundleId?: string }
  /** The trust bundle that the device goes by, asked for with each report. Default: that of the credentials. */
  trustBundleId?: () => string
  /** Called for each directive, before the report that it came with resolves. */
  onDirective?: (directive: DirectiveKind) => void
  onClosed?: (error: ServiceError | undefined) => void
  /** A connection to share, made by `openChannel`; left open. Default: one of its own. */
  channel?: Channel
  clock?: Clock
}): HeartbeatStream {
  const { address, credentials, options } = clientTarget(server, shown, channel)
  const client = new HeartbeatServiceClient(address, credentials, options)
  const call = client.heartbeat()
  const { closed, close } = endOf(call, () => {
    if (!channel) client.close()
  })

  type Waiting = { resolve: (response: HeartbeatResponse) => void; reject: (error: Error) => void }
  /** By sequence, in ascending order. */
  const waiting = new Map<number, Waiting>()
  let sequence = 0
  /** Why the stream has ended, once it has. */
  let ended: Error | undefined

  call.on('data', (response: HeartbeatResponse) => {
    for (const { kind } of response.directives) if (kind) onDirective?.(kind)
    for (const [reported, { resolve }] of waiting) {
      if (reported > response.acknowledgedSequence) break
      waiting.delete(reported)
      resolve(response)
    }
  })
  closed.then(error => {
    ended = error ?? streamEnded()
    for (const { reject } of waiting.values()) reject(ended)
    waiting.clear()
    onClosed?.(error)
  })

  return {
    closed,
    close,
    async report(posture, openConnectionIds = []) {
      if (ended || call.writableEnded) throw ended ?? streamEnded()
      if (waiting.size >= reportsInFlightMax) throw reportsUnanswered()
      sequence += 1
      const acknowledged = new Promise<HeartbeatResponse>((resolve, reject) => {
        waiting.set(sequence, { resolve, reject })
      })
      call.write({
        sequence,
        posture: Posture.fromPartial(posture),
        openConnectionIds,
        sentAt: new Date(clock()),
        trustBundleId: trustBundleId(),
      })
      return acknowledged
    },
  }
}

function streamEnded(): Fault {
  return new Fault('UNAVAILABLE', 'STREAM_ENDED', 'the heartbeat stream has ended; open another')
}

function reportsUnanswered(): Fault {
  const message = `${reportsInFlightMax} reports wait for the server's acknowledgement; wait for it too`
  return new Fault('RESOURCE_EXHAUSTED', 'REPORTS_UNANSWERED', message)
}
