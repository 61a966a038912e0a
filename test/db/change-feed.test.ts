import { setTimeout as sleep } from 'node:timers/promises'
import test from 'ava'
import {
  announce,
  announcements,
  announcing,
  compareClocks,
  readPayload,
  startChangeFeed,
} from '../../src/db/change-feed.ts'
import { keepFacts } from '../../src/db/kept-facts.ts'
import { databaseServers } from '../../src/db/servers.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const hourMs = 3_600_000

test('instances whose clocks differ by hours agree on when a change was announced', async t => {
  const { url, pool } = await testDatabase(t)
  const clocks = [0, 3 * hourMs, -2 * hourMs].map(offsetMs => () => Date.now() + offsetMs)
  const feeds = await Promise.all(
    clocks.map((clock, at) =>
      startChangeFeed({ servers: databaseServers(url), instanceId: `instance-${at}`, log, clock }),
    ),
  )
  t.teardown(() => Promise.all(feeds.map(feed => feed.stop())))
  const heard = feeds.map(() => [] as { keys: string[]; announcedAtMs: number | undefined }[])
  feeds.forEach((feed, at) => void feed.onChange((keys, announcedAtMs) => heard[at]?.push({ keys, announcedAtMs })))

  const before = Date.now()
  const [payload] = announcements(['device:alpha', 'user:ada'])
  await pool.query(`select ${announcing('$1::text')}`, [payload])
  await eventually('all have heard', () => heard.every(changes => changes.length === 1))
  const after = Date.now()
  heard.forEach((changes, at) => {
    const [{ keys, announcedAtMs = Number.NaN } = { keys: [] }] = changes
    t.deepEqual(keys, ['device:alpha', 'user:ada'])
    const ours = announcedAtMs - ((clocks[at]?.() ?? 0) - Date.now())
    // The clocks are compared with ticks that take milliseconds; hours is what they differ by.
    t.true(ours > before - 5_000 && ours < after + 5_000, `instance ${at}: ${ours} is not in ${before}..${after}`)
    t.true(Math.abs((feeds[at]?.databaseTimeMs(clocks[at]?.() ?? 0) ?? 0) - Date.now()) < 5_000)
  })
})

test('while its connection is killed again and again, an instance never answers with what was changed a second ago', async t => {
  const { url, pool, em } = await testDatabase(t)
  const feed = await startChangeFeed({ servers: databaseServers(url), instanceId: 'shaken', log })
  t.teardown(() => feed.stop())
  const ids = Array.from({ length: 150 }, (_, at) => `fact-${at}`)
  await pool.query('create table shaken (id text primary key, value int not null)')
  await pool.query('insert into shaken select unnest($1::text[]), 0', [ids])
  const facts = keepFacts<number>({
    feed,
    kind: 'shaken',
    max: ids.length,
    load: async id => (await pool.query('select value from shaken where id = $1', [id])).rows[0].value,
  })
  let resets = 0
  feed.onReset(() => void resets++)

  /** By id: what was acknowledged, and when. Ids are changed rarely, so that one lost notification is not made good by the next. */
  const acknowledged = new Map(ids.map(id => [id, [{ value: 0, atMs: performance.now() }]]))
  let isOver = false
  const writing = (async () => {
    for (let value = 1; !isOver; value++) {
      const id = ids[(value * 67) % ids.length]!
      await em().transactional(async tx => {
        await tx.execute('update shaken set value = ? where id = ?', [value, id])
        await announce(tx, [`shaken:${id}`])
      })
      acknowledged.get(id)?.push({ value, atMs: performance.now() })
      await sleep(10)
    }
  })()
  const killing = (async () => {
    while (!isOver) {
      await sleep(200 + Math.random() * 500)
      await pool.query(
        `select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name = 'edgemesh change feed'`,
      )
    }
  })()

  const untilMs = performance.now() + 8_000
  let answers = 0
  const stale: string[] = []
  while (performance.now() < untilMs) {
    for (const id of ids) {
      const askedAtMs = performance.now()
      const isThere = await feed.caughtUp().then(
        () => true,
        () => false,
      )
      if (!isThere) continue
      const { value } = await facts.get(id)
      answers++
      const due = acknowledged.get(id)?.findLast(({ atMs }) => atMs < askedAtMs - 1_000)?.value ?? 0
      if (value < due) stale.push(`${id} is ${value}, was ${due} a second before`)
    }
    await sleep(5)
  }
  isOver = true
  await Promise.all([writing, killing])
  t.deepEqual(stale, [])
  t.true(resets > 3, `it was cut off ${resets} times`)
  t.true(answers > 1_000, `it answered ${answers} times`)
  await feed.caughtUp()
  for (const [id, values] of acknowledged) {
    await eventually(`${id} is known as it is`, async () => (await facts.get(id)).value === values.at(-1)?.value)
  }
})

test('what an instance of the version before announces is heard, without a moment', async t => {
  const { url, pool } = await testDatabase(t)
  const feed = await startChangeFeed({ servers: databaseServers(url), instanceId: 'new', log })
  t.teardown(() => feed.stop())
  const heard: unknown[] = []
  feed.onChange((keys, announcedAtMs) => void heard.push([keys, announcedAtMs]))
  await pool.query("select pg_notify('edgemesh_changes', $1)", ['device:alpha\ndevice:beta'])
  await eventually('it is heard', () => heard.length > 0)
  t.deepEqual(heard, [[['device:alpha', 'device:beta'], undefined]])
})

test('a moment that is none is not taken for one', t => {
  t.deepEqual(readPayload('at:soon\ndevice:a'), { keys: ['device:a'], announcedAtMs: undefined })
  t.deepEqual(readPayload('at:1764027827000.125\ndevice:a'), { keys: ['device:a'], announcedAtMs: 1764027827000.125 })
  t.deepEqual(readPayload('device:at:5'), { keys: ['device:at:5'], announcedAtMs: undefined })
})

test('clocks are compared by the quickest of the last answers', t => {
  const clocks = compareClocks()
  t.is(clocks.aheadMs(), 0)
  clocks.compare(1_000, 5_000, 1_100)
  t.is(clocks.aheadMs(), 3_950)
  clocks.compare(2_000, 6_000, 2_002)
  t.is(clocks.aheadMs(), 3_999)
  // A slow answer says less; nor does one during which our clock was set back.
  clocks.compare(3_000, 7_900, 4_000)
  clocks.compare(5_000, 9_000, 4_000)
  t.is(clocks.aheadMs(), 3_999)
  // Ours was set forward: after as many ticks as are compared that is what counts.
  for (let at = 0; at < 8; at++) clocks.compare(100_000, 50_000, 100_004)
  t.is(clocks.aheadMs(), -50_002)
})
