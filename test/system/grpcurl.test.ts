/** What a person does with grpcurl, as the README shows it. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { heartbeats } from '../support/device.ts'
import { type Credentials, type EdgeMesh, shared as share, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { findGrpcurl, run } from '../support/grpcurl.ts'
import { healthy } from '../support/healthy.ts'

const grpcurl = findGrpcurl()
const shared = share(test, async file => {
  const mesh = await startEdgeMesh(file)
  await furnish(mesh)
  return mesh
})
/** Skipped where there is no grpcurl: install it, or name it in GRPCURL. */
const curling = grpcurl ? test : test.skip
if (!grpcurl) test.skip('grpcurl is not on this machine: install it, or name it in GRPCURL', t => t.pass())
let folder = ''

async function furnish(mesh: EdgeMesh): Promise<void> {
  folder = await mkdtemp(join(tmpdir(), 'edgemesh-grpcurl-'))
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: 'Payroll', labels: {}, owner: '', roles: [] })
  await save('operator', mesh.operator)
  await save('alpha', await mesh.enroll({ device: { id: 'alpha' } }))
  await writeFile(join(folder, 'ca.pem'), mesh.anonymous.rootsPem)
}

test.after.always(() => rm(folder, { recursive: true, force: true }))

async function save(name: string, { certificatePem = '', keyPem = '' }: Credentials): Promise<void> {
  await writeFile(join(folder, `${name}.pem`), certificatePem)
  await writeFile(join(folder, `${name}-key.pem`), keyPem, { mode: 0o600 })
}

/** @param who the name of the certificate that is shown, if any */
function curl(who: string | undefined, args: string[], options: string[] = [], host = '127.0.0.1') {
  const identity = who ? ['-cert', join(folder, `${who}.pem`), '-key', join(folder, `${who}-key.pem`)] : []
  const tls = ['-cacert', join(folder, 'ca.pem'), ...identity, '-authority', 'localhost']
  return run(grpcurl as string, [...tls, ...options, `${host}:${shared().server.apiPort}`, ...args])
}

curling('an operator sees the services', async t => {
  const { stdout, stderr } = await curl('operator', ['list'])
  const listed = stdout.trim().split('\n')
  for (const name of [
    'edgemesh.v1.AdminService',
    'edgemesh.v1.AuthorizeService',
    'edgemesh.v1.EnrollService',
    'edgemesh.v1.HeartbeatService',
    'envoy.service.auth.v3.Authorization',
    'grpc.health.v1.Health',
  ]) {
    t.true(listed.includes(name), `${name} in ${stdout}${stderr}`)
  }
})

curling('without a certificate the services are not shown', async t => {
  const { exitCode, stderr } = await curl(undefined, ['list'])
  t.not(exitCode, 0)
  t.regex(stderr, /certificate/)
})

curling('each service is described, down to its messages', async t => {
  const { stdout } = await curl('operator', ['describe', 'edgemesh.v1.AuthorizeService'])
  t.regex(stdout, /rpc Check \( \.edgemesh\.v1\.CheckRequest \) returns \( \.edgemesh\.v1\.CheckResponse \);/)
  t.regex(stdout, /rpc Authorize \( stream \.edgemesh\.v1\.AuthorizeRequest \)/)
  const described = await curl('alpha', ['describe', 'edgemesh.v1.CreateEnrollmentTokenRequest'])
  t.regex(described.stdout, /map<string, string> labels = 3;/)
  t.regex(described.stdout, /\.google\.protobuf\.Duration lifetime = 2;/)
  const proxys = await curl('operator', ['describe', 'envoy.service.auth.v3.AttributeContext.Peer'])
  t.regex(proxys.stdout, /string certificate = 5/)
})

const question = (service: string) => ({ question: { id: 'q1', user: 'ada@example.com', service } })

curling('a device checks its own access, denied first, allowed once it is healthy', async t => {
  const check = () => curl('alpha', ['edgemesh.v1.AuthorizeService/Check'], ['-d', JSON.stringify(question('payroll'))])
  const denied = await check()
  t.is(denied.exitCode, 0, denied.stderr)
  t.deepEqual(
    JSON.parse(denied.stdout).answer.reasons.map(({ code }: { code: string }) => code),
    ['HEALTH_UNKNOWN'],
  )
  const mesh = shared()
  const heart = heartbeats(t, mesh, await mesh.enroll({ device: { id: 'beta' } }))
  await heart.beat(healthy)
  const asked = await curl(
    'operator',
    ['edgemesh.v1.AuthorizeService/Check'],
    ['-d', JSON.stringify({ ...question('payroll'), deviceId: 'beta' })],
    'localhost',
  )
  t.true(JSON.parse(asked.stdout).answer.allowed, asked.stderr)
})

curling('health is told to anyone', async t => {
  const { stdout, stderr, exitCode } = await curl(
    undefined,
    ['grpc.health.v1.Health/Check'],
    [
      '-import-path',
      join(import.meta.dirname, '../../node_modules/grpc-health-check/proto'),
      '-proto',
      'health/v1/health.proto',
    ],
  )
  t.is(exitCode, 0, stderr)
  t.deepEqual(JSON.parse(stdout), { status: 'SERVING' })
})

curling('an operator lists the devices', async t => {
  const { stdout, stderr } = await curl('operator', ['edgemesh.v1.AdminService/ListDevices'])
  const { devices } = JSON.parse(stdout || stderr)
  const alpha = devices.find(({ id }: { id: string }) => id === 'alpha')
  t.is(alpha.status, 'DEVICE_STATUS_ACTIVE')
  t.is(alpha.spiffeId, 'spiffe://edgemesh.local/device/alpha')
  t.is(alpha.certificates.length, 1)
})

curling('mistakes are shown with code, field and reason', async t => {
  const { exitCode, stderr } = await curl(
    'operator',
    ['edgemesh.v1.AdminService/GetDevice'],
    ['-d', '{"id": "No Such Id"}'],
  )
  t.not(exitCode, 0)
  t.regex(stderr, /Code: InvalidArgument/)
  t.regex(stderr, /Message: id has to be of 1 to 64 characters/)
  t.regex(stderr, /"reason": *"INVALID_FIELD"/)
  t.regex(stderr, /"field": *"id"/)

  const refused = await curl('alpha', ['edgemesh.v1.AdminService/ListDevices'])
  t.regex(refused.stderr, /Code: PermissionDenied/)
  t.regex(refused.stderr, /"reason": *"WRONG_CALLER"/)
})
