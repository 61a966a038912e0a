import { createPrivateKey, createPublicKey, hash, X509Certificate } from 'node:crypto'
import { Writable } from 'node:stream'
import test from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { type SpecialLeaf, specialLeaves } from '../support/authority.ts'
import { authorizations, endOf, heartbeats } from '../support/device.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  refused,
  shared,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const minuteMs = 60_000
const dayMs = 24 * 60 * minuteMs
/** Half an hour: the authority of a test, and so its certificates, can't be older than an hour. */
const windowDays = 0.5 / 24

let logged = ''
const sink = new Writable({
  write(chunk, _encoding, done) {
    logged += chunk
    done()
  },
})
/** On one database; they differ in what they do with a device that comes back. */
const instances = shared(test, async file => {
  const log = createLog({ level: 'warn', destination: sink })
  const window = { CERT_RECOVERY_DAYS: windowDays.toFixed(6) }
  const mesh = await startEdgeMesh(file, window, log)
  return {
    mesh,
    strict: await startSecondInstance(file, mesh, { ...window, CERT_RECOVERY: 'approval' }),
    never: await startSecondInstance(file, mesh, { CERT_RECOVERY_DAYS: '0' }),
  }
})
const mesh = () => instances().mesh
const strict = () => instances().strict
const never = () => instances().never

const spiffe = (id: string) => `spiffe://edgemesh.local/device/${id}`

/** A device whose newest certificate has expired a minute ago. */
async function away(id: string, leaf: Partial<SpecialLeaf> = {}) {
  const device = await mesh().enroll({ device: { id } })
  return { device, expired: await lateCertificate(id, leaf) }
}

async function lateCertificate(id: string, leaf: Partial<SpecialLeaf> = {}) {
  const issue = await specialLeaves(mesh())
  return issue({ spiffeId: spiffe(id), recordedFor: id, validFromMs: -50 * minuteMs, validForMs: -minuteMs, ...leaf })
}

/** Asks for a certificate by showing `who`, as a device does that starts again. */
async function comeBack(instance: EdgeMesh, who: Credentials, keyPem = createKey()): Promise<Credentials> {
  const { enroll } = instance.clients(who)
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, keyPem) })
  return { rootsPem: who.rootsPem, keyPem, certificatePem: identity?.certificateChainPem.join('') ?? '' }
}

const check = async (instance: EdgeMesh, who: Credentials) => {
  const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
  const { answer } = await unary(instance.clients(who).authorize, 'check', { question, deviceId: '' })
  return answer?.reasons.map(({ code }) => code)
}

async function statusOf(id: string) {
  const { device } = await unary(mesh().admin, 'getDevice', { id })
  return { status: device?.status, reason: device?.statusReason ?? '' }
}

async function recoveries(id: string) {
  const { rows } = await mesh().pool.query(
    `select actor, code, reason, detail from audit_events
     where method like '%/RenewCertificate' and target = $1 order by at, id`,
    [`device/${id}`],
  )
  return rows
}

