/**
 * The life of tokens against a model: whatever operators and devices do, in whatever order, at two instances, each call
 * is answered as the model says, and what the database counts is what the model counts.
 */
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import type { EnrollServiceClient } from '../../src/gen/edgemesh/v1/enroll.ts'
import { DeviceType } from '../../src/gen/edgemesh/v1/types.ts'
import { clientsOf, type EdgeMesh, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { startEnroll } from '../support/enrolling.ts'
import { relay } from '../support/relay.ts'
import { noTokenRequest } from '../support/token-request.ts'

const runs = Number(process.env.EDGEMESH_TEST_RUNS ?? 30)
/** A life is of fifty steps at most, and usually over within a second. */
const runMsMax = 20_000
const second = 1_000
const hour = 3_600 * second

// ── What can happen ────────────────────────────────────────────────────────────────────────────────────────────────

const addresses = ['127.0.0.41', '127.0.0.42'] as const
const names = ['press-1', 'press-2', 'gate-1'] as const
const types = { laptop: DeviceType.LAPTOP, iot: DeviceType.IOT } as const
type TypeName = keyof typeof types

type Create = {
  does: 'create'
  usesMax: 1 | 2 | 3 | null
  lifetimeSeconds: number
  device: 'any' | 'press-1' | 'press-*'
  type: TypeName | undefined
  network: (typeof addresses)[number] | undefined
  approval: boolean
}
type Enroll = {
  does: 'enroll'
  token: number
  text: 'as it was made' | 'with another secret' | 'with another id'
  key: number
  name: (typeof names)[number] | ''
  type: TypeName
  address: number
  instance: number
}
/** A call of before is made again, with a request signed anew. */
type Repeat = { does: 'repeat'; call: number; instance: number }
type Operate =
  | { does: 'revoke token'; token: number; withDevices: boolean }
  | { does: 'approve' | 'revoke' | 'delete'; device: number }
type Pass = { does: 'pass'; seconds: number }
type Step = Create | Enroll | Repeat | Operate | Pass

const keys = 3
const any = fc.nat({ max: 11 })
const create = fc.record({
  does: fc.constant('create' as const),
  usesMax: fc.constantFrom(1 as const, 1 as const, 2 as const, 3 as const, null),
  lifetimeSeconds: fc.constantFrom(60, 7_200, 86_400),
  device: fc.constantFrom('any' as const, 'any' as const, 'any' as const, 'press-1' as const, 'press-*' as const),
  type: fc.constantFrom(undefined, undefined, undefined, 'iot' as const),
  network: fc.constantFrom(undefined, undefined, undefined, addresses[0]),
  approval: fc.boolean(),
})
const enroll = fc.record({
  does: fc.constant('enroll' as const),
  token: any,
  text: fc.oneof(
    { weight: 14, arbitrary: fc.constant('as it was made' as const) },
    { weight: 1, arbitrary: fc.constantFrom('with another secret' as const, 'with another id' as const) },
  ),
  key: fc.nat({ max: keys - 1 }),
  name: fc.constantFrom('' as const, '' as const, ...names),
  type: fc.constantFrom('laptop' as const, 'iot' as const, 'iot' as const),
  address: fc.nat({ max: addresses.length - 1 }),
  instance: fc.nat({ max: 1 }),
})
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 12, arbitrary: enroll },
  {
    weight: 8,
    arbitrary: fc.record({ does: fc.constant('repeat' as const), call: any, instance: fc.nat({ max: 1 }) }),
  },
  { weight: 3, arbitrary: create },
  {
    weight: 1,
    arbitrary: fc.record({ does: fc.constant('revoke token' as const), token: any, withDevices: fc.boolean() }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      does: fc.constantFrom('approve' as const, 'approve' as const, 'revoke' as const, 'delete' as const),
      device: any,
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({ does: fc.constant('pass' as const), seconds: fc.constantFrom(30, 3_599, 86_400) }),
  },
)
/** Each life begins with a token: before that nothing can happen. */
const life = fc
  .tuple(create, fc.array(step, { minLength: 15, maxLength: 50, size: 'max' }))
  .map(([first, rest]): Step[] => [first, ...rest])

// ── The model ──────────────────────────────────────────────────────────────────────────────────────────────────────

type Device = {
  id: string
  key: number
  status: 'pending' | 'active' | 'revoked'
  deleted: boolean
  standing: number
}
type Redemption = { device: Device; completedAt: number | undefined }
type Token = Create & {
  id: string
  text: string
  expiresAt: number
  revoked: boolean
  redemptions: Map<number, Redemption>
}

type Model = { now: number; tokens: Token[]; devices: Device[] }

