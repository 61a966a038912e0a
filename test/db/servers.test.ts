/** Which server is connected to, where there are several, or where one is not what it is taken for. */
import { createServer } from 'node:net'
import type { ExecutionContext } from 'ava'
import test from 'ava'
import pg from 'pg'
import { auditEntities } from '../../src/audit/entities.ts'
import { databaseFailure, isDatabaseOutage } from '../../src/db/failure.ts'
import { openDatabase } from '../../src/db/orm.ts'
import { databaseServers } from '../../src/db/servers.ts'
import { eventually } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { type OwnPostgres, ownPostgres } from '../support/own-postgres.ts'
import { link } from '../support/relay.ts'

function urlOf(server: OwnPostgres, ports: number[], attributes = ''): string {
  const url = new URL(server.url)
  url.searchParams.set('host', ports.map(() => '127.0.0.1').join())
  url.searchParams.set('port', ports.join())
  if (attributes) url.searchParams.set('target_session_attrs', attributes)
  return url.href
}

async function poolOf(t: ExecutionContext, url: string) {
  const db = await openDatabase({ url, poolMax: 4, entities: auditEntities })
  t.teardown(() => db.close())
  // A busy machine may take longer for a connection than the pool waits for one; whoever asks then asks again.
  const port = () =>
    eventually('a server is connected to', async () => {
      try {
        const { rows } = await db.pool.query<{ port: string }>(`select current_setting('port') as port`)
        return Number(rows[0]?.port)
      } catch (error) {
        if (isDatabaseOutage(error)) return undefined
        throw error
      }
    })
  return { ...db, port }
}

/** A port where whoever connects hears nothing. */
async function silentPort(t: ExecutionContext): Promise<number> {
  const port = await freePort()
  const server = createServer(socket => {
    socket.on('error', () => {})
    t.teardown(() => socket.destroy())
  })
  await new Promise<void>(resolve => server.listen(port, '127.0.0.1', resolve))
  t.teardown(() => server.close())
  return port
}

test('of several servers the primary is used, wherever it stands in the list, whether others are gone, silent or standbys', async t => {
  const primary = await ownPostgres(t)
  const standby = await primary.standby('two')
  const others = [await freePort(), await silentPort(t), standby.port]
  for (const at of [0, 1, 3]) {
    const db = await poolOf(t, urlOf(primary, others.toSpliced(at, 0, primary.port)))
    t.is(await db.port(), primary.port)
    t.deepEqual(await db.em().execute('select pg_is_in_recovery() as standby'), [{ standby: false }])
  }
  const reader = await poolOf(t, urlOf(primary, [standby.port], 'any'))
  t.is(await reader.port(), standby.port, 'a standby is taken where that was asked for')

  const none = await poolOf(t, urlOf(primary, others))
  const error = await t.throwsAsync(none.pool.query('select 1'))
  t.true(isDatabaseOutage(error))
  t.regex(error.message, new RegExp(`127.0.0.1:${others[0]}: connect ECONNREFUSED`))
  t.regex(error.message, new RegExp(`127.0.0.1:${standby.port}: is a standby, which takes no writes`))
  t.false(error.message.includes(new URL(primary.url).password))
})

test('a standby that answers under the name of the primary is refused, and connected to once it is promoted', async t => {
  const primary = await ownPostgres(t)
  const standby = await primary.standby('two')
  const way = await link(t, primary.port)
  const url = new URL(primary.url)
  url.port = String(way.port)
  const db = await poolOf(t, url.href)
  t.is(await db.port(), primary.port)

  way.leadTo(standby.port)
  way.cut()
  const refused = await eventually('the connections of before are gone', () =>
    db.pool.query('select 1').then(
      () => undefined,
      error => (databaseFailure(error) === 'read_only' ? error : undefined),
    ),
  )
  t.regex(refused.message, /is a standby, which takes no writes/)
  await standby.promote()
  t.is(await db.port(), standby.port)
})

test('after a failover the pool is at the new primary, and at no server of an older timeline that comes back', async t => {
  const one = await ownPostgres(t)
  const two = await one.standby('two')
  const url = urlOf(one, [one.port, two.port])
  const db = await poolOf(t, url)
  t.is(await db.port(), one.port)
  await one.kill()
  await two.promote()
  await eventually('it has moved', () => db.port().catch(() => undefined))
  t.is(await db.port(), two.port)

  // As its service manager starts it again: it knows nothing of the other, and takes writes.
  await one.start()
  t.is(await db.port(), two.port)
  for (let instance = 0; instance < 3; instance++) t.is(await (await poolOf(t, url)).port(), two.port)
})

test('when another server has become the primary, nothing is asked any more of what is open to the one before', async t => {
  const one = await ownPostgres(t)
  const two = await one.standby('two')
  const way = await link(t, one.port)
  const servers = databaseServers(urlOf(one, [way.port, two.port]))
  const before = new servers.Client({})
  await before.connect()
  const ended = new Promise<void>(resolve => before.on('end', resolve))
  // Out of reach for those who come now, but not for those who are there.
  way.leadTo(1)
  await two.promote()
  await t.throwsAsync(new servers.Client({}).connect())
  const after = await eventually('the other is found', () => new servers.Client({}).connect().catch(() => undefined))
  t.is((await after.query<{ port: string }>(`select current_setting('port') as port`)).rows[0]?.port, String(two.port))
  await ended
  await t.throwsAsync(before.query('select 1'))
  await after.end()
})

test('a connection that does not answer is not given to the next who asks', async t => {
  const primary = await ownPostgres(t)
  const servers = databaseServers(primary.url)
  const pool = new pg.Pool({ Client: servers.Client, max: 1, query_timeout: 300 } as pg.PoolConfig)
  t.teardown(() => pool.end())
  const client = await pool.connect()
  await t.throwsAsync(client.query('select pg_sleep(60)'), { message: 'Query read timeout' })
  client.release()
  t.is(pool.totalCount, 0)
  await eventually('there is one that answers', () => pool.query('select 1').catch(() => undefined))
  t.true(servers.failures.get('silent')! >= 1)
})

test('once a statement has had no answer for longer than PostgreSQL may take, all connections of before are given up', async t => {
  const primary = await ownPostgres(t)
  const way = await link(t, primary.port)
  const url = new URL(primary.url)
  url.port = String(way.port)
  const servers = databaseServers(url.href)
  const [asked, idle] = await Promise.all(
    [1, 2].map(() => new servers.Client({ statement_timeout: 200, query_timeout: 400 }).connect()),
  )
  const gone = new Promise<void>(resolve => idle!.on('end', resolve))
  way.hold()
  await t.throwsAsync(asked!.query('select 1'), { message: 'Query read timeout' })
  await gone
  t.pass()
})
