import { randomUUIDv7 } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import type pg from 'pg'
import {
  advance,
  type Checkpoint,
  checkpointAt,
  checkpointOfNow,
  checkpointText,
  forgetOld,
  readCheckpoint,
  sealsAfter,
} from '../../src/audit/follow.ts'
import { createFollower } from '../../src/audit/follower.ts'
import { auditEventsTable, startJournal } from '../../src/audit/journal.ts'
import { encodeRow } from '../../src/audit/journal-table.ts'
import { createChain, insertSeal, sealedRow, sealKeyFrom } from '../../src/audit/seals.ts'
import { sealLeftovers } from '../../src/audit/unsealed.ts'
import { systemClock } from '../../src/clock.ts'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually } from '../support/edgemesh.ts'
import { testDatabase } from '../support/postgres.ts'

const log = createLog({ level: 'silent' })
const sealKey = sealKeyFrom('a secret of tests that is long enough')
const clock = systemClock
const dayMs = 86_400_000
const events = new Set(['audit_events'] as const)

function row(id: string = randomUUIDv7(), at = new Date()): unknown[] {
  return [at, id, 'tester', '/test', id, '127.0.0.1', 'OK', '', '{}', 'instance']
}

/** Follows until the test ends. @returns the ids that have come, in their order */
function followed(
  t: ExecutionContext,
  pool: pg.Pool,
  checkpoint: Checkpoint,
  pace = async () => {},
  queuedMax = 1_000,
): string[] {
  const follower = createFollower({ pool, reports: pool, clock, log, everyMs: 20, queuedMax })
  const ids: string[] = []
  const done = new AbortController()
  const running = (async () => {
    for await (const { records } of follower.follow({ checkpoint, tables: events, signal: done.signal })) {
      for (const record of records) ids.push(record.row.id)
      await pace()
    }
  })().catch(error => {
    if (!done.signal.aborted) t.fail(String(error))
  })
  t.teardown(async () => {
    done.abort(new Error('the test is over'))
    await running
  })
  return ids
}

/** Commits take their time, each another: those that begin earlier become visible later. */
async function slowCommits(pool: pg.Pool, secondsMax: number): Promise<void> {
  await pool.query(`
    create function dawdle() returns trigger language plpgsql as $$
    begin perform pg_sleep(random() * ${secondsMax}); return null; end $$`)
  await pool.query('create trigger dawdle after insert on audit_seals for each row execute function dawdle()')
}

/** What an admin change does: its event is committed with it, and sealed after. */
async function ownEvent(pool: pg.Pool, journal: ReturnType<typeof startJournal>, id: string): Promise<void> {
  const client = await pool.connect()
  const own = journal.ownEvents()
  const values = row(id)
  await client.query('begin')
  await client.query('insert into audit_events values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)', [
    ...values,
    own.vouch(values),
  ])
  await sleep(Math.random() * 50)
  await client.query('commit')
  client.release()
  own.committed()
}

test('four writers whose commits overtake each other are followed without a loss or a repetition, from whichever moment', async t => {
  const { pool } = await testDatabase(t)
  await slowCommits(pool, 0.03)
  const start = (at: number) =>
    startJournal({ pool, log, sealKey, instanceId: `instance-${at}`, clock: () => clock() + at })
  const before = row()
  const first = start(0)
  await first.append([{ table: auditEventsTable, row: before }])

  const fromTheBegin = followed(t, pool, checkpointAt(0))
  const fromNow = followed(t, pool, await checkpointOfNow(pool, clock()))
  // So slow that it falls behind and has to catch up, again and again.
  const slowly = followed(t, pool, checkpointAt(0), () => sleep(20), 5)

  const written: string[] = []
  const write = async (journal: typeof first, count: number) => {
    for (let at = 0; at < count; at++) {
      const ids: string[] = Array.from({ length: 1 + (at % 3) }, () => randomUUIDv7())
      written.push(...ids)
      if (at % 5 === 0) await ownEvent(pool, journal, ids.shift() as string)
      await Promise.all(ids.map(id => journal.append([{ table: auditEventsTable, row: row(id) }])))
    }
  }
  // The last two begin while the others write: chains that no reader has known.
  const journals = [first, start(1)]
  const writing = journals.map(journal => write(journal, 40))
  await sleep(200)
  const late = [start(2), start(3)]
  await Promise.all([...writing, ...late.map(journal => write(journal, 30))])
  await Promise.all([...journals, ...late].map(journal => journal.stop()))

  for (const [ids, expected] of [
    [fromTheBegin, [before[1] as string, ...written]],
    [fromNow, written],
    [slowly, [before[1] as string, ...written]],
  ] as const) {
    await eventually('all have come', () => ids.length >= expected.length)
    t.deepEqual(ids.toSorted(), expected.toSorted())
  }
})

