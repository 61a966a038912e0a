/** A daemon in Python, with stubs of our protos, as docs/integrate.md has it. */
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import test from 'ava'
import { exampleFolder, furnished, liveADaemonsLife } from './daemon.ts'
import { installedBy, repository, scriptUnder } from './guide.ts'

/** Where `.ci/tools` puts what requirements.txt names. */
const env = { PYTHONPATH: join(repository, '.tools/python'), PYTHONDONTWRITEBYTECODE: '1' }
const needed = 'import cryptography, google.rpc.status_pb2, grpc, grpc_tools'
const { status } = spawnSync('python3', ['-c', needed], { env: { ...process.env, ...env } })

if (status === 0) {
  test('a daemon in Python enrolls, reports, holds a connection through what may happen, and lets go of it when told', async t => {
    t.timeout(300_000)
    const [served, folder] = await Promise.all([furnished(t), exampleFolder(t, 'python')])
    await liveADaemonsLife(t, served, scriptUnder('Python'), { folder, env })
  })
} else {
  test.skip('a daemon in Python (python3, or what docs/examples/python/requirements.txt names, is missing: .ci/tools installs it)', t =>
    t.pass())
}

test('docs/integrate.md installs for Python what the example requires', t => {
  t.true(installedBy('Python').includes('-r requirements.txt'))
})
