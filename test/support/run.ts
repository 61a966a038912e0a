/**
 * Runs the tests: one PostgreSQL for all test files, then ava, then the line that CI reads.
 *
 *     npm test                        everything
 *     npm test -- test/system/x.ts    what is named
 *
 * Without DATABASE_URL an embedded server is started; each test makes its own database in it.
 */
import { spawn } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { startEmbeddedPostgres } from '../../src/db/embedded.ts'
import { createLog } from '../../src/telemetry/log.ts'

const directory = await mkdtemp(join(tmpdir(), 'edgemesh-tests-'))
const given = process.env.DATABASE_URL ?? process.env.EDGEMESH_TEST_POSTGRES
const postgres = given ? undefined : await startEmbeddedPostgres({ directory, log: createLog({ level: 'error' }) })
const env = { ...process.env, EDGEMESH_TEST_POSTGRES: given ?? postgres?.url }

// npm has put node_modules/.bin on the path, and with it the node that is new enough.
const child = spawn('ava', ['--tap', ...process.argv.slice(2)], { env, stdio: ['ignore', 'pipe', 'inherit'] })
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => child.kill(signal))

const counts = { passed: 0, failed: 0, skipped: 0 }
for await (const line of createInterface({ input: child.stdout })) {
  // TAP: a test a line, `ok 1 - title` or `not ok 2 - title`, with `# SKIP` where one was skipped.
  if (/^ok .*# SKIP/.test(line)) counts.skipped++
  else if (/^ok /.test(line)) counts.passed++
  else if (/^not ok /.test(line)) counts.failed++
  if (!/^(TAP version|1\.\.|# (tests|pass|skip|fail) )/.test(line)) console.log(line)
}
const exitCode = await new Promise<number>(resolve => child.on('close', code => resolve(code ?? 1)))
await postgres?.stop()
await rm(directory, { recursive: true, force: true })

// A run that crashed, or left something behind that keeps a process alive, may have no failing test to show for it.
if (exitCode !== 0 && counts.failed === 0) {
  console.log('ava has failed without a failing test: a test file crashed or did not exit')
  counts.failed = 1
}
console.log(`${counts.passed} passed, ${counts.failed} failed${counts.skipped ? `, ${counts.skipped} skipped` : ''}`)
process.exit(counts.failed > 0 ? 1 : 0)