test('a device that was away too long comes back quarantined, on record, and an operator lets it out', async t => {
  const { expired } = await away('sleeper')
  const elsewhere = await refused(check(mesh(), expired))
  t.deepEqual([elsewhere.code, elsewhere.reason], ['UNAUTHENTICATED', 'CERTIFICATE_EXPIRED'])
  const heart = heartbeats(t, mesh(), expired)
  heart.send({})
  t.is((await endOf(heart))?.reason, 'CERTIFICATE_EXPIRED')

  const back = await comeBack(mesh(), expired)
  const leaf = new X509Certificate(back.certificatePem ?? '')
  t.true(leaf.subjectAltName?.includes(`URI:${spiffe('sleeper')}`))
  t.true(leaf.validToDate.getTime() > Date.now() + 80 * dayMs)

  const { status, reason } = await statusOf('sleeper')
  t.is(status, DeviceStatus.QUARANTINED)
  t.regex(reason, /^its certificate expired at 20\d\d-.*, and it came back later$/)
  for (const instance of [mesh(), strict()]) {
    t.true((await check(instance, back))?.includes('DEVICE_QUARANTINED'))
  }
  const { directives } = await heartbeats(t, strict(), back).beat(healthy)
  t.deepEqual(directives, [{ kind: { $case: 'quarantined', value: { reason } } }])

  await unary(mesh().admin, 'releaseDevice', { id: 'sleeper' })
  for (const instance of [mesh(), strict()]) {
    await eventually('the device is out of quarantine', async () => {
      return !(await check(instance, back))?.includes('DEVICE_QUARANTINED')
    })
  }

  const [event] = await recoveries('sleeper')
  t.like(event, { actor: spiffe('sleeper'), code: 'OK' })
  t.like(event.detail, {
    expiredSerial: expired.serial,
    recovery: 'quarantined',
    before: 'active',
    after: 'quarantined',
    serial: leaf.serialNumber.toLowerCase(),
  })
  const warning = logged.split('\n').find(line => line.includes('sleeper')) ?? ''
  t.regex(warning, /came back with an expired certificate/)
  t.true(warning.includes(expired.serial))
  const metrics = await (await fetch(`http://127.0.0.1:${mesh().server.metricsPort}/metrics`)).text()
  t.regex(metrics, /^edgemesh_certificate_recoveries_total\{outcome="quarantined"\} [1-9]/m)
})

test('where approval is asked for, a device waits until an operator approves it, and is let in then', async t => {
  const { expired } = await away('supplicant')
  for (let asked = 1; asked <= 2; asked++) {
    const seen = await refused(comeBack(strict(), expired))
    t.deepEqual([seen.code, seen.reason], ['FAILED_PRECONDITION', 'RECOVERY_NEEDS_APPROVAL'])
    t.true((seen.retryAfterMs ?? 0) >= 1_000)
    t.is((await statusOf('supplicant')).status, DeviceStatus.PENDING)
  }
  // An instance that would take it into quarantine does not let it around the operator who is asked already.
  t.is((await refused(comeBack(mesh(), expired))).reason, 'RECOVERY_NEEDS_APPROVAL')

  await unary(mesh().admin, 'approveDevice', { id: 'supplicant' })
  const back = await comeBack(strict(), expired)
  t.deepEqual(await statusOf('supplicant'), { status: DeviceStatus.ACTIVE, reason: '' })
  t.false((await check(strict(), back))?.some(code => code.startsWith('DEVICE_')))

  t.deepEqual(
    (await recoveries('supplicant')).map(({ code, reason, detail }) => [code, reason, detail.recovery]),
    [
      ['OK', 'RECOVERY_ASKED', 'needs_approval'],
      ...Array(3).fill(['FAILED_PRECONDITION', 'RECOVERY_NEEDS_APPROVAL', 'needs_approval']),
      ['OK', '', 'approved'],
    ],
  )
  t.is((await refused(comeBack(strict(), expired))).reason, 'RECOVERY_SUPERSEDED', 'once is all that was approved')
})

test('who has asked in time may be approved after the time is over', async t => {
  const { expired } = await away('patient')
  t.is((await refused(comeBack(strict(), expired))).reason, 'RECOVERY_NEEDS_APPROVAL')
  const late = await lateCertificate('patient', { validForMs: -windowDays * dayMs - minuteMs })
  t.is((await refused(comeBack(strict(), late))).reason, 'RECOVERY_WINDOW_OVER')
  await mesh().pool.query("update devices set recovery_serial = $1 where id = 'patient'", [late.serial])
  t.is((await refused(comeBack(strict(), late))).reason, 'RECOVERY_NEEDS_APPROVAL')
  await unary(mesh().admin, 'approveDevice', { id: 'patient' })
  await comeBack(strict(), late)
  t.is((await statusOf('patient')).status, DeviceStatus.ACTIVE)
})

