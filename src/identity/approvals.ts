/**
 * Devices that wait, each on its Enroll stream, until an operator approves or rejects them.
 *
 * Nothing is kept here that matters: that a device waits is in the database, and whoever reconnects, to any instance,
 * goes on waiting. The change feed says when to look. Each look is at many at once, in one statement: when a wait begins
 * (the decision may have come between), when a device or a token changes, after a feed that was lost, and with each
 * reminder.
 */
import type pg from 'pg'
import type { ChangeFeed } from '../db/change-feed.ts'
import { Fault } from '../fault.ts'
import type { Log } from '../telemetry/log.ts'

export type Approvals = {
  /**
   * Resolves with true once the device has left the status in which it waits, or its token was revoked; with false when
   * it is time to tell the device that it still waits.
   *
   * @throws the reason of `signal`; Fault UNAVAILABLE `APPROVALS_FULL`, or the fault of `endAll`
   */
  decided(wait: Wait, signal: AbortSignal): Promise<boolean>
  /** Ends all waits, and those that would begin: the instance stops. */
  endAll(fault: Fault): void
}

export type Wait = { tokenId: string; deviceId: string; status: string }

/** Streams that wait on one instance, a few kB each; more are asked to come back. */
const waitingMax = 5_000
const comeBackMs = 30_000
/** Proxies cut streams on which nothing is said, the strictest of them after a minute. */
const reminderMsDefault = 30_000
/** A look that failed is taken again after this long. */
const retryMs = 500

/**
 * Those of the waits, by their place, that are over. Plain arrays through `unnest`, so that one statement has one plan
 * however many wait.
 */
const findDecided = `
  select waits.place::int as place
  from unnest($1::text[], $2::text[], $3::text[]) with ordinality as waits (token_id, device_id, status, place)
  left join devices on devices.id = waits.device_id
  left join enrollment_tokens on enrollment_tokens.id = waits.token_id
  where devices.status is distinct from waits.status or enrollment_tokens.revoked_at is not null`

type Waiting = { wait: Wait; end: (decided: boolean) => void; fail: (reason: unknown) => void }

export function createApprovals(options: {
  pool: Pick<pg.Pool, 'query'>
  feed: Pick<ChangeFeed, 'onChange' | 'onReset'>
  log: Log
  /** How long a device is left without a word. */
  reminderMs?: number
}): Approvals {
  const { pool, feed, log, reminderMs = reminderMsDefault } = options
  const waiting = new Set<Waiting>()
  const toLookAt = new Set<Waiting>()
  let looking = false
  let ended: Fault | undefined

  feed.onReset(() => lookAt(waiting))
  feed.onChange(keys => {
    if (waiting.size === 0) return
    const concerns = new Set(keys)
    lookAt(
      [...waiting].filter(
        ({ wait }) => concerns.has(`device:${wait.deviceId}`) || concerns.has(`token:${wait.tokenId}`),
      ),
    )
  })

  function lookAt(some: Iterable<Waiting>): void {
    for (const one of some) toLookAt.add(one)
    if (toLookAt.size === 0 || looking) return
    looking = true
    // What begins to wait in this turn of the event loop is looked at in one go.
    setImmediate(look)
  }

  async function look(): Promise<void> {
    const batch = [...toLookAt].filter(one => waiting.has(one))
    toLookAt.clear()
    try {
      for (const one of await decidedAmong(batch)) one.end(true)
    } catch (error) {
      log.debug({ err: error, waiting: batch.length }, 'approvals can not be looked at yet')
      for (const one of batch) toLookAt.add(one)
      await new Promise(resolve => setTimeout(resolve, retryMs).unref())
    }
    looking = false
    lookAt([])
  }

  async function decidedAmong(batch: readonly Waiting[]): Promise<Waiting[]> {
    if (batch.length === 0) return []
    const { rows } = await pool.query<{ place: number }>(findDecided, [
      batch.map(({ wait }) => wait.tokenId),
      batch.map(({ wait }) => wait.deviceId),
      batch.map(({ wait }) => wait.status),
    ])
    return rows.map(({ place }) => batch[place - 1] as Waiting)
  }

  return {
    decided(wait, signal) {
      if (ended) return Promise.reject(ended)
      if (signal.aborted) return Promise.reject(signal.reason)
      if (waiting.size >= waitingMax) return Promise.reject(approvalsFull())
      return new Promise((resolve, reject) => {
        const over = () => {
          clearTimeout(remind)
          signal.removeEventListener('abort', leave)
          waiting.delete(one)
        }
        const one: Waiting = {
          wait,
          end(decided) {
            over()
            resolve(decided)
          },
          fail(reason) {
            over()
            reject(reason)
          },
        }
        const leave = () => one.fail(signal.reason)
        const remind = setTimeout(() => one.end(false), reminderMs)
        signal.addEventListener('abort', leave)
        waiting.add(one)
        lookAt([one])
      })
    },
    endAll(fault) {
      ended = fault
      for (const one of waiting) one.fail(fault)
    },
  }
}

function approvalsFull(): Fault {
  const message = 'the device waits for approval, but more do than can be kept on a stream here; ask again later'
  return new Fault('UNAVAILABLE', 'APPROVALS_FULL', message, { retryAfterMs: comeBackMs })
}
