/** Every answer carries the server's time, whatever kind of call it ends and however that ends. */
import { Client, credentials, type StatusObject, status } from '@grpc/grpc-js'
import test from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { type EdgeMesh, freshCsr, shared, startEdgeMesh, type TestDevice, unary } from '../support/edgemesh.ts'

type Setting = EdgeMesh & { device: TestDevice; client(): Client }

const setting = shared<Setting>(test, async file => {
  const mesh = await startEdgeMesh(file)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  const client = () => {
    const opened = new Client(`127.0.0.1:${mesh.server.apiPort}`, credentials.createSsl(Buffer.from(device.rootsPem)), {
      'grpc.ssl_target_name_override': 'localhost',
      'grpc.default_authority': 'localhost',
    })
    file.teardown(() => opened.close())
    return opened
  }
  return { ...mesh, device, client }
})

type AnyCall = { on(event: string, listener: (end: StatusObject) => void): unknown; resume?(): unknown }

/** The status with which a call ends, its trailing metadata among it. */
function endOf(call: unknown): Promise<StatusObject> {
  const started = call as AnyCall
  started.on('error', () => {})
  started.resume?.()
  return new Promise(resolve => started.on('status', resolve))
}

const asIs = (bytes: Buffer) => bytes
const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
const aBeat = {
  sequence: 1,
  posture: undefined,
  openConnectionIds: [],
  sentAt: undefined,
  trustBundleId: '',
}

const calls: Record<string, [code: keyof typeof status, call: (mesh: Setting) => unknown]> = {
  'a unary call that is answered': ['OK', mesh => mesh.admin.getPolicyState({}, () => {})],
  'a unary call without a certificate': [
    'UNAUTHENTICATED',
    mesh => mesh.clients(mesh.anonymous).authorize.check({ question, deviceId: '' }, () => {}),
  ],
  'a unary call that is refused': [
    'PERMISSION_DENIED',
    mesh => mesh.clients(mesh.device).admin.getDevice({ id: 'alpha' }, () => {}),
  ],
  'a unary call that fails': ['NOT_FOUND', mesh => mesh.admin.getDevice({ id: 'nobody' }, () => {})],
  'a unary call whose request is no message': [
    'INVALID_ARGUMENT',
    mesh => {
      const path = '/edgemesh.v1.EnrollService/GetTrustBundle'
      return mesh.client().makeUnaryRequest(path, asIs, asIs, Buffer.from('0aff', 'hex'), () => {})
    },
  ],
  'an enrollment': [
    'OK',
    async mesh => {
      const { enroll } = mesh.clients(mesh.anonymous)
      const [token, csr] = [await mesh.token(), await freshCsr(enroll, createKey())]
      return enroll.enroll({ token, csr, device: undefined, sentAt: undefined })
    },
  ],
  'an enrollment that is refused': [
    'INVALID_ARGUMENT',
    mesh => {
      const request = { token: 'em1.x', csr: Buffer.alloc(0), device: undefined, sentAt: undefined }
      return mesh.clients(mesh.anonymous).enroll.enroll(request)
    },
  ],
  'a heartbeat stream that the device ends': [
    'OK',
    mesh => {
      const stream = mesh.clients(mesh.device).heartbeat.heartbeat()
      stream.end()
      return stream
    },
  ],
  'a heartbeat stream that ends for what was sent': [
    'INVALID_ARGUMENT',
    mesh => {
      const stream = mesh.clients(mesh.device).heartbeat.heartbeat()
      stream.write(aBeat)
      return stream
    },
  ],
  'an authorize stream without a certificate': [
    'UNAUTHENTICATED',
    mesh => mesh.clients(mesh.anonymous).authorize.authorize(),
  ],
  'a stream that is cut': [
    'UNAUTHENTICATED',
    async mesh => {
      const device = await mesh.enroll({ device: { id: 'cut' } })
      const stream = mesh.clients(device).authorize.authorize()
      const end = endOf(stream)
      await unary(mesh.admin, 'revokeDevice', { id: 'cut', reason: 'lost' })
      return { on: (event: string, hear: (end: StatusObject) => void) => event === 'status' && end.then(hear) }
    },
  ],
  'a probe': [
    'OK',
    mesh => mesh.client().makeUnaryRequest('/grpc.health.v1.Health/Check', asIs, asIs, Buffer.alloc(0), () => {}),
  ],
  'a probe of what does not exist': [
    'NOT_FOUND',
    mesh =>
      mesh
        .client()
        .makeUnaryRequest('/grpc.health.v1.Health/Check', asIs, asIs, Buffer.from('0a0178', 'hex'), () => {}),
  ],
}

for (const [what, [code, call]] of Object.entries(calls)) {
  test(`${what} ends with the server's time`, async t => {
    const before = Date.now()
    const end = await endOf(await call(setting()))
    t.is(status[end.code], code, end.details)
    const [told, ...more] = end.metadata.get('edgemesh-server-time')
    t.deepEqual(more, [])
    t.regex(String(told), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/)
    const at = Date.parse(String(told))
    t.true(at >= before && at <= Date.now(), `${told}`)
  })
}

test('an answer that says the time itself needs no trailing metadata for it', async t => {
  const mesh = setting()
  const before = Date.now()
  let said: Date | undefined
  const end = await endOf(
    mesh.clients(mesh.anonymous).enroll.getTrustBundle({}, (_, answer) => {
      said = answer.serverTime
    }),
  )
  t.is(status[end.code], 'OK')
  t.deepEqual(end.metadata.get('edgemesh-server-time'), [])
  t.true(Number(said) >= before && Number(said) <= Date.now())
})
