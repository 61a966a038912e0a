/** A small server for agents: it answers reports and renewals as a test says, and keeps what it has seen. */
import { createPublicKey, hash, type X509Certificate } from 'node:crypto'
import type { ServerDuplexStream, ServerUnaryCall, ServerWritableStream, sendUnaryData } from '@grpc/grpc-js'
import type { ExecutionContext } from 'ava'
import { type Clock, systemClock } from '../../src/clock.ts'
import { durationOf } from '../../src/duration.ts'
import { Fault } from '../../src/fault.ts'
import {
  type EnrollRequest,
  type EnrollResponse,
  EnrollServiceService,
  type GetChallengeResponse,
  type GetTrustBundleResponse,
  type Identity,
  type RenewCertificateRequest,
  type RenewCertificateResponse,
} from '../../src/gen/edgemesh/v1/enroll.ts'
import {
  type HeartbeatRequest,
  HeartbeatResponse,
  HeartbeatServiceService,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { TrustBundle } from '../../src/gen/edgemesh/v1/types.ts'
import type { Authority } from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { checkCsr } from '../../src/identity/csr.ts'
import { statusOf } from '../../src/rpc/status.ts'
import { rootsOf, type Shown, type SmallServer, serveAs, serverCertificate } from './small-server.ts'

export type Kind = NonNullable<HeartbeatResponse['directives'][number]['kind']>

export type Reply = { directives: Kind[] } | { refuse: Fault } | 'end'

/** One heartbeat stream as the server saw it. */
export type SeenStream = {
  shown: X509Certificate
  /** The bundle that each report named. */
  reports: string[]
  acknowledged: number
  ended: 'no' | 'by the server' | 'by the device'
  /** Other streams that were open and had a report acknowledged when the device ended this one. */
  besides: number
  send(directive: Kind): void
  cut(fault: Fault): void
}

export type FleetServer = SmallServer & {
  streams: SeenStream[]
  renewals: { shown: X509Certificate; keySha256: string }[]
  enrollments: { token: string; deviceId: string; keySha256: string }[]
  /** Streams that are open and have had a report acknowledged. */
  open(): SeenStream[]
}

/** So long that nothing but what a test is about happens meanwhile. */
export const reportIntervalMs = 3_600_000

const dayMs = 86_400_000

export async function fleetServer(
  t: Pick<ExecutionContext, 'teardown'>,
  authority: Authority,
  behaviour: {
    /** @param at which stream and which of its reports, from 0 */
    answer?: (at: { stream: number; report: number }) => Reply
    /** Refuses a renewal, or grants it by nothing. */
    renewal?: (attempt: number) => Fault | undefined
    /** Refuses an enrollment, ends it without an answer, or grants it by nothing; `pending` asks for patience. */
    enrollment?: (attempt: number, stream: { pending(): void }) => Promise<Fault | 'end' | undefined>
    bundle?: () => TrustBundle
    clock?: Clock
    /** What the server shows. Default: a certificate that is good. */
    shown?: Shown
    intervalMs?: number
    /** Renewed certificates are due for renewal after so long, by the server's clock. */
    renewAfterMs?: number
  } = {},
): Promise<FleetServer> {
  const { answer = () => ({ directives: [] }), renewal = () => undefined, clock = systemClock } = behaviour
  const { enrollment = async () => undefined } = behaviour
  const { shown = serverCertificate(authority, new Date(clock())) } = behaviour
  const { bundle = () => bundleOf(authority), intervalMs = reportIntervalMs, renewAfterMs = 365 * dayMs } = behaviour
  const streams: SeenStream[] = []
  const renewals: FleetServer['renewals'] = []
  const enrollments: FleetServer['enrollments'] = []
  const open = () => streams.filter(({ acknowledged, ended }) => acknowledged > 0 && ended === 'no')

  function heartbeat(call: ServerDuplexStream<HeartbeatRequest, HeartbeatResponse>): void {
    const at = streams.length
    const seen: SeenStream = {
      shown: server.shownBy(call) as X509Certificate,
      reports: [],
      acknowledged: 0,
      ended: 'no',
      besides: 0,
      send: kind => call.write(HeartbeatResponse.fromPartial({ directives: [{ kind }] })),
      cut(fault) {
        seen.ended = 'by the server'
        call.emit('error', statusOf(fault, undefined, unspread))
      },
    }
    streams.push(seen)
    call.on('data', ({ sequence, trustBundleId }) => {
      if (seen.ended !== 'no') return
      const reply = answer({ stream: at, report: seen.reports.push(trustBundleId) - 1 })
      if (reply === 'end') {
        seen.ended = 'by the server'
        call.end()
      } else if ('refuse' in reply) {
        seen.cut(reply.refuse)
      } else {
        seen.acknowledged += 1
        const directives = reply.directives.map(kind => ({ kind }))
        const times = { nextInterval: durationOf(intervalMs), serverTime: new Date(clock()) }
        call.write(HeartbeatResponse.fromPartial({ acknowledgedSequence: sequence, directives, ...times }))
      }
    })
    call.on('end', () => {
      if (seen.ended === 'no') {
        seen.ended = 'by the device'
        seen.besides = open().length
      }
      call.end()
    })
  }

  function identityFor(spki: Buffer, spiffeId: string): Identity {
    const [, kind, id = ''] = /([a-z]+)\/([^/]+)$/.exec(spiffeId) ?? []
    const leaf = authority.issueLeaf({
      serial: Buffer.from(newSerial(), 'hex'),
      spki,
      spiffeId,
      purpose: 'client',
      commonName: id,
      notBefore: new Date(clock() - dayMs),
      notAfter: new Date(clock() + dayMs),
    })
    return {
      deviceId: kind === 'device' ? id : '',
      spiffeId,
      certificateChainPem: [leaf.pem, ...authority.intermediates],
      trustBundle: bundle(),
      notAfter: leaf.notAfter,
      renewAfter: new Date(clock() + renewAfterMs),
    }
  }

  const serverTime = () => new Date(clock())
  const enroll = {
    getChallenge(_call: unknown, done: sendUnaryData<GetChallengeResponse>) {
      done(null, { challenge: 'c1.0.0', expiresAt: serverTime(), serverTime: serverTime() })
    },
    getTrustBundle(_call: unknown, done: sendUnaryData<GetTrustBundleResponse>) {
      done(null, { trustBundle: bundle(), serverTime: serverTime() })
    },
    async enroll(call: ServerWritableStream<EnrollRequest, EnrollResponse>) {
      const { token, csr, device } = call.request
      const { spki, publicKeySha256 } = checkCsr(csr)
      const deviceId = device?.id || 'alpha'
      const attempt = enrollments.push({ token, deviceId, keySha256: publicKeySha256 }) - 1
      const refusal = await enrollment(attempt, {
        pending: () =>
          call.write({ step: { $case: 'pendingApproval', value: { deviceId } }, serverTime: serverTime() }),
      })
      if (refusal instanceof Fault) {
        call.emit('error', statusOf(refusal, undefined, unspread))
        return
      }
      const value = identityFor(spki, `spiffe://edgemesh.test/device/${deviceId}`)
      if (refusal !== 'end') call.write({ step: { $case: 'identity', value }, serverTime: serverTime() })
      call.end()
    },
    renewCertificate(
      call: ServerUnaryCall<RenewCertificateRequest, RenewCertificateResponse>,
      done: sendUnaryData<RenewCertificateResponse>,
    ) {
      const { spki, publicKeySha256 } = checkCsr(call.request.csr)
      const shown = server.shownBy(call) as X509Certificate
      const refusal = renewal(renewals.push({ shown, keySha256: publicKeySha256 }) - 1)
      if (refusal) return done(statusOf(refusal, undefined, unspread))
      const spiffeId = shown.subjectAltName?.replace('URI:', '') ?? ''
      done(null, { identity: identityFor(spki, spiffeId), serverTime: serverTime() })
    },
  }

  const server = await serveAs(t, shown, [
    [HeartbeatServiceService, { heartbeat }],
    [EnrollServiceService, enroll],
  ])
  return { ...server, streams, renewals, enrollments, open }
}

export function bundleOf(authority: Authority, id = 'first', ...others: Authority[]): TrustBundle {
  return TrustBundle.fromPartial({ rootsPem: [authority, ...others].flatMap(rootsOf), id })
}

export function keySha256(keyPem: string): string {
  return hash('sha256', createPublicKey(keyPem).export({ type: 'spki', format: 'der' }), 'hex')
}

export const unavailable = () => new Fault('UNAVAILABLE', 'DATABASE_UNAVAILABLE', 'not now')
export const unauthenticated = (reason: string) => new Fault('UNAUTHENTICATED', reason, `refused: ${reason}`)

/** So that a test can tell to the millisecond when the agent comes back. */
const unspread = () => 0
