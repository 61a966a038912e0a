/**
 * The life of a device and of its certificates, as a model of states against two real instances that differ in what they
 * do with a device that comes back. After every step both must say of each certificate what the model says of it.
 */
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { createKey } from '../../src/client/csr.ts'
import { DeviceStatus } from '../../src/gen/edgemesh/v1/types.ts'
import { specialLeaves } from '../support/authority.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  freshCsr,
  refusal,
  shared,
  startEdgeMesh,
  startSecondInstance,
  unary,
} from '../support/edgemesh.ts'

const runs = 25
const stepsMax = 40
const minuteMs = 60_000
const recoveryDays = 0.5 / 24

const instances = shared(test, async file => {
  const window = { CERT_RECOVERY_DAYS: recoveryDays.toFixed(6) }
  const lenient = await startEdgeMesh(file, window)
  const strict = await startSecondInstance(file, lenient, { ...window, CERT_RECOVERY: 'approval' })
  return { lenient, strict, issue: await specialLeaves(lenient) }
})

type Status = 'none' | 'pending' | 'active' | 'quarantined' | 'revoked'

/** `fate`: what it was revoked with. `age`: how long ago it expired, if it has. */
type Certificate = {
  credentials: Credentials
  key: string
  age: 'live' | 'expired' | 'long expired'
  fate: 'stands' | 'revoked' | 'deleted'
}

type Model = {
  status: Status
  /** Of all its lives, the newest last. */
  certificates: Certificate[]
  /** The one with which it waits to be let in again, or has been. */
  asked: Certificate | undefined
}

type Real = {
  id: string
  at: { lenient: EdgeMesh; strict: EdgeMesh }
  issue: Awaited<ReturnType<typeof specialLeaves>>
  clients: (instance: EdgeMesh, who: Credentials) => ReturnType<EdgeMesh['clients']>
}

type Where = keyof Real['at']

const ok = 'OK'

/** What every call is told that shows this certificate. */
function standing({ status }: Model, { age, fate }: Pick<Certificate, 'age' | 'fate'>): string {
  return age === 'live' ? onRecord(status, fate) : 'CERTIFICATE_EXPIRED'
}

function onRecord(status: Status, fate: Certificate['fate']): string {
  if (status === 'none' || fate === 'deleted') return 'DEVICE_DELETED'
  if (status === 'revoked') return 'DEVICE_REVOKED'
  return fate === 'revoked' ? 'CERTIFICATE_REVOKED' : ok
}

/** What a device is told that comes back, and which status it has then. */
function coming(model: Model, certificate: Certificate, key: string, where: Where): { told: string; status: Status } {
  const { status, certificates, asked } = model
  const stays = (told: string) => ({ told, status })
  const record = onRecord(status, certificate.fate)
  if (record !== ok) return stays(record)
  const hasAsked = asked === certificate
  if (certificate.age === 'long expired' && !hasAsked) return stays('RECOVERY_WINDOW_OVER')
  const newer = certificates.slice(certificates.indexOf(certificate) + 1)
  if (newer.some(other => other.key !== key || other.fate !== 'stands')) return stays('RECOVERY_SUPERSEDED')
  if (status === 'pending') return stays('RECOVERY_NEEDS_APPROVAL')
  if (status === 'quarantined' || hasAsked || newer.some(({ age }) => age === 'live')) return stays(ok)
  return where === 'lenient'
    ? { told: ok, status: 'quarantined' }
    : { told: 'RECOVERY_NEEDS_APPROVAL', status: 'pending' }
}

/** What a call is told. One that met the end of its connection, which a refused certificate has coming, is made again. */
async function told(call: () => Promise<unknown>): Promise<string> {
  for (;;) {
    try {
      await call()
      return ok
    } catch (error) {
      const { code, reason } = refusal(error)
      if (code !== 'UNAVAILABLE') return reason
    }
  }
}

/** Both instances have heard of all that has happened, and say so. */
async function agree(t: ExecutionContext, model: Model, real: Real): Promise<void> {
  const question = { id: 'q', user: 'nobody', service: 'nothing', action: '' }
  for (const where of ['lenient', 'strict'] as const) {
    for (const certificate of model.certificates) {
      const { authorize } = real.clients(real.at[where], certificate.credentials)
      const expected = standing(model, certificate)
      let seen = ''
      await eventually(`${where} says ${expected}`, async () => {
        try {
          const { answer } = await unary(authorize, 'check', { question, deviceId: '' })
          const codes = answer?.reasons.map(({ code }) => code) ?? []
          const named = codes.find(code => /^DEVICE_(PENDING|QUARANTINED|REVOKED|UNKNOWN|NOT_ACTIVE)$/.test(code))
          seen = `${ok} ${named ?? 'active'}`
        } catch (error) {
          seen = refusal(error).reason
        }
        return seen === (expected === ok ? `${ok} ${statusCodes[model.status]}` : expected)
      }).catch(error => t.fail(`${error.message}, but ${seen}`))
    }
  }
}

