/** A device that a server has let in, by the calls that a real one makes, with a user and a service that it may reach. */
import { credentials } from '@grpc/grpc-js'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import {
  AdminServiceClient,
  CreateEnrollmentTokenRequest,
  type CreateEnrollmentTokenResponse,
  type GetPolicyStateResponse,
  type PolicyData,
} from '../../src/gen/edgemesh/v1/admin.ts'
import {
  type EnrollResponse,
  EnrollServiceClient,
  type GetChallengeResponse,
} from '../../src/gen/edgemesh/v1/enroll.ts'
import {
  HeartbeatRequest,
  type HeartbeatResponse,
  HeartbeatServiceClient,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { DeviceDescription } from '../../src/gen/edgemesh/v1/types.ts'
import { healthy } from '../support/healthy.ts'
import type { Served } from './served.ts'

/** PEM. */
export type Identity = { rootsPem: string; certificatePem: string; keyPem: string }

export type EnrolledDevice = Identity & {
  user: string
  /** Ends its heartbeat stream. */
  stop(): void
}

/** Node takes no IP address as TLS server name; and each client has a connection of its own. */
export const channelOptions = {
  'grpc.ssl_target_name_override': 'localhost',
  'grpc.default_authority': 'localhost',
  'grpc.use_local_subchannel_pool': 1,
}

export function channelOf({ rootsPem, keyPem, certificatePem }: Identity) {
  return credentials.createSsl(Buffer.from(rootsPem), Buffer.from(keyPem), Buffer.from(certificatePem))
}

/** At any hour, for as long as its first report is fresh. */
export async function enrollDevice(served: Served, services: readonly string[]): Promise<EnrolledDevice> {
  const user = 'bench'
  const tokenText = await setUp(served, user, services)
  const device = await enroll(served, tokenText)
  const client = new HeartbeatServiceClient(served.address, channelOf(device), channelOptions)
  const stream = client.heartbeat()
  await new Promise<void>((resolve, reject) => {
    stream.on('error', reject)
    stream.once('data', (_: HeartbeatResponse) => resolve())
    stream.write(HeartbeatRequest.fromPartial({ sequence: 1, posture: healthy }))
  })
  return {
    ...device,
    user,
    stop() {
      stream.end()
      client.close()
    },
  }
}

/** @returns a token to enroll with */
async function setUp(served: Served, user: string, services: readonly string[]): Promise<string> {
  const keyPem = createKey()
  const certificatePem = await served.operatorCertificate(signingRequestFor(keyPem))
  const channel = channelOf({ rootsPem: served.rootsPem, keyPem, certificatePem })
  const admin = new AdminServiceClient(served.address, channel, channelOptions)
  try {
    const role = 'developer'
    await answered<unknown>(done => admin.createUser({ id: user, email: 'bench@example.com', name: '', role }, done))
    for (const id of services) {
      await answered<unknown>(done => admin.createService({ id, name: '', labels: {}, owner: '', roles: [role] }, done))
    }
    const { data } = await answered<GetPolicyStateResponse>(done => admin.getPolicyState({}, done))
    const atAnyHour: PolicyData = { requirements: data?.requirements, hours: undefined }
    await answered<unknown>(done => admin.updatePolicyData({ data: atAnyHour }, done))
    const token = CreateEnrollmentTokenRequest.fromPartial({ usesMax: 1 })
    const { tokenText } = await answered<CreateEnrollmentTokenResponse>(done =>
      admin.createEnrollmentToken(token, done),
    )
    return tokenText
  } finally {
    admin.close()
  }
}

async function enroll({ address, rootsPem }: Served, token: string): Promise<Identity> {
  const client = new EnrollServiceClient(address, credentials.createSsl(Buffer.from(rootsPem)), channelOptions)
  try {
    const keyPem = createKey()
    const { challenge } = await answered<GetChallengeResponse>(done => client.getChallenge({}, done))
    const csr = signingRequestFor(keyPem, challenge)
    const device = DeviceDescription.fromPartial({ os: 'linux', osVersion: '6.12', type: 1 })
    return await new Promise<Identity>((resolve, reject) => {
      const call = client.enroll({ token, csr, device, sentAt: new Date() })
      call.on('error', reject)
      call.on('data', ({ step }: EnrollResponse) => {
        if (step?.$case !== 'identity') return
        resolve({ rootsPem, keyPem, certificatePem: step.value.certificateChainPem.join('') })
      })
      call.on('end', () => reject(new Error('the call has ended without an identity')))
    })
  } finally {
    client.close()
  }
}

export function answered<Answer>(call: (done: (error: Error | null, answer: Answer) => void) => void): Promise<Answer> {
  return new Promise((resolve, reject) => call((error, answer) => (error ? reject(error) : resolve(answer))))
}
