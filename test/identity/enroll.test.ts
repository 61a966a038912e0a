import test from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { Fault } from '../../src/fault.ts'
import type { EnrollResponse } from '../../src/gen/edgemesh/v1/enroll.ts'
import { createChallenges } from '../../src/identity/challenge.ts'
import { createEnroll, type EnrollDeps } from '../../src/identity/enroll.ts'
import type { Redeemed } from '../../src/identity/redemption.ts'
import { hashSecret, mintToken, parseToken, secretKeyOf } from '../../src/identity/token-text.ts'
import { newCall } from '../admin/operator.ts'
import { storedToken } from '../support/stored-token.ts'

const tokenSecret = 'a secret of tests that is long enough'
const clock = () => Date.parse('2026-03-02T10:00:00Z')
const challenges = createChallenges({ secret: tokenSecret, clock })
const { text: token } = mintToken({ rootKeySha256: 'ab'.repeat(32) })
const waits: Redeemed = { step: 'waits', deviceId: 'press-7', status: 'pending' }

/** Enroll over a token that is good, where redemptions and approvals come out as the test says. */
function scene(deps: Partial<EnrollDeps>) {
  const outcomes: string[] = []
  const { id, secret } = parseToken(token)
  const restrictions = { deviceIdPattern: null, sourceNetworks: [], requiresApproval: true }
  const stored = storedToken({
    id,
    secretHash: hashSecret(secret, secretKeyOf(restrictions, tokenSecret)),
    expiresAt: new Date(clock() + 60_000),
    ...restrictions,
  })
  const enroll = createEnroll({
    challenges,
    tokenSecret,
    clock,
    limit: async () => {},
    limitToken: async () => {},
    onEnrollment: outcome => outcomes.push(outcome),
    issuance: { ready: async () => {} } as EnrollDeps['issuance'],
    ...deps,
    redemptions: { token: async () => stored, ...deps.redemptions },
  } as EnrollDeps)
  const csr = signingRequestFor(createKey(), challenges.give().challenge)
  return { outcomes, stream: enroll({ token, csr, device: undefined, sentAt: undefined }, newCall()) }
}

test('a device that waits is told so again and again, until there is a decision', async t => {
  const reminders = [false, false, true, true]
  const redeemed = [waits, waits]
  const { stream, outcomes } = scene({
    redemptions: {
      async redeem() {
        const next = redeemed.shift()
        if (next) return next
        throw new Fault('PERMISSION_DENIED', 'ENROLLMENT_REJECTED', 'an operator has rejected it')
      },
    } as unknown as EnrollDeps['redemptions'],
    approvals: { decided: async () => reminders.shift() ?? true, endAll: () => {} },
  })
  const responses: EnrollResponse[] = []
  const end = await t.throwsAsync(
    async () => {
      for await (const response of stream) responses.push(response)
    },
    { instanceOf: Fault },
  )
  t.is((end as Fault).reason, 'ENROLLMENT_REJECTED')
  // Three times for the first wait, and once more for a decision that was taken back before it was looked at.
  t.deepEqual(
    responses,
    Array(4).fill({
      step: { $case: 'pendingApproval', value: { deviceId: 'press-7' } },
      serverTime: new Date(clock()),
    }),
  )
  t.deepEqual(outcomes, ['pending', 'pending', 'enrollment_rejected'])
})

test('an outage is no mark against the token', async t => {
  const marks: string[] = []
  const { stream, outcomes } = scene({
    redemptions: {
      redeem: () => Promise.reject(new Fault('UNAVAILABLE', 'ENROLLMENTS_BEHIND', 'try again')),
    } as unknown as EnrollDeps['redemptions'],
    limitToken: async id => void marks.push(id),
  })
  await t.throwsAsync(stream.next(), { instanceOf: Fault })
  t.deepEqual(marks, [])
  t.deepEqual(outcomes, ['enrollments_behind'])
})

test('a limit that can not be counted does not hide why an attempt was refused', async t => {
  const { stream } = scene({
    redemptions: {
      redeem: () => Promise.reject(new Fault('ALREADY_EXISTS', 'DEVICE_EXISTS', 'another key holds the id')),
    } as unknown as EnrollDeps['redemptions'],
    limitToken: () => Promise.reject(new Error('the database is away')),
  })
  const fault = await t.throwsAsync(stream.next(), { instanceOf: Fault })
  t.is((fault as Fault).reason, 'DEVICE_EXISTS')
})