test('who was approved and did not come for it until twice the time was over, is not let in any more', async t => {
  const sixMinutes = { CERT_RECOVERY_DAYS: (0.1 / 24).toFixed(6), CERT_RECOVERY: 'approval' }
  const hasty = await startSecondInstance(t, mesh(), sixMinutes)
  for (const [id, expiredMinutesAgo, outcome] of [
    ['forgetful-1', 11, undefined],
    ['forgetful-2', 13, 'RECOVERY_WINDOW_OVER'],
  ] as const) {
    const { expired } = await away(id, { validForMs: -expiredMinutesAgo * minuteMs })
    // It had asked in time, and an operator has approved it since.
    await mesh().pool.query('update devices set recovery_serial = $1 where id = $2', [expired.serial, id])
    const answer = comeBack(hasty, expired)
    if (outcome) t.is((await refused(answer)).reason, outcome)
    else await t.notThrowsAsync(answer)
    t.is((await statusOf(id)).status, DeviceStatus.ACTIVE)
  }
})

test('a quarantined device that comes back stays quarantined, whatever comes back elsewhere', async t => {
  const { expired } = await away('suspect')
  await unary(mesh().admin, 'quarantineDevice', { id: 'suspect', reason: 'odd traffic' })
  const back = await comeBack(strict(), expired)
  t.deepEqual(await statusOf('suspect'), { status: DeviceStatus.QUARANTINED, reason: 'odd traffic' })
  t.true((await check(strict(), back))?.includes('DEVICE_QUARANTINED'))
})

test('a device that lost the answer repeats its call for the same key, and nobody else may', async t => {
  for (const [instance, id, status] of [
    [mesh(), 'unlucky-1', DeviceStatus.QUARANTINED],
    [strict(), 'unlucky-2', DeviceStatus.ACTIVE],
  ] as const) {
    const { expired } = await away(id)
    const keyPem = createKey()
    if (instance === strict()) {
      await refused(comeBack(instance, expired, keyPem))
      await unary(mesh().admin, 'approveDevice', { id })
    }
    const first = await comeBack(instance, expired, keyPem)
    const second = await comeBack(instance, expired, keyPem)
    t.not(new X509Certificate(second.certificatePem ?? '').serialNumber, serialOf(first))
    t.is((await statusOf(id)).status, status)
    for (const back of [first, second]) await heartbeats(t, instance, back).beat(healthy)
    const other = await refused(comeBack(instance, expired))
    t.deepEqual([other.code, other.reason], ['FAILED_PRECONDITION', 'RECOVERY_SUPERSEDED'])
  }
})

const serialOf = ({ certificatePem }: Credentials) => new X509Certificate(certificatePem ?? '').serialNumber

test('a device whose certificate expires while it is connected is cut off and comes back on the same connection', async t => {
  await mesh().enroll({ device: { id: 'drowsy' } })
  const leaf = await lateCertificate('drowsy', { validFromMs: -minuteMs, validForMs: 8_000 })
  const heart = heartbeats(t, mesh(), leaf)
  await heart.beat(healthy)
  const { enroll } = mesh().clients(leaf)
  const csr = await freshCsr(enroll, createKey())
  const access = authorizations(t, mesh(), leaf)
  await access.ask('ada', 'payroll')
  for (const stream of [heart, access]) t.is((await endOf(stream))?.reason, 'CERTIFICATE_EXPIRED')
  await unary(enroll, 'renewCertificate', { csr })
  t.is((await statusOf('drowsy')).status, DeviceStatus.QUARANTINED)
})

/** The same certificate, with one bit of its signature turned: whoever made it has no key of ours. */
function forged({ certificatePem = '', ...rest }: Credentials): Credentials {
  const [leaf = '', ...above] = certificatePem.split(/(?=-----BEGIN)/)
  const der = Buffer.from(new X509Certificate(leaf).raw)
  der[der.length - 1] = (der.at(-1) ?? 0) ^ 1
  const pem = `-----BEGIN CERTIFICATE-----\n${der.toString('base64').replace(/.{64}/g, '$&\n')}\n-----END CERTIFICATE-----\n`
  return { ...rest, certificatePem: [pem, ...above].join('') }
}

