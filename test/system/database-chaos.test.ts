/** Failures of the database in any order and at the same time, with two instances at work on it: the promises hold all the same. */
import { setTimeout as sleep } from 'node:timers/promises'
import test from 'ava'
import fc from 'fast-check'
import pg from 'pg'
import { eventually, startEdgeMesh, startSecondInstance } from '../support/edgemesh.ts'
import { type OwnPostgres, ownPostgres } from '../support/own-postgres.ts'
import { type Link, link } from '../support/relay.ts'
import { isToldToComeBack, work } from '../support/workload.ts'

type Database = { postgres: OwnPostgres; way: Link }

/** Each ends what it has begun. Where another has taken the server away, there is nothing to do. */
const faults: Record<string, (database: Database, ms: number) => Promise<unknown>> = {
  async cut({ way }) {
    way.cut()
  },
  async silence({ way }, ms) {
    way.hold()
    await sleep(ms)
    way.letGo()
  },
  sessionsEnd: ({ postgres }) =>
    postgres.query(`select pg_terminate_backend(pid) from pg_stat_activity where application_name ^@ 'edgemesh'`),
  statementsEnd: ({ postgres }) =>
    postgres.query(`select pg_cancel_backend(pid) from pg_stat_activity where application_name ^@ 'edgemesh'`),
  processDies: ({ postgres }) => postgres.crash(),
  async readOnly({ postgres }, ms) {
    try {
      await postgres.query('alter system set default_transaction_read_only = on')
      await postgres.query('select pg_reload_conf()')
      await sleep(ms)
    } finally {
      // Whatever else has happened to the server meanwhile, and before it has heard of it.
      await eventually('it can be told', () =>
        postgres.query('alter system reset default_transaction_read_only').catch(() => undefined),
      )
      await eventually('it can be told', () => postgres.query('select pg_reload_conf()').catch(() => undefined))
    }
  },
  async locks({ postgres }, ms) {
    const client = new pg.Client({ connectionString: postgres.url })
    client.on('error', () => {})
    try {
      await client.connect()
      await client.query('begin')
      await client.query('lock table users, device_postures, decisions, enrollment_tokens in exclusive mode')
      await sleep(ms)
    } finally {
      await client.end()
    }
  },
  async allConnectionsTaken({ postgres }, ms) {
    const others = Array.from({ length: 60 }, () => new pg.Client({ connectionString: postgres.url }))
    await Promise.all(
      others.map(client =>
        client
          .on('error', () => {})
          .connect()
          .catch(() => {}),
      ),
    )
    await sleep(ms)
    await Promise.all(others.map(client => client.end()))
  },
}

/** The whole server. One at a time, and nothing else meanwhile. */
const ends: Record<string, (database: Database, ms: number) => Promise<unknown>> = {
  async stopped({ postgres }, ms) {
    await postgres.stop()
    await sleep(ms)
    await postgres.start()
  },
  async killed({ postgres }, ms) {
    await postgres.kill()
    await sleep(ms)
    await postgres.start()
  },
}

const together = fc.array(
  fc.record({ fault: fc.constantFrom(...Object.keys(faults)), ms: fc.integer({ min: 0, max: 2_000 }) }),
  {
    minLength: 1,
    maxLength: 3,
  },
)
const alone = fc.record({ fault: fc.constantFrom(...Object.keys(ends)), ms: fc.integer({ min: 0, max: 2_000 }) })
const story = fc.array(fc.oneof({ weight: 3, arbitrary: together }, { weight: 1, arbitrary: fc.tuple(alone) }), {
  minLength: 6,
  maxLength: 10,
})

test('whatever goes wrong with the database in whatever order, nothing acknowledged is lost and nothing is done too often', async t => {
  const seen = fc.asyncProperty(story, async steps => {
    const postgres = await ownPostgres(t)
    const way = await link(t, postgres.port)
    const url = new URL(postgres.url)
    url.port = String(way.port)
    const mesh = await startEdgeMesh(t, { DATABASE_URL: url.href, LEASE_GRACE_SECONDS: '60' })
    const second = await startSecondInstance(t, mesh, { LEASE_GRACE_SECONDS: '60' })
    const load = await work(t, mesh, second)
    await load.goesOn()
    for (const step of steps) {
      t.log(step.map(({ fault, ms }) => `${fault} ${ms} ms`).join(' with '))
      const run = ({ fault, ms }: { fault: string; ms: number }) =>
        (faults[fault] ?? ends[fault])!({ postgres, way }, ms)
      await Promise.all(step.map(one => run(one).catch(() => {})))
      // Some come while work goes on, some while it has not begun again.
      await sleep(step[0]!.ms)
    }
    await load.goesOn()
    for (const { server } of [mesh, second]) {
      await eventually('it is ready', async () => (await server.readiness()).ready)
    }
    await load.stop()
    t.deepEqual(
      load.refusals.filter(({ refusal }) => !isToldToComeBack(refusal)),
      [],
    )
    t.deepEqual(load.streamsLost, [], 'no stream has ended')
    const pool = new pg.Pool({ connectionString: postgres.url, max: 2 })
    pool.on('error', () => {})
    t.teardown(() => pool.end())
    await load.account(t, pool)
  })
  // One story a run: each takes half a minute. What fails says how to be told again.
  const seed = Number(process.env.EDGEMESH_CHAOS_SEED) || undefined
  await fc.assert(seen, { numRuns: 1, endOnFailure: true, includeErrorInReport: true, ...(seed && { seed }) })
})
