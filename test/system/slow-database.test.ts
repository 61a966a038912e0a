/** Devices while the database takes its time: they wait longer, and lose nothing. */
import test from 'ava'
import pg from 'pg'
import { heartbeats } from '../support/device.ts'
import { eventually, startEdgeMesh } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

const intervalOf = ({ nextInterval }: { nextInterval?: { seconds: number; nanos: number } | undefined }) =>
  (nextInterval?.seconds ?? 0) + (nextInterval?.nanos ?? 0) / 1e9

test('while reports can not be written devices are acknowledged later, told to report less often, and nothing is lost', async t => {
  const mesh = await startEdgeMesh(t, { HEARTBEAT_INTERVAL_SECONDS: '10', RATE_LIMIT_HEALTH: '100000/minute' })
  const devices = await Promise.all(['alpha', 'beta'].map(id => mesh.enroll({ device: { id } })))
  const streams = devices.map(device => heartbeats(t, mesh, device))
  const [prompt] = await Promise.all(streams.map(stream => stream.beat(healthy)))
  t.true(intervalOf(prompt!) < 12)

  const blocker = new pg.Client({ connectionString: mesh.databaseUrl })
  await blocker.connect()
  await blocker.query('begin')
  await blocker.query('lock table health_reports in exclusive mode')
  const first = streams.map(stream => stream.beat({ cpuPercent: 50 }))
  // More than a stream is read for: they wait on the way, in order.
  const rest = streams.flatMap(stream => [51, 52, 53].map(cpuPercent => stream.beat({ cpuPercent })))
  await eventually('they have waited', async () => {
    const { rows } = await mesh.pool.query(
      `select 1 from pg_stat_activity where wait_event_type = 'Lock' and query_start < now() - interval '3 seconds'`,
    )
    return rows.length > 0
  })
  t.deepEqual(
    streams.map(({ responses }) => responses.filter(({ acknowledgedSequence }) => acknowledgedSequence > 1)),
    [[], []],
  )
  await blocker.query('commit')
  await blocker.end()

  for (const response of await Promise.all(first)) t.true(intervalOf(response) > 20, String(intervalOf(response)))
  await Promise.all(rest)
  const { rows } = await mesh.pool.query(
    'select device_id, array_agg(sequence::int order by sequence) as sequences from health_reports group by 1 order by 1',
  )
  t.deepEqual(
    rows,
    ['alpha', 'beta'].map(device_id => ({ device_id, sequences: [1, 2, 3, 4, 5] })),
  )
  const after = await streams[0]!.beat({ cpuPercent: 1 })
  t.true(intervalOf(after) < 12, 'as before')
})
