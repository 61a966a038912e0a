/** A transaction of plain statements, for paths on which an entity manager costs more than what it manages. */
import type pg from 'pg'
import { database, spanned } from '../telemetry/tracing.ts'
import { untilCommitted } from './failure.ts'

/**
 * Commits what `work` has done when it resolves, and takes it back when it rejects. When PostgreSQL takes it back for the
 * sake of another transaction, `work` is run again, a few times.
 */
export function inTransaction<T>(pool: pg.Pool, work: (client: pg.ClientBase) => Promise<T>): Promise<T> {
  return spanned('database transaction', database, () => untilCommitted(() => onceInTransaction(pool, work)))
}

async function onceInTransaction<T>(pool: pg.Pool, work: (client: pg.ClientBase) => Promise<T>): Promise<T> {
  const client = await pool.connect()
  let broken = false
  try {
    await client.query('begin')
    const result = await work(client)
    await client.query('commit')
    return result
  } catch (error) {
    // A connection that can't even roll back is not given to anyone else.
    await client.query('rollback').catch(() => {
      broken = true
    })
    throw error
  } finally {
    client.release(broken)
  }
}