/** How a call has to be answered: a reason, or what is granted. Nothing of the model changes. */
function expected({ now, devices }: Model, token: Token, asked: Enroll, prefix: string): string {
  if (asked.text === 'with another id') return 'TOKEN_UNKNOWN'
  if (asked.text === 'with another secret') return 'TOKEN_SECRET_WRONG'

  const redemption = token.redemptions.get(asked.key)
  if (token.revoked) return 'TOKEN_REVOKED'
  if (redemption?.completedAt !== undefined && now >= Math.max(token.expiresAt, redemption.completedAt + hour)) {
    return 'TOKEN_EXPIRED'
  }
  if (!redemption && token.usesMax !== null && token.redemptions.size === token.usesMax) {
    return token.usesMax === 1 ? 'TOKEN_OTHER_KEY' : 'TOKEN_USED_UP'
  }
  if (!redemption && now >= token.expiresAt) return 'TOKEN_EXPIRED'

  if (token.network && token.network !== addresses[asked.address]) return 'TOKEN_FOR_OTHER_NETWORK'
  if (token.type && token.type !== asked.type) return 'TOKEN_FOR_OTHER_TYPE'
  if (token.device === 'press-*' && asked.name === '') return 'INVALID_FIELD'
  if (token.device === 'press-*' && !asked.name.startsWith('press-')) return 'TOKEN_FOR_OTHER_DEVICE'
  if (token.device === 'press-1' && asked.name !== '' && asked.name !== 'press-1') return 'TOKEN_FOR_OTHER_DEVICE'

  if (redemption) {
    const { device, completedAt } = redemption
    if (asked.name !== '' && prefix + asked.name !== device.id) return 'TOKEN_FOR_OTHER_DEVICE'
    if (device.deleted) return completedAt === undefined ? 'ENROLLMENT_REJECTED' : 'DEVICE_DELETED'
    if (device.status === 'revoked') return completedAt === undefined ? 'ENROLLMENT_REJECTED' : 'DEVICE_REVOKED'
    return device.status === 'pending' ? 'pending' : 'identity'
  }
  const name = token.device === 'press-1' ? 'press-1' : asked.name
  const there = name === '' ? undefined : devices.find(({ id, deleted }) => id === prefix + name && !deleted)
  if (there && there.key !== asked.key) return 'DEVICE_EXISTS'
  if (there?.status === 'revoked') return 'DEVICE_REVOKED'
  return token.approval || there?.status === 'pending' ? 'pending' : 'identity'
}

/** What the granted call has changed. */
function apply(model: Model, token: Token, asked: Enroll, granted: 'pending' | 'identity', deviceId: string): void {
  let redemption = token.redemptions.get(asked.key)
  if (!redemption) {
    let device = model.devices.find(({ id, deleted }) => id === deviceId && !deleted)
    if (!device) {
      device = { id: deviceId, key: asked.key, status: 'active', deleted: false, standing: 0 }
      model.devices.push(device)
    }
    if (token.approval) device.status = 'pending'
    redemption = { device, completedAt: undefined }
    token.redemptions.set(asked.key, redemption)
    // Without an approval to wait for it is complete at once, whatever its device waits for.
    if (!token.approval) redemption.completedAt = model.now
  }
  if (granted !== 'identity') return
  redemption.completedAt ??= model.now
  redemption.device.standing++
}

function statusOf({ now }: Model, { revoked, usesMax, redemptions, expiresAt }: Token): number {
  const [active, usedUp, expired, over] = [1, 2, 3, 4]
  if (revoked) return over as number
  if (usesMax !== null && redemptions.size >= usesMax) return usedUp as number
  return (now >= expiresAt ? expired : active) as number
}

function revoke(device: Device): void {
  device.status = 'revoked'
  device.standing = 0
}

// ── The real thing ─────────────────────────────────────────────────────────────────────────────────────────────────

type Scene = {
  time: { now: number }
  mesh: EdgeMesh
  admin: EdgeMesh['admin']
  /** By instance and address. */
  clients: EnrollServiceClient[][]
  keys: string[]
}

async function scene(t: ExecutionContext): Promise<Scene> {
  const time = { now: Date.now() }
  const mesh = await startEdgeMesh(t, {}, undefined, () => time.now)
  const other = await startEdgeMesh(t, { DATABASE_URL: mesh.databaseUrl }, undefined, () => time.now)
  // Its certificate has to last for all the lives, whose time only moves on.
  const keyPem = createKey()
  const csr = signingRequestFor(keyPem)
  const operator = await mesh.server.issueOperator({ name: 'oldie', role: 'admin', csr, validityMs: 19_800 * hour })
  const clients = await Promise.all(
    [mesh, other].map(({ server, anonymous }) =>
      Promise.all(
        addresses.map(
          async from => clientsOf(t, `127.0.0.1:${await relay(t, server.apiPort, { from })}`, anonymous).enroll,
        ),
      ),
    ),
  )
  const { admin } = mesh.clients({ ...mesh.anonymous, certificatePem: operator.certificatePem, keyPem })
  return { time, mesh, admin, clients, keys: Array.from({ length: keys }, createKey) }
}

