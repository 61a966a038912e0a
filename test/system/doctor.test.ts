/** `edgemesh doctor` before a system that is set up as the documentation says, with all that belongs to it. */
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { checks } from '../../src/doctor/checks.ts'
import { goodSettings, look, strongSecret } from '../support/doctor.ts'
import { startEdgeMesh } from '../support/edgemesh.ts'
import { balancer, balancers, startBalancer } from '../support/load-balancers.ts'
import { findOpa, startOpa } from '../support/opa.ts'
import { buildOpaBundle } from '../support/opa-bundle.ts'
import { serve } from '../support/serve.ts'
import { twoRoles } from '../support/service-role.ts'

/** What depends on the machine that runs the test, not on what the test has set up. */
const ofTheMachine = ['memory', 'open-files', 'clock']

type Finding = { check: string; severity: string; what: string }

/** As `--settings-file` of the very file that the server is started with. */
function doctor(envFile: string, ...args: string[]): Promise<{ exitCode: number; findings: Finding[] }> {
  const main = join(import.meta.dirname, '../../src/main.ts')
  const command = [main, 'doctor', '--settings-file', envFile, '--skip', ofTheMachine.join(), '--json', ...args]
  return new Promise((resolve, reject) => {
    execFile(process.execPath, command, { env: { PATH: process.env.PATH } }, (error, stdout, stderr) => {
      if (stdout === '') reject(new Error(stderr))
      else resolve({ exitCode: error ? Number(error.code) : 0, findings: JSON.parse(stdout).findings })
    })
  })
}

async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-'))
  t.teardown(() => rm(path, { recursive: true }))
  return path
}

const { haproxy } = balancers
const missing = [...(findOpa() ? [] : ['opa']), ...(haproxy.program ? [] : ['haproxy'])]
const title = 'a system that is set up as documented has no finding, before it is started and while it runs'
if (missing.length > 0) {
  test.skip(`${title}: ${missing.join(' and ')} is missing, .ci/tools installs it`, t => t.pass())
} else {
  test(title, async t => {
    const roles = await twoRoles(t)
    t.is((await roles.migrateUp()).exitCode, 0)
    // Nobody would guess it; the one that the test's role has is for tests.
    const password = strongSecret()
    await roles.pool.query(`alter role ${roles.service.name} password '${password}'`)
    const url = new URL(roles.service.url)
    url.password = password
    const token = strongSecret()
    const opa = await startOpa(t, { token, bundle: await buildOpaBundle(t, 'r1') })
    const path = await folder(t)
    const env: Record<string, string> = {
      ...goodSettings,
      DATABASE_URL: url.href,
      DATABASE_POOL_SIZE: '2',
      DATABASE_MAX_OVERFLOW: '0',
      OPA_URL: opa.url,
      OPA_BEARER_TOKEN: token,
      TRUSTED_PROXIES: balancer,
      DATA_DIR: join(path, 'data'),
      DRAIN_SECONDS: '1',
    }
    const envFile = join(path, 'edgemesh.env')
    const writeEnv = () =>
      writeFile(
        envFile,
        Object.entries(env)
          .map(([name, value]) => `${name}=${value}\n`)
          .join(''),
        { mode: 0o600 },
      )
    const backup = join(path, 'edgemesh.prom')
    await writeFile(backup, `edgemesh_backup_last_success_timestamp_seconds ${Date.now() / 1_000 - 3_600}\n`)

    // On the eve of the first start.
    await writeEnv()
    const before = await doctor(envFile, '--backup-metrics', backup)
    // How long commits take on a machine that others use as well is no fault of what was set up.
    const worse = ({ findings }: { findings: Finding[] }) =>
      findings.filter(
        ({ check, severity }) => severity === 'failed' || (severity === 'warning' && check !== 'instance-latency'),
      )
    t.deepEqual(worse(before), [])
    t.is(before.exitCode, 0)

    const served = await serve(t, env)
    Object.assign(env, { API_PORT: String(served.apiPort), METRICS_PORT: String(served.metricsPort) })
    await writeEnv()
    const port = await startBalancer(t, haproxy, [served])
    const running = await doctor(envFile, '--backup-metrics', backup, '--public', `localhost:${port}`, '--idle', '1')
    t.deepEqual(worse(running), [])
    t.is(running.exitCode, 0)
    t.deepEqual(
      running.findings.filter(({ severity }) => severity === 'skipped').map(({ check }) => check),
      ['replicas'],
    )
    t.deepEqual(
      running.findings.map(({ check }) => check),
      checks.map(({ name }) => name).filter(name => !ofTheMachine.includes(name)),
    )
    t.false(JSON.stringify(running).includes(password))
    t.is(await served.stop(), 0)
  })
}

test('looking changes nothing in the database', async t => {
  const mesh = await startEdgeMesh(t)
  await mesh.token()
  await mesh.server.stop()
  const { rows: tables } = await mesh.pool.query<{ name: string }>(
    `select relname as name from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'`,
  )
  const content = async () => {
    const all: Record<string, unknown> = {}
    for (const { name } of tables) {
      const { rows } = await mesh.pool.query(`select md5(string_agg(x::text, ',' order by x::text)) from ${name} as x`)
      all[name] = rows[0]
    }
    const { rows } = await mesh.pool.query(`select count(*) from pg_class where relnamespace = 'public'::regnamespace`)
    return { ...all, relations: rows[0] }
  }
  const before = await content()
  const found = await look(
    { DATABASE_URL: mesh.databaseUrl },
    checks.map(({ name }) => name),
  )
  t.true(found.length >= checks.length)
  t.deepEqual(await content(), before)
})
