/** The files of Docker Compose, read by Compose itself, which needs no engine for that. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { parse } from 'yaml'
import { findBinaries } from '../../src/db/embedded.ts'
import { readSettings } from '../../src/settings.ts'
import { findProgram } from '../support/find-program.ts'
import { freePort } from '../support/free-port.ts'
import { openSecrets, unknownSettings } from '../support/known-settings.ts'
import { findOpa } from '../support/opa.ts'
import { deploy, judged, root, say } from '../support/programs.ts'
import { serve } from '../support/serve.ts'
import { makeSecrets, openFolder, shippedPostgres } from '../support/shipped-postgres.ts'

const compose = findProgram('docker-compose')
const haproxy = findProgram('haproxy')
const psql = findProgram('psql')
const files = { production: 'compose.production.yaml', development: 'compose.yaml' } as const
/** They end when they are done, so there is nothing to be healthy. */
const oneShot = new Set(['migrate', 'cli'])

type Service = {
  image: string
  build?: unknown
  user?: string
  read_only?: boolean
  cap_drop?: string[]
  cap_add?: string[]
  privileged?: boolean
  security_opt?: string[]
  restart?: string
  command?: string[]
  stop_grace_period?: string
  environment?: Record<string, string>
  healthcheck?: { test?: string[]; disable?: boolean }
  logging?: { driver: string; options: Record<string, string> }
  deploy?: { resources?: { limits?: Record<string, unknown> } }
  ports?: { host_ip?: string; target: number }[]
  networks: Record<string, { ipv4_address?: string; aliases?: string[] } | null>
  volumes?: { type: string; source: string; read_only?: boolean }[]
  secrets?: { source: string; target: string }[]
}
type Model = {
  services: Record<string, Service>
  networks: Record<string, { internal?: boolean }>
  secrets: Record<string, { file: string }>
}

/** As Compose understands the file, with secrets made in a folder of the test's own. */
async function load(t: ExecutionContext, program: string, file: string): Promise<Model & { folder: string }> {
  const folder = join(await openFolder(t, 'compose'), 'secrets')
  await makeSecrets(folder)
  const args = ['-f', join(deploy, 'compose', file), '--profile', '*', 'config', '--format', 'json']
  const { exitCode, said, stdout } = await say(program, args, { env: { PATH: process.env.PATH, SECRETS_DIR: folder } })
  if (exitCode !== 0) throw new Error(said)
  return { ...JSON.parse(stdout), folder }
}

const isEdgeMesh = ({ image }: Service) => /\/?edgemesh:/.test(image)

/** With what is told as files inside the container read from where those lie outside. */
function environmentOf({ environment = {}, secrets = [] }: Service, model: Model): Record<string, string> {
  return Object.fromEntries(
    Object.entries(environment).map(([name, value]) => {
      if (!name.endsWith('_FILE') || value === '') return [name, value]
      const secret = secrets.find(({ target }) => target === value)
      if (!secret) throw new Error(`${name}=${value} is no secret of that service`)
      return [name, model.secrets[secret.source]?.file ?? '']
    }),
  )
}

