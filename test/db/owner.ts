/** A process that owns an embedded database until it is killed or told on stdin to end. For embedded.test.ts. */
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { createLog } from '../../src/telemetry/log.ts'

try {
  const postgres = await startEmbeddedPostgres({ directory: process.argv[2]!, log: createLog({ level: 'silent' }) })
  console.log(JSON.stringify({ pid: postgres.pid, url: postgres.url }))
  process.stdin.once('end', () => postgres.stop()).resume()
} catch (error) {
  const { code, message } = error as { code?: string; message: string }
  console.log(JSON.stringify({ code, message }))
}
