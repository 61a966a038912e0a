/**
 * Who is calling, read once per connection from the verified client certificate, never from a message.
 *
 * `rpc/peer.ts` makes these; every handler receives one inside its `Call`.
 */
export type Caller = Anonymous | Identified

/** No client certificate: may call Enroll, GetTrustBundle and health, nothing else. */
export type Anonymous = { kind: 'anonymous' }

export type Identified = {
  kind: 'device' | 'operator' | 'service'
  /** Last segment of the SPIFFE ID: the device's id, the operator's or the service's name. */
  id: string
  spiffeId: string
  /** Key identifier of the authority that issued the certificate, lower-case hex. */
  issuerKeyId: string
  /** The certificate's serial number, lower-case hex without leading zeros' loss: 32 characters. */
  serial: string
  /** Start of the certificate's validity, ms since epoch: a little before it was issued. */
  notBefore: number
  /** End of the certificate's validity, ms since epoch. */
  notAfter: number
  /** The operator's role, from the certificate's subject OU; the empty string for devices and services. */
  role: string
  /** SHA-256 of the certificate's SubjectPublicKeyInfo, lower-case hex. */
  publicKeySha256: string
}

/** One RPC under way: who calls, from where, and until when it is of interest. */
export type Call = {
  caller: Caller
  /** Source IP address, without the port. */
  address: string
  /** Full method name, such as `/edgemesh.v1.EnrollService/Enroll`. */
  method: string
  /** When the call began, ms since epoch. */
  startedAt: number
  /** The instance that serves it. */
  instanceId: string
  /** How far the caller's clock is ahead of ours, by what it said last; absent: it has said nothing of it. */
  clockOffsetMs?: number | undefined
  /** Aborted when the caller has gone, the deadline has passed or the server cuts the call. */
  signal: AbortSignal
  /** What the audit event of this call will say beyond who, what and when. Handlers fill it in. */
  audit: CallAudit
}

export type CallAudit = {
  /** What the call acted on, such as `device/alpha`. */
  target: string
  /** Small facts worth keeping. Never a secret. */
  detail: Record<string, unknown>
  /** True once a transaction of the call has written the event itself. */
  written: boolean
  /** Absent where no journal runs. */
  own?: OwnEvents
}

/** The journal's part in events that transactions of the call write themselves: it vouches for them, then seals them. */
export type OwnEvents = {
  /** @returns what goes into the event's column `mac` */
  vouch(row: readonly unknown[]): string
  committed(): void
  rolledBack(): void
}

/** The caller's name in audit events and logs: its SPIFFE ID, or `anonymous`. */
export function callerName(caller: Caller): string {
  return caller.kind === 'anonymous' ? 'anonymous' : caller.spiffeId
}