for (const [name, file] of Object.entries(files)) {
  judged(
    `${name}: Compose accepts the file, and every service is held as tight as it can be`,
    { compose },
    async (t, { compose }) => {
      const model = await load(t, compose, file)
      for (const [name, service] of Object.entries(model.services)) {
        t.regex(service.user ?? 'root', /^[1-9]\d*:[1-9]\d*$/, `${name} runs as root`)
        t.true(service.read_only, `${name} may write everywhere`)
        t.deepEqual(service.cap_drop, ['ALL'], name)
        t.is(service.cap_add, undefined, name)
        t.not(service.privileged, true, name)
        t.deepEqual(service.security_opt, ['no-new-privileges:true'], name)
        const { cpus, memory, pids } = service.deploy?.resources?.limits ?? {}
        t.true(Number(cpus) > 0 && Number(memory) > 0 && Number(pids) > 0, `${name} has no limits`)
        t.truthy(service.logging?.options['max-size'], `${name}: its log has no end`)
        t.truthy(service.restart, name)
        if (!oneShot.has(name)) {
          t.truthy(service.healthcheck?.test, `${name}: nobody knows whether it lives`)
          t.is(service.restart, 'unless-stopped', name)
        }
        const built = Object.values(model.services).some(
          ({ build, image }) => build !== undefined && image === service.image,
        )
        if (!built) t.regex(service.image, /^[\w./-]+:v?\d+\.\d+(\.\d+)?(-[a-z]+)?(@sha256:\w{64})?$/, name)
      }
    },
  )

  judged(
    `${name}: what is mounted is there, and none of it can be changed from within`,
    { compose },
    async (t, { compose }) => {
      const { services } = await load(t, compose, file)
      for (const [name, { volumes = [] }] of Object.entries(services)) {
        for (const { type, source, read_only } of volumes.filter(({ type }) => type === 'bind')) {
          t.is(type, 'bind')
          t.true(read_only, `${name}: ${source}`)
          t.true(existsSync(source), `${name}: ${source} is not there`)
        }
      }
    },
  )

  judged(
    `${name}: secrets are files that only their service can read, and settings are those of EdgeMesh`,
    { compose },
    async (t, { compose }) => {
      const model = await load(t, compose, file)
      for (const [name, service] of Object.entries(model.services)) {
        for (const { source } of service.secrets ?? []) {
          const path = model.secrets[source]?.file ?? ''
          const { mode, uid } = statSync(path)
          t.is(mode & 0o777, 0o600, path)
          if (process.getuid?.() === 0) t.is(uid, Number(service.user?.split(':')[0]), `${name} can't read ${path}`)
        }
        for (const [variable, value] of Object.entries(service.environment ?? {})) {
          const secret = /PASS|SECRET|TOKEN|KEY|PASSPHRASE/.test(variable) && !/_FILE$|^PASSWORDS$/.test(variable)
          t.false(secret, `${name}: ${variable}=${value}`)
        }
        if (!isEdgeMesh(service)) continue
        t.deepEqual(unknownSettings(Object.keys(service.environment ?? {})), [], name)
        t.deepEqual(openSecrets(service.environment ?? {}), [], name)
        const settings = readSettings(environmentOf(service, model))
        t.truthy(settings.database.url)
        t.is(settings.opa.bearerToken, readFileSync(join(model.folder, 'opa', 'token'), 'utf8').trim())
        t.is(
          settings.database.migrationUrl !== undefined,
          name === 'migrate',
          'the owner of the tables is for migrate alone',
        )
        const graceSeconds = Number(/^(?:(\d+)m)?(\d+)s$/.exec(service.stop_grace_period ?? '')?.[2])
        t.true(graceSeconds >= settings.drainMs / 1_000 + 10, `${name} is killed while it drains`)
      }
    },
  )
}

judged(
  'production: nothing is published but the gRPC port, and Grafana to this host',
  { compose },
  async (t, { compose }) => {
    const { services, networks } = await load(t, compose, files.production)
    const published = Object.entries(services).flatMap(([name, { ports = [] }]) =>
      ports.map(({ host_ip, target }) => `${name} ${host_ip ?? 'everywhere'} ${target}`),
    )
    t.deepEqual(published.sort(), ['grafana 127.0.0.1 3000', 'haproxy everywhere 8000'])
    for (const name of ['database', 'policy', 'metrics']) t.true(networks[name]?.internal, name)
    const inDatabase = Object.keys(services).filter(name => 'database' in (services[name]?.networks ?? {}))
    const allowed = /^(postgres.*|edgemesh-\d|migrate|cli)$/
    t.deepEqual(
      inDatabase.filter(name => !allowed.test(name)),
      [],
    )
    for (const name of ['postgres', 'postgres-replica'])
      t.deepEqual(Object.keys(services[name]?.networks ?? {}), ['database'])
  },
)

