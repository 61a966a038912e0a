/**
 * The topology of production on one machine, each part started as a process from the file that is shipped for it: etcd, two nodes
 * of PostgreSQL under Patroni, HAProxy before them, OPA, two instances of EdgeMesh with HAProxy before them, Prometheus and
 * Alertmanager.
 *
 * Whatever becomes of the test, nothing is left: all that it starts works in one folder, and a keeper ends whoever does and removes
 * the folder once nobody holds its standard input any more, be it because the test is over or because it was killed.
 */
import { type ChildProcess, execFile, execFileSync, type SpawnOptions, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  cpSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
} from 'node:fs'
import { mkdtemp, writeFile } from 'node:fs/promises'
import { Agent, request } from 'node:https'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { text } from 'node:stream/consumers'
import type { ExecutionContext } from 'ava'
import { readDatabaseUrl } from '../../src/db/database-url.ts'
import { eventually, secrets, testEnvironment } from './edgemesh.ts'
import { findPostgres, findProgram } from './find-program.ts'
import { freePort } from './free-port.ts'
import { balancer, balancers, startBalancer } from './load-balancers.ts'
import { alertmanager, prometheus, startAlertmanager, startInbox, startPrometheus } from './monitoring.ts'
import { findOpa } from './opa.ts'
import { type ServedEdgeMesh, serve } from './serve.ts'

const root = join(import.meta.dirname, '..', '..')
const deploy = join(root, 'deploy')
const main = join(root, 'src', 'main.ts')

/** Where Debian has PostgreSQL: the newest that is here. */
const postgresBin = findPostgres()

/** What the topology is made of; undefined is what this machine has not got. */
export const programs = {
  etcd: findProgram('etcd'),
  patroni: findProgram('patroni'),
  patronictl: findProgram('patronictl'),
  postgres: postgresBin,
  psql: postgresBin && join(postgresBin, 'psql'),
  haproxy: balancers.haproxy.program,
  prometheus,
  alertmanager,
  opa: findOpa(),
  openssl: findProgram('openssl'),
}

/** A machine of the database: Patroni and its PostgreSQL. */
export type DatabaseNode = {
  name: string
  /** Both with -9, as a machine that loses its power. */
  kill(): Promise<void>
  start(): void
  /** Whether Patroni answers 200 at this path: /primary, /sync, /replica. */
  is(path: string): Promise<boolean>
  /** All that the two have said. */
  said(): string
}

export type Instance = { name: string; running: ServedEdgeMesh; start(): Promise<void> }

export type Production = {
  /** Where devices and operators connect. */
  address: string
  /** What `edgemesh operator create` has left. */
  operatorFolder: string
  databaseUrl: string
  nodes: [DatabaseNode, DatabaseNode]
  etcd: { kill(): Promise<void>; start(): Promise<void> }
  instances: [Instance, Instance]
  prometheus: string
  inbox: Awaited<ReturnType<typeof startInbox>>
  patronictl(...args: string[]): Promise<string>
  /** `edgemesh`, with the settings of an instance. */
  edgemesh(args: string[], env?: Record<string, string>): Promise<string>
  /** The last lines that each part has said, for who looks into a failure. */
  said(): string
}

/** By their end: PostgreSQL makes a group of each of its processes, so a process's working folder is what tells whose it is. */
const keeper = `
cat > /dev/null
left=yes
while [ -n "$left" ]; do
  left=
  for process in /proc/[0-9]*; do
    case "$(readlink "$process/cwd")" in
      "$1" | "$1"/*) left=yes; kill -KILL "\${process#/proc/}" ;;
    esac
  done
done
rm -rf "$1"
`

