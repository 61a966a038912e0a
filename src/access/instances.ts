/**
 * Which instances are alive, so that the connections of one that died do not stay on record as open.
 *
 * A lease lives on its stream, and a stream dies with its instance: what is left is the row. Its device may resume it at
 * another instance, until `resume_by` where its own has said that, else until that is taken for dead. Then another
 * instance closes it.
 */
import type pg from 'pg'
import type { Log } from '../telemetry/log.ts'
import { notResumed } from './leases.ts'

export type InstanceRecord = {
  /** @param leavesConnections whether some wait to be resumed: then it is left to be found dead */
  stop(leavesConnections: boolean): Promise<void>
}

const beatMs = 5_000
/**
 * An instance that has not been seen for this long beyond the leases' grace time is taken for dead: one that is only out
 * of touch has given up its leases by then.
 */
const deadMarginMs = 15_000

/**
 * Takes the dead off the record, and closes what they have left and what was not resumed in time.
 *
 * Every few seconds at every instance, among a million open connections of which hardly any is concerned: so who holds some is
 * found by leaps through the index, a look-up for each instance, and only rows of those who are gone are read. The condition
 * stands twice because a row may have been claimed meanwhile: it is looked at again once it is locked.
 */
const closeOrphans = `
  with recursive dead as (
    delete from instances where seen_at < now() - make_interval(secs => $1) returning id
  ), holder as (
    (select instance_id as id from connections where status = 'active' order by instance_id limit 1)
    union all
    select (select c.instance_id from connections c where c.status = 'active' and c.instance_id > holder.id
      order by c.instance_id limit 1)
    from holder where holder.id is not null
  ), gone as (
    select id from holder where id in (select id from dead) or id not in (select id from instances)
  )
  update connections set status = 'closed', ended_at = now(),
    end_reasons = case when resume_by is null then $2::jsonb else $3::jsonb end
  where id in (
      select c.id from connections c where c.status = 'active' and c.resume_by <= now()
      union all
      select c.id from gone join connections c on c.instance_id = gone.id and c.status = 'active' where c.resume_by is null)
    and status = 'active' and (resume_by <= now() or resume_by is null and instance_id in (select id from gone))`

export async function keepInstanceRecord(options: {
  pool: pg.Pool
  instanceId: string
  /** LEASE_GRACE_SECONDS, the same for all instances. */
  leaseGraceMs: number
  log: Log
}): Promise<InstanceRecord> {
  const { pool, instanceId, leaseGraceMs, log } = options
  const deadAfterMs = leaseGraceMs + deadMarginMs

  async function beat(): Promise<void> {
    await pool.query(
      `insert into instances (id, started_at, seen_at, hands_over) values ($1, now(), now(), true)
       on conflict (id) do update set seen_at = now(), hands_over = true`,
      [instanceId],
    )
    await pool.query(closeOrphans, [deadAfterMs / 1_000, JSON.stringify([instanceGone]), JSON.stringify([notResumed])])
  }

  /** What a process of the same name has left: nobody holds it now. */
  async function takeOver(): Promise<void> {
    await pool.query(
      `update connections set resume_by = now() + make_interval(secs => $2)
       where status = 'active' and instance_id = $1 and resume_by is null`,
      [instanceId, leaseGraceMs / 1_000],
    )
  }

  await takeOver()
  await beat()
  const timer = setInterval(() => {
    beat().catch(error => log.debug({ err: error }, 'the instance can not be recorded now'))
  }, beatMs)
  timer.unref()
  return {
    async stop(leavesConnections) {
      clearInterval(timer)
      // Instances of the version before close the connections of one that has no record, whether or not they can be resumed.
      if (leavesConnections) return
      await pool.query('delete from instances where id = $1', [instanceId]).catch(() => {})
    },
  }
}

const instanceGone = {
  code: 'INSTANCE_GONE',
  field: 'connection.instance_id',
  actual: 'gone',
  required: 'alive',
  message: 'The instance that held the connection has gone.',
}
