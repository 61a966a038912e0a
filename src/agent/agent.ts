/**
 * The edge daemon: enrolls once, then says how its host is for as long as it runs.
 *
 *     await runAgent({ server: 'localhost:8000', stateDirectory: '/var/lib/edgemesh', token, device: { id: 'alpha' },
 *       posture: hostPosture(), log: event => console.log(event), signal: stopping.signal })
 *
 * Its states, each with what leads out of it:
 *
 *     enrolling   no identity is kept yet. The identity arrives → reporting; an operator has to approve it → stays,
 *                 asking again with the same key when the stream breaks; the token is refused → failed.
 *     reporting   what every client does that holds a heartbeat stream: `client/reporting.ts` has the states of it. The
 *                 server has ended this identity: there is a token that is new → enrolling; else → failed.
 *     failed      the promise rejects with the reason; only a person can help.
 *     stopped     `signal` was aborted: the session is ended in order, and the promise resolves.
 *
 * An identity that is lost (deleted, its certificate or its authority retired, too long away) is not taken up again by
 * the token that it came from: that would undo in a second what an operator has done, and again with each restart. A
 * token with another id is a person's word that the device may come in once more, so with that it enrolls again, with
 * the same key and under the same id. Its id is kept then, and it will not be used for a third time. The server takes
 * nobody in whose certificate has expired before an operator has deleted the device, nor one that was revoked at all.
 */
import type { Server } from '../client/channel.ts'
import type { DeviceCredentials } from '../client/enroll.ts'
import { pinnedTrustBundle } from '../client/first-contact.ts'
import { type Reentry, type ReportingOptions, startReporting } from '../client/reporting.ts'
import { keyForRenewal, loadState, saveState, saveTrust } from '../client/state.ts'
import { systemTimer } from '../client/waiting.ts'
import { systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { DeviceDescription, Posture } from '../gen/edgemesh/v1/types.ts'
import { parseToken } from '../identity/token-text.ts'
import { keepEnrolling } from './enrolling.ts'
import type { AgentEvent } from './events.ts'

export type AgentOptions = Pick<ReportingOptions, 'connected' | 'clock' | 'timer' | 'random'> & {
  server: Server
  /** Where the identity is kept; see `client/state.ts`. */
  stateDirectory: string
  /** Needed until the device is enrolled. */
  token?: string
  device: Partial<DeviceDescription>
  posture: () => Promise<Partial<Posture>>
  log: (event: AgentEvent) => void
  signal: AbortSignal
}

type Settled = Required<Omit<AgentOptions, 'connected'>> & Pick<AgentOptions, 'connected'>

/**
 * Runs until `signal` is aborted.
 *
 * @throws Fault or ServiceError when the device can't be enrolled, or is no longer who it was
 */
export async function runAgent(options: AgentOptions): Promise<void> {
  const { clock = systemClock, timer = systemTimer, random = Math.random, token = '' } = options
  const settled = { ...options, token, clock, timer, random }
  const credentials = await identify(settled)
  if (credentials) {
    const { stateDirectory } = options
    await startReporting({
      ...settled,
      credentials,
      keeper: {
        keyForRenewal: () => keyForRenewal(stateDirectory),
        save: renewed => saveState(stateDirectory, renewed),
        saveTrust: trusting => saveTrust(stateDirectory, trusting),
      },
      reentry: byToken(settled),
    }).ended
  }
  options.log({ event: 'stopped' })
}

/** The identity that was kept, or a new one; nothing when the agent is stopped before. */
async function identify(options: Settled): Promise<DeviceCredentials | undefined> {
  const { stateDirectory, token, device, log } = options
  const kept = await loadState(stateDirectory)
  if (kept) {
    log({ event: 'resumed', deviceId: kept.deviceId, spiffeId: kept.spiffeId, notAfter: kept.notAfter })
    return kept
  }
  if (token === '') throw tokenMissing(stateDirectory)
  return keepEnrolling(options, device)
}

/** A new token lets a device in again whose identity is lost. See the head of this file. */
function byToken(options: Settled): Reentry {
  const { server, token, device } = options
  const isOpenTo = ({ tokenId }: DeviceCredentials) =>
    token !== '' && tokenId !== '' && parseToken(token).id !== tokenId
  return {
    isOpenTo,

    async vouchesForServer(lost) {
      try {
        if (!isOpenTo(lost)) return false
        await pinnedTrustBundle({ server, rootKeySha256: parseToken(token).rootKeySha256 })
        return true
      } catch {
        return false // it is for another server, or somebody is in the middle: the identity that there is stays
      }
    },

    enter: ({ deviceId }) => keepEnrolling(options, { id: deviceId, ...device }),
  }
}

function tokenMissing(directory: string): Fault {
  const message = `${directory} holds no identity, and there is no token to enroll with: have an operator make one`
  return new Fault('FAILED_PRECONDITION', 'TOKEN_MISSING', message)
}
