/** heartbeat.persisted and heartbeat.flat: what a report costs until it is on disk, also in a large fleet. */
import { readdir } from 'node:fs/promises'
import pg from 'pg'
import { healthy } from '../support/healthy.ts'
import { percentile } from '../support/percentile.ts'
import { addDevices, deviceId, devicesCount, type FleetSides, fewRows, fleetProcesses, seedOthers } from './fleet.ts'
import { processStat } from './process-stat.ts'
import { medianRate, type Rate, rate, showLoad, showRate } from './rates.ts'
import type { GroupOptions, Row } from './row.ts'

/** Odd, so that there is one in the middle. */
const rounds = 5
const reportingStreams = 512
const reportsOfRound = 10_000
const rowsOfStatement = 500
/** The table of a large fleet, beside that of a small one. */
const manyRows = 100_000
const timesFewMax = 1.25

export async function* measureReports(sides: FleetSides, options: GroupOptions): AsyncGenerator<Row> {
  const { served, clients } = sides
  const { progress } = options
  const addresses = [served.address]
  const streams = Math.min(reportingStreams, devicesCount) / fleetProcesses
  await clients.all({ ask: 'open', group: 'ours', addresses, from: 0, to: streams })
  const pool = new pg.Pool({ connectionString: served.databaseUrl, max: 1 })
  try {
    const backends = await databaseProcesses(pool)
    const oneRound = async () => {
      const [before, databaseBefore] = [await served.cpuSince(), await backends?.()]
      const startedAt = performance.now()
      await clients.all({ ask: 'report', group: 'ours', streams, reports: reportsOfRound / fleetProcesses })
      const wallMs = performance.now() - startedAt
      const cpu = await served.cpuSince(before)
      const databaseCpu = databaseBefore === undefined ? 0 : (await backends!()) - databaseBefore
      return { ...rate(reportsOfRound, cpu, wallMs), us: (cpu.user + cpu.system + databaseCpu) / reportsOfRound }
    }
    const severalRounds = async (what: string) => {
      await oneRound()
      const measured: Awaited<ReturnType<typeof oneRound>>[] = []
      for (let round = 1; round <= rounds; round++) {
        progress(`${what}: round ${round} of ${rounds}`)
        measured.push(await oneRound())
      }
      return measured
    }

    const few = await severalRounds(`heartbeat.persisted, ${fewRows} devices`)
    const bare = await bareStatement(pool)
    const [value, floor] = [medianRate(few), medianRate(bare)]
    yield {
      name: 'heartbeat.persisted',
      value: value.perCpuSecond,
      unit: 'reports/s',
      floor: floor.perCpuSecond,
      ratio: value.perCpuSecond / floor.perCpuSecond,
      note:
        `acknowledged after their commit: ${showRate(value)} for a second of the server's processor time, ` +
        `${Math.round(value.perWallSecond)}/s by the clock over ${streams * fleetProcesses} streams; floor: the same rows by ` +
        `one statement of ${rowsOfStatement}, ${showRate(floor)} for a second of the client's processor time; ${showLoad()}`,
    }

    await addDevices(sides, Math.min(fewRows, devicesCount), devicesCount, options)
    await seedOthers(served, manyRows - devicesCount)
    const many = await severalRounds(`heartbeat.flat, ${manyRows} devices`)
    const [usFew, usMany] = [few, many].map(measured =>
      percentile(
        measured.map(({ us }) => us),
        50,
      ),
    ) as [number, number]
    yield {
      name: 'heartbeat.flat',
      value: usMany,
      unit: 'µs a report',
      floor: usFew,
      ratio: usFew / usMany,
      note:
        `processor time of the server${backends ? ' and of PostgreSQL' : ''} with ${manyRows} devices on record; floor: with ` +
        `${fewRows}; ${showLoad()}`,
      bar: { demand: `at most ${timesFewMax} × that of the small table`, met: usMany <= timesFewMax * usFew },
    }
  } finally {
    await pool.end()
    await clients.all({ ask: 'close', group: 'ours' })
  }
}

/** Nothing but the rows: what a report leaves behind, by one statement for hundreds, with its commit. */
async function bareStatement(pool: pg.Pool): Promise<Rate[]> {
  await pool.query(
    'create table bare_postures (device_id text primary key, posture jsonb, measured_at timestamptz, received_at timestamptz)',
  )
  await pool.query(
    'create table bare_reports (device_id text, sequence bigint, posture jsonb, measured_at timestamptz, received_at timestamptz)',
  )
  const ids = Array.from({ length: rowsOfStatement }, (_, number) => deviceId(number))
  const once = async (sequence: number) => {
    const now = ids.map(() => new Date())
    await pool.query(
      `with kept as (
         insert into bare_postures select id, posture::jsonb, measured, received
         from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) as t(id, posture, measured, received)
         on conflict (device_id) do update set
           posture = excluded.posture, measured_at = excluded.measured_at, received_at = excluded.received_at)
       insert into bare_reports select id, $5, posture::jsonb, measured, received
       from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) as t(id, posture, measured, received)`,
      [ids, ids.map(() => JSON.stringify(healthy)), now, now, sequence],
    )
  }
  const measured: Rate[] = []
  for (let round = 0; round <= rounds; round++) {
    const before = process.cpuUsage()
    const startedAt = performance.now()
    const statements = reportsOfRound / rowsOfStatement
    for (let turn = 0; turn < statements; turn++) await once(turn)
    if (round > 0) measured.push(rate(reportsOfRound, process.cpuUsage(before), performance.now() - startedAt))
  }
  return measured
}

/** Microseconds of processor time of all of PostgreSQL's processes; undefined where they are elsewhere. */
async function databaseProcesses(pool: pg.Pool): Promise<(() => Promise<number>) | undefined> {
  const { rows } = await pool.query<{ pid: number }>('select pg_backend_pid() as pid')
  const own = await processStat(rows[0]!.pid).catch(() => undefined)
  if (own?.name !== 'postgres') return undefined
  const { parent } = own
  return async () => {
    const pids = (await readdir('/proc')).filter(name => /^\d+$/.test(name))
    let us = 0
    for (const pid of pids) {
      const found = await processStat(pid).catch(() => undefined)
      if (found?.parent === parent) us += found.cpu.user + found.cpu.system
    }
    return us
  }
}
