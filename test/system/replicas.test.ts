/** Lists and reports beside real streaming replicas that lag, die, are promoted, or follow somebody else. */
import test, { type ExecutionContext } from 'ava'
import { openDatabase } from '../../src/db/orm.ts'
import { type Replicas, startReplicas } from '../../src/db/replicas.ts'
import { entities } from '../../src/server.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { type EdgeMesh, eventually, shared, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { link } from '../support/relay.ts'
import { primaryServer, standbyOf, type TestServer } from '../support/standby.ts'

const servers = shared(test, async file => {
  const primary = await primaryServer(file)
  return { primary, standby: await standbyOf(file, primary) }
})

/** What is told to Prometheus of the one replica, and of where lists were read. */
async function told({ server }: EdgeMesh) {
  const text = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  const value = (pattern: string) => Number(new RegExp(`^${pattern}(?:\\{[^}]*\\})? (\\S+)`, 'm').exec(text)?.[1] ?? 0)
  const reads = (where: string) => value(`edgemesh_report_reads_total\\{where="${where}"[^}]*\\}`)
  return {
    ready: value('edgemesh_replica_ready'),
    lagSeconds: value('edgemesh_replica_lag_seconds'),
    lagBytes: value('edgemesh_replica_lag_bytes'),
    readsAtReplica: reads('replica'),
    readsAtPrimary: reads('primary'),
  }
}

const readFromReplica = (mesh: EdgeMesh) =>
  eventually('the replica is read from', async () => (await told(mesh)).ready === 1)
const notReadFromReplica = (mesh: EdgeMesh) =>
  eventually('the replica is not read from', async () => (await told(mesh)).ready === 0)

let users = 0
async function createUser({ admin }: EdgeMesh): Promise<string> {
  const id = `user-${++users}`
  await unary(admin, 'createUser', { id, email: `${id}@example.com`, name: '', role: 'staff' })
  return id
}

async function usersListed({ admin }: EdgeMesh): Promise<string[]> {
  return (await unary(admin, 'listUsers', { pageSize: 1_000, pageToken: '' })).users.map(({ id }) => id)
}

async function startWith(t: ExecutionContext, primary: string, ...replicas: string[]): Promise<EdgeMesh> {
  return startEdgeMesh(t, { DATABASE_URL: primary, DATABASE_REPLICA_URLS: replicas.join(',') })
}

test.serial(
  'what was changed at one instance is in the next list at another, which a lagging replica answers',
  async t => {
    const { primary, standby } = servers()
    const one = await startWith(t, primary.url, standby.url)
    const two = await startWith(t, primary.url, standby.url)
    await standby.pool.query(`alter system set recovery_min_apply_delay = '100ms'`)
    await standby.pool.query('select pg_reload_conf()')
    t.teardown(async () => {
      await standby.pool.query('alter system reset recovery_min_apply_delay')
      await standby.pool.query('select pg_reload_conf()')
    })
    await readFromReplica(two)
    const before = await told(two)
    for (let round = 0; round < 10; round++) {
      const user = await createUser(one)
      const listed = await usersListed(two)
      t.true(listed.includes(user), `${user} is not listed`)
    }
    const { readsAtReplica } = await told(two)
    t.true(readsAtReplica > before.readsAtReplica, 'no list was read from the replica')
  },
)

test.serial('the audit log is exported from a replica, whole', async t => {
  const { primary, standby } = servers()
  const mesh = await startWith(t, primary.url, standby.url)
  await readFromReplica(mesh)
  const user = await createUser(mesh)
  const before = await told(mesh)
  await eventually('the change is exported', async () => {
    const stream = mesh.admin.exportAuditRecords({ ...{ kinds: [], follow: false, afterCheckpoint: '' }, ...noTimes })
    const targets: string[] = []
    for await (const { record } of stream) if (record?.$case === 'event') targets.push(record.value.target)
    return targets.includes(`user/${user}`)
  })
  const after = await told(mesh)
  t.true(after.readsAtReplica > before.readsAtReplica)
  const { events } = await unary(mesh.admin, 'searchAuditEvents', { ...everything, target: `user/${user}` })
  t.is(events.length, 1)
})

const noTimes = { since: undefined, until: undefined }
const everything = { pageSize: 10, pageToken: '', actor: '', method: '', code: '', after: undefined, before: undefined }

test.serial(
  'a replica that does not catch up is not waited for again and again, and is read from when it has',
  async t => {
    const { primary, standby } = servers()
    const mesh = await startWith(t, primary.url, standby.url)
    await readFromReplica(mesh)
    await standby.pool.query('select pg_wal_replay_pause()')
    t.teardown(() => standby.pool.query('select pg_wal_replay_resume()'))
    await eventually('replay has paused', async () => {
      const { rows } = await standby.pool.query('select pg_get_wal_replay_pause_state() as state')
      return rows[0].state === 'paused'
    })
    for (let round = 0; round < 5; round++) {
      const user = await createUser(mesh)
      t.true((await usersListed(mesh)).includes(user))
    }
    await notReadFromReplica(mesh)
    const { lagBytes } = await eventually('the lag grows', async () => {
      const now = await told(mesh)
      return now.lagSeconds > 1 && now
    })
    t.true(lagBytes > 0)
    t.true((await mesh.server.readiness()).ready)

    await standby.pool.query('select pg_wal_replay_resume()')
    await readFromReplica(mesh)
    const user = await createUser(mesh)
    t.true((await usersListed(mesh)).includes(user))
    t.true((await told(mesh)).lagSeconds < 1)
  },
)

