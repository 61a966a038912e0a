/** A group commit and nothing else: what it costs a server, whatever it does, to have a row on disk for each message. */
import { randomUUID } from 'node:crypto'
import pg from 'pg'

/** As in EdgeMesh's journal: from so many rows in a commit on, the next one waits a moment for company. */
const crowdMin = 8
const crowdWaitMs = 2

/**
 * Rows like the newest decision that is there, in a table of their own.
 *
 * @returns writes one, and calls back when it is on disk
 */
export async function startBareCommit(databaseUrl: string): Promise<(done: () => void) => void> {
  const database = new pg.Client({ connectionString: databaseUrl })
  await database.connect()
  await database.query('create table bench_commits (like decisions including indexes)')
  const { rows } = await database.query<{ row: Record<string, unknown> }>(
    `select to_jsonb(d) - 'at' - 'id' as row from decisions d order by at desc limit 1`,
  )
  const alike = JSON.stringify(rows[0]?.row).slice(1)
  let texts: string[] = []
  let waiting: (() => void)[] = []
  let running = false

  async function run(): Promise<void> {
    await new Promise(resolve => setImmediate(resolve))
    for (let crowd = 0; waiting.length > 0; ) {
      if (crowd >= crowdMin) await new Promise(resolve => setTimeout(resolve, crowdWaitMs))
      const [batch, text] = [waiting, `[${texts.join(',')}]`]
      waiting = []
      texts = []
      crowd = batch.length
      await database.query({
        name: 'commit',
        text: 'insert into bench_commits select * from json_populate_recordset(null::bench_commits, $1::json)',
        values: [text],
      })
      for (const done of batch) done()
    }
    running = false
  }

  return done => {
    texts.push(`{"at":"${new Date().toISOString()}","id":"${randomUUID()}",${alike}`)
    waiting.push(done)
    if (running) return
    running = true
    void run()
  }
}
