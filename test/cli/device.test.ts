import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { heartbeats } from '../support/device.ts'
import { type EdgeMesh, startEdgeMesh } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

/** The bin, as an operator at a terminal has it. */
async function terminal(t: ExecutionContext, { server, operator }: EdgeMesh) {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-operator-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const { keyPem = '', certificatePem = '', rootsPem } = operator
  const files = { 'operator.key': keyPem, 'operator.crt': certificatePem, 'ca.crt': rootsPem }
  for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text, { mode: 0o600 })
  const main = join(import.meta.dirname, '../../src/main.ts')
  const env = { PATH: process.env.PATH, EDGEMESH_SERVER: `localhost:${server.apiPort}`, EDGEMESH_CREDENTIALS: folder }
  return (...args: string[]) =>
    new Promise<{ exitCode: number; stdout: string; stderr: string }>(resolve => {
      execFile(process.execPath, [main, 'device', ...args], { env }, (error, stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
      })
    })
}

test('an operator approves, looks at and deletes a device from the command line', async t => {
  const mesh = await startEdgeMesh(t)
  const run = await terminal(t, mesh)
  const alpha = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, alpha).beat(healthy)
  await mesh.pool.query("update devices set status = 'pending' where id = 'alpha'")
  await mesh.pool.query("update device_postures set clock_offset_ms = -10800000, trust_bundle_id = 'roots-1'")

  t.regex((await run('list', '--status', 'pending')).stdout, /^alpha .*pending/m)
  t.deepEqual(await run('approve', 'alpha'), { exitCode: 0, stdout: 'device alpha is active\n', stderr: '' })
  const { stdout: shown } = await run('show', 'alpha')
  t.regex(shown, /^clock +3h behind$/m)
  t.regex(shown, /^trust bundle +roots-1$/m)
  t.regex(shown, /^SERIAL +ISSUER/m)

  t.deepEqual(await run('delete', 'alpha'), { exitCode: 0, stdout: 'device alpha is deleted\n', stderr: '' })
  const again = await run('delete', 'alpha', '--json')
  t.is(again.exitCode, 1)
  t.is(again.stderr.split('\n')[0], 'error: there is no device alpha')
})