test('a seal that is visible before the one ahead of it waits for that; one that was removed does not hold the rest up for good', async t => {
  const { pool } = await testDatabase(t)
  const chain = createChain({ key: sealKey, instanceId: 'instance', clock })
  const drafts = [1, 2, 3].map(() => {
    const event = row()
    const draft = chain.next([sealedRow(auditEventsTable, event, encodeRow(auditEventsTable, event))!], [])!
    chain.advance(draft)
    return draft
  })
  const insert = (client: pg.Pool | pg.PoolClient, at: number) => {
    const parameters: unknown[] = []
    return client.query(insertSeal(drafts[at]!, parameters), parameters)
  }
  const numbers = async (nowMs = clock()) =>
    (await sealsAfter(pool, checkpointAt(clock()), nowMs)).seals.map(({ sequence }) => sequence)

  await insert(pool, 0)
  const slow = await pool.connect()
  await slow.query('begin')
  await insert(slow, 1)
  await insert(pool, 2)
  t.deepEqual(await numbers(), [0])
  t.deepEqual(await numbers(clock() + 60_000), [0, 2], 'after a minute nobody waits any more')
  await slow.query('commit')
  slow.release()
  t.deepEqual(await numbers(), [0, 1, 2])
})

test('a reader goes on while the database was away, and hears what was committed meanwhile', async t => {
  const { pool } = await testDatabase(t)
  const journal = startJournal({ pool, log, sealKey, instanceId: 'instance', clock })
  const append = async () => {
    const values = row()
    await journal.append([{ table: auditEventsTable, row: values }])
    return values[1] as string
  }
  let away = false
  const flaky = new Proxy(pool, {
    get: (target, name) =>
      name === 'query' && away ? () => Promise.reject(new Error('Connection terminated')) : Reflect.get(target, name),
  })
  const ids = followed(t, flaky, checkpointAt(0))
  const expected = [await append()]
  await eventually('the first has come', () => ids.length === 1)
  away = true
  expected.push(await append(), await append())
  await sleep(100)
  away = false
  await eventually('the rest has come', () => ids.length === 3)
  t.deepEqual(ids, expected)
})

test('a checkpoint forgets the chains of the days before yesterday, and what they write again comes once', async t => {
  const { pool } = await testDatabase(t)
  let now = Date.UTC(2030, 0, 10, 12)
  const journal = startJournal({ pool, log, sealKey, instanceId: 'instance', clock: () => now })
  const append = async () => {
    await journal.append([{ table: auditEventsTable, row: row(randomUUIDv7(), new Date(now)) }])
  }
  const checkpoint = checkpointAt(now)
  const read = async () => {
    const { seals } = await sealsAfter(pool, checkpoint, now)
    for (const seal of seals) advance(checkpoint, seal)
    forgetOld(checkpoint, now)
    return seals.flatMap(({ rows }) => rows).length
  }
  await append()
  t.is(await read(), 1)
  t.is(checkpoint.seen.size, 1)
  now += 5 * dayMs
  t.is(await read(), 0)
  t.is(checkpoint.seen.size, 0)
  await append()
  t.is(await read(), 1)
  t.is(await read(), 0)
})

