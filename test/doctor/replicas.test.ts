/** Real streaming replicas that lag, are promoted, or follow somebody else. */
import test from 'ava'
import { told } from '../support/doctor.ts'
import { shared } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { testDatabase } from '../support/postgres.ts'
import { primaryServer, standbyOf } from '../support/standby.ts'

const servers = shared(test, async file => {
  const primary = await primaryServer(file)
  return { primary, standby: await standbyOf(file, primary) }
})

const look = (DATABASE_URL: string, ...replicas: string[]) =>
  told({ DATABASE_URL, DATABASE_REPLICA_URLS: replicas.join() }, 'replicas')

test.serial('a replica that has all is found well; without any it is said where lists are read', async t => {
  const { primary, standby } = servers()
  t.deepEqual(await look(primary.url, standby.url), [`ok: ${new URL(standby.url).host} has all that the primary has`])
  t.regex((await look(primary.url)).join(), /^skipped: DATABASE_REPLICA_URLS names none/)
})

test.serial('a replica that does not keep up is told', async t => {
  const { primary, standby } = servers()
  await standby.pool.query('select pg_wal_replay_pause()')
  t.teardown(() => standby.pool.query('select pg_wal_replay_resume()'))
  await primary.pool.query('create table something (id int)')
  t.regex((await look(primary.url, standby.url)).join(), /^warning: 127\.0\.0\.1:\d+ is \d+ bytes behind for 2 s$/)
})

test.serial('a replica that is away, of another database, or none, is told, each by its name', async t => {
  const { primary } = servers()
  const stranger = (await testDatabase(t)).url
  const gone = `postgresql://edgemesh:x@127.0.0.1:${await freePort()}/edgemesh`
  const [away, foreign, itself, ...rest] = await look(primary.url, gone, stranger, primary.url)
  t.regex(away ?? '', /^failed: no connection to the database at 127\.0\.0\.1:\d+: connect ECONNREFUSED/)
  t.is(foreign, `failed: ${new URL(stranger).host} is a replica of another database`)
  t.is(itself, `failed: ${new URL(primary.url).host} is no standby: it takes writes itself`)
  t.deepEqual(rest, [])
})
