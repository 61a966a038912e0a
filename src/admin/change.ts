/** One change by an operator: what it changes, its announcement and its audit event stand or fall together. */
import { recordCall } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import { announce } from '../db/change-feed.ts'
import type { Database, EntityManager } from '../db/orm.ts'

/** What a change gives back: the answer to the caller, and the keys under which every instance learns of it. */
type Changed<T> = { answer: T; keys: string[] }

/** Runs `work` in a transaction. `call.audit` has to say by its end what was acted on. */
export async function change<T>(
  db: Database,
  call: Call,
  work: (em: EntityManager) => Promise<Changed<T>>,
): Promise<T> {
  try {
    const done = await db.transaction(async em => {
      // What an attempt before has vouched for went with its transaction.
      call.audit.own?.rolledBack()
      call.audit.written = false
      const { answer, keys } = await work(em)
      // Before the event, so that a change that the database refuses is never recorded as made.
      await em.flush()
      await announce(em, keys)
      await recordCall(em, call, { code: 'OK' })
      return answer
    })
    call.audit.own?.committed()
    return done
  } catch (error) {
    // The event went with the transaction; whoever answers the call writes that it failed.
    call.audit.written = false
    call.audit.own?.rolledBack()
    throw error
  }
}
