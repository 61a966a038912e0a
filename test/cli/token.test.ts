import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { saveCredentials } from '../../src/cli/operator-credentials.ts'
import { createKey } from '../../src/client/csr.ts'
import { refused, shared, startEdgeMesh, tokenIdOf, unary } from '../support/edgemesh.ts'

type Outcome = { exitCode: number; stdout: string; stderr: string }

/** A server, and `edgemesh token` with the credentials of an operator. */
const scene = shared(test, async file => {
  const mesh = await startEdgeMesh(file)
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-cli-'))
  file.teardown(() => rm(folder, { recursive: true }))
  const { certificatePem = '', keyPem = '', rootsPem } = mesh.operator
  const server = `localhost:${mesh.server.apiPort}`
  await saveCredentials(folder, { keyPem, certificatePem, rootsPem, server })
  const main = join(import.meta.dirname, '../../src/main.ts')
  const edgemesh = (...args: string[]): Promise<Outcome> =>
    new Promise(resolve => {
      const options = { env: { PATH: process.env.PATH, EDGEMESH_CREDENTIALS: folder } }
      execFile(process.execPath, [main, 'token', ...args], options, (error, stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
      })
    })
  return { mesh, edgemesh }
})

test('a token with everything on it is made, used, listed and shown', async t => {
  const { mesh, edgemesh } = scene()
  const made = await edgemesh(
    ...[
      'create',
      '--reusable',
      '--expires',
      '8h',
      '--device-pattern',
      'press-*',
      '--type',
      'iot',
      '--label',
      'site=berlin',
    ],
    ...['--network', '127.0.0.0/8', '--network', '10.7.0.0/16'],
  )
  t.is(made.exitCode, 0, made.stderr)
  const token = made.stdout.trim()
  const id = tokenIdOf(token)
  t.regex(made.stderr, new RegExp(`^note: token ${id}, good for any number of uses until \\d{4}-`))
  const keyPem = createKey()
  await mesh.enroll({ token, keyPem, device: { id: 'press-1', type: 3 } })
  await mesh.enroll({ token, device: { id: 'press-2', type: 3 } })

  const listed = await edgemesh('list')
  t.is(listed.exitCode, 0, listed.stderr)
  const [heading = '', ...lines] = listed.stdout.split('\n')
  t.regex(heading, /^ID +STATUS +USES +EXPIRES +LAST USED +FROM +BY +TYPE +DEVICE +CREATED BY +LABELS$/)
  const when = '\\d{4}-\\d\\d-\\d\\dT[\\d:]{8}Z'
  t.regex(
    lines.find(line => line.startsWith(id)) ?? '',
    new RegExp(
      `^${id} +active +2/∞ +${when} +${when} +127\\.0\\.0\\.1 +press-2 +iot +press-\\* +spiffe://\\S+ +site=berlin$`,
    ),
  )

  const shown = await edgemesh('show', id)
  t.is(shown.exitCode, 0, shown.stderr)
  for (const fact of [
    /^uses +2\/∞$/m,
    /^approval +not required$/m,
    /^device +press-\*$/m,
    /^networks +127\.0\.0\.0\/8 10\.7\.0\.0\/16$/m,
    /^press-1 +\S+ +127\.0\.0\.1 +[0-9a-f]{64}$/m,
    /^press-2 +\S+ +127\.0\.0\.1 +[0-9a-f]{64}$/m,
  ]) {
    t.regex(shown.stdout, fact)
  }
  t.false(shown.stdout.includes(token.split('.')[2] as string), 'never its text')
  const { redemptions } = JSON.parse((await edgemesh('show', id, '--json')).stdout)
  t.deepEqual(
    redemptions.map(({ deviceId }: { deviceId: string }) => deviceId),
    ['press-2', 'press-1'],
  )
})

test('a token that takes approval says so', async t => {
  const { edgemesh } = scene()
  const made = await edgemesh('create', '--approval', '--device', 'press-3')
  t.is(made.exitCode, 0, made.stderr)
  t.regex(made.stderr, /good for one use until \S+; what it enrolls waits for approval$/m)
  t.regex((await edgemesh('show', tokenIdOf(made.stdout.trim()))).stdout, /^approval +required$/m)
})

test('a token is revoked, with its devices where that is asked for, and it takes a reason to throw them out', async t => {
  const { mesh, edgemesh } = scene()
  const token = await mesh.token({ usesMax: 3 })
  await mesh.enroll({ token, device: { id: 'van-1' } })
  const alone = await edgemesh('revoke', tokenIdOf(token))
  t.deepEqual([alone.exitCode, alone.stdout], [0, `token ${tokenIdOf(token)} is revoked; it was used 1/3 times\n`])
  t.is((await unary(mesh.admin, 'getDevice', { id: 'van-1' })).device?.status, 2)

  const silent = await edgemesh('revoke', tokenIdOf(token), '--with-devices')
  t.is(silent.exitCode, 2)
  t.regex(silent.stderr, /^error: .*give --reason/)
  t.is((await unary(mesh.admin, 'getDevice', { id: 'van-1' })).device?.status, 2)

  const both = await edgemesh('revoke', tokenIdOf(token), '--with-devices', '--reason', 'stolen')
  t.is(both.exitCode, 0, both.stderr)
  t.is(both.stdout, `token ${tokenIdOf(token)} is revoked; it was used 1/3 times; devices revoked with it: 1\n`)
  const { device } = await unary(mesh.admin, 'getDevice', { id: 'van-1' })
  t.like(device, { status: 4, statusReason: 'stolen' })
  t.is((await refused(mesh.enroll({ token }))).reason, 'TOKEN_REVOKED')
  const again = await edgemesh('revoke', tokenIdOf(token), '--with-devices', '--reason', 'stolen', '--json')
  t.like(JSON.parse(again.stdout), {
    id: tokenIdOf(token),
    status: 'ENROLLMENT_TOKEN_STATUS_REVOKED',
    devicesRevoked: 0,
  })
})

test('what the server refuses is an error with exit code 1, and what contradicts itself one with 2', async t => {
  const { edgemesh } = scene()
  const unknown = await edgemesh('show', '0123456789ab')
  t.deepEqual([unknown.exitCode, unknown.stdout], [1, ''])
  t.regex(unknown.stderr, /^error: there is no enrollment token 0123456789ab/)
  const pattern = await edgemesh('create', '--device-pattern', 'Press/*')
  t.is(pattern.exitCode, 1)
  t.regex(pattern.stderr, /^error: device_id_pattern has to be .*such as press-\*/)
  const network = await edgemesh('create', '--network', '10.0.0.0/33')
  t.regex(network.stderr, /^error: source_networks\[0\] has to be a network such as/)
  for (const contradiction of [
    ['--reusable', '--uses', '3'],
    ['--device', 'a', '--device-pattern', 'a*'],
  ]) {
    const { exitCode, stderr } = await edgemesh('create', ...contradiction)
    t.is(exitCode, 2)
    t.regex(stderr, /^error: option .* cannot be used with option/)
  }
})
