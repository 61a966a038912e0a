/**
 * What can go wrong with a database, each of it done to a real one while everybody is at work. Whatever it was: who could not be
 * served is told when to come back, streams stay open, work goes on once it is over, and in the end nothing is missing.
 */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmdirSync } from 'node:fs'
import { chown, mkdtemp, open, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import pg from 'pg'
import { type EdgeMesh, eventually, refused, shared, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { type OwnPostgres, ownPostgres } from '../support/own-postgres.ts'
import { type Link, link } from '../support/relay.ts'
import { isToldToComeBack, work } from '../support/workload.ts'

type AtWork = { postgres: OwnPostgres; way: Link; mesh: EdgeMesh; load: Awaited<ReturnType<typeof work>> }

const atWork = shared(test, async (file): Promise<AtWork> => {
  const postgres = await ownPostgres(file)
  const way = await link(file, postgres.port)
  const url = new URL(postgres.url)
  url.port = String(way.port)
  const mesh = await startEdgeMesh(file, { DATABASE_URL: url.href, LEASE_GRACE_SECONDS: '60' })
  return { postgres, way, mesh, load: await work(file, mesh) }
})

/** A session of somebody else's in the same database, for locks. */
async function session(t: ExecutionContext, { url }: OwnPostgres, options = ''): Promise<pg.Client> {
  const client = new pg.Client({ connectionString: url, options })
  client.on('error', () => {})
  await client.connect()
  t.teardown(() => client.end())
  return client
}

async function failuresOf({ server }: EdgeMesh): Promise<Map<string, number>> {
  const text = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  const found = text.matchAll(/^edgemesh_database_failures_total\{kind="(\w+)"\} (\d+)$/gm)
  return new Map(Array.from(found, ([, kind = '', count]) => [kind, Number(count)]))
}

const endSessions = `select pg_terminate_backend(pid) from pg_stat_activity
  where application_name ^@ 'edgemesh' and pid <> pg_backend_pid()`

/**
 * Runs while everybody is at work, and looks what becomes of it.
 *
 * @param kinds of failure, of which an operator has to be told one at least
 */
async function through(t: ExecutionContext, kinds: string[], fault: (given: AtWork) => Promise<void>): Promise<void> {
  const given = atWork()
  const { load, mesh } = given
  await load.goesOn()
  const [refusedBefore, lostBefore, before] = [load.refusals.length, load.streamsLost.length, await failuresOf(mesh)]
  await fault(given)
  await load.goesOn()
  await eventually('it is ready', async () => (await mesh.server.readiness()).ready)
  const refusals = load.refusals.slice(refusedBefore)
  t.deepEqual(
    refusals.filter(({ refusal }) => !isToldToComeBack(refusal)),
    [],
  )
  t.deepEqual(load.streamsLost.slice(lostBefore), [], 'no stream has ended')
  const after = await failuresOf(mesh)
  const seen = [...after].filter(([kind, count]) => count > (before.get(kind) ?? 0)).map(([kind]) => kind)
  t.log(`counted: ${seen.join(', ')}; refused: ${refusals.length}`)
  t.true(
    seen.some(kind => kinds.includes(kind)),
    `${kinds.join(' or ')} is counted, not only ${seen.join(', ')}`,
  )
}

const isCounted = async (mesh: EdgeMesh, kind: string, before: number) =>
  ((await failuresOf(mesh)).get(kind) ?? 0) > before

/** Until a failure of that kind has been met. */
async function met(mesh: EdgeMesh, kind: string, act: () => Promise<unknown> = async () => {}): Promise<void> {
  const before = (await failuresOf(mesh)).get(kind) ?? 0
  await eventually(`${kind} is counted`, async () => {
    await act()
    return isCounted(mesh, kind, before)
  })
}

test.serial('connections that are cut on the way are made anew', async t => {
  await through(t, ['unreachable'], async ({ way }) => {
    for (let times = 0; times < 5; times++) {
      way.cut()
      await sleep(100)
    }
  })
})

test.serial('sessions that an administrator ends are begun anew (57P01)', async t => {
  await through(t, ['shutdown'], async ({ postgres, mesh }) => met(mesh, 'shutdown', () => postgres.query(endSessions)))
})

test.serial(
  'a process of PostgreSQL that dies takes all sessions along; they come back after its recovery (57P02, 57P03)',
  async t => {
    await through(t, ['shutdown'], async ({ postgres }) => postgres.crash())
  },
)

test.serial('PostgreSQL is shut down and started again (57P01, 57P03)', async t => {
  await through(t, ['shutdown', 'unreachable'], async ({ postgres, load }) => {
    const before = load.refusals.length
    await postgres.stop()
    await eventually('callers see it', () => load.refusals.length > before)
    await postgres.start()
  })
})

test.serial('PostgreSQL is killed and started again', async t => {
  await through(t, ['unreachable'], async ({ postgres, load }) => {
    const before = load.refusals.length
    await postgres.kill()
    await eventually('callers see it', () => load.refusals.length > before)
    await postgres.start()
  })
})

test.serial('others have taken all connections (53300)', async t => {
  await through(t, ['too_many_connections'], async ({ postgres, mesh }) => {
    const others: pg.Client[] = []
    const greedy = setInterval(() => {
      const client = new pg.Client({ connectionString: postgres.url })
      client.on('error', () => {})
      others.push(client)
      client.connect().catch(() => {})
    }, 5)
    const administrator = await session(t, postgres)
    await met(mesh, 'too_many_connections', () => administrator.query(endSessions))
    clearInterval(greedy)
    await Promise.all(others.map(client => client.end()))
  })
})

test.serial('statements that take too long are given up (57014)', async t => {
  await through(t, ['timeout'], async ({ postgres, mesh }) => {
    const blocker = await session(t, postgres)
    await blocker.query('begin')
    await blocker.query('lock table users, health_reports in exclusive mode')
    await met(mesh, 'timeout')
    await blocker.query('rollback')
  })
})

test.serial(
  'locks that are not to be had in time are given up, where an administrator has said so (55P03)',
  async t => {
    await through(t, ['locked'], async ({ postgres, mesh, load }) => {
      const before = load.refusals.length
      await postgres.query(`alter role edgemesh set lock_timeout = '200ms'`)
      await postgres.query(endSessions)
      const blocker = await session(t, postgres)
      await blocker.query('set lock_timeout = 0')
      await blocker.query('begin')
      await blocker.query('lock table users, health_reports, decisions in exclusive mode')
      await met(mesh, 'locked')
      await eventually('callers see it', () => load.refusals.length > before)
      await blocker.query('rollback')
      await postgres.query('alter role edgemesh reset lock_timeout')
      await postgres.query(endSessions)
    })
  },
)

test.serial('a report waits, and its stream stays, while what it is judged by can not be read', async t => {
  await through(t, ['locked'], async ({ postgres, mesh, load }) => {
    await postgres.query(`alter role edgemesh set lock_timeout = '200ms'`)
    const blocker = await session(t, postgres, '-c lock_timeout=0')
    await blocker.query('begin')
    await blocker.query('lock table policy_data in access exclusive mode')
    // With its connection the change feed loses everything that is known.
    await postgres.query(endSessions)
    await met(mesh, 'locked')
    await eventually('reports wait', async () => {
      const { heartbeat } = load.counts()
      await sleep(500)
      return load.counts().heartbeat === heartbeat
    })
    await blocker.query('rollback')
    await postgres.query('alter role edgemesh reset lock_timeout')
    await postgres.query(endSessions)
  })
})

test.serial(
  'a report that was the victim of a deadlock is written again, and its device sees nothing of it (40P01)',
  async t => {
    await through(t, ['deadlock'], async ({ postgres, mesh, load }) => {
      const refusedBefore = load.refusals.length
      // It never gives up, so the service has to.
      const other = await session(t, postgres, '-c deadlock_timeout=60s')
      const lock = 'select from device_postures where device_id = $1 for update'
      await met(mesh, 'deadlock', async () => {
        await other.query('begin')
        await other.query(lock, ['beta'])
        await eventually('reports of both wait', async () => {
          const [row] = await postgres.query<{ waiting: number }>(
            `select count(*)::int as waiting from pg_locks where not granted and locktype in ('transactionid', 'tuple')`,
          )
          return row?.waiting
        })
        // They are written in order: whoever waits for beta has alpha, if alpha is among them.
        await other.query(lock, ['alpha'])
        await other.query('rollback')
      })
      t.deepEqual(load.refusals.slice(refusedBefore), [])
    })
  },
)

test.serial('what can not be serialised is done again, and callers see nothing of it (40001)', async t => {
  await through(t, ['serialization'], async ({ postgres, mesh, load }) => {
    await postgres.query(`alter role edgemesh set default_transaction_isolation = 'serializable'`)
    await postgres.query(endSessions)
    await load.goesOn()
    const refusedBefore = load.refusals.length
    const other = await session(t, postgres)
    for (const [table, kind] of [
      ['enrollment_tokens', 'enrollment'],
      ['device_postures', 'heartbeat'],
    ] as const) {
      await met(mesh, 'serialization', async () => {
        await other.query('begin isolation level read committed')
        await other.query(`update ${table} set ${table === 'device_postures' ? 'failing = failing' : 'uses = uses'}`)
        await eventually(`who comes with an ${kind} waits`, async () => {
          const rows = await postgres.query(`select from pg_locks where not granted and locktype = 'transactionid'`)
          return rows.length > 0
        })
        await other.query('commit')
      })
      await load.goesOn()
    }
    t.deepEqual(load.refusals.slice(refusedBefore), [])
    await postgres.query('alter role edgemesh reset default_transaction_isolation')
    await postgres.query(endSessions)
  })
})

test.serial('a database that takes no writes is none, until it takes them again (25006)', async t => {
  await through(t, ['read_only'], async ({ postgres, mesh }) => {
    await postgres.query('alter system set default_transaction_read_only = on')
    await postgres.query('select pg_reload_conf()')
    await met(mesh, 'read_only')
    await postgres.query('alter system reset default_transaction_read_only')
    await postgres.query('select pg_reload_conf()')
  })
})

test.serial('a database that takes connections and statements and never answers holds nobody for long', async t => {
  await through(t, ['silent', 'unreachable'], async ({ way, load }) => {
    const before = load.refusals.length
    way.hold()
    await eventually('who calls is told to come back', () => {
      const kinds = new Set(load.refusals.slice(before).map(({ work }) => work))
      return kinds.has('enrollment') && kinds.has('change') && kinds.has('allow')
    })
    way.letGo()
  })
})

const mountSmallDisk = (folder: string) =>
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=16m', 'edgemesh-test', folder], { stdio: 'ignore' })
const unmount = (folder: string) => execFileSync('umount', ['-l', folder])

/** It takes root, and in a container the right to do it. */
function canMount(): boolean {
  const folder = mkdtempSync(join(tmpdir(), 'edgemesh-small-disk-'))
  try {
    mountSmallDisk(folder)
    unmount(folder)
    return true
  } catch {
    return false
  } finally {
    rmdirSync(folder)
  }
}

const mounts = canMount()
const withSmallDisk = mounts ? test.serial : test.serial.skip

const diskFull = 'the disk of the database is full, until there is room again (53100)'
withSmallDisk(`${diskFull}${mounts ? '' : ' (no file system can be mounted here)'}`, async t => {
  const { postgres } = atWork()
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-small-disk-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  mountSmallDisk(folder)
  t.teardown(() => unmount(folder))
  const { uid, gid } = await stat(postgres.directory)
  await chown(folder, uid, gid)
  await postgres.query(`create tablespace small location '${folder}'`)
  const tables = await postgres.query<{ name: string }>(
    `select format('%I', relname) as name from pg_class where relkind = 'r'
       and relname ~ '^(audit_events|decisions|health_reports|device_postures|users|devices)' and not relispartition
     union all select inhrelid::regclass::text from pg_inherits
       where inhrelid::regclass::text ~ '^(audit_events|decisions|health_reports)'
         and (select relkind from pg_class where oid = inhrelid) = 'r'`,
  )
  for (const { name } of tables) await postgres.query(`alter table ${name} set tablespace small`)
  await through(t, ['disk_full'], async ({ mesh, load }) => {
    const before = load.refusals.length
    const file = join(folder, 'of somebody else')
    await met(mesh, 'disk_full', () => fill(file))
    await eventually('callers see it', () => load.refusals.length > before)
    await rm(file)
  })
  for (const { name } of tables) await postgres.query(`alter table ${name} set tablespace pg_default`)
  await postgres.query('drop tablespace small')
})

/** Until there is no room for a byte more. */
async function fill(path: string): Promise<void> {
  const file = await open(path, 'a')
  const megabyte = Buffer.alloc(1_000_000)
  try {
    for (let size = megabyte.length; size > 0; ) {
      try {
        await file.write(megabyte, 0, size)
      } catch {
        size = Math.floor(size / 2)
      }
    }
  } finally {
    await file.close()
  }
}

test.serial(
  'after all of that nothing acknowledged is missing, no token was used too often, and the audit log is whole',
  async t => {
    const { load, postgres } = atWork()
    await load.stop()
    const pool = new pg.Pool({ connectionString: postgres.url, max: 2 })
    t.teardown(() => pool.end())
    await load.account(t, pool)
  },
)

test('who finds all connections of an instance in use is told to come back, and operators see why', async t => {
  const mesh = await startEdgeMesh(t, { DATABASE_POOL_SIZE: '2', DATABASE_MAX_OVERFLOW: '0' })
  const blocker = new pg.Client({ connectionString: mesh.databaseUrl })
  await blocker.connect()
  t.teardown(() => blocker.end())
  await blocker.query('begin')
  await blocker.query('lock table users in exclusive mode')
  const change = (id: string) =>
    unary(mesh.admin, 'createUser', { id, email: `${id}@example.com`, name: id, role: 'viewer' })
  const holders = [change('one'), change('two')]
  await eventually('both connections are in use', async () => {
    const { rowCount } = await mesh.pool.query(
      `select from pg_locks where not granted and relation = 'users'::regclass`,
    )
    return rowCount === 2
  })
  for (const refusal of await Promise.all(['three', 'four', 'five'].map(id => refused(change(id))))) {
    t.true(isToldToComeBack(refusal), JSON.stringify(refusal))
  }
  t.true(((await failuresOf(mesh)).get('pool_exhausted') ?? 0) >= 3)
  await blocker.query('rollback')
  await Promise.all(holders)
  await eventually('there are connections again', () => change('six').catch(() => undefined))
})

test('TLS connections to the database that are reset, in their handshake too, are made anew', async t => {
  const postgres = await ownPostgres(t)
  await postgres.enableTls()
  const way = await link(t, postgres.port)
  const url = new URL(postgres.url)
  url.port = String(way.port)
  url.searchParams.set('ssl', 'require')
  const mesh = await startEdgeMesh(t, { DATABASE_URL: url.href })
  const [row] = await postgres.query<{ encrypted: boolean }>(
    `select bool_and(ssl) as encrypted from pg_stat_ssl join pg_stat_activity using (pid) where application_name ^@ 'edgemesh'`,
  )
  t.true(row?.encrypted)
  const load = await work(t, mesh)
  await load.goesOn()
  for (let times = 0; times < 100; times++) {
    way.cut()
    await sleep(Math.random() * 20)
  }
  await load.goesOn()
  await load.stop()
  t.deepEqual(
    load.refusals.filter(({ refusal }) => !isToldToComeBack(refusal)),
    [],
  )
  t.deepEqual(load.streamsLost, [])
  const pool = new pg.Pool({ connectionString: postgres.url, max: 2 })
  t.teardown(() => pool.end())
  await load.account(t, pool)
})
