/**
 * EdgeMesh for daemons and services in TypeScript: `import { connect } from 'edgemesh/client'`.
 *
 *     const identity = await enroll({ server: 'edge.example.com:8000', token, device: { id: 'press-7' } })
 *     const client = connect({ server: 'edge.example.com:8000', identity, onIdentity: renewed => saveIdentity('./id', renewed) })
 *
 *     const heartbeat = client.heartbeat({ posture: () => ({ diskEncrypted: true, cpuPercent: 12 }), onEnded: error => exit(error) })
 *     await heartbeat.report()
 *
 *     const authorizations = client.authorizations({ onRevoked: ({ connectionId }) => cut(connectionId) })
 *     const [answer] = await authorizations.ask([{ user: 'ada', service: 'wiki' }])
 *     if (answer?.allowed) open(answer.connectionId)
 *
 *     await client.close()
 *
 * A heartbeat reconnects by itself, with full-jitter backoff, for as long as the identity is good; it renews the certificate,
 * follows changes of the trust bundle, and goes where the server sends it. What is authorized moves along: it is resumed on the
 * next connection, and whoever holds it hears only of what was taken back or could not be resumed in time.
 *
 * One connection carries all of it. A service, which reports nothing, asks with `check`, and shows a certificate that was issued
 * anew with `use`.
 */