/** @param t of the file: all ends with it */
export async function startProduction(t: ExecutionContext): Promise<Production> {
  const before = process.cwd()
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-production-'))
  chmodSync(folder, 0o755)
  const keeping = spawn('/bin/sh', ['-c', keeper, 'keeper', folder], {
    cwd: '/',
    detached: true,
    stdio: ['pipe', 'ignore', 'ignore'],
  })
  t.teardown(async () => {
    process.chdir(before)
    const kept = once(keeping, 'exit')
    keeping.stdin?.end()
    await kept
  })
  // Whatever this process starts works here, too.
  process.chdir(folder)
  // Nobody would tell it that the run of the tests was killed.
  process.once('disconnect', () => process.exit(1))

  const ports = await portsOf('etcd', 'etcdPeer', 'primary', 'replicas', 'opa')
  await makeCertificates(folder)
  const etcd = await startEtcd(folder, ports.etcd, ports.etcdPeer)
  const database = await startDatabase(folder, ports.etcd)
  await startDatabaseBalancer(folder, database.ports, ports)

  const url = (user: string, port: number) =>
    `postgresql://${user}:${passwords[user]}@localhost:${port}/edgemesh?sslmode=verify-full&sslrootcert=${folder}/tls/ca.crt`
  const env = {
    ...testEnvironment,
    DATABASE_URL: url('edgemesh', ports.primary),
    DATABASE_REPLICA_URLS: url('edgemesh', ports.replicas),
    OPA_URL: `http://127.0.0.1:${ports.opa}`,
    OPA_BEARER_TOKEN: opaToken,
    TRUSTED_PROXIES: balancer,
    HEARTBEAT_INTERVAL_SECONDS: '1',
    DRAIN_SECONDS: '8',
    // What a failover takes is below the default, on a machine that has nothing else to do.
    LEASE_GRACE_SECONDS: '120',
  }
  const edgemesh = (args: string[], more: Record<string, string> = {}) =>
    output(process.execPath, [main, ...args], { env: { PATH: process.env.PATH, ...env, ...more } })
  const owner = { DATABASE_MIGRATION_URL: url('edgemesh_owner', ports.primary) }
  await edgemesh(['migrate', 'up'], owner)
  const operatorFolder = join(folder, 'ada')
  await edgemesh(['operator', 'create', 'ada', '--role', 'admin', '--out', operatorFolder], {
    DATABASE_URL: owner.DATABASE_MIGRATION_URL,
  })
  await startOpa(folder, ports.opa)

  const instances = (await Promise.all(
    ['one', 'two'].map(async name => {
      const { apiPort, metricsPort } = await portsOf('apiPort', 'metricsPort')
      const own = { INSTANCE_ID: name, API_PORT: String(apiPort), METRICS_PORT: String(metricsPort) }
      const start = () => serve(t, { ...env, ...own })
      const instance: Instance = {
        name,
        running: await start(),
        async start() {
          instance.running = await start()
        },
      }
      return instance
    }),
  )) as [Instance, Instance]
  const backends = instances.map(({ running }) => running)
  const port = await startBalancer(t, balancers.haproxy, backends)

  const inbox = await startInbox(t)
  const monitoring = await startPrometheus(t, programs.prometheus as string, {
    edgemesh: backends.map(({ metricsPort }) => `127.0.0.1:${metricsPort}`),
    alertmanager: await startAlertmanager(t, programs.alertmanager as string, inbox.url),
    opa: `127.0.0.1:${ports.opa}`,
    secrets: { 'opa-token': opaToken },
  })
  return {
    address: `127.0.0.1:${port}`,
    operatorFolder,
    databaseUrl: readDatabaseUrl(env.DATABASE_URL, () => false),
    nodes: database.nodes,
    etcd,
    instances,
    prometheus: monitoring,
    inbox,
    patronictl: database.patronictl,
    edgemesh,
    said: () => saidIn(folder),
  }
}

// ── Each part ────────────────────────────────────────────────────────────────────────────────────────────────────

const passwords: Record<string, string> = { edgemesh: 'of-the-servers', edgemesh_owner: 'of-the-owner' }
const opaToken = secrets.ENROLLMENT_TOKEN_SECRET