async function live(t: ExecutionContext, { time, mesh, admin, clients, keys }: Scene, steps: Step[], prefix: string) {
  const model: Model = { now: time.now, tokens: [], devices: [] }
  const { pool } = mesh
  const announce = (...changed: string[]) =>
    pool.query(`select pg_notify('edgemesh_changes', $1)`, [changed.join('\n')])

  const calls: Enroll[] = []
  for (const next of steps) {
    const before = next.does === 'repeat' ? calls[next.call % calls.length] : undefined
    if (next.does === 'repeat' && !before) continue
    const at = next.does === 'repeat' ? { ...(before as Enroll), instance: next.instance } : next
    // Two things never happen in the same millisecond.
    time.now += at.does === 'pass' ? at.seconds * second : 1
    model.now = time.now
    const token = 'token' in at ? model.tokens[at.token % model.tokens.length] : undefined
    const device =
      'device' in at && typeof at.device === 'number' ? model.devices[at.device % model.devices.length] : undefined

    if (at.does === 'create') {
      const made = await unary(admin, 'createEnrollmentToken', {
        ...noTokenRequest,
        usesMax: at.usesMax ?? 0,
        reusable: at.usesMax === null,
        lifetime: { seconds: at.lifetimeSeconds, nanos: 0 },
        deviceId: at.device === 'press-1' ? `${prefix}press-1` : '',
        deviceIdPattern: at.device === 'press-*' ? `${prefix}press-*` : '',
        deviceType: at.type ? types[at.type] : 0,
        sourceNetworks: at.network ? [at.network] : [],
        requiresApproval: at.approval,
      })
      const expiresAt = time.now + at.lifetimeSeconds * second
      model.tokens.push({
        ...at,
        id: made.token?.id ?? '',
        text: made.tokenText,
        expiresAt,
        revoked: false,
        redemptions: new Map(),
      })
    }

    if (at.does === 'enroll' && token) {
      calls.unshift(at)
      const call = await startEnroll(t, clients[at.instance]?.[at.address] as EnrollServiceClient, {
        token: asShown(token, at.text),
        keyPem: keys[at.key] as string,
        device: { id: at.name && prefix + at.name, type: types[at.type] },
      })
      const answer = await call.first()
      const wanted = expected(model, token, at, prefix)
      t.is(answer.is, wanted, JSON.stringify({ at, token: { ...token, text: '' } }))
      if (answer.is === 'pending' || answer.is === 'identity') apply(model, token, at, answer.is, answer.deviceId)
      call.cancel()
    }

    if (at.does === 'revoke token' && token) {
      const doomed = [...token.redemptions.values()].map(({ device }) => device).filter(({ deleted }) => !deleted)
      const { devicesRevoked } = await unary(admin, 'revokeEnrollmentToken', {
        id: token.id,
        revokeDevices: at.withDevices,
        reason: '',
      })
      const out = at.withDevices ? new Set(doomed.filter(({ status }) => status !== 'revoked')) : new Set()
      t.is(devicesRevoked, out.size)
      token.revoked = true
      if (at.withDevices) for (const device of doomed) revoke(device)
    }

    if (at.does === 'approve' && device?.status === 'pending' && !device.deleted) {
      await pool.query(`update devices set status = 'active' where id = $1`, [device.id])
      await announce(`device:${device.id}`)
      device.status = 'active'
    }
    if (at.does === 'revoke' && device && !device.deleted) {
      await unary(admin, 'revokeDevice', { id: device.id, reason: '' })
      revoke(device)
    }
    if (at.does === 'delete' && device && !device.deleted) {
      await pool.query('update certificates set revoked_at = now() where subject_id = $1', [device.id])
      await pool.query('delete from devices where id = $1', [device.id])
      await announce(`device:${device.id}`)
      device.deleted = true
      device.standing = 0
    }
  }

  for (const token of model.tokens) {
    const { token: shown } = await unary(admin, 'getEnrollmentToken', { id: token.id })
    t.like(shown, { uses: token.redemptions.size, status: statusOf(model, token) })
    t.deepEqual(
      shown?.redemptions.map(({ deviceId }) => deviceId).sort(),
      [...token.redemptions.values()].map(({ device }) => device.id).sort(),
    )
  }
  const { rows } = await pool.query(
    `select id, status, (select count(*)::int from certificates c where c.subject_id = devices.id and c.revoked_at is null)
       as standing
     from devices where id = any($1) order by id`,
    [model.devices.map(({ id }) => id)],
  )
  const remaining = model.devices.filter(({ deleted }) => !deleted)
  t.deepEqual(
    rows,
    remaining.map(({ id, status, standing }) => ({ id, status, standing })).sort((a, b) => (a.id < b.id ? -1 : 1)),
  )
}

function asShown({ text }: Token, how: Enroll['text']): string {
  const [version = '', id = '', secret = '', pin = ''] = text.split('.')
  if (how === 'with another secret') return [version, id, Buffer.alloc(32, 7).toString('base64url'), pin].join('.')
  if (how === 'with another id') return [version, id.split('').reverse().join(''), secret, pin].join('.')
  return text
}

test('tokens live as the model says, whatever operators and devices do at two instances', async t => {
  t.timeout(runs * runMsMax)
  const stage = await scene(t)
  let lives = 0
  await fc.assert(
    fc.asyncProperty(life, steps => live(t, stage, steps, `r${++lives}-`)),
    // The steps that led there are told as they were: to look for fewer would take minutes.
    { numRuns: runs, endOnFailure: true },
  )
  t.true(lives >= runs)
})
