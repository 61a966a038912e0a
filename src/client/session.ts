/**
 * A session: one connection to the server, on which the device has shown one certificate, and the heartbeat stream on it.
 *
 * A device that has a new certificate, or is asked to go elsewhere, opens its next session before it closes this one.
 */
import type { Channel } from '@grpc/grpc-js'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { HeartbeatResponse } from '../gen/edgemesh/v1/heartbeat.ts'
import type { Posture, TrustBundle } from '../gen/edgemesh/v1/types.ts'
import { millisecondsOf, openChannel, type Server } from './channel.ts'
import type { DeviceCredentials } from './enroll.ts'
import { type DirectiveKind, openHeartbeats } from './heartbeat-stream.ts'

export type Session = {
  /** What the device has shown on this connection. */
  credentials: DeviceCredentials
  /** The connection, for other calls. */
  channel: Channel
  /** What the server has asked for on this stream, and has not been heeded yet. */
  asked: Asked
  /** How many reports have been acknowledged. */
  reports: number
  /** Resolves when the report is durable, or to nothing when `signal` is aborted before. Rejects when the stream breaks. */
  report(
    posture: Partial<Posture>,
    signal: AbortSignal,
    openConnectionIds?: string[],
  ): Promise<HeartbeatResponse | undefined>
  /** Why the stream is no more, once it is no more. */
  ended: Error | undefined
  close(): Promise<void>
}

export type Asked = {
  /** To open a stream anew, after so long. */
  reconnectInMs?: number
  /** To renew the certificate, after so long or at the device's own pace. */
  renew?: { inMs: number | undefined }
  trustBundle?: TrustBundle
  /** The reason for which the identity was revoked. */
  revoked?: string
}

/** The server acknowledges within a second; after this long it is taken to be gone. */
const acknowledgementTimeoutMsDefault = 30_000

export function openSession({
  server,
  credentials,
  trustBundleId,
  onDirective,
  wake,
  clock,
  acknowledgementTimeoutMs = acknowledgementTimeoutMsDefault,
}: {
  server: Server
  credentials: DeviceCredentials
  trustBundleId: () => string
  /** What is no more than news is handed on as it comes. */
  onDirective: (directive: DirectiveKind) => void
  /** Called when there is something that can't wait for the next report. */
  wake: () => void
  clock: Clock
  acknowledgementTimeoutMs?: number
}): Session {
  const channel = openChannel(server, credentials)
  const heartbeats = openHeartbeats({ server, credentials, trustBundleId, channel, clock, onDirective: note })

  function note(directive: DirectiveKind): void {
    const { asked } = session
    switch (directive.$case) {
      case 'renewCertificate':
        asked.renew = { inMs: directive.value.delay && millisecondsOf(directive.value.delay) }
        break
      case 'trustBundle':
        asked.trustBundle = directive.value.trustBundle
        break
      case 'reconnect':
        asked.reconnectInMs = directive.value.delay ? millisecondsOf(directive.value.delay) : 0
        break
      case 'revoked':
        asked.revoked = directive.value.reason
        break
      default:
        onDirective(directive)
        return
    }
    wake()
  }

  const session: Session = {
    credentials,
    channel,
    asked: {},
    reports: 0,
    ended: undefined,
    async report(posture, signal, openConnectionIds) {
      const acknowledged = heartbeats.report(posture, openConnectionIds)
      const answer = await within(acknowledgementTimeoutMs, acknowledged, signal)
      if (answer) session.reports += 1
      return answer
    },
    async close() {
      await heartbeats.close()
      channel.close()
    },
  }
  heartbeats.closed.then(error => {
    session.ended = error ?? endedInOrder()
    wake()
  })
  return session
}

/** What `acknowledged` resolves to, or nothing when `signal` is aborted before. */
async function within<T>(ms: number, acknowledged: Promise<T>, signal: AbortSignal): Promise<T | undefined> {
  const { promise: given, resolve: giveUp, reject: fail } = Promise.withResolvers<undefined>()
  const timeout = setTimeout(() => fail(unacknowledged(ms)), ms)
  const stop = () => giveUp(undefined)
  signal.addEventListener('abort', stop)
  if (signal.aborted) stop()
  try {
    return await Promise.race([acknowledged, given])
  } finally {
    clearTimeout(timeout)
    signal.removeEventListener('abort', stop)
  }
}

function endedInOrder(): Fault {
  return new Fault('UNAVAILABLE', 'STREAM_ENDED', 'the server ended the heartbeat stream')
}

function unacknowledged(ms: number): Fault {
  return new Fault('UNAVAILABLE', 'SERVER_SILENT', `a report was not acknowledged within ${ms / 1_000} s`)
}
