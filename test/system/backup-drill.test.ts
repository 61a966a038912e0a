/** The database is lost, and brought back by the scripts that are shipped: what goes on, what stays out, and what is to be done again. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import pg from 'pg'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { installScripts, manifestOf } from '../support/backup-scripts.ts'
import {
  type Credentials,
  type EdgeMesh,
  eventually,
  refused,
  startEdgeMesh,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { findProgram } from '../support/find-program.ts'
import { healthy } from '../support/healthy.ts'
import { type PlainUser, plainUser, type Ran } from '../support/plain-user.ts'
import { postgresBin, postgresWithTools } from '../support/postgres-with-tools.ts'
import { type Link, link } from '../support/relay.ts'

const jq = findProgram('jq')
const main = join(import.meta.dirname, '../../src/main.ts')

/** The daemon of a device, until the test ends. */
function keepDaemon(t: ExecutionContext, { port }: Link, folder: string, id: string, token: string) {
  const events: AgentEvent[] = []
  const stopping = new AbortController()
  const done = runAgent({
    server: `127.0.0.1:${port}`,
    stateDirectory: join(folder, id),
    token,
    device: { id },
    posture: async () => healthy,
    log: event => events.push(event),
    signal: stopping.signal,
    // One that has failed often waits for up to a minute; a test has no time for that.
    random: () => 0.01,
  })
  done.catch(() => {})
  const stop = async () => {
    stopping.abort()
    await done.catch(() => {})
  }
  t.teardown(stop)
  const count = (name: AgentEvent['event']) => events.filter(({ event }) => event === name).length
  return {
    stop,
    count,
    reasons: () => events.map(event => ('error' in event ? event.error.reason : '')),
    async reports() {
      const before = count('reported')
      await eventually(`${id} reports`, () => count('reported') > before)
    },
  }
}

/** `edgemesh`, as beside the database. */
function edgemesh(args: string[], env: Record<string, string>): Promise<Ran> {
  return new Promise(resolve => {
    execFile(
      process.execPath,
      [main, ...args],
      { env: { PATH: process.env.PATH, ...env } },
      (error, stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
      },
    )
  })
}

const isIn = async (mesh: Pick<EdgeMesh, 'clients'>, who: Credentials): Promise<string> => {
  const question = { id: 'q', user: 'ada', service: 'payroll', action: '' }
  const asked = unary(mesh.clients(who).authorize, 'check', { question, deviceId: '' })
  return asked.then(
    () => 'in',
    async () => (await refused(asked)).reason,
  )
}

/** The audit log as it was shipped elsewhere, until the loss. */
async function shipped(mesh: EdgeMesh, who: PlainUser, operator: string): Promise<string> {
  const server = `localhost:${mesh.server.apiPort}`
  const { exitCode, stdout, stderr } = await edgemesh(
    ['audit', 'export', '--server', server, '--credentials', operator],
    {},
  )
  if (exitCode !== 0) throw new Error(stderr)
  return who.file('audit.ndjson', stdout)
}

const missing = Object.entries({ 'PostgreSQL with pg_dump': postgresBin, jq }).filter(([, found]) => !found)
const drill = missing.length > 0 ? test.skip : test
const why =
  missing.length > 0 ? ` (${missing.map(([name]) => name).join(' and ')} is missing: .ci/tools installs it)` : ''

