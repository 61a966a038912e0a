import test from 'ava'
import { announcements, announcing, compareClocks, readPayload, startChangeFeed } from '../../src/db/change-feed.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const hourMs = 3_600_000

test('instances whose clocks differ by hours agree on when a change was announced', async t => {
  const { url, pool } = await testDatabase(t)
  const clocks = [0, 3 * hourMs, -2 * hourMs].map(offsetMs => () => Date.now() + offsetMs)
  const feeds = await Promise.all(
    clocks.map((clock, at) => startChangeFeed({ url, instanceId: `instance-${at}`, log, clock })),
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

test('what an instance of the version before announces is heard, without a moment', async t => {
  const { url, pool } = await testDatabase(t)
  const feed = await startChangeFeed({ url, instanceId: 'new', log })
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
