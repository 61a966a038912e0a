/** An upgrade and the way back, instance by instance and with the schema, while devices and operators go on. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import type pg from 'pg'
import { runAgent } from '../../src/agent/agent.ts'
import { type EndedConnection, keepAuthorizations } from '../../src/client/authorizations.ts'
import { createKey } from '../../src/client/csr.ts'
import { loadState } from '../../src/client/state.ts'
import {
  type Credentials,
  clientsOf,
  enrollOnce,
  eventually,
  type Refusal,
  refusal,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { testDatabase } from '../support/postgres.ts'
import { type Link, link } from '../support/relay.ts'
import { type ServedEdgeMesh, serve } from '../support/serve.ts'
import { noTokenRequest } from '../support/token-request.ts'
import { commitBefore, thisVersion, type Version, versionAt, versionOfTomorrow } from '../support/versions.ts'

/** Between two acts of one who makes load. */
const pauseMs = 100
const agentsPerPlace = 2
const question = { user: 'ada', service: 'payroll' }

/** What a balancer sends devices to: one instance after another. */
type Place = { way: Link; running: ServedEdgeMesh }

/** What was acknowledged, and what was refused, since the load began. */
type Seen = {
  enrolled: string[]
  users: string[]
  /** Ids of decisions. */
  decisions: string[]
  connections: string[]
  /** By device: `diskPercent` of the last report that was acknowledged. */
  reported: Map<string, number>
  ended: EndedConnection[]
  refusals: (Refusal & { what: string })[]
}

async function emptyDatabase(t: ExecutionContext): Promise<{ url: string; pool: pg.Pool }> {
  const { url, pool } = await testDatabase(t)
  await pool.query('drop schema public cascade')
  await pool.query('create schema public')
  return { url, pool }
}

async function operatorMadeBy(
  t: ExecutionContext,
  version: Version,
  env: Record<string, string>,
): Promise<Credentials> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-upgrade-operator-'))
  t.teardown(() => rm(folder, { recursive: true }))
  await version.command(env, 'operator', 'create', 'tester', '--role', 'admin', '--out', folder)
  const [keyPem, certificatePem, rootsPem] = await Promise.all(
    ['operator.key', 'operator.crt', 'ca.crt'].map(name => readFile(join(folder, name), 'utf8')),
  )
  return { keyPem: keyPem!, certificatePem: certificatePem!, rootsPem: rootsPem! }
}

/** Enrolls, keeps a connection and reports every second, as the agent does it. */
async function keepAgent(
  t: ExecutionContext,
  { way }: Place,
  id: string,
  token: string,
  seen: Seen,
): Promise<Credentials> {
  const parent = await mkdtemp(join(tmpdir(), 'edgemesh-upgrade-agent-'))
  t.teardown(() => rm(parent, { recursive: true }))
  const stateDirectory = join(parent, 'state')
  const server = `127.0.0.1:${way.port}`
  const stopping = new AbortController()
  let authorizations: ReturnType<typeof keepAuthorizations> | undefined
  let reports = 0
  const done = runAgent({
    server,
    stateDirectory,
    token,
    device: { id },
    posture: async () => ({ ...healthy, diskPercent: ++reports / 100 }),
    log(event) {
      if (event.event === 'reported') seen.reported.set(id, event.posture.diskPercent ?? 0)
    },
    signal: stopping.signal,
    connected: async target => authorizations?.moveTo(target),
  })
  done.catch(() => {})
  await eventually(`the first report of ${id}`, () => seen.reported.has(id))
  const credentials = await loadState(stateDirectory)
  if (!credentials) throw new Error('it has enrolled')
  t.teardown(async () => {
    await authorizations?.close()
    stopping.abort()
    await done.catch(() => {})
  })
  const kept = keepAuthorizations({ server, credentials, onEnded: ended => void seen.ended.push(ended) })
  authorizations = kept
  const [answer] = await kept.ask([question])
  if (!answer?.allowed) throw new Error(`${id} is not allowed: ${JSON.stringify(answer)}`)
  seen.connections.push(answer.connectionId)
  const { rootsPem, keyPem, certificateChainPem } = credentials
  return { rootsPem, keyPem, certificatePem: certificateChainPem }
}