const statusCodes: Record<Status, string> = {
  none: '-',
  pending: 'DEVICE_PENDING',
  active: 'active',
  quarantined: 'DEVICE_QUARANTINED',
  revoked: '-',
}

type Step = fc.AsyncCommand<Model, Real>

/** One step: what it does to the service, what the model expects of it, and what becomes of the model. */
function step(
  t: ExecutionContext,
  name: string,
  when: (model: Model) => boolean,
  run: (model: Model, real: Real) => Promise<void>,
): Step {
  return {
    check: when,
    toString: () => name,
    async run(model, real) {
      await run(model, real)
      await agree(t, model, real)
    },
  }
}

const pick = <T>(from: readonly T[], at: number): T => from[at % from.length] as T
const whoseAge = ({ certificates }: Model, wanted: boolean) =>
  certificates.filter(({ age }) => (age === 'live') === wanted)

function enroll(t: ExecutionContext, where: Where, at: number): Step {
  return step(
    t,
    `enroll at ${where} with ${at === 0 ? 'a new key' : `key ${at}`}`,
    () => true,
    async (model, real) => {
      const { status, certificates } = model
      // Those that the device had in lives before: good for another life, and for nothing else.
      const old = certificates.map(({ key }) => key).filter(key => isOfThePast(key, certificates))
      const key = at === 0 || old.length === 0 || status === 'revoked' ? createKey() : pick(old, at)
      const expected = status === 'none' ? ok : 'DEVICE_EXISTS'
      const seen = await told(async () => {
        const credentials = await real.at[where].enroll({ keyPem: key, device: { id: real.id } })
        model.status = 'active'
        model.asked = undefined
        model.certificates.push({ credentials, key, age: 'live', fate: 'stands' })
      })
      t.is(seen, expected)
    },
  )
}

const isOfThePast = (key: string, certificates: Certificate[]) =>
  certificates.every(certificate => certificate.key !== key || certificate.fate === 'deleted')

/** Shows a certificate and has another one made. The connection is new: one of an expired certificate does not last. */
async function renewed(model: Model, real: Real, where: Where, { credentials }: Certificate, key: string) {
  const { enroll } = real.at[where].clients(credentials)
  const { identity } = await unary(enroll, 'renewCertificate', { csr: await freshCsr(enroll, key) }).finally(() =>
    enroll.close(),
  )
  const certificatePem = identity?.certificateChainPem.join('') ?? ''
  const renewed = { rootsPem: credentials.rootsPem, keyPem: key, certificatePem }
  model.certificates.push({ credentials: renewed, key, age: 'live', fate: 'stands' })
}

function renew(t: ExecutionContext, where: Where, at: number): Step {
  return step(
    t,
    `renew at ${where} with live certificate ${at}`,
    model => whoseAge(model, true).length > 0,
    async (model, real) => {
      const certificate = pick(whoseAge(model, true), at)
      const key = createKey()
      const expected = standing(model, certificate)
      t.is(await told(() => renewed(model, real, where, certificate, key)), expected)
    },
  )
}

/** The newest certificate of a device is one that has expired while it was away. */
function expire(t: ExecutionContext, age: 'expired' | 'long expired'): Step {
  return step(
    t,
    age === 'expired' ? 'expire' : 'expire long ago',
    model => !['none', 'revoked'].includes(model.status),
    async (model, real) => {
      const validForMs = age === 'expired' ? -minuteMs : -31 * minuteMs
      const spiffeId = `spiffe://edgemesh.local/device/${real.id}`
      const leaf = await real.issue({ spiffeId, recordedFor: real.id, validFromMs: -50 * minuteMs, validForMs })
      model.certificates.push({ credentials: leaf, key: leaf.keyPem, age, fate: 'stands' })
    },
  )
}

