/**
 * Which devices are there now:
 *
 * - `online`: it holds a heartbeat stream at an instance that is alive, and its health is fresh.
 * - `stale`: it holds a stream, but has not reported in time.
 * - `offline`: it holds none, or none that anybody alive knows of.
 *
 * An instance puts on record whose streams it holds. Its word is worth as much as its own sign of life in `instances`: when
 * that is old, nobody is there. A device that comes back within `leavingMs`, here or elsewhere, has never been away.
 * Nothing is decided by presence; it is for people and for what they automate.
 */
import type pg from 'pg'
import type { Clock } from '../clock.ts'
import type { Log } from '../telemetry/log.ts'

export type PresenceName = 'online' | 'stale' | 'offline'

export type PresenceRecord = {
  /** A device has opened a stream. @returns to be called once, when that stream has ended */
  opened(deviceId: string): () => void
  /** Takes back what this instance has on record: whoever is here yet goes. */
  stop(): Promise<void>
}

/** Changes are put on record together. */
const flushMs = 250
const changesAtOnceMax = 2_000
/** How long a device may be without a stream before it is offline: a reconnection takes a second or two. */
const leavingMs = 5_000
/** An instance gives a sign of life every five seconds; one that has missed two of them is taken for dead. */
const aliveSeconds = 15
/** What the dead have left is removed, an hour's worth of doubt later. */
const sweepMs = 60_000
const sweptAfterSeconds = 3_600

export async function keepPresence(options: {
  pool: pg.Pool
  instanceId: string
  clock: Clock
  log: Log
}): Promise<PresenceRecord> {
  const { pool, instanceId, clock, log } = options
  /** Streams by device. */
  const streams = new Map<string, number>()
  /** Devices that have no stream any more, and when the last one ended. */
  const leaving = new Map<string, number>()
  /** What is not on record yet: since when a device is here, or `undefined` where it is gone. */
  let changes = new Map<string, Date | undefined>()
  let flushing: Promise<void> | undefined
  let isStopped = false

  function noteDeparted(): void {
    const now = clock()
    // In the order in which they left.
    for (const [deviceId, leftAtMs] of leaving) {
      if (now - leftAtMs < leavingMs && now >= leftAtMs) return
      leaving.delete(deviceId)
      changes.set(deviceId, undefined)
    }
  }

  async function flush(): Promise<void> {
    const batch = new Map([...changes].slice(0, changesAtOnceMax))
    for (const deviceId of batch.keys()) changes.delete(deviceId)
    try {
      await write(batch)
    } catch (error) {
      // What has changed since is newer.
      changes = new Map([...batch, ...changes])
      log.debug({ err: error }, 'presence can not be recorded now')
    }
  }

  async function write(batch: ReadonlyMap<string, Date | undefined>): Promise<void> {
    const here = [...batch].filter(([, since]) => since !== undefined)
    const gone = [...batch.keys()].filter(deviceId => batch.get(deviceId) === undefined)
    // Who moves from one instance to another has been there all along. A device that was deleted has no row to refer to.
    if (here.length > 0) {
      await pool.query(
        `insert into device_presence as kept (device_id, instance_id, since)
         select t.device_id, $1, t.since from unnest($2::text[], $3::timestamptz[]) as t(device_id, since)
         join devices on devices.id = t.device_id order by t.device_id
         on conflict (device_id) do update set instance_id = excluded.instance_id,
           since = case when ${isAlive('kept.instance_id')} then kept.since else excluded.since end`,
        [instanceId, here.map(([deviceId]) => deviceId), here.map(([, since]) => since)],
      )
    }
    if (gone.length > 0) {
      await pool.query('delete from device_presence where instance_id = $1 and device_id = any($2)', [instanceId, gone])
    }
  }

  const forgetOwn = () => pool.query('delete from device_presence where instance_id = $1', [instanceId])

  // What a process of the same name has left.
  await forgetOwn()
  const ticking = setInterval(() => {
    noteDeparted()
    if (changes.size > 0 && !flushing) {
      flushing = flush().finally(() => {
        flushing = undefined
      })
    }
  }, flushMs)
  const sweeping = setInterval(() => {
    pool
      .query(sweepPresence, [sweptAfterSeconds])
      .catch(error => log.debug({ err: error }, 'presence can not be swept now'))
  }, sweepMs)
  sweeping.unref()

  return {
    opened(deviceId) {
      streams.set(deviceId, (streams.get(deviceId) ?? 0) + 1)
      leaving.delete(deviceId)
      // Also where it is on record here: it may have been elsewhere in between.
      changes.set(deviceId, new Date(clock()))
      return () => {
        const left = (streams.get(deviceId) ?? 1) - 1
        if (left > 0) {
          streams.set(deviceId, left)
          return
        }
        streams.delete(deviceId)
        if (!isStopped) leaving.set(deviceId, clock())
      }
    },
    async stop() {
      isStopped = true
      clearInterval(ticking)
      clearInterval(sweeping)
      await flushing
      await forgetOwn().catch(() => {})
    },
  }
}

/** Who holds devices is found by leaps through the index: of a million rows hardly any is to be removed. */
export const sweepPresence = `
  with recursive holder as (
    (select instance_id as id from device_presence order by instance_id limit 1)
    union all
    select (select p.instance_id from device_presence p where p.instance_id > holder.id order by p.instance_id limit 1)
    from holder where holder.id is not null
  )
  delete from device_presence p using holder where p.instance_id = holder.id and not exists (
    select from instances i where i.id = holder.id and i.seen_at > now() - make_interval(secs => $1))`

function isAlive(instanceId: string): string {
  return `exists (select from instances i where i.id = ${instanceId}
    and i.seen_at > now() - make_interval(secs => ${aliveSeconds}))`
}

/** SQL for the rows of those that hold a stream at an instance that is alive. */
export const presentDevices = `select here.* from device_presence here where ${isAlive('here.instance_id')}`

/**
 * SQL for whether a device is present so. Unlike a comparison with `presenceOf` it lets PostgreSQL join those who hold a stream,
 * instead of asking for each device there is; health, though, is looked up for those that a page needs, never read whole.
 *
 * @param deviceId an expression of SQL
 */
export function isPresent(presence: PresenceName, deviceId: string, maxAgeMs: number): string {
  const present = `exists (select from (${presentDevices}) here where here.device_id = ${deviceId})`
  const fresh = `coalesce((select r.measured_at > now() - make_interval(secs => ${maxAgeMs / 1_000})
    from device_postures r where r.device_id = ${deviceId}), false)`
  switch (presence) {
    case 'online':
      return `${present} and ${fresh}`
    case 'stale':
      return `${present} and not ${fresh}`
    case 'offline':
      return `not ${present}`
  }
}

/**
 * SQL for the presence of a device, a `PresenceName`. Of many at once `presentDevices` costs less.
 *
 * @param deviceId an expression of SQL
 */
export function presenceOf(deviceId: string, maxAgeMs: number): string {
  return `coalesce((
    select case when r.measured_at > now() - make_interval(secs => ${maxAgeMs / 1_000}) then 'online' else 'stale' end
    from (${presentDevices}) here left join device_postures r on r.device_id = here.device_id
    where here.device_id = ${deviceId}), 'offline')`
}