/** Acts again and again until it is stopped; what is refused is kept, and tried again. */
function keepActing(
  t: ExecutionContext,
  what: string,
  seen: Seen,
  act: () => Promise<void>,
): { stop(): Promise<void>; turns(): number } {
  let isOver = false
  let turns = 0
  const acting = (async () => {
    while (!isOver) {
      await act().catch(error => void seen.refusals.push({ what, ...refusal(error) }))
      turns++
      await sleep(pauseMs)
    }
  })()
  const stop = () => {
    isOver = true
    return acting
  }
  t.teardown(stop)
  return { turns: () => turns, stop }
}

/** Two instances of `older`, then of `newer`, then of `older` again, with the schema of each; and all the time the load. */
async function thereAndBack(t: ExecutionContext, older: Version, newer: Version): Promise<void> {
  const { url, pool } = await emptyDatabase(t)
  const env = { ...testEnvironment, DATABASE_URL: url, HEARTBEAT_INTERVAL_SECONDS: '1', DRAIN_SECONDS: '8' }
  const applied = async () => (await pool.query('select name from migrations order by id')).rows.map(({ name }) => name)

  // The older version, on its own schema.
  const operator = await operatorMadeBy(t, older, env)
  const schemaOfOlder = await applied()
  const places = await Promise.all(
    [1, 2].map(async (): Promise<Place> => {
      const running = await serve(t, env, { program: older.program })
      return { running, way: await link(t, portOf(running)) }
    }),
  )
  const [one, two] = places as [Place, Place]
  const clients = ({ way }: Place, who: Credentials) => clientsOf(t, `127.0.0.1:${way.port}`, who)
  const [admin, adminOfTwo] = [clients(one, operator).admin, clients(two, operator).admin]
  await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: '', role: 'admin' })
  await unary(admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const { tokenText } = await unary(admin, 'createEnrollmentToken', { ...noTokenRequest, reusable: true })

  // The load.
  const seen: Seen = {
    ...{ enrolled: [], users: [], decisions: [], connections: [], ended: [], refusals: [] },
    reported: new Map(),
  }
  const agents = await Promise.all(
    places.flatMap((place, at) =>
      Array.from({ length: agentsPerPlace }, (_, n) => keepAgent(t, place, `agent-${at}-${n}`, tokenText, seen)),
    ),
  )
  const loads = places.flatMap((place, at) => {
    const anonymous = clients(place, { rootsPem: operator.rootsPem }).enroll
    const { authorize } = clients(place, agents[at * agentsPerPlace]!)
    let enrollments = 0
    let key = createKey()
    return [
      keepActing(t, 'Enroll', seen, async () => {
        // Who is refused comes again with the same key.
        const id = `new-${at}-${enrollments}`
        const { deviceId } = await enrollOnce(anonymous, tokenText, key, { id })
        seen.enrolled.push(deviceId)
        enrollments++
        key = createKey()
      }),
      keepActing(t, 'Check', seen, async () => {
        const { answer } = await unary(authorize, 'check', {
          question: { id: 'q', action: '', ...question },
          deviceId: '',
        })
        if (!answer?.allowed) throw new Error(`it was denied: ${JSON.stringify(answer)}`)
        seen.decisions.push(answer.decisionId)
      }),
    ]
  })
  let users = 0
  loads.push(
    keepActing(t, 'CreateUser and ListUsers', seen, async () => {
      const id = `user-${users++}`
      await unary(admin, 'createUser', { id, email: `${id}@example.com`, name: '', role: 'staff' })
      seen.users.push(id)
      const listed = await unary(adminOfTwo, 'listUsers', { pageSize: 1_000, pageToken: '' })
      if (!listed.users.some(user => user.id === id)) throw new Error(`${id} is not listed`)
    }),
  )
  const goOn = async () => {
    const before = loads.map(({ turns }) => turns())
    await eventually('all go on', () => loads.every(({ turns }, at) => turns() > before[at]! + 3))
  }
  async function replace(place: Place, version: Version): Promise<void> {
    const next = await serve(t, env, { program: version.program })
    place.way.leadTo(portOf(next))
    t.is(await place.running.stop(), 0)
    place.running = next
    await goOn()
  }

  // There: the first of the new instances brings the schema with it, and the older one beside it goes on.
  await goOn()
  await replace(one, newer)
  const schemaOfNewer = await applied()
  t.true(schemaOfNewer.length > schemaOfOlder.length, 'the newer version has brought a migration')
  await replace(two, newer)
  // Back: the older version serves on the schema of the newer one, first beside it, then alone.
  await replace(one, older)
  await replace(two, older)
  t.deepEqual(await applied(), schemaOfNewer)
  // Now the schema, step by step; and there again.
  for (const name of schemaOfNewer.slice(schemaOfOlder.length).toReversed()) {
    t.deepEqual(JSON.parse(await newer.command(env, 'migrate', 'down', '--json')), { reverted: [name] })
    await goOn()
  }
  t.deepEqual(await applied(), schemaOfOlder)
  await newer.command(env, 'migrate', 'up')
  await goOn()
  await replace(one, newer)

  for (const load of loads) await load.stop()
  t.log({
    ...{ enrolled: seen.enrolled.length, decisions: seen.decisions.length, users: seen.users.length },
    ...{
      reported: [...seen.reported.values()],
      refused: seen.refusals.map(({ what, reason }) => `${what}: ${reason}`),
    },
  })

  // Nothing but: come again.
  const worse = seen.refusals.filter(({ code, retryAfterMs }) => code !== 'UNAVAILABLE' || !retryAfterMs)
  t.deepEqual(worse, [])
  t.deepEqual(seen.ended, [], 'connections were taken back')
  // Nothing that was acknowledged is lost.
  for (const [table, ids] of [
    ['devices', seen.enrolled],
    ['users', seen.users],
    ['decisions', seen.decisions.map(id => id.split('.')[0])],
    ["connections where status = 'active'", seen.connections],
  ] as const) {
    const { rows } = await pool.query<{ id: string }>(`select id::text from ${table}`)
    const kept = new Set(rows.map(({ id }) => id))
    t.deepEqual(
      ids.filter(id => !kept.has(id!)),
      [],
      table,
    )
  }
  const { rows: postures } = await pool.query<{ id: string; disk: number }>(
    `select device_id as id, (posture ->> 'diskPercent')::float8 as disk from device_postures`,
  )
  for (const [id, disk] of seen.reported) {
    t.true((postures.find(posture => posture.id === id)?.disk ?? 0) >= disk, `the last report of ${id}`)
  }
}

