import test from 'ava'
import { maintainPartitions } from '../../src/db/partitions.ts'
import { testDatabase } from '../support/postgres.ts'

const dayMs = 86_400_000

test('partitions are made ahead, by several instances at once, and dropped when the retention is over', async t => {
  const { pool } = await testDatabase(t)
  const names = async () => {
    const { rows } = await pool.query<{ name: string }>(
      "select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = 'audit_events'::regclass order by 1",
    )
    return rows.map(row => row.name)
  }
  const start = Date.UTC(2030, 0, 30, 12)
  await Promise.all([1, 2, 3].map(() => maintainPartitions(pool, 2, start)))
  const first = await names()
  t.deepEqual(
    first.filter(name => name !== 'audit_events_default'),
    ['20300130', '20300131', '20300201', '20300202', '20300203', '20300204', '20300205', '20300206'].map(
      day => `audit_events_${day}`,
    ),
  )
  await maintainPartitions(pool, 2, start + 3 * dayMs)
  const later = await names()
  t.false(later.includes('audit_events_20300130'))
  t.true(later.includes('audit_events_20300131'))
  t.true(later.includes('audit_events_20300209'))
})

test('rows that came before their partition stay and are found', async t => {
  const { pool } = await testDatabase(t)
  const at = new Date(Date.UTC(2030, 5, 1, 8))
  await pool.query(
    `insert into health_reports (received_at, device_id, sequence, posture, measured_at) values ($1, 'alpha', 1, '{}', $1)`,
    [at],
  )
  await maintainPartitions(pool, 90, at.getTime())
  const { rows } = await pool.query('select device_id from health_reports where received_at = $1', [at])
  t.is(rows.length, 1)
})