judged(
  'production: the instances together never want more connections than PostgreSQL has',
  { compose },
  async (t, { compose }) => {
    const model = await load(t, compose, files.production)
    const most = Object.values(model.services)
      .filter(service => isEdgeMesh(service))
      .map(service => {
        const { database } = readSettings(environmentOf(service, model))
        // Each worker hears of changes by a connection of its own, and there is one for each core.
        return database.poolMax + Number(service.deploy?.resources?.limits?.cpus)
      })
      .reduce((sum, connections) => sum + connections, 0)
    const conf = await readFile(join(deploy, 'postgres', 'postgresql.conf'), 'utf8')
    const of = (name: string) => Number(new RegExp(`^${name} = (\\d+)$`, 'm').exec(conf)?.[1])
    const monitor = 5
    t.true(most + monitor <= of('max_connections') - of('superuser_reserved_connections'), `${most} connections`)
  },
)

judged(
  'production: HAProxy accepts its file with the addresses of the instances, which trust it',
  { compose, haproxy },
  async (t, { compose, haproxy }) => {
    const { services } = await load(t, compose, files.production)
    const balancer = services.haproxy
    const addressOf = (name: string) => services[name]?.networks.edge?.ipv4_address
    const given = balancer?.environment ?? {}
    for (const [at, number] of ['ONE', 'TWO', 'THREE'].entries()) {
      t.is(given[`EDGEMESH_${number}`], `${addressOf(`edgemesh-${at + 1}`)}:8000`)
      t.is(services[`edgemesh-${at + 1}`]?.environment?.TRUSTED_PROXIES, `${addressOf('haproxy')}/32`)
    }
    const folder = await openFolder(t, 'compose-haproxy')
    const env = { PATH: process.env.PATH, ...given, HAPROXY_SOCKET: join(folder, 'admin') }
    const { exitCode, said } = await say(haproxy, ['-c', '-f', join(deploy, 'haproxy', 'haproxy.cfg')], { env })
    t.is(exitCode, 0, said)
  },
)

judged(
  'production: what Prometheus scrapes are services, with ports at which they listen',
  { compose },
  async (t, { compose }) => {
    const { services } = await load(t, compose, files.production)
    const folder = join(deploy, 'prometheus', 'targets')
    const listed = await Promise.all(
      (await readdir(folder)).map(async name => parse(await readFile(join(folder, name), 'utf8'))),
    )
    const targets = listed.flat().flatMap(({ targets }: { targets: string[] }) => targets)
    for (const target of targets) {
      const [host = ''] = target.split(':')
      t.true('metrics' in (services[host]?.networks ?? {}), `${target} is no service that Prometheus reaches`)
    }
  },
)