test('a checkpoint is read as it was written; any other text is refused', t => {
  const uuid = fc.uuid()
  const seen = fc.uniqueArray(
    fc.tuple(uuid, fc.record({ sequence: fc.nat(2 ** 40), atMs: fc.integer({ min: 0, max: 4e12 }) })),
    { selector: ([writer]) => writer, maxLength: 50 },
  )
  fc.assert(
    fc.property(fc.nat(40_000), seen, (day, chains) => {
      const checkpoint = { fromMs: day * dayMs, seen: new Map(chains) }
      const text = checkpointText(checkpoint)
      t.deepEqual(readCheckpoint(text), checkpoint)
      for (const wrong of [`${text}A`, text.slice(1), ` ${text}`, `${text}=`]) t.is(readCheckpoint(wrong), undefined)
    }),
    { numRuns: 50 },
  )
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 100 }), bytes => {
      const text = Buffer.from(bytes).toString('base64url')
      const read = readCheckpoint(text)
      return read === undefined || checkpointText(read) === text
    }),
  )
  t.is(readCheckpoint('A'.repeat(1_000_000)), undefined)
})

test('what a server that was killed has left unsealed comes with the next one that starts, once', async t => {
  const { pool } = await testDatabase(t)
  const write = async (journal: ReturnType<typeof startJournal>, id: string, instanceId: string, forged = false) => {
    const values = row(id)
    values[9] = instanceId
    const mac = journal.ownEvents().vouch(values)
    await pool.query('insert into audit_events values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)', [
      ...values,
      forged ? mac.replace(/^../, mac.startsWith('00') ? '11' : '00') : mac,
    ])
    return values
  }
  const killed = startJournal({ pool, log, sealKey, instanceId: 'killed', clock })
  const alive = startJournal({ pool, log, sealKey, instanceId: 'alive', clock })
  for (const journal of [killed, alive]) await journal.append([{ table: auditEventsTable, row: row() }])
  await pool.query(`insert into instances values ('alive', now(), now())`)
  const sealed = randomUUIDv7()
  await ownEvent(pool, killed, sealed)
  await killed.drained()
  const left = randomUUIDv7()
  await write(killed, left, 'killed')
  await write(killed, randomUUIDv7(), 'killed', true)
  await write(alive, randomUUIDv7(), 'alive')
  await sleep(2)

  const next = ['one', 'two', 'three'].map(instanceId => ({
    ...{ pool, key: sealKey, instanceId, startedAtMs: clock() },
    journal: startJournal({ pool, log, sealKey, instanceId, clock }),
  }))
  const counts = await Promise.all(next.map(sealLeftovers))
  t.deepEqual(counts.toSorted(), [0, 0, 1], 'not those of a server that lives, nor what the service has not written')
  const { seals } = await sealsAfter(pool, checkpointAt(clock()), clock())
  const named = seals.flatMap(({ rows }) => rows.map(({ id }) => id))
  t.is(named.filter(id => id === left).length, 1)
  t.is(named.filter(id => id === sealed).length, 1)
})

test('a look at what is new reads no table from one end to the other', async t => {
  const { pool } = await testDatabase(t)
  await pool.query(
    `insert into audit_seals (at, writer, sequence, instance_id, closing, anchors, rows, key_id, hash)
     select now() + n * interval '10 milliseconds', md5((n % 20)::text)::uuid, n / 20, 'i', false, '[]', '', 'k', ''
     from generate_series(0, 99999) n`,
  )
  await pool.query('analyze audit_seals')
  const plans: string[] = []
  const explaining = {
    async query(sql: string, values: unknown[]) {
      const { rows } = await pool.query(`explain ${sql}`, values)
      plans.push(rows.map(line => line['QUERY PLAN']).join('\n'))
      return pool.query(sql, values)
    },
  } as unknown as pg.Pool
  const checkpoint = await checkpointOfNow(explaining, clock())
  t.is(checkpoint.seen.size, 20)
  t.is((await sealsAfter(explaining, checkpoint, clock())).seals.length, 0)
  for (const plan of plans) t.notRegex(plan, /Seq Scan on audit_seals/)
  t.is(plans.length, 2)
})
