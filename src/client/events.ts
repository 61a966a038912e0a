/** What happens to a device that reports, as it happens. */
import type { Posture } from '../gen/edgemesh/v1/types.ts'
import type { DescribedError, Server } from './channel.ts'

export type ReportingEvent =
  | { event: 'connecting'; server: Server }
  /** The server has acknowledged a report: what it rests on, what of it fails, when the next is due. */
  | { event: 'reported'; posture: Partial<Posture>; failingPosture: string[]; nextInMs: number }
  | { event: 'renewed'; notAfter: Date }
  | { event: 'renewal-failed'; error: DescribedError; retryInMs: number }
  | { event: 'trust-bundle-changed'; trustBundleId: string }
  /** A bundle could not be used or kept. What was trusted before is trusted still. */
  | { event: 'trust-bundle-refused'; error: DescribedError }
  | { event: 'policy-changed'; revision: string }
  | { event: 'quarantined'; reason: string }
  | { event: 'released' }
  /** The server wants the device elsewhere. */
  | { event: 'reconnecting'; delayMs: number }
  /** The next session could not be opened; the one before is still there. */
  | { event: 'reconnection-failed'; error: DescribedError; retryInMs: number }
  /** There is no session. */
  | { event: 'disconnected'; error: DescribedError; retryInMs: number }
  | { event: 'certificate-expired'; error: DescribedError }
  /** It has expired, and an operator has to let the device in again. Told once. */
  | { event: 'recovery-pending'; error: DescribedError; retryInMs: number }
  | { event: 'recovered'; notAfter: Date }
  /** The server has ended the identity; the token at hand is another, and is used now. */
  | { event: 'identity-lost'; error: DescribedError }
  /** How far this host's clock is ahead of the server's, or behind where negative. Told when it goes wrong. */
  | { event: 'clock-wrong'; offsetMs: number }
  | { event: 'clock-right' }
  /** The identity is good and in use, but the folder does not take it. */
  | { event: 'state-unsaved'; error: DescribedError; retryInMs: number }
