/** The primary dies under load, and its synchronous standby takes over: nothing acknowledged is lost, and nothing is started anew. */
import type { ExecutionContext } from 'ava'
import test from 'ava'
import pg from 'pg'
import { type EdgeMesh, eventually, startEdgeMesh, startSecondInstance } from '../support/edgemesh.ts'
import { type OwnPostgres, ownPostgres } from '../support/own-postgres.ts'
import { link } from '../support/relay.ts'
import { isToldToComeBack, work } from '../support/workload.ts'

async function pairOf(t: ExecutionContext): Promise<[OwnPostgres, OwnPostgres]> {
  const one = await ownPostgres(t)
  const two = await one.standby('two')
  await one.query(`alter system set synchronous_standby_names = 'two'`)
  await one.query('select pg_reload_conf()')
  await eventually('the standby is a synchronous one', async () => {
    const [row] = await one.query<{ sync_state: string }>('select sync_state from pg_stat_replication')
    return row?.sync_state === 'sync'
  })
  return [one, two]
}

function poolAt(t: ExecutionContext, { url }: OwnPostgres): pg.Pool {
  const pool = new pg.Pool({ connectionString: url, max: 2 })
  pool.on('error', () => {})
  t.teardown(() => pool.end())
  return pool
}

async function isReady({ server }: EdgeMesh): Promise<boolean> {
  return (await server.readiness()).ready
}

test('instances that know both servers go on at the promoted one, and stay there when the old one comes back', async t => {
  const [one, two] = await pairOf(t)
  const url = new URL(one.url)
  const given = `postgresql://${url.username}:${url.password}@127.0.0.1:${one.port},127.0.0.1:${two.port}/edgemesh?target_session_attrs=read-write`
  const mesh = await startEdgeMesh(t, { DATABASE_URL: given })
  const second = await startSecondInstance(t, mesh)
  const load = await work(t, mesh, second)
  await load.goesOn()

  await one.kill()
  await eventually('callers see that it is gone', () => load.refusals.length > 0)
  await two.promote()
  await load.goesOn()
  for (const instance of [mesh, second]) await eventually('it is ready', () => isReady(instance))

  // Started by its service manager, it takes itself for the primary.
  await one.start()
  await load.goesOn()
  await load.stop()
  t.deepEqual(
    load.refusals.filter(({ refusal }) => !isToldToComeBack(refusal)),
    [],
  )
  t.deepEqual(load.streamsLost, [], 'no stream has ended')
  await load.account(t, poolAt(t, two))
  const users = `select count(*)::int as users from users`
  const [[there], [here]] = await Promise.all([one.query(users), two.query(users)])
  t.true(there!.users < here!.users, 'the old one was left alone')
})

test('behind a balancer that moves instances go on as well, and stay away from a standby that it leads to', async t => {
  const [one, two] = await pairOf(t)
  const balancer = await link(t, one.port)
  const url = new URL(one.url)
  url.port = String(balancer.port)
  const mesh = await startEdgeMesh(t, { DATABASE_URL: url.href })
  const load = await work(t, mesh)
  await load.goesOn()

  await one.kill()
  // Too early: it is a standby yet.
  balancer.leadTo(two.port)
  await eventually('callers see that there is no primary', () => load.refusals.length > 3)
  t.false(await isReady(mesh))
  await two.promote()
  await load.goesOn()
  await eventually('it is ready', () => isReady(mesh))
  await load.stop()
  t.deepEqual(
    load.refusals.filter(({ refusal }) => !isToldToComeBack(refusal)),
    [],
  )
  t.deepEqual(load.streamsLost, [], 'no stream has ended')
  await load.account(t, poolAt(t, two))
})