for (const [what, prepare, code, reason] of [
  [
    'after more than the days that are allowed',
    async () => (await away('very-late', { validForMs: -windowDays * dayMs - minuteMs })).expired,
    'FAILED_PRECONDITION',
    'RECOVERY_WINDOW_OVER',
  ],
  [
    'with a certificate older than its newest',
    async () => {
      const expired = await lateCertificate('renewed-since')
      await mesh().enroll({ device: { id: 'renewed-since' } })
      return expired
    },
    'FAILED_PRECONDITION',
    'RECOVERY_SUPERSEDED',
  ],
  [
    'that has been revoked',
    async () => {
      const { expired } = await away('outcast')
      await unary(mesh().admin, 'revokeDevice', { id: 'outcast', reason: 'stolen' })
      return expired
    },
    'UNAUTHENTICATED',
    'DEVICE_REVOKED',
  ],
  [
    'that has been deleted',
    async () => {
      const { expired } = await away('removed')
      await unary(mesh().admin, 'deleteDevice', { id: 'removed' })
      return expired
    },
    'UNAUTHENTICATED',
    'DEVICE_DELETED',
  ],
  [
    'that was deleted, and whose name another has taken',
    async () => {
      const { expired } = await away('renamed')
      await unary(mesh().admin, 'deleteDevice', { id: 'renamed' })
      await mesh().enroll({ device: { id: 'renamed' } })
      return expired
    },
    'UNAUTHENTICATED',
    'DEVICE_DELETED',
  ],
  [
    'with a certificate that was revoked',
    async () => {
      const { expired } = await away('leaked')
      await mesh().pool.query('update certificates set revoked_at = now() where serial = $1', [expired.serial])
      return expired
    },
    'UNAUTHENTICATED',
    'CERTIFICATE_REVOKED',
  ],
  [
    'with a certificate that is not on record',
    async () => {
      await mesh().enroll({ device: { id: 'unrecorded' } })
      const issue = await specialLeaves(mesh())
      return issue({ spiffeId: spiffe('unrecorded'), validFromMs: -50 * minuteMs, validForMs: -minuteMs })
    },
    'UNAUTHENTICATED',
    'CERTIFICATE_UNKNOWN',
  ],
  [
    'with a certificate whose signature is not ours',
    async () => forged((await away('victim')).expired),
    'UNAUTHENTICATED',
    'CERTIFICATE_UNTRUSTED',
  ],
  [
    "with a server's certificate",
    async () => (await away('pretender', { purpose: 'server' })).expired,
    'UNAUTHENTICATED',
    'CERTIFICATE_PURPOSE',
  ],
  [
    'with a name in another trust domain',
    async () => lateCertificate('foreigner', { spiffeId: 'spiffe://elsewhere.example/device/foreigner' }),
    'UNAUTHENTICATED',
    'CERTIFICATE_IDENTITY',
  ],
] as const) {
  test(`a device ${what} does not come back: ${reason}`, async t => {
    const who = await prepare()
    const keyPem = createKey()
    const seen = await refused(comeBack(mesh(), who, keyPem))
    t.deepEqual([seen.code, seen.reason], [code, reason])
    t.is(await certificatesFor(keyPem), 0)
  })
}

test('where no expired certificate is taken, none is', async t => {
  const { expired } = await away('unwelcome', { validForMs: -1_000 })
  const seen = await refused(comeBack(never(), expired))
  t.deepEqual([seen.code, seen.reason], ['FAILED_PRECONDITION', 'RECOVERY_WINDOW_OVER'])
  t.is((await statusOf('unwelcome')).status, DeviceStatus.ACTIVE)
})