/** An authority for the machines of the database, and one certificate: they are one machine here. */
async function makeCertificates(folder: string): Promise<void> {
  const tls = join(folder, 'tls')
  mkdirSync(tls)
  const names = 'subjectAltName=DNS:localhost,IP:127.0.0.1'
  const make = (...words: string[]) =>
    execFileSync('openssl', words.join(' ').split(' '), { cwd: tls, stdio: ['ignore', 'ignore', 'pipe'] })
  const key = '-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
  make(`req -x509 ${key} -days 1 -subj /CN=database -keyout ca.key -out ca.crt`)
  make(`req ${key} -subj /CN=db -keyout node.key -out node.csr`)
  await writeFile(join(tls, 'extensions'), `${names}\nextendedKeyUsage=serverAuth,clientAuth\n`)
  make('x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 1 -extfile extensions -out node.crt')
}

async function startEtcd(folder: string, port: number, peerPort: number): Promise<Production['etcd']> {
  const tls = join(folder, 'tls')
  const env = await environmentOf('etcd.env', text => text.replaceAll('/etc/etcd/tls', tls), {
    ETCD_DATA_DIR: join(folder, 'etcd'),
    ETCD_LISTEN_CLIENT_URLS: `https://127.0.0.1:${port}`,
    ETCD_ADVERTISE_CLIENT_URLS: `https://127.0.0.1:${port}`,
    ETCD_LISTEN_PEER_URLS: `https://127.0.0.1:${peerPort}`,
    ETCD_INITIAL_ADVERTISE_PEER_URLS: `https://127.0.0.1:${peerPort}`,
    ETCD_INITIAL_CLUSTER: `db-1=https://127.0.0.1:${peerPort}`,
  })
  let child: ChildProcess
  async function run() {
    child = start(folder, 'etcd', programs.etcd as string, [], { env })
    await eventually('etcd answers', async () => (await status(folder, port, '/health', child)) === 200, startMs)
  }
  await run()
  return {
    start: run,
    async kill() {
      const gone = once(child, 'exit')
      child.kill('SIGKILL')
      await gone
    },
  }
}

/** What a part may take to start on a machine that has much else to do. */
const startMs = 60_000

async function startDatabase(folder: string, etcdPort: number) {
  const account = postgresAccount()
  const own = (path: string) => account && chownSync(path, account.uid, account.gid)
  const shared = join(folder, 'patroni')
  mkdirSync(join(shared, 'tls'), { recursive: true })
  own(shared)
  for (const name of ['ca.crt', 'node.crt', 'node.key']) {
    const file = join(shared, 'tls', name)
    copyFileSync(join(folder, 'tls', name), file)
    chmodSync(file, 0o600)
    own(file)
  }
  const config = join(shared, 'patroni.yml')
  const shipped = readFileSync(join(deploy, 'patroni', 'patroni.yml'), 'utf8')
  await writeFile(config, shipped.replaceAll('/etc/patroni/', `${shared}/`).replace('/var/run/postgresql', shared))
  const user = account ? {} : { PATRONI_SUPERUSER_USERNAME: process.env.USER ?? '' }

  const ports: { postgres: number; patroni: number }[] = []
  const nodes: DatabaseNode[] = []
  let environment: NodeJS.ProcessEnv = {}
  for (const name of ['db-1', 'db-2']) {
    const port = await portsOf('postgres', 'patroni')
    const home = join(folder, name)
    mkdirSync(home, { mode: 0o700 })
    own(home)
    const data = join(home, 'data')
    const env = await environmentOf('patroni.env', text => text, {
      PATRONI_NAME: name,
      PATRONI_RESTAPI_LISTEN: `127.0.0.1:${port.patroni}`,
      PATRONI_RESTAPI_CONNECT_ADDRESS: `127.0.0.1:${port.patroni}`,
      PATRONI_POSTGRESQL_LISTEN: `127.0.0.1:${port.postgres}`,
      PATRONI_POSTGRESQL_CONNECT_ADDRESS: `127.0.0.1:${port.postgres}`,
      PATRONI_POSTGRESQL_DATA_DIR: data,
      PATRONI_POSTGRESQL_BIN_DIR: postgresBin as string,
      PATRONI_POSTGRESQL_PGPASS: join(home, 'pgpass'),
      PATRONI_ETCD3_HOSTS: `127.0.0.1:${etcdPort}`,
      PATRONI_REPLICATION_PASSWORD: 'of-the-standbys',
      PATRONI_REWIND_PASSWORD: 'of-those-that-come-back',
    })
    environment = { ...env, ...user }
    let patroni: ChildProcess | undefined
    const node: DatabaseNode = {
      name,
      start() {
        const options = { cwd: home, env: { ...env, ...user }, ...account }
        patroni = start(folder, name, programs.patroni as string, [config], options)
      },
      async kill() {
        const gone = patroni && once(patroni, 'exit')
        patroni?.kill('SIGKILL')
        await gone
        await eventually('PostgreSQL has gone', () => endAllIn(data) === 0)
      },
      said: () => readFileSync(join(folder, `${name}.log`), 'utf8'),
      is: async path => (await status(folder, port.patroni, path, patroni)) === 200,
    }
    node.start()
    const part = nodes.length === 0 ? '/primary' : '/sync'
    await eventually(`${name} answers 200 at ${part}`, () => node.is(part), 2 * startMs)
    nodes.push(node)
    ports.push(port)
  }

  // Its passwords are in the environment, as database.sql asks.
  await output(programs.psql as string, ['-X', '-h', shared, '-f', '-', 'postgres'], {
    env: {
      PGPORT: String(ports[0]?.postgres),
      EDGEMESH_PASSWORD: passwords.edgemesh,
      EDGEMESH_OWNER_PASSWORD: passwords.edgemesh_owner,
    },
    cwd: join(folder, 'db-1'),
    input: readFileSync(join(deploy, 'patroni', 'database.sql'), 'utf8'),
    ...account,
  })
  return {
    nodes: nodes as [DatabaseNode, DatabaseNode],
    ports,
    patronictl: (...args: string[]) =>
      output(programs.patronictl as string, ['-c', config, ...args], {
        env: environment,
        cwd: join(folder, 'db-1'),
        ...account,
      }),
  }
}