const portOf = ({ address }: ServedEdgeMesh) => Number(address.split(':')[1])

test.serial('this version and one of tomorrow serve side by side, there and back, and nobody notices', async t => {
  t.timeout(300_000)
  await thereAndBack(t, thisVersion, await versionOfTomorrow(t))
})

/** What it printed and how it ended, for commands that may fail. */
async function ended(version: Version, env: Record<string, string>, ...args: string[]) {
  try {
    return { exitCode: 0, stdout: await version.command(env, ...args), stderr: '' }
  } catch (error) {
    const { code, stdout, stderr } = error as { code: number; stdout: string; stderr: string }
    return { exitCode: code, stdout, stderr }
  }
}

test.serial(
  'before, amid and after an update each version says what it may do, and the way back loses nothing',
  async t => {
    t.timeout(180_000)
    const { url, pool } = await emptyDatabase(t)
    const env = { ...testEnvironment, DATABASE_URL: url }
    const [today, tomorrow] = [thisVersion, await versionOfTomorrow(t)]
    const manifest = join(tomorrow.program, '../../package.json')
    await writeFile(manifest, JSON.stringify({ ...JSON.parse(await readFile(manifest, 'utf8')), version: '9.9.9' }))
    t.regex(await tomorrow.command(env, '--version'), /^9\.9\.9\n$/)
    const status = async (version: Version) => {
      const { exitCode, stdout } = await ended(version, env, 'migrate', 'status', '--json')
      const { mayServe, pending, newer } = JSON.parse(stdout)
      return { exitCode, mayServe, pending, newer }
    }
    const migrationsFound = async (version: Version) => {
      const found = await ended(version, env, 'doctor', '--only', 'migrations', '--json')
      return [found.exitCode, JSON.parse(found.stdout).findings[0].severity]
    }
    const fine = { exitCode: 0, mayServe: true, pending: [], newer: [] }
    const behind = { exitCode: 1, mayServe: false, pending: ['9999-tomorrow'], newer: [] }
    const ahead = { exitCode: 0, mayServe: true, pending: [], newer: ['9999-tomorrow'] }

    // There is nothing yet: neither may serve.
    t.like(await status(today), { exitCode: 1, mayServe: false })
    await today.command(env, 'migrate', 'up')
    t.deepEqual([await status(today), await status(tomorrow)], [fine, behind])
    t.deepEqual(
      [await migrationsFound(today), await migrationsFound(tomorrow)],
      [
        [0, 'ok'],
        [1, 'failed'],
      ],
    )
    const pending = await ended(tomorrow, env, 'migrate', 'status')
    t.regex(pending.stdout, /\nversion 9\.9\.9 may serve after: edgemesh migrate up\n$/)

    // The schema of tomorrow: both may.
    await tomorrow.command(env, 'migrate', 'up')
    t.deepEqual([await status(today), await status(tomorrow)], [ahead, fine])
    t.deepEqual(
      [await migrationsFound(today), await migrationsFound(tomorrow)],
      [
        [0, 'warning'],
        [0, 'ok'],
      ],
    )
    const running = await serve(t, env, { program: tomorrow.program })
    const operator = await operatorMadeBy(t, tomorrow, env)
    const { admin } = clientsOf(t, running.address, operator)
    await unary(admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: '', role: 'admin' })
    const ports = { ...env, METRICS_PORT: String(running.metricsPort) }
    const seen = JSON.parse((await ended(today, ports, 'doctor', '--only', 'instance', '--json')).stdout)
    t.like(seen.findings[0], { severity: 'warning' })
    t.regex(seen.findings[0].what, /^the instance is of version 9\.9\.9, and this program of \d/)
    t.is(await running.stop(), 0)

    // Back: what tomorrow has written is there, and only tomorrow takes its schema back.
    const back = await serve(t, env, { program: today.program })
    const listed = await unary(clientsOf(t, back.address, operator).admin, 'listUsers', { pageSize: 10, pageToken: '' })
    t.deepEqual(
      listed.users.map(({ id }) => id),
      ['ada'],
    )
    t.is(await back.stop(), 0)
    const refusedDown = await ended(today, env, 'migrate', 'down')
    t.is(refusedDown.exitCode, 1)
    t.regex(
      refusedDown.stderr,
      /^error: this version can not take back 9999-tomorrow, which a newer one has made\nhint: /,
    )
    await tomorrow.command(env, 'migrate', 'down')
    t.deepEqual([await status(today), await status(tomorrow)], [fine, behind])
    t.is((await pool.query('select from users')).rowCount, 1)
  },
)

const before = commitBefore()
if ('missing' in before) {
  test.skip(`the version before can not be run: ${before.missing}`, t => t.pass())
} else {
  test.serial('the version before and this one serve side by side, there and back, and nobody notices', async t => {
    t.timeout(300_000)
    await thereAndBack(t, await versionAt(t, before.commit), thisVersion)
  })
}
