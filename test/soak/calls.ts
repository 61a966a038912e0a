/** Calls on instances that may be killed at any moment, and what may come of them. */
import { Metadata } from '@grpc/grpc-js'
import {
  answerOf,
  type Credentials,
  clientTarget,
  type DescribedError,
  describeCallError,
  openChannel,
} from '../../src/client/channel.ts'
import { AdminServiceClient } from '../../src/gen/edgemesh/v1/admin.ts'
import type { Findings } from './findings.ts'
import type { Instance } from './instance.ts'

/** What a user may be told while something is broken; all else is a fault of the service whatever happens to it. */
const outages = new Set(['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED'])

const deadlineMs = 20_000

/**
 * @param expected reasons or codes that what was asked may well be answered with
 * @returns what went wrong, described
 */
export function judgeFailure(
  failure: unknown,
  {
    what,
    instance,
    sinceMs,
    findings,
    expected = [],
  }: { what: string; instance: Instance; sinceMs: number; findings: Findings; expected?: readonly string[] },
): DescribedError {
  const error = describeCallError(failure)
  if (expected.includes(error.reason) || expected.includes(error.code)) return error
  const said = `${what} at ${instance.name}: ${error.code} ${error.reason}: ${error.message}`
  if (!outages.has(error.code)) findings.broken('no error comes that a user must not see', said)
  else if (instance.wasCalm(sinceMs, Date.now())) findings.broken('an instance that is left in peace answers', said)
  return error
}

type Admin = InstanceType<typeof AdminServiceClient>
type Method = {
  [M in keyof Admin]: Admin[M] extends (request: never, done: never) => unknown ? M : never
}[keyof Admin]

export type AdminCaller = {
  /** @throws ServiceError */
  call<Response>(instance: Instance, method: string, request: unknown): Promise<Response>
  close(): void
}

/** An operator's calls, over one connection to each instance. */
export function createAdminCaller(operator: Credentials): AdminCaller {
  const clients = new Map<string, { admin: Admin; close(): void }>()
  return {
    call(instance, method, request) {
      let client = clients.get(instance.address)
      if (!client) {
        const channel = openChannel(instance.address, operator)
        const target = clientTarget(instance.address, operator, channel)
        const admin = new AdminServiceClient(target.address, target.credentials, target.options)
        client = { admin, close: () => channel.close() }
        clients.set(instance.address, client)
      }
      const { admin } = client
      return answerOf(done => {
        const start = (admin[method as Method] as (...args: unknown[]) => unknown).bind(admin)
        return start(request, new Metadata(), { deadline: Date.now() + deadlineMs }, done)
      })
    },
    close() {
      for (const { close } of clients.values()) close()
    },
  }
}