import type { Channel } from '@grpc/grpc-js'
import { systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { HeartbeatResponse } from '../gen/edgemesh/v1/heartbeat.ts'
import { type DeviceDescription, DeviceType, type Posture, type Reason } from '../gen/edgemesh/v1/types.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import { type Authorizations, type EndedConnection, keepAuthorizations, type Target } from './authorizations.ts'
import { type Answer, type AskedQuestion, check } from './authorize-stream.ts'
import { type DescribedError, openChannel, type Server } from './channel.ts'
import { createKey } from './csr.ts'
import { type DeviceCredentials, enrollDevice, renewCredentials } from './enroll.ts'
import { asEdgeMeshError, EdgeMeshError, withTypedErrors } from './error.ts'
import type { ReportingEvent } from './events.ts'
import { givenIdentity, readIdentity } from './given-identity.ts'
import type { IssuedIdentity } from './issued-identity.ts'
import { type Reporting, startReporting } from './reporting.ts'
import { comparingClocks } from './server-clock.ts'
import { loadState, saveState } from './state.ts'

export {
  type Answer,
  type AskedQuestion,
  createKey,
  type DescribedError,
  type DeviceDescription,
  DeviceType,
  EdgeMeshError,
  type EndedConnection,
  type HeartbeatResponse,
  type Posture,
  type Reason,
  type ReportingEvent,
  readIdentity,
  type Server,
}

/** Who a client is: a device, an operator or a service. PEM, with what is known of it. The key is for this holder alone. */
export type Identity = IssuedIdentity

/** A device's, as `enroll` gives it and `saveIdentity` keeps it. */
export type DeviceIdentity = DeviceCredentials

export type Client = {
  /** Who the client is now. */
  identity(): Identity
  /**
   * Asks whether a user may reach a service, once: nothing is held by the answer, and nothing of it is taken back.
   *
   * @param options.deviceId the device that is asked about; operators and services name it, devices ask about themselves
   * @param options.userAssertion a JWT of the users' issuer, where the server wants one
   * @param options.timeoutMs default 10,000
   * @throws EdgeMeshError where there is no decision: take it as a no
   */
  check(
    question: AskedQuestion,
    options?: { deviceId?: string; userAssertion?: string; timeoutMs?: number },
  ): Promise<Answer>
  /** Starts to report how this device is. One at a time. @throws EdgeMeshError NOT_A_DEVICE, HEARTBEAT_RUNNING */
  heartbeat(options: HeartbeatOptions): Heartbeat
  /**
   * Asks for connections, and holds those that are allowed until they are closed or taken back. Devices only.
   *
   * @param options.onRevoked cut the connection now; the server is told when what it returns has resolved. `reasons` say why; the
   *   code `NOT_RESUMED` among them: no server could be reached for longer than a connection outlives its stream
   */
  authorizations(options: { onRevoked: (ended: EndedConnection) => void | Promise<void> }): ClientAuthorizations
  /** A new certificate for a new key, now; a heartbeat does so by itself in time. Devices and operators. */
  renew(): Promise<Identity>
  /** Shows this identity from now on; what is held moves to a connection that shows it. */
  use(identity: Identity): Promise<void>
  /** Ends everything: the heartbeat, what is held, the connection. */
  close(): Promise<void>
}

export type HeartbeatOptions = {
  /**
   * Measures the device, for each report. What is absent was not measured. Where it throws, the heartbeat ends with what it threw;
   * whoever can't measure for a while better returns the last with its `measuredAt`.
   */
  posture: () => Partial<Posture> | Promise<Partial<Posture>>
  /** What happens, as it happens, for a log: reports, reconnections with their delay, renewals, quarantine. */
  onEvent?: (event: ReportingEvent) => void
  /**
   * There will be no more reports, and only a person can help: the device was revoked or deleted, or was away for so long that
   * it has to enroll anew. An EdgeMeshError, or what `posture` threw. Not called where the client was closed.
   */
  onEnded: (error: Error) => void
}

export type Heartbeat = {
  /**
   * Measures and reports now, because something has changed. Resolves when the server has it, however often the connection has to
   * be made anew before; `failingPosture` in what it resolves to names what of the posture misses the requirements.
   *
   * @throws EdgeMeshError when the heartbeat has ended
   */
  report(): Promise<HeartbeatResponse>
  /** Stops reporting. The device counts as offline then, and its health turns stale. */
  close(): Promise<void>
}

export type ClientAuthorizations = {
  /**
   * Asks, any number at once. Answers in the order of the questions; one that is allowed is held from then on, under its
   * `connectionId`. What could not be decided is denied with the reason of the outage and `retryAfter`.
   *
   * @param userAssertion a JWT of the user's issuer: connections end with it unless `renew` brings a fresh one
   * @throws EdgeMeshError when there is no server to ask, or it was lost meanwhile: ask again
   */
  ask(questions: AskedQuestion[], userAssertion?: string): Promise<Answer[]>
  /** Holds connections beyond the end of their assertion by a fresh one. Answers for those that are still held. */
  renew(connectionIds: string[], userAssertion?: string): Promise<Answer[]>
  /** These connections have ended on this side. */
  closeConnections(connectionIds: string[]): Promise<void>
  /** The ids of what is held. */
  held(): string[]
  /** Ends all of it. */
  close(): Promise<void>
}

/**
 * Redeems an enrollment token, once: the key is made here and stays here, the server is authenticated by the token.
 *
 * A call whose answer was lost is repeated with the same token and the same `keyPem`, and gives the same device: whoever wants to
 * survive a crash keeps a key of `createKey` before calling.
 *
 * @param options.device how the device describes itself; without an id the server chooses one
 * @param options.keyPem a P-256 key, PKCS#8 in PEM. Default: a new one
 * @param options.onPendingApproval the token asks for an operator's approval; the promise stays pending until one decides. Called
 *   again and again
 * @param options.signal gives up waiting
 * @throws EdgeMeshError with the reason of the server, such as `TOKEN_EXPIRED`, or `SERVER_NOT_PINNED`
 */
export function enroll(options: {
  server: Server
  token: string
  device?: Partial<DeviceDescription>
  keyPem?: string
  onPendingApproval?: (deviceId: string) => void
  signal?: AbortSignal
}): Promise<DeviceIdentity> {
  return withTypedErrors(() => enrollDevice({ device: {}, ...options }))
}

/** An identity from PEM texts. @throws EdgeMeshError INVALID_ARGUMENT with the field that is wrong */
export function identityFromPem(pem: { key: string; certificate: string; bundle: string }): Identity {
  try {
    return givenIdentity(pem)
  } catch (failure) {
    throw asEdgeMeshError(failure)
  }
}

/** What `saveIdentity` has kept in the folder, or nothing if it holds none. @throws EdgeMeshError STATE_BROKEN */
export function loadIdentity(folder: string): Promise<DeviceIdentity | undefined> {
  return withTypedErrors(() => loadState(folder))
}

/** Keeps an identity in a folder, the key readable by its owner alone, whole whatever the moment of a crash. */
export function saveIdentity(folder: string, identity: DeviceIdentity): Promise<void> {
  return withTypedErrors(() => saveState(folder, identity))
}

/**
 * A client of `server`. No connection is made before it is needed.
 *
 * @param options.onIdentity a device's identity was renewed, or trusts other roots: keep it. Where it rejects, it is called again
 * @throws EdgeMeshError INVALID_ARGUMENT when `server` is not `host:port`
 */
export function connect({
  server,
  identity: first,
  onIdentity = () => {},
}: {
  /** `host:port`, such as `edge.example.com:8000`. */
  server: Server
  identity: Identity
  onIdentity?: (identity: DeviceIdentity) => void | Promise<void>
}): Client {
  let identity = first
  /** The connection of the heartbeat's session, while there is one. */
  let shared: Target | undefined
  /** The client's own, while there is none. */
  let own: Channel | undefined
  let heart: { reporting: Reporting; stop: AbortController } | undefined
  const kept = new Set<Authorizations>()
  let closed = false

  // Here, so that who calls hears of a wrong address at once.
  own = openedBy(identity)

  function openedBy(shown: Identity): Channel {
    try {
      return openChannel(server, shown)
    } catch (failure) {
      throw asEdgeMeshError(failure)
    }
  }

  function target(): Target & { channel: Channel } {
    if (shared?.channel) return { ...shared, channel: shared.channel }
    own ??= openedBy(identity)
    return { server, credentials: identity, channel: own }
  }

  /** What is held moves to another connection; the client's own, if it was on that, is closed then. */
  async function moveAll(to: Target, nextOwn?: Channel): Promise<void> {
    const before = own === nextOwn ? undefined : own
    own = nextOwn
    await Promise.all([...kept].map(authorizations => authorizations.moveTo(to)))
    before?.close()
  }

  function demandOpen(): void {
    if (closed) throw asEdgeMeshError(clientClosed())
  }

  async function use(next: Identity): Promise<void> {
    demandOpen()
    const device = heart && deviceIdentity(next)
    const channel = shared ? undefined : openedBy(next)
    identity = next
    // The session's connection is replaced by the next session's.
    if (device) heart?.reporting.use(device)
    if (channel) await moveAll({ server, credentials: next, channel }, channel)
  }

  function startHeart({ posture, onEvent = () => {}, onEnded }: HeartbeatOptions): Heartbeat {
    demandOpen()
    const device = deviceIdentity(identity)
    if (heart) throw asEdgeMeshError(heartbeatRunning())
    const stop = new AbortController()
    const keep = async (changed: DeviceIdentity) => {
      identity = changed
      await onIdentity(changed)
    }
    const reporting = startReporting({
      server,
      credentials: device,
      posture: async () => posture(),
      openConnectionIds: () =>
        [...kept].flatMap(authorizations => authorizations.held()).slice(0, openConnectionIdsMax),
      keeper: { keyForRenewal: async () => createKey(), save: keep, saveTrust: keep },
      log: onEvent,
      signal: stop.signal,
      async connected(next) {
        shared = next
        await moveAll(next)
      },
      disconnected: leaveShared,
    })
    const started = { reporting, stop }
    heart = started
    reporting.ended.catch(failure => onEnded(asEdgeMeshError(failure) as Error)).finally(() => endHeart(started))
    return {
      report: () => withTypedErrors(() => reporting.report()),
      async close() {
        stop.abort()
        await reporting.ended.catch(() => {})
        endHeart(started)
      },
    }
  }

  /** Until the next session, what is held is resumed on the client's own connection, which makes its own attempts. */
  function leaveShared(): void {
    if (!shared) return
    shared = undefined
    if (kept.size === 0 || closed) return
    const to = target()
    void moveAll(to, to.channel)
  }

  function endHeart(which: typeof heart): void {
    if (heart !== which) return
    heart = undefined
    leaveShared()
  }

  return {
    identity: () => identity,

    check: (question, options = {}) =>
      withTypedErrors(() => {
        demandOpen()
        return comparingClocks(server, check({ ...target(), question, ...options }), systemClock)
      }),

    heartbeat: startHeart,

    authorizations({ onRevoked }) {
      demandOpen()
      const authorizations = keepAuthorizations({ ...target(), onEnded: onRevoked })
      kept.add(authorizations)
      return {
        held: authorizations.held,
        ask: (questions, assertion) => withTypedErrors(() => authorizations.ask(questions, assertion)),
        renew: (ids, assertion) => withTypedErrors(() => authorizations.renew(ids, assertion)),
        closeConnections: ids => withTypedErrors(() => authorizations.closeConnections(ids)),
        async close() {
          kept.delete(authorizations)
          await withTypedErrors(() => authorizations.close())
        },
      }
    },

    renew: () =>
      withTypedErrors(async () => {
        demandOpen()
        const { channel } = target()
        const renewed = await renewCredentials(server, identity, { channel })
        if (parseSpiffeId(renewed.spiffeId)?.kind === 'device') await onIdentity(deviceIdentity(renewed))
        await use(renewed)
        return renewed
      }),

    use,

    async close() {
      closed = true
      await Promise.all([...kept].map(authorizations => authorizations.close()))
      kept.clear()
      heart?.stop.abort()
      await heart?.reporting.ended.catch(() => {})
      own?.close()
      own = undefined
    },
  }
}

/** What a heartbeat may name: the bound of the wire. */
const openConnectionIdsMax = 1_024

/** @throws EdgeMeshError NOT_A_DEVICE */
function deviceIdentity(identity: Identity & Partial<DeviceIdentity>): DeviceIdentity {
  const named = parseSpiffeId(identity.spiffeId)
  if (named?.kind !== 'device') throw asEdgeMeshError(notADevice(identity.spiffeId))
  return { tokenId: '', ...identity, deviceId: named.id }
}

function notADevice(spiffeId: string): Fault {
  const message = `${spiffeId} is no device: only devices report their health; ask with check`
  return new Fault('FAILED_PRECONDITION', 'NOT_A_DEVICE', message)
}

function heartbeatRunning(): Fault {
  return new Fault(
    'FAILED_PRECONDITION',
    'HEARTBEAT_RUNNING',
    'the client reports already: close that heartbeat before',
  )
}

function clientClosed(): Fault {
  return new Fault('FAILED_PRECONDITION', 'CLIENT_CLOSED', 'the client has been closed: make another with connect')
}