async function certificatesFor(keyPem: string): Promise<number> {
  const spki = createPublicKey(createPrivateKey(keyPem)).export({ type: 'spki', format: 'der' })
  const { rows } = await mesh().pool.query('select count(*)::int from certificates where public_key_sha256 = $1', [
    hash('sha256', spki, 'hex'),
  ])
  return rows[0].count
}

async function operator(name: string, role: string, validityMs: number): Promise<Credentials> {
  const keyPem = createKey()
  const issued = await mesh().server.issueOperator({ name, role, csr: signingRequestFor(keyPem), validityMs })
  return { ...issued, keyPem }
}

const lifeMsOf = ({ certificatePem = '' }: Credentials) => {
  const { validFromDate, validToDate } = new X509Certificate(certificatePem)
  return validToDate.getTime() - validFromDate.getTime()
}

const listAll = { pageSize: 1, pageToken: '', status: 0, labels: {} }

test('an operator renews: the same name, the same role, for as long as before', async t => {
  const before = await operator('olga', 'auditor', 30 * dayMs)
  const after = await comeBack(mesh(), before)
  const [old, renewed] = [before, after].map(({ certificatePem }) => new X509Certificate(certificatePem ?? ''))
  t.is(renewed?.subject, old?.subject)
  t.is(renewed?.subjectAltName, old?.subjectAltName)
  t.is(lifeMsOf(after), lifeMsOf(before))
  const { admin } = mesh().clients(after)
  await unary(admin, 'listDevices', listAll)
  t.is((await refused(unary(admin, 'deleteDevice', { id: 'nobody' }))).reason, 'OPERATOR_NOT_PERMITTED')
  await unary(mesh().clients(before).admin, 'listDevices', listAll)

  const { rows } = await mesh().pool.query(
    "select actor, target, code from audit_events where method like '%/RenewCertificate' and target = 'operator/olga'",
  )
  t.deepEqual(rows, [{ actor: 'spiffe://edgemesh.local/operator/olga', target: 'operator/olga', code: 'OK' }])
})

test('an operator who was made for longer than is allowed now renews for no longer than that', async t => {
  const after = await comeBack(mesh(), await operator('otis', 'admin', 3_000 * dayMs))
  t.true(lifeMsOf(after) < 826 * dayMs)
})

test("an operator's certificate that has expired is worth nothing", async t => {
  const issue = await specialLeaves(mesh())
  const expired = await issue({
    spiffeId: 'spiffe://edgemesh.local/operator/old',
    validFromMs: -50 * minuteMs,
    validForMs: -minuteMs,
  })
  const seen = await refused(comeBack(mesh(), expired))
  t.deepEqual([seen.code, seen.reason], ['UNAUTHENTICATED', 'CERTIFICATE_EXPIRED'])
})

test('a certificate that was revoked a moment ago gets no other one, whatever this instance knows yet', async t => {
  const device = await mesh().enroll({ device: { id: 'moment' } })
  const { enroll } = mesh().clients(device)
  const csr = await freshCsr(enroll, createKey())
  await unary(enroll, 'renewCertificate', { csr })
  // Nobody announces it.
  await mesh().pool.query("update certificates set revoked_at = now() where subject_id = 'moment'")
  const seen = await refused(unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, createKey()) }))
  t.deepEqual([seen.code, seen.reason], ['UNAUTHENTICATED', 'CERTIFICATE_REVOKED'])
})

test('a device is reminded to renew only late in the life of its certificate', async t => {
  await mesh().enroll({ device: { id: 'aging' } })
  // Issued fifty minutes ago, being dated five minutes back.
  for (const [validForMs, reminded] of [
    [60 * minuteMs, false],
    [10 * minuteMs, true],
  ] as const) {
    const leaf = await lateCertificate('aging', { validFromMs: -55 * minuteMs, validForMs })
    const { directives } = await heartbeats(t, mesh(), leaf).beat(healthy)
    t.is(
      directives.some(({ kind }) => kind?.$case === 'renewCertificate'),
      reminded,
    )
  }
})
