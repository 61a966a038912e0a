/** The npm package, as another team has it: packed here, installed into an empty folder, used from there. */
import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import test, { type ExecutionContext } from 'ava'
import { loadIdentity } from '../../src/client/client.ts'
import { enrollDevice } from '../../src/client/enroll.ts'
import { saveState } from '../../src/client/state.ts'
import { exampleFolder, furnished, liveADaemonsLife, runScript } from './daemon.ts'
import { blocksUnder, repository, scriptUnder } from './guide.ts'

const path = [join(repository, 'node_modules/.bin'), process.env.PATH].join(delimiter)
/** Packing compiles everything, and installing unpacks a hundred packages. */
const timeoutMs = 600_000

async function run(command: string, args: string[], cwd: string): Promise<string> {
  try {
    const options = { cwd, env: { ...process.env, PATH: path }, maxBuffer: 16 * 1024 * 1024 }
    return (await promisify(execFile)(command, args, options)).stdout
  } catch (error) {
    const { stdout, stderr } = error as { stdout: string; stderr: string }
    throw new Error(`${command} ${args.join(' ')} has failed:\n${stdout}${stderr}`, { cause: error })
  }
}

/** What the package does not bring along comes from here: npm asks it for what its cache does not hold. */
const registry = await run('npm', ['ping', '--fetch-retries', '0', '--fetch-timeout', '10000'], tmpdir()).then(
  () => true,
  () => false,
)
const installing = registry ? test.serial : test.skip
if (!registry) test.skip('the package, installed (the npm registry can not be reached)', t => t.pass())

let folder = ''
let listed: string[] = []

test.before(async t => {
  t.timeout(timeoutMs)
  folder = await mkdtemp(join(tmpdir(), 'edgemesh-package-'))
  const [packed] = JSON.parse(await run('npm', ['pack', '--json', '--pack-destination', folder], repository)) as [
    { filename: string; files: { path: string }[] },
  ]
  listed = packed.files.map(file => file.path)
  if (!registry) return
  await mkdir(join(folder, 'installed'))
  await writeFile(join(folder, 'installed/package.json'), '{"private": true, "type": "module"}')
  const options = ['--prefer-offline', '--no-fund', '--no-audit', '--loglevel', 'error']
  await run('npm', ['install', ...options, join(folder, packed.filename)], join(folder, 'installed'))
})

test.after.always(() => rm(folder, { recursive: true, force: true }))

/** As after `npm install edgemesh`, without doing it again. */
async function withPackage(t: ExecutionContext): Promise<string> {
  const example = await exampleFolder(t, 'typescript')
  await run('cp', ['-al', join(folder, 'installed/node_modules'), join(example, 'node_modules')], folder)
  // What the example's devDependencies bring.
  for (const name of ['buf', 'protoc-gen-ts_proto']) {
    await symlink(join(repository, 'node_modules/.bin', name), join(example, 'node_modules/.bin', name))
  }
  return example
}

test('the package has what runs and what integrators need, and nothing else', t => {
  for (const file of [
    'package.json',
    'README.md',
    'LICENSE',
    'src/edgemesh.js',
    'dist/main.js',
    'dist/workers/worker.js',
    'dist/client/client.js',
    'dist/client/client.d.ts',
    'dist/gen/edgemesh.binpb',
    'proto/edgemesh/v1/authorize.proto',
    'policies/authz.rego',
    'policies/bundle/policy.wasm',
    'policies/bundle/manifest.json',
  ]) {
    t.true(listed.includes(file), file)
  }
  const other = listed.filter(
    file =>
      !/^(dist\/.*\.(js|d\.ts|binpb)|proto\/.*\.proto|policies\/bundle\/.*|policies\/[a-z-]+\.rego)$/.test(file) &&
      !['package.json', 'README.md', 'LICENSE', 'CHANGELOG.md', 'src/edgemesh.js'].includes(file),
  )
  t.deepEqual(other, [])
})

