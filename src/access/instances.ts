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
    await pool.query(
      `with dead as (
         delete from instances where seen_at < now() - make_interval(secs => $1) returning id
       )
       update connections set status = 'closed', ended_at = now(),
         end_reasons = case when resume_by is null then $2::jsonb else $3::jsonb end
       where status = 'active' and (resume_by <= now() or resume_by is null
         and (instance_id in (select id from dead) or instance_id not in (select id from instances)))`,
      [deadAfterMs / 1_000, JSON.stringify([instanceGone]), JSON.stringify([notResumed])],
    )
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