async function startDatabaseBalancer(
  folder: string,
  nodes: { postgres: number; patroni: number }[],
  ports: { primary: number; replicas: number },
): Promise<void> {
  const env: NodeJS.ProcessEnv = {
    PATH: process.env.PATH,
    PATRONI_CA: join(folder, 'tls', 'ca.crt'),
    POSTGRES_PRIMARY_BIND: `127.0.0.1:${ports.primary}`,
    POSTGRES_REPLICA_BIND: `127.0.0.1:${ports.replicas}`,
  }
  for (const [at, name] of ['ONE', 'TWO'].entries()) {
    env[`POSTGRES_${name}`] = `127.0.0.1:${nodes[at]?.postgres}`
    env[`POSTGRES_${name}_PATRONI_PORT`] = String(nodes[at]?.patroni)
  }
  start(folder, 'postgres-balancer', programs.haproxy as string, ['-f', join(deploy, 'haproxy', 'postgres.cfg')], {
    env,
  })
}

/** As deploy/opa/README.md says. */
async function startOpa(folder: string, port: number): Promise<void> {
  const bundle = join(folder, 'bundle.tar.gz')
  const opa = programs.opa as string
  cpSync(join(root, 'policies'), join(folder, 'policies'), { recursive: true })
  const ignored = ['*_test.rego', 'bundle', '*.json'].flatMap(what => ['--ignore', what])
  execFileSync(opa, ['build', '--revision', 'production', ...ignored, '--output', bundle, './policies'])
  const env = {
    PATH: [dirname(opa), process.env.PATH].join(delimiter),
    EDGEMESH_OPA_TOKEN: opaToken,
    OPA_ADDR: `127.0.0.1:${port}`,
    OPA_LOG_LEVEL: 'error',
  }
  const child = start(folder, 'opa', join(deploy, 'opa', 'start'), [bundle], { env })
  await eventually('OPA answers who knows the token', async () => {
    demandAlive(folder, 'opa', child)
    const headers = { authorization: `Bearer ${opaToken}` }
    return fetch(`http://127.0.0.1:${port}/health`, { headers }).then(
      ({ ok }) => ok,
      () => false,
    )
  })
}

// ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────

