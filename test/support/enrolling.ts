/** An Enroll call as tests drive it: its stream, with everything that arrives kept. */
import type { ExecutionContext } from 'ava'
import type { EnrollResponse, EnrollServiceClient, Identity } from '../../src/gen/edgemesh/v1/enroll.ts'
import { endOf } from './device.ts'
import { callEnroll, type EnrollAttempt, eventually, type Refusal, refusal } from './edgemesh.ts'

export type EnrollCall = {
  responses: EnrollResponse[]
  /** Waits until the device is told that it waits. @returns its id */
  pending(): Promise<string>
  /** Waits for the identity, which ends the stream. */
  identity(): Promise<Identity>
  /** Waits for the first answer: that it waits, the identity, or a refusal. */
  first(): Promise<{ is: string; deviceId: string }>
  /** Waits for the refusal that ends the stream. */
  refused(): Promise<Refusal>
  /** Waits for whatever ends it: `identity`, or the reason of the refusal. */
  outcome(): Promise<string>
  cancel(): void
}

export async function startEnroll(
  t: ExecutionContext,
  client: EnrollServiceClient,
  attempt: EnrollAttempt,
): Promise<EnrollCall> {
  const { responses, cancel, ...call } = await callEnroll(client, attempt)
  const ended = call.ended.then(error => error && refusal(error))
  let over: Refusal | undefined
  ended.then(end => {
    over = end
  })
  t.teardown(cancel)
  /** Of this kind; or the end of the stream, if that comes first. */
  const step = async <Case extends 'pendingApproval' | 'identity'>($case: Case) => {
    const early = ended.then(end => {
      if (end) throw new Error(`the enrollment was refused: ${JSON.stringify(end)}`)
      return new Promise<never>(() => {})
    })
    const found = eventually(`${$case} on the Enroll stream`, () =>
      responses.map(({ step }) => step).find(step => step?.$case === $case),
    )
    return (await Promise.race([found, early])) as Extract<NonNullable<EnrollResponse['step']>, { $case: Case }>
  }
  return {
    responses,
    pending: async () => (await step('pendingApproval')).value.deviceId,
    identity: async () => (await step('identity')).value,
    async refused() {
      const end = await endOf({ ended })
      if (!end) throw new Error('the enrollment was not refused')
      return end
    },
    async first() {
      const answer = await eventually('an answer to Enroll', () => responses[0]?.step ?? (over ? 'refused' : undefined))
      if (answer === 'refused') return { is: over?.reason ?? '', deviceId: '' }
      return { is: answer.$case === 'identity' ? 'identity' : 'pending', deviceId: answer.value.deviceId }
    },
    outcome: async () => (await endOf({ ended }))?.reason ?? 'identity',
    cancel,
  }
}
