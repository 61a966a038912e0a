/** The commands for grpcurl in docs/integrate.md, each as it stands there, with what they print. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { heartbeats } from '../support/device.ts'
import { startEdgeMesh } from '../support/edgemesh.ts'
import { findGrpcurl } from '../support/grpcurl.ts'
import { healthy } from '../support/healthy.ts'
import { runScript } from './daemon.ts'
import { blocksUnder, repository } from './guide.ts'

const grpcurl = findGrpcurl()
const curling = grpcurl ? test : test.skip
if (!grpcurl) test.skip('grpcurl is not on this machine: .ci/tools installs it', t => t.pass())

curling('every command of the cookbook does what is printed below it', async t => {
  t.timeout(300_000)
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await heartbeats(t, mesh, device).beat(healthy)
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-cookbook-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const files = {
    'ca.crt': mesh.anonymous.rootsPem,
    'operator.crt': mesh.operator.certificatePem ?? '',
    'operator.key': mesh.operator.keyPem ?? '',
    'device.crt': device.certificatePem,
    'device.key': device.keyPem,
  }
  for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text, { mode: 0o600 })

  const blocks = blocksUnder('With grpcurl')
  // One shell for all of them, as at a prompt: a line between them tells whose output is whose.
  const script = blocks.map(({ info, text }, at) => (info === 'sh' ? `${text}\necho "=== ${at}"\n` : '')).join('')
  const env = { SERVER: `localhost:${mesh.server.apiPort}`, OPERATOR: folder, DEVICE: folder }
  const program = runScript(t, script, { folder: repository, env })
  t.is(await program.ended, 0, program.lines.join('\n'))

  const outputs = program.lines.join('\n').split(/^=== (\d+)$/m)
  let expected = 0
  for (const [at, { info, text }] of blocks.entries()) {
    if (info !== 'text') continue
    const output = outputs[outputs.indexOf(String(at - 1)) - 1] ?? ''
    for (const line of text.trim().split('\n')) {
      t.true(output.includes(line), `${line}\nis not in\n${output}`)
      expected++
    }
  }
  t.true(expected > 10)
})