/** What it says is in `NAME.log` of the folder. */
function start(folder: string, name: string, program: string, args: string[], options: SpawnOptions): ChildProcess {
  const said = openSync(join(folder, `${name}.log`), 'a')
  const child = spawn(program, args, { ...options, stdio: ['ignore', said, said] })
  child.on('error', error => appendFileSync(said, `${error.message}\n`))
  return child
}

function saidIn(folder: string): string {
  const logs = readdirSync(folder).filter(name => name.endsWith('.log'))
  const ends = logs.map(name => {
    const lines = readFileSync(join(folder, name), 'utf8').trimEnd().split('\n')
    return [`${name}:`, ...lines.slice(-linesMax)].join('\n  ')
  })
  return ends.join('\n')
}

const linesMax = 30

function demandAlive(folder: string, name: string, { pid, exitCode }: ChildProcess): void {
  if (pid === undefined || exitCode !== null) throw new Error(`${name} has ended:\n${saidIn(folder)}`)
}

/** What it prints. @throws with what it says when it fails */
function output(
  program: string,
  args: string[],
  { input, ...options }: { env: NodeJS.ProcessEnv; cwd?: string; input?: string; uid?: number; gid?: number },
): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = execFile(program, args, { ...options, encoding: 'utf8' }, (error, stdout, stderr) => {
      if (error) reject(new Error(`${program} ${args.join(' ')}: ${error.message}\n${stdout}${stderr}`))
      else resolve(stdout)
    })
    child.stdin?.end(input)
  })
}

/** Of something that asks for a certificate of the database's authority. */
async function status(folder: string, port: number, path: string, child?: ChildProcess): Promise<number | undefined> {
  if (child) demandAlive(folder, 'what was asked', child)
  const read = (name: string) => readFileSync(join(folder, 'tls', name))
  const agent = new Agent({ ca: read('ca.crt'), cert: read('node.crt'), key: read('node.key') })
  const asked = request({ host: 'localhost', port, path, agent, timeout: 2_000 })
  asked.on('timeout', () => asked.destroy(new Error('it does not answer')))
  asked.end()
  try {
    const [response] = await once(asked, 'response')
    await text(response)
    return response.statusCode
  } catch {
    return undefined
  }
}

/** With -9. @returns how many processes had their data there */
function endAllIn(data: string): number {
  const pids = readdirSync('/proc').filter(name => /^\d+$/.test(name) && workingFolderOf(name) === data)
  for (const pid of pids) {
    try {
      process.kill(Number(pid), 'SIGKILL')
    } catch {
      // It has gone by itself meanwhile.
    }
  }
  return pids.length
}

function workingFolderOf(pid: string): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/cwd`)
  } catch {
    return undefined
  }
}

/** A file of variables that is shipped, with others in their places. @throws for one that is not in it */
async function environmentOf(
  file: string,
  edit: (text: string) => string,
  own: Record<string, string>,
): Promise<NodeJS.ProcessEnv> {
  const lines = edit(readFileSync(join(deploy, 'patroni', file), 'utf8'))
    .split('\n')
    .filter(line => /^[A-Z]/.test(line))
  const given = Object.fromEntries(lines.map(line => line.split(/=(.*)/s).slice(0, 2) as [string, string]))
  const unknown = Object.keys(own).filter(name => !(name in given))
  if (unknown.length > 0) throw new Error(`not in ${file}: ${unknown.join(', ')}`)
  return { PATH: process.env.PATH, ...given, ...own }
}

async function portsOf<Name extends string>(...names: Name[]): Promise<Record<Name, number>> {
  const found = await Promise.all(names.map(async name => [name, await freePort()] as const))
  return Object.fromEntries(found) as Record<Name, number>
}

/** PostgreSQL does not run as root; the package has made an account for it. */
function postgresAccount(): { uid: number; gid: number } | undefined {
  if (process.getuid?.() !== 0) return undefined
  const line = readFileSync('/etc/passwd', 'utf8')
    .split('\n')
    .find(line => line.startsWith('postgres:'))
  const [, , uid, gid] = line?.split(':') ?? []
  if (uid === undefined) throw new Error('there is no account postgres')
  return { uid: Number(uid), gid: Number(gid) }
}