installing(
  'edgemesh runs from the package, as from a checkout: its version, and a whole server that proves itself',
  async t => {
    t.timeout(timeoutMs)
    const installed = join(folder, 'installed')
    const { version } = JSON.parse(await readFile(join(repository, 'package.json'), 'utf8'))
    for (const place of [installed, repository]) {
      // A checkout knows its commit, too.
      const [said] = (await run('npx', ['--no', '--', 'edgemesh', '--version'], place)).trim().split(' (')
      t.is(said, version)
    }
    const script = 'API_PORT=0 METRICS_PORT=0 npx --no -- edgemesh dev --once --json --data ./data'
    const program = runScript(t, script, { folder: installed, env: { PATH: path } })
    t.is(await program.ended, 0, program.lines.join('\n'))
    t.like(JSON.parse(program.lines.at(-1) ?? ''), { step: 'done', ok: true })
  },
)

installing('worker processes start from the package', async t => {
  t.timeout(timeoutMs)
  const { mesh } = await furnished(t)
  const env = {
    PATH: path,
    DATABASE_URL: mesh.databaseUrl,
    ENROLLMENT_TOKEN_SECRET: 'a-test-secret-for-tokens-that-is-long-enough',
    CA_KEY_PASSPHRASE: 'a-test-passphrase-for-the-ca-that-is-long-enough',
    API_PORT: '0',
    METRICS_PORT: '0',
  }
  const program = runScript(t, 'exec npx --no -- edgemesh serve --workers 1', {
    folder: join(folder, 'installed'),
    env,
  })
  t.regex(await program.heard(/edgemesh is serving/), /"port":\d+/)
})

installing('a project in strict TypeScript takes the types as they are', async t => {
  t.timeout(timeoutMs)
  const example = await withPackage(t)
  await run('buf', ['generate'], example)
  const service = blocksUnder('TypeScript').find(({ info }) => info === 'ts service')?.text ?? ''
  t.true(service.includes('client.check'))
  await writeFile(
    join(example, 'service.ts'),
    `import { connect, readIdentity } from 'edgemesh/client'\n${service}console.log(allowed, reasons[0]?.code)\n`,
  )
  await writeFile(
    join(example, 'wrong.ts'),
    `import { connect } from 'edgemesh/client'\n// @ts-expect-error: it needs an identity\nconnect({ server: 'localhost:8000' })\n`,
  )
  await run('tsc', ['-p', '.', '--skipLibCheck', 'false'], example)
  t.pass()
})

installing(
  'a daemon on edgemesh/client enrolls, reports, holds a connection through what may happen, and lets go',
  async t => {
    t.timeout(timeoutMs)
    const [served, example] = await Promise.all([furnished(t), withPackage(t)])
    await liveADaemonsLife(t, served, scriptUnder('TypeScript'), { folder: example })
    const kept = await loadIdentity(join(example, 'my-gateway'))
    t.is(kept?.deviceId, 'gateway-1')
  },
)

installing('bare stubs, loaded and generated, ask with the identity that the daemon has kept', async t => {
  t.timeout(timeoutMs)
  const [{ mesh, server }, example] = await Promise.all([furnished(t), withPackage(t)])
  const identity = await enrollDevice({ server, token: await mesh.token(), device: { id: 'gateway-1' } })
  await saveState(join(example, 'my-gateway'), identity)
  const script = scriptUnder('TypeScript', 'sh stubs')
  const program = runScript(t, script, { folder: example, env: { EDGEMESH_SERVER: server, PATH: path } })
  t.is(await program.ended, 0, program.lines.join('\n'))
  t.deepEqual(
    program.lines.map(line => line.split(' ')[0]),
    ['reported,', 'allowed', 'allowed'],
  )
})

test('what docs/integrate.md shows of the daemon in TypeScript stands in it', async t => {
  const daemon = await readFile(join(repository, 'docs/examples/typescript/daemon.ts'), 'utf8')
  const shown = blocksUnder('TypeScript').filter(({ info }) => info === 'ts')
  t.true(shown.length > 1)
  for (const { text } of shown) t.true(daemon.includes(text), text)
})