drill(
  `a fleet goes on with its certificates when its database was lost and restored, and who was revoked stays out${why}`,
  async t => {
    t.timeout(240_000)
    const who = await plainUser(t)
    const postgres = await postgresWithTools(t, who)
    const scripts = await installScripts(who)
    const [backups, state] = [await who.subfolder('backups'), await who.subfolder('state')]
    const env = { ...testEnvironment, DATABASE_URL: postgres.url, HEARTBEAT_INTERVAL_SECONDS: '1' }
    const run = (name: string, ...args: string[]) =>
      who.run('bash', [join(scripts, name), ...args], { DATABASE_URL: postgres.url, BACKUP_DIR: backups })

    // A fleet at work: daemons, one device that was revoked, and a token that has a use left.
    const mesh = await startEdgeMesh(t, env)
    const operator = join(state, 'operator')
    const made = await edgemesh(['operator', 'create', 'grace', '--role', 'admin', '--out', operator], env)
    t.is(made.exitCode, 0, made.stderr)
    await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
    await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
    const way = await link(t, mesh.server.apiPort)
    const daemons = await Promise.all(
      ['alpha', 'beta'].map(async id => keepDaemon(t, way, state, id, await mesh.token())),
    )
    for (const daemon of daemons) await daemon.reports()
    const [revokedBefore, revokedAfter] = [
      await mesh.enroll({ device: { id: 'revoked-before' } }),
      await mesh.enroll({ device: { id: 'revoked-after' } }),
    ]
    await unary(mesh.admin, 'revokeDevice', { id: 'revoked-before', reason: 'left on a train' })
    const tokenLeft = await mesh.token()

    const backup = await run('backup.sh')
    t.is(backup.exitCode, 0, backup.stderr)
    const dump = join(backups, `${backup.stdout.split(':')[0]}.dump`)
    const taken = (await manifestOf(dump.replace('.dump', '.manifest'))).get('taken')?.[0]?.[0] ?? ''

    // What comes after it, and is lost with the database.
    await unary(mesh.admin, 'revokeDevice', { id: 'revoked-after', reason: `sold on Ada's market` })
    await unary(mesh.admin, 'createUser', { id: 'late', email: 'late@example.com', name: '', role: 'admin' })
    t.is(await isIn(mesh, revokedAfter), 'DEVICE_REVOKED')
    const usedAfter = await mesh.enroll({ token: tokenLeft, device: { id: 'used-after' } })
    const newcomer = keepDaemon(t, way, state, 'newcomer', await mesh.token())
    await newcomer.reports()
    const audit = await shipped(mesh, who, operator)
    const headsBefore = JSON.parse((await edgemesh(['audit', 'verify', '--json'], env)).stdout).heads

    // The disk is gone. Whoever goes on meanwhile is in the way of a restore.
    await postgres.replaceByEmpty()
    await eventually('the instance is at the empty database', async () => {
      const rows = await postgres.query(`select 1 from pg_stat_activity where application_name like 'edgemesh%'`)
      return rows.length > 0
    })
    // What fails there makes the instance let go of its connections and come again. One that stays is seen whenever it is looked.
    const staying = new pg.Client({ connectionString: postgres.url, application_name: 'edgemesh' })
    await staying.connect()
    const early = await run('restore.sh', dump)
    await staying.end()
    t.is(early.exitCode, 1)
    t.regex(early.stderr, /edgemesh is in use, by: edgemesh|somebody has connected to the database meanwhile/)
    way.cut()
    await mesh.server.stop()
    await eventually('nobody is connected', async () => {
      const rows = await postgres.query(`select 1 from pg_stat_activity where application_name like 'edgemesh%'`)
      return rows.length === 0
    })

    const restored = await run('restore.sh', dump)
    t.is(restored.exitCode, 0, restored.stderr)
    t.regex(restored.stdout, new RegExp(`as of ${taken}`))
    t.is((await edgemesh(['migrate', 'up'], env)).exitCode, 0)
    const verified = await edgemesh(['audit', 'verify', '--json'], env)
    t.is(verified.exitCode, 0, verified.stdout)
    // Whole in itself; that it is of an earlier day is told by heads that were kept elsewhere.
    const { heads } = JSON.parse(verified.stdout)
    const sequenceOf = (all: { writer: string; sequence: number }[], of: string) =>
      all.find(({ writer }) => writer === of)?.sequence ?? -1
    t.true(
      headsBefore.some(
        ({ writer, sequence }: { writer: string; sequence: number }) => sequenceOf(heads, writer) < sequence,
      ),
    )

    // An instance that devices do not reach yet: in it what was taken back since then is taken back again.
    const again = await startEdgeMesh(t, { ...env, SERVER_NAMES: 'localhost' })
    t.is(await isIn(again, revokedBefore), 'DEVICE_REVOKED')
    t.is(await isIn(again, revokedAfter), 'in', 'this is why')
    const changes = await who.run(jq ?? '', [
      ...[
        '--raw-input',
        '--slurp',
        '--raw-output',
        '--arg',
        'since',
        taken,
        '-f',
        join(scripts, 'changes-since.jq'),
        audit,
      ],
    ])
    t.is(changes.exitCode, 0, changes.stderr)
    t.regex(changes.stdout, /^# by hand: CreateUser user\/late /m)
    t.regex(changes.stdout, /^# device\/newcomer has enrolled: give it a new token$/m)
    const commands = changes.stdout
      .split('\n')
      .filter(line => line.startsWith('edgemesh '))
      .map(line => line.replace(/^edgemesh/, `"$NODE" "$MAIN"`))
    // As an operator's shell does: what is not in the backup is refused, and the next is done.
    const answers = await new Promise<string>(resolve => {
      const there = { EDGEMESH_SERVER: `localhost:${again.server.apiPort}`, EDGEMESH_CREDENTIALS: operator }
      const options = { env: { PATH: process.env.PATH, NODE: process.execPath, MAIN: main, ...there } }
      execFile('bash', ['--norc', '-c', commands.join('\n')], options, (_, stdout, stderr) => resolve(stdout + stderr))
    })
    t.is(await isIn(again, revokedAfter), 'DEVICE_REVOKED', answers)
    t.is(
      (await unary(again.admin, 'getDevice', { id: 'revoked-after' })).device?.statusReason,
      `sold on Ada's market, again after a restore`,
    )
    t.regex((await refused(again.enroll({ token: tokenLeft, device: { id: 'twice' } }))).reason, /TOKEN_REVOKED/)
    t.is(await isIn(again, usedAfter), 'CERTIFICATE_UNKNOWN')

    // Devices come: those of before with what they have, the others with a token more.
    way.leadTo(again.server.apiPort)
    for (const daemon of daemons) {
      await daemon.reports()
      t.is(daemon.count('enrolled'), 1, 'when it was new, and not again')
    }
    await eventually('the newcomer is told', () => newcomer.reasons().includes('CERTIFICATE_UNKNOWN'))
    await newcomer.stop()
    const anew = keepDaemon(t, way, state, 'newcomer', await again.token())
    await anew.reports()

    // The log goes on behind the backup's, and is whole.
    await again.server.stop()
    const after = await edgemesh(['audit', 'verify', '--json'], env)
    t.is(after.exitCode, 0, after.stdout)
    t.true(JSON.parse(after.stdout).rows > JSON.parse(verified.stdout).rows)
    const next = await run('backup.sh')
    t.is(next.exitCode, 0, next.stderr)
  },
)
