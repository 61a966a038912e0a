/**
 * Whether the EdgeMesh in this container lives: node healthcheck.ts [/readyz]. Exit code 0 or 1, as Docker wants it.
 *
 * /healthz, unless another path is given, fails only when restarting helps; /readyz also while the database is away.
 */
import { readFileSync } from 'node:fs'

const answerMsMax = 4_000

const path = process.argv[2] ?? '/healthz'
const port = process.env.METRICS_PORT_FILE
  ? readFileSync(process.env.METRICS_PORT_FILE, 'utf8').trim()
  : process.env.METRICS_PORT || '9090'
const given = process.env.METRICS_HOST || '0.0.0.0'
// These two are where to listen, and nowhere to connect to.
const host = given === '0.0.0.0' ? '127.0.0.1' : given === '::' ? '[::1]' : given.includes(':') ? `[${given}]` : given
try {
  const response = await fetch(`http://${host}:${port}${path}`, { signal: AbortSignal.timeout(answerMsMax) })
  console.log(`${response.status} ${(await response.text()).trim()}`)
  process.exitCode = response.ok ? 0 : 1
} catch (error) {
  const cause = (error as Error).cause instanceof Error ? `: ${((error as Error).cause as Error).message}` : ''
  console.log(`error: nothing answers at http://${host}:${port}${path}: ${(error as Error).message}${cause}`)
  process.exitCode = 1
}