test.serial('a replica that is killed costs no list, and is read from when it is back', async t => {
  const { primary, standby } = servers()
  const mesh = await startWith(t, primary.url, standby.url)
  await readFromReplica(mesh)
  await standby.stop()
  for (let round = 0; round < 5; round++) {
    const user = await createUser(mesh)
    t.true((await usersListed(mesh)).includes(user))
  }
  await notReadFromReplica(mesh)
  t.true((await mesh.server.readiness()).ready)
  await standby.start()
  await readFromReplica(mesh)
})

/** Without a service: what is asked of it is the test's own. */
async function reportsOf(t: ExecutionContext, primary: TestServer, ...replicas: string[]): Promise<Replicas> {
  const open = (url: string) => openDatabase({ url, poolMax: 4, entities, takesStandby: true })
  const db = await open(primary.url)
  await db.migrate()
  const instanceId = `tester-${process.hrtime.bigint()}`
  const opened = await Promise.all(replicas.map(async url => ({ url, db: await open(url) })))
  const reports = await startReplicas({
    primary: db,
    replicas: opened,
    instanceId,
    log: createLog({ level: 'silent' }),
  })
  await db.pool.query('insert into instances (id, started_at, seen_at) values ($1, now(), now())', [instanceId])
  t.teardown(async () => {
    await reports.stop()
    await db.pool.query('delete from instances where id = $1', [instanceId])
    await db.close()
  })
  return reports
}

const inState = (reports: Replicas, wanted: string) =>
  eventually(`a replica that is ${wanted}`, () => reports.status().some(({ state }) => state === wanted))

test.serial('a read that its replica breaks off is answered by the primary', async t => {
  const { primary, standby } = servers()
  const reports = await reportsOf(t, primary, standby.url)
  await inState(reports, 'ready')
  const { rows: at } = await reports.query('select pg_is_in_recovery() as replica')
  t.deepEqual(at, [{ replica: true }])
  const breaking = 'select pg_is_in_recovery() and pg_terminate_backend(pg_backend_pid()) as replica'
  t.deepEqual((await reports.query(breaking)).rows, [{ replica: false }])
  t.deepEqual(await reports.read(em => em.execute(breaking)), [{ replica: false }])
})

test.serial('what is no replica of the primary is never read from', async t => {
  const { primary } = servers()
  const other = await primaryServer(t)
  const stranger = await standbyOf(t, other)
  const reports = await reportsOf(t, primary, stranger.url, other.url, primary.url)
  const states = () => reports.status().map(({ state }) => state)
  await eventually('all have been looked at', () => states().every(state => state !== 'away'))
  t.deepEqual(states(), ['foreign', 'foreign', 'promoted'])
  t.deepEqual((await reports.query('select pg_is_in_recovery() as replica')).rows, [{ replica: false }])
})

test('after a failover a replica that still follows the old primary is not read from, however far that has come', async t => {
  const old = await primaryServer(t)
  const next = await standbyOf(t, old)
  const left = await standbyOf(t, old)
  const way = await link(t, Number(new URL(old.url).port))
  const url = new URL(old.url)
  url.port = String(way.port)
  const mesh = await startWith(t, url.href, left.url)
  await readFromReplica(mesh)
  await createUser(mesh)

  // Nobody tells the old primary that it is none any more: it writes on, and its replica follows.
  await next.pool.query('select pg_promote()')
  way.leadTo(Number(new URL(next.url).port))
  way.cut()
  await old.pool.query('create table written_on (line text)')
  await old.pool.query(`insert into written_on select repeat('x', 1000) from generate_series(1, 20000)`)
  const created = await eventually('the new primary takes changes', async () => createUser(mesh).catch(() => undefined))
  t.true((await usersListed(mesh)).includes(created))
  await notReadFromReplica(mesh)
  for (let round = 0; round < 8; round++) {
    const user = await createUser(mesh)
    t.true((await usersListed(mesh)).includes(user))
    // Longer than it takes until the instance has given a sign of life to the new primary.
    await new Promise(resolve => setTimeout(resolve, 1_000))
  }
  t.is((await told(mesh)).ready, 0)
})

test('a replica that is promoted is not read from any more', async t => {
  const primary = await primaryServer(t)
  const standby = await standbyOf(t, primary)
  const mesh = await startWith(t, primary.url, standby.url)
  await readFromReplica(mesh)
  await standby.pool.query('select pg_promote()')
  for (let round = 0; round < 3; round++) {
    const user = await createUser(mesh)
    t.true((await usersListed(mesh)).includes(user))
  }
  await notReadFromReplica(mesh)
})
