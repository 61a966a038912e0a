/** Enrolling until there is an identity or a refusal that no repetition helps. */
import { describeCallError, isCallError, type Server } from '../client/channel.ts'
import { type DeviceCredentials, enrollDevice, isFinal } from '../client/enroll.ts'
import { keyForEnrollment, saveState } from '../client/state.ts'
import { backoffDelayMs, type Timer } from '../client/waiting.ts'
import type { Clock } from '../clock.ts'
import type { DeviceDescription } from '../gen/edgemesh/v1/types.ts'
import type { AgentEvent } from './events.ts'

/** A stream on which the server has asked for patience so often has lived: what failed before it is forgotten. */
const pendingSettled = 2

/**
 * Enrolls, and keeps the identity. Each attempt has the same key, so that the server sees one device, and one that waits
 * for approval goes on waiting.
 *
 * @returns nothing when `signal` is aborted before
 * @throws Fault or ServiceError that is final
 */
export async function keepEnrolling(
  options: {
    server: Server
    stateDirectory: string
    token: string
    log: (event: AgentEvent) => void
    signal: AbortSignal
    clock: Clock
    timer: Timer
    random: () => number
  },
  device: Partial<DeviceDescription>,
): Promise<DeviceCredentials | undefined> {
  const { server, stateDirectory, token, log, signal, clock, timer, random } = options
  const keyPem = await keyForEnrollment(stateDirectory)
  let told = false
  let failures = 0
  while (!signal.aborted) {
    let pending = 0
    const onPendingApproval = (deviceId: string) => {
      if (!told) log({ event: 'pending-approval', deviceId })
      told = true
      pending += 1
      if (pending === pendingSettled) failures = 0
    }
    log({ event: 'enrolling', server })
    try {
      const credentials = await enrollDevice({ server, token, device, keyPem, signal, onPendingApproval, clock })
      await saveState(stateDirectory, credentials)
      const { deviceId, spiffeId, notAfter } = credentials
      log({ event: 'enrolled', deviceId, spiffeId, notAfter })
      return credentials
    } catch (failure) {
      if (signal.aborted) return undefined
      const error = describeCallError(failure, clock)
      if (!isCallError(failure) || isFinal(error)) throw failure
      const retryInMs = backoffDelayMs(failures, random, error.retryAfterMs)
      failures += 1
      log({ event: 'disconnected', error, retryInMs })
      await timer.sleep(retryInMs, signal)
    }
  }
  return undefined
}
