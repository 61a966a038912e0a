/** `edgemesh ca`, as an operator types it, against a real server. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { saveCredentials } from '../../src/cli/operator-credentials.ts'
import { secrets, shared, startEdgeMesh } from '../support/edgemesh.ts'
import { openssl } from '../support/openssl.ts'
import { testDatabase } from '../support/postgres.ts'

const mesh = shared(test, async file => {
  const mesh = await startEdgeMesh(file)
  folder = await mkdtemp(join(tmpdir(), 'edgemesh-ca-'))
  file.teardown(() => rm(folder, { recursive: true, force: true }))
  const { keyPem = '', certificatePem = '', rootsPem } = mesh.operator
  await saveCredentials(folder, { keyPem, certificatePem, rootsPem, server: `localhost:${mesh.server.apiPort}` })
  return mesh
})
const main = join(import.meta.dirname, '../../src/main.ts')
let folder = ''

function edgemesh(args: string[], env: Record<string, string> = { EDGEMESH_CREDENTIALS: folder }) {
  return new Promise<{ exitCode: number; stdout: string; stderr: string }>(resolve => {
    execFile(process.execPath, [main, ...args], { env: { PATH: process.env.PATH, ...env } }, (error, stdout, stderr) =>
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr }),
    )
  })
}

test.serial('an operator sees who issues, rotates a stage on and back, and is told why a stage is too far', async t => {
  await mesh().enroll({ device: { id: 'alpha' } })
  const before = JSON.parse((await edgemesh(['ca', 'show', '--json'])).stdout)
  t.is(before.rotationStage, 'AUTHORITY_ROTATION_STAGE_STABLE')

  const on = await edgemesh(['ca', 'rotate', '--to', 'published'])
  t.deepEqual([on.exitCode, on.stdout], [0, 'the authority is published\n'], on.stderr)
  const shown = await edgemesh(['ca', 'show'])
  t.regex(shown.stdout, /devices that trust the new root +0 of 1/)
  t.regex(shown.stdout, /2 +trusted/)
  const behind = await edgemesh(['ca', 'progress', '--behind'])
  t.regex(behind.stdout, /spiffe:\/\/edgemesh\.local\/device\/alpha +no +no/)

  const tooFar = await edgemesh(['ca', 'rotate', '--to', 'issuing'])
  t.is(tooFar.exitCode, 1)
  t.regex(tooFar.stderr, /error: 1 of 1 devices have not reported yet/)
  const nonsense = await edgemesh(['ca', 'rotate', '--to', 'retiring'])
  t.regex(nonsense.stderr, /error: the rotation is at published: it can go on to issuing or back to stable/)

  t.is((await edgemesh(['ca', 'rotate', '--to', 'stable', '--json'])).exitCode, 0)
  const after = JSON.parse((await edgemesh(['ca', 'show', '--json'])).stdout)
  t.is(after.trustBundle.id, before.trustBundle.id)
})

test.serial('openssl reads the revocation list that ca crl prints', async t => {
  const { stdout } = await edgemesh(['ca', 'crl'])
  const { said } = await openssl(t, ['crl', '-in', 'list', '-noout', '-issuer'], { list: stdout })
  t.regex(said, /issuer=CN = EdgeMesh Issuing CA/)
})

test('the authority can be made before the first start, once', async t => {
  const { url } = await testDatabase(t)
  const root = join(folder, 'root.pem')
  const env = { ...secrets, DATABASE_URL: url }
  const first = JSON.parse((await edgemesh(['ca', 'init', '--json', '--out', root], env)).stdout)
  const again = JSON.parse((await edgemesh(['ca', 'init', '--json'], env)).stdout)
  t.deepEqual([first.created, again.created], [true, false])
  t.is(again.rootKeySha256, first.rootKeySha256)
  const { said } = await openssl(t, ['x509', '-in', 'root', '-noout', '-subject'], { root: await readFile(root) })
  t.regex(said, /EdgeMesh Root CA/)
})
