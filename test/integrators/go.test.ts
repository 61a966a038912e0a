/** A daemon in Go, with stubs of our protos, as docs/integrate.md has it. */
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import test from 'ava'
import { findProgram } from '../support/find-program.ts'
import { exampleFolder, furnished, liveADaemonsLife } from './daemon.ts'
import { installedBy, repository, scriptUnder } from './guide.ts'

const missing = ['go', 'protoc-gen-go', 'protoc-gen-go-grpc'].filter(name => findProgram(name) === undefined)
/** As `.ci/tools` compiles, so that what it has compiled is found. */
const env = { GOFLAGS: '-trimpath' }

if (missing.length === 0) {
  test('a daemon in Go enrolls, reports, holds a connection through what may happen, and lets go of it when told', async t => {
    t.timeout(300_000)
    const [served, folder] = await Promise.all([furnished(t), exampleFolder(t, 'go')])
    await liveADaemonsLife(t, served, scriptUnder('Go'), { folder, env })
  })

  test('the daemon in Go is formatted and vetted', async t => {
    t.timeout(300_000)
    const folder = await exampleFolder(t, 'go')
    const path = [join(repository, '.tools/bin'), join(repository, 'node_modules/.bin'), process.env.PATH].join(
      delimiter,
    )
    const options = { cwd: folder, env: { ...process.env, PATH: path, ...env }, encoding: 'utf8' } as const
    t.is(execFileSync('gofmt', ['-l', '.'], options), '')
    execFileSync('buf', ['generate'], options)
    t.is(execFileSync('go', ['vet', '.'], options), '')
  })
} else {
  test.skip(`a daemon in Go (${missing.join(', ')} missing: .ci/tools installs the plugins, go.dev/dl has Go)`, t =>
    t.pass())
}

test('what docs/integrate.md installs for Go is what is installed here', t => {
  const tools = readFileSync(join(repository, '.ci/tools'), 'utf8')
  const modules = installedBy('Go').match(/\S+@v\S+/g) ?? []
  t.is(modules.length, 2)
  for (const module of modules) t.true(tools.includes(module), module)
})
