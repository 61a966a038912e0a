/** Devices whose clock is wrong: they are served like all others, and they and their operators are told. */
import test, { type ExecutionContext } from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { createChallenges } from '../../src/identity/challenge.ts'
import { specialLeaves } from '../support/authority.ts'
import { endOf, heartbeats } from '../support/device.ts'
import {
  type EdgeMesh,
  eventually,
  freshCsr,
  type Refusal,
  refusal,
  refused,
  secrets,
  sharedEdgeMesh,
  startEdgeMesh,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const mesh = sharedEdgeMesh(test)
const hourMs = 3_600_000
const yearMs = 365.25 * 24 * hourMs

/** A device's clock that shows another time and runs as fast as ours. */
const clockAt = (at: string) => {
  const offsetMs = Date.parse(at) - Date.now()
  return () => new Date(Date.now() + offsetMs)
}

const bundle = '0123456789abcdef'.repeat(4)

for (const [what, at] of [
  ['1970', '1970-01-01T00:00:00Z'],
  ['2100', '2100-01-01T00:00:00Z'],
  ['the year 9999', '9999-12-31T00:00:00Z'],
] as const) {
  test(`a device that believes it is ${what} enrolls, heartbeats and is healthy`, async t => {
    const clock = clockAt(at)
    const token = await mesh().token()
    const { enroll } = mesh().clients(mesh().anonymous)
    const keyPem = createKey()
    const { deviceId, certificateChainPem } = await new Promise<{ deviceId: string; certificateChainPem: string[] }>(
      (resolve, reject) => {
        freshCsr(enroll, keyPem).then(csr => {
          const stream = enroll.enroll({ token, csr, device: undefined, sentAt: clock() })
          stream.on('error', reject)
          stream.on('data', ({ step }) => step?.$case === 'identity' && resolve(step.value))
        }, reject)
      },
    )
    const device = { ...mesh().anonymous, keyPem, certificatePem: certificateChainPem.join('') }
    const heart = heartbeats(t, mesh(), device)
    const measuredAt = new Date(clock().getTime() - 60_000)
    const posture = { attributes: {}, ...healthy, measuredAt }
    heart.send({ sentAt: clock(), posture: posture as never, trustBundleId: bundle })
    const acknowledged = await eventually('the acknowledgement', () => heart.responses[0])
    t.deepEqual(acknowledged.failingPosture, [])
    t.true(Math.abs((acknowledged.serverTime?.getTime() ?? 0) - Date.now()) < hourMs)

    const { device: seen } = await unary(mesh().admin, 'getDevice', { id: deviceId })
    const age = (seen?.lastSeenAt?.getTime() ?? 0) - (seen?.posture?.measuredAt?.getTime() ?? 0)
    t.is(Math.round(age / 1_000), 60, 'it was measured a minute before')
    const offsetYears = ((seen?.clockOffset?.seconds ?? 0) * 1_000) / yearMs
    const wanted = Math.min((Date.parse(at) - Date.now()) / yearMs, 100)
    t.true(Math.abs(offsetYears - wanted) < 0.01, `${offsetYears}`)
    t.is(seen?.trustBundleId, bundle)
  })
}

test('what a device told once stays on record when it tells no more', async t => {
  const device = await mesh().enroll({ device: { id: 'taciturn' } })
  const first = heartbeats(t, mesh(), device)
  first.send({ posture: { attributes: {} } as never, sentAt: new Date(Date.now() - 2 * hourMs), trustBundleId: bundle })
  await eventually('the acknowledgement', () => first.responses[0])
  const second = heartbeats(t, mesh(), device)
  second.send({ posture: { attributes: {} } as never, sentAt: undefined, trustBundleId: '' })
  await eventually('the acknowledgement', () => second.responses[0])
  const { device: seen } = await unary(mesh().admin, 'getDevice', { id: 'taciturn' })
  t.is(seen?.trustBundleId, bundle)
  t.is(Math.round((seen?.clockOffset?.seconds ?? 0) / 3_600), -2)
})

async function metricsOf({ server }: EdgeMesh): Promise<(name: string) => number> {
  const text = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  return name => Number(new RegExp(`^${name}(?:{.*})? (\\S+)`, 'm').exec(text)?.[1])
}

test('operators see how many clocks are wrong, and the worst of them, for as long as these devices report', async t => {
  const own = await startEdgeMesh(t)
  for (const [id, offsetMs] of [
    ['right', 30_000],
    ['ahead', 2 * hourMs],
    ['behind', -3 * hourMs],
    ['gone', -9 * hourMs],
    ['mute', undefined],
  ] as const) {
    const heart = heartbeats(t, own, await own.enroll({ device: { id } }))
    const sentAt = offsetMs === undefined ? undefined : new Date(Date.now() + offsetMs)
    heart.send({ posture: { attributes: {} } as never, sentAt })
    await eventually('the acknowledgement', () => heart.responses[0])
  }
  await own.pool.query("update device_postures set received_at = now() - interval '1 day' where device_id = 'gone'")
  const value = await eventually('the count', async () => {
    const read = await metricsOf(own)
    return read('edgemesh_wrong_clock_devices') === 2 && read
  })
  t.is(Math.round(value('edgemesh_device_clock_offset_max_seconds') / 3_600), 3)
})

/** What an Enroll with this token, at this time of the device, is told. */
async function enrollmentRefused(token: string, sentAt: Date | undefined, challenge?: string): Promise<Refusal> {
  const { enroll } = mesh().clients(mesh().anonymous)
  const csr = challenge ? signingRequestFor(createKey(), challenge) : await freshCsr(enroll, createKey())
  return new Promise((resolve, reject) => {
    const stream = enroll.enroll({ token, csr, device: undefined, sentAt })
    stream.on('error', error => resolve(refusal(error)))
    stream.on('data', () => reject(new Error('the call was not refused')))
  })
}

test('who enrolls with what is too old is told how wrong its clock is, if it is', async t => {
  const token = await mesh().token()
  const longAgo = () => Date.now() - hourMs
  const { challenge } = createChallenges({ secret: secrets.ENROLLMENT_TOKEN_SECRET, clock: longAgo }).give()
  const late = new Date(Date.now() - 3 * hourMs)
  const stale = await enrollmentRefused(token, late, challenge)
  t.is(stale.reason, 'CSR_CHALLENGE_STALE')
  t.regex(stale.message, /sign a new request; your clock is 3 h behind$/)

  await mesh().pool.query("update enrollment_tokens set expires_at = now() - interval '1 hour' where id = $1", [
    token.split('.')[1],
  ])
  const expired = await enrollmentRefused(token, late)
  t.is(expired.reason, 'TOKEN_EXPIRED')
  t.regex(expired.message, /; your clock is 3 h behind$/)

  for (const right of [new Date(), undefined]) {
    const { reason, message } = await enrollmentRefused(token, right)
    t.is(reason, 'TOKEN_EXPIRED')
    t.notRegex(message, /clock/)
  }
  const other = await enrollmentRefused('em1.x', late)
  t.notRegex(other.message, /clock/, 'a clock has nothing to do with that')
})

test('who renews with a certificate that is not valid yet is told how wrong its clock is', async t => {
  const issue = await specialLeaves(mesh())
  const spiffeId = 'spiffe://edgemesh.local/device/early'
  const { enroll } = mesh().clients(await issue({ spiffeId, validFromMs: hourMs, validForMs: 2 * hourMs }))
  const request = { csr: await freshCsr(enroll, createKey()), sentAt: new Date(Date.now() + hourMs + 60_000) }
  const told = await refused(unary(enroll, 'renewCertificate', request))
  t.is(told.reason, 'CERTIFICATE_NOT_YET_VALID')
  t.regex(told.message, /; your clock is 61 min ahead$/)
})

async function cutForExpiry(t: ExecutionContext, id: string, sentAt: Date): Promise<Refusal | undefined> {
  const device = await mesh().enroll({ device: { id } })
  const issue = await specialLeaves(mesh())
  const leaf = await issue({ spiffeId: `spiffe://edgemesh.local/device/${id}`, validForMs: 5_000, recordedFor: id })
  const heart = heartbeats(t, mesh(), { ...device, ...leaf })
  heart.send({ posture: { attributes: {} } as never, sentAt })
  return endOf(heart)
}

test('whose certificate expires under its stream is told how wrong its own clock is, and no other', async t => {
  const [late, right] = await Promise.all([
    cutForExpiry(t, 'late', new Date(Date.now() - 3 * hourMs)),
    cutForExpiry(t, 'punctual', new Date()),
  ])
  t.deepEqual([late?.reason, right?.reason], ['CERTIFICATE_EXPIRED', 'CERTIFICATE_EXPIRED'])
  t.regex(late?.message ?? '', /your clock is 3 h behind$/)
  t.notRegex(right?.message ?? '', /clock/)
})