judged(
  'production: with what Compose hands to its services the schema is brought, and an instance serves with PostgreSQL and OPA',
  { compose, psql, opa: findOpa() },
  async (t, { compose, psql, opa }) => {
    t.timeout(120_000)
    const model = await load(t, compose, files.production)
    const { services, folder } = model
    // The names of services lead nowhere here: the database and OPA are on this host, at ports of their own.
    const server = await shippedPostgres(t, findBinaries())
    const env = { PATH: process.env.PATH, PGPASSWORD: await server.password('superuser') }
    const roles = join(deploy, 'postgres', 'roles.sql')
    t.true(services.postgres?.volumes?.some(({ source }) => source === roles))
    const args = [
      '--no-psqlrc',
      '--quiet',
      `--host=${server.folder}`,
      `--port=${server.port}`,
      '--username=postgres',
      `--file=${roles}`,
    ]
    const made = await say(psql, [...args, 'postgres'], { env: { ...env, PASSWORDS: join(folder, 'postgres') } })
    t.is(made.exitCode, 0, made.said)
    const [kind, check = ''] = services.postgres?.healthcheck?.test ?? []
    t.is(kind, 'CMD-SHELL')
    const inside = { PGDATA: join(server.folder, 'data'), PGHOST: server.folder, PGPORT: `${server.port}` }
    const healthy = await say('/bin/sh', ['-c', check.replaceAll('$$', '$')], { env: { ...env, ...inside } })
    t.is(healthy.exitCode, 0, healthy.said)
    const port = await freePort()
    const opaEnvironment = { ...environmentOf(services.opa as Service, model), OPA_ADDR: `127.0.0.1:${port}` }
    const bundle = join(await openFolder(t, 'bundle'), 'bundle.tar.gz')
    const ignored = ['*_test.rego', 'bundle', '*.json'].flatMap(pattern => ['--ignore', pattern])
    const built = await say(opa, ['build', '--revision', 'r1', ...ignored, '--output', bundle, join(root, 'policies')])
    t.is(built.exitCode, 0, built.said)
    const path = `${join(opa, '..')}:${process.env.PATH}`
    const guard = spawn(join(deploy, 'opa', 'start'), [bundle], {
      env: { PATH: path, ...opaEnvironment },
      stdio: 'ignore',
    })
    t.teardown(async () => {
      const exited = once(guard, 'exit')
      guard.kill('SIGKILL')
      await exited
    })
    const here = async (environment: Record<string, string>) => {
      const settings: Record<string, string> = { ...environment, OPA_URL: `http://127.0.0.1:${port}` }
      for (const name of Object.keys(settings).filter(name => /^DATABASE_.*_FILE$/.test(name))) {
        const url = await readFile(settings[name] ?? '', 'utf8')
        settings[name] = join(server.folder, name)
        const moved = url.replace(/@postgres(-replica)?:5432/, `@localhost:${server.port}`)
        await writeFile(settings[name], moved.replace('/run/secrets/postgres-ca.crt', join(server.folder, 'ca.crt')))
      }
      return settings
    }
    const migration = await here(environmentOf(services.migrate as Service, model))
    const migrated = await say(process.execPath, [join(root, 'src/main.ts'), ...(services.migrate?.command ?? [])], {
      env: { PATH: process.env.PATH, ...migration },
    })
    t.is(migrated.exitCode, 0, migrated.said)
    t.regex(migrated.said, /edgemesh has what a server needs/)
    const free = {
      API_HOST: '127.0.0.1',
      API_PORT: '0',
      METRICS_HOST: '127.0.0.1',
      METRICS_PORT: '0',
      TRUSTED_PROXIES: '',
    }
    const settings = {
      ...(await here(environmentOf(services['edgemesh-1'] as Service, model))),
      ...free,
      DRAIN_SECONDS: '1',
    }
    const served = await serve(t, settings)
    const ready = (await (await fetch(`${served.http}/readyz`)).json()) as { ready: boolean }
    t.true(ready.ready, JSON.stringify(ready))
    t.is(await served.stop(), 0)
  },
)

test('secrets are made once: made again, those that are there stay, and a wrong host is told', async t => {
  const folder = join(await openFolder(t, 'secrets'), 'secrets')
  await makeSecrets(folder)
  const paths = (await readdir(folder, { recursive: true, withFileTypes: true }))
    .filter(entry => entry.isFile())
    .map(({ parentPath, name }) => join(parentPath, name))
  const before = paths.map(path => readFileSync(path, 'utf8'))
  await makeSecrets(folder)
  t.deepEqual(
    paths.map(path => readFileSync(path, 'utf8')),
    before,
  )
  t.is((await stat(folder)).mode & 0o777, 0o700)
  const contents = before.filter(text => /^[0-9a-f]{64}$/.test(text))
  t.is(contents.length, 13)
  // Two of the services know the token beside OPA, and one of the exporters its own password.
  t.is(new Set(contents).size, 10, 'secrets are different ones')
  const error = await t.throwsAsync(makeSecrets(folder, { DATABASE_HOST: 'two words' }))
  t.regex(error?.message ?? '', /error: DATABASE_HOST and REPLICA_HOST are names of hosts, not 'two words'/)
})
