/** A device as tests drive it: its heartbeat stream and its authorize stream, with everything that arrives kept. */
import type { ClientDuplexStream, ServiceError } from '@grpc/grpc-js'
import type { ExecutionContext } from 'ava'
import type {
  Answer,
  AuthorizeRequest,
  AuthorizeResponse,
  ConnectionRevoked,
} from '../../src/gen/edgemesh/v1/authorize.ts'
import type { HeartbeatRequest, HeartbeatResponse } from '../../src/gen/edgemesh/v1/heartbeat.ts'
import type { Posture } from '../../src/gen/edgemesh/v1/types.ts'
import { type Credentials, type EdgeMesh, eventually, type Refusal, refusal } from './edgemesh.ts'

export type HeartbeatClient = {
  /** Sends a message and waits until it is acknowledged. */
  beat(posture?: Partial<Posture>): Promise<HeartbeatResponse>
  send(request: Partial<HeartbeatRequest>): void
  responses: HeartbeatResponse[]
  /** How the stream ended, once it has. */
  ended: Promise<Refusal | undefined>
  end(): void
}

export function heartbeats(t: ExecutionContext, mesh: Pick<EdgeMesh, 'clients'>, device: Credentials): HeartbeatClient {
  const stream: ClientDuplexStream<HeartbeatRequest, HeartbeatResponse> = mesh.clients(device).heartbeat.heartbeat()
  const responses: HeartbeatResponse[] = []
  const ended = ending(stream)
  let sequence = 0
  stream.on('data', response => responses.push(response))
  t.teardown(() => stream.cancel())
  const send = (request: Partial<HeartbeatRequest>) =>
    stream.write({
      sequence: ++sequence,
      posture: undefined,
      openConnectionIds: [],
      sentAt: new Date(),
      trustBundleId: '',
      ...request,
    })
  return {
    responses,
    ended,
    send,
    async beat(posture) {
      send({ posture: posture && ({ attributes: {}, measuredAt: undefined, ...posture } as Posture) })
      const wanted = sequence
      const failed = ended.then(end => {
        throw new Error(`the heartbeat stream ended: ${JSON.stringify(end)}`)
      })
      const acknowledged = eventually(`acknowledgement of heartbeat ${wanted}`, () =>
        responses.find(response => response.acknowledgedSequence >= wanted),
      )
      return Promise.race([acknowledged, failed])
    },
    end: () => stream.end(),
  }
}

export type AuthorizeClient = {
  ask(user: string, service: string, action?: string, userAssertion?: string): Promise<Answer>
  send(kind: NonNullable<AuthorizeRequest['kind']>): void
  responses: AuthorizeResponse[]
  revoked: ConnectionRevoked[]
  /** Waits for the revocation of a connection. */
  revocationOf(connectionId: string): Promise<ConnectionRevoked>
  /** Asks to hold connections of another stream here; the answers in the order of the ids. */
  resume(connectionIds: string[], userAssertion?: string): Promise<Answer[]>
  ended: Promise<Refusal | undefined>
  end(): void
}

export function authorizations(
  t: ExecutionContext,
  mesh: Pick<EdgeMesh, 'clients'>,
  device: Credentials,
): AuthorizeClient {
  const stream: ClientDuplexStream<AuthorizeRequest, AuthorizeResponse> = mesh.clients(device).authorize.authorize()
  const responses: AuthorizeResponse[] = []
  const revoked: ConnectionRevoked[] = []
  const answers = new Map<string, Answer>()
  const ended = ending(stream)
  let questions = 0
  stream.on('data', (response: AuthorizeResponse) => {
    responses.push(response)
    if (response.kind?.$case === 'revoked') revoked.push(response.kind.value)
    if (response.kind?.$case === 'answers')
      for (const answer of response.kind.value.answers) answers.set(answer.questionId, answer)
  })
  t.teardown(() => stream.cancel())
  return {
    responses,
    revoked,
    ended,
    send: kind => void stream.write({ kind }),
    async ask(user, service, action = '', userAssertion) {
      const id = `q${++questions}`
      const value = { questions: [{ id, user, service, action }], userAssertion }
      stream.write({ kind: { $case: 'questions', value } })
      const failed = ended.then(end => {
        throw new Error(`the authorize stream ended: ${JSON.stringify(end)}`)
      })
      return Promise.race([eventually(`the answer to ${id}`, () => answers.get(id)), failed])
    },
    revocationOf: id =>
      eventually(`the revocation of ${id}`, () => revoked.find(revocation => revocation.connectionId === id)),
    async resume(connectionIds, userAssertion) {
      const before = responses.length
      stream.write({ kind: { $case: 'resume', value: { connectionIds, userAssertion } } })
      const failed = ended.then(end => {
        throw new Error(`the authorize stream ended: ${JSON.stringify(end)}`)
      })
      const answered = eventually(`the answer to the resumption of ${connectionIds}`, () =>
        responses
          .slice(before)
          .map(({ kind }) => (kind?.$case === 'answers' ? kind.value.answers : []))
          .find(({ length }) => length === connectionIds.length),
      )
      return Promise.race([answered, failed])
    },
    end: () => stream.end(),
  }
}

function ending(stream: { on(event: 'error' | 'end', listener: (error: ServiceError) => void): unknown }) {
  const ended = new Promise<Refusal | undefined>(resolve => {
    stream.on('error', error => resolve(refusal(error)))
    stream.on('end', () => resolve(undefined))
  })
  return ended
}

/** How a stream ends that has to. */
export async function endOf({ ended }: { ended: Promise<Refusal | undefined> }): Promise<Refusal | undefined> {
  let end: { how: Refusal | undefined } | undefined
  ended.then(how => {
    end = { how }
  })
  return (await eventually('the end of the stream', () => end)).how
}