function comeBack(t: ExecutionContext, where: Where, at: number, repeat: boolean): Step {
  return step(
    t,
    `come back at ${where} with expired certificate ${at}${repeat ? ' for the newest key' : ''}`,
    model => whoseAge(model, false).length > 0,
    async (model, real) => {
      const certificate = pick(whoseAge(model, false).reverse(), at)
      const key = repeat ? (model.certificates.at(-1)?.key ?? '') : createKey()
      const expected = coming(model, certificate, key, where)
      t.is(await told(() => renewed(model, real, where, certificate, key)), expected.told)
      model.status = expected.status
      if (expected.told === ok) model.asked = undefined
      if (expected.told === 'RECOVERY_NEEDS_APPROVAL') model.asked = certificate
    },
  )
}

/** By what an operator does: which statuses it takes, and where it leads. */
const operations = {
  approveDevice: { pending: 'active', active: 'active' },
  quarantineDevice: { pending: 'quarantined', active: 'quarantined' },
  releaseDevice: { quarantined: 'active' },
  revokeDevice: { pending: 'revoked', active: 'revoked', quarantined: 'revoked', revoked: 'revoked' },
  deleteDevice: { pending: 'none', active: 'none', quarantined: 'none', revoked: 'none' },
} as const satisfies Record<string, Partial<Record<Status, Status>>>

function operate(t: ExecutionContext, where: Where, method: keyof typeof operations): Step {
  return step(
    t,
    `${method} at ${where}`,
    () => true,
    async (model, real) => {
      const after = (operations[method] as Partial<Record<Status, Status>>)[model.status]
      const refused =
        model.status === 'none'
          ? 'DEVICE_NOT_FOUND'
          : method === 'releaseDevice'
            ? 'DEVICE_NOT_QUARANTINED'
            : `DEVICE_${model.status.toUpperCase()}`
      const { admin } = real.at[where]
      t.is(await told(() => unary(admin, method, { id: real.id, reason: 'so it goes' })), after ? ok : refused)
      if (!after) return
      model.status = after
      const fate = after === 'revoked' ? 'revoked' : after === 'none' ? 'deleted' : undefined
      for (const certificate of model.certificates) {
        if (fate && certificate.fate === 'stands') certificate.fate = fate
      }
      if (after === 'none') return
      const { device } = await unary(admin, 'getDevice', { id: real.id })
      t.is(device?.status, DeviceStatus[after.toUpperCase() as keyof typeof DeviceStatus])
    },
  )
}

test('whatever happens to a device, both instances refuse and allow what they should, with the right reason', async t => {
  t.timeout(300_000)
  const where = fc.constantFrom<Where>('lenient', 'strict')
  const at = fc.nat(3)
  const steps: fc.Arbitrary<Step>[] = [
    fc.tuple(where, at).map(([where, at]) => enroll(t, where, at)),
    fc.tuple(where, at).map(([where, at]) => renew(t, where, at)),
    fc.constantFrom<Step>(expire(t, 'expired'), expire(t, 'expired'), expire(t, 'long expired')),
    // Mostly with the newest that has expired.
    fc.tuple(where, at, fc.boolean()).map(([where, at, repeat]) => comeBack(t, where, at, repeat)),
    fc.tuple(where, fc.boolean()).map(([where, repeat]) => comeBack(t, where, 0, repeat)),
    fc
      .tuple(where, fc.constantFrom(...(Object.keys(operations) as (keyof typeof operations)[])))
      .map(([where, method]) => operate(t, where, method)),
  ]
  let devices = 0
  const { lenient, strict, issue } = instances()
  await fc.assert(
    fc.asyncProperty(fc.commands(steps, { maxCommands: stepsMax, size: 'max' }), commands => {
      const opened = new Map<string, ReturnType<EdgeMesh['clients']>>()
      const clients = (instance: EdgeMesh, who: Credentials) => {
        const name = `${instance.server.apiPort} ${who.certificatePem}`
        const known = opened.get(name) ?? instance.clients(who)
        opened.set(name, known)
        return known
      }
      return fc
        .asyncModelRun(async () => {
          const id = `model-${++devices}`
          const keyPem = createKey()
          const first = await lenient.enroll({ keyPem, device: { id } })
          const certificates: Certificate[] = [{ credentials: first, key: keyPem, age: 'live', fate: 'stands' }]
          return {
            model: { status: 'active', certificates, asked: undefined } as Model,
            real: { id, at: { lenient, strict }, issue, clients },
          }
        }, commands)
        .finally(() => {
          for (const client of [...opened.values()].flatMap(Object.values)) client.close()
        })
    }),
    { numRuns: runs, endOnFailure: true },
  )
})
