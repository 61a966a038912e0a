/** `edgemesh doctor` as a person, or a program, runs it. */
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { goodSettings, strongSecret } from '../support/doctor.ts'
import { testDatabase } from '../support/postgres.ts'

function doctor(args: string[], env: Record<string, string> = goodSettings) {
  const main = join(import.meta.dirname, '../../src/main.ts')
  return new Promise<{ exitCode: number; stdout: string; stderr: string }>(resolve => {
    const options = { env: { PATH: process.env.PATH, ...env } }
    execFile(process.execPath, [main, 'doctor', ...args], options, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

async function envFile(t: ExecutionContext, text: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-cli-'))
  t.teardown(() => rm(folder, { recursive: true }))
  await writeFile(join(folder, 'edgemesh.env'), text, { mode: 0o600 })
  return join(folder, 'edgemesh.env')
}

test('nothing has failed: exit code 0, also with warnings; each finding is a line, and a sum is the last', async t => {
  const { exitCode, stdout, stderr } = await doctor(['--only', 'settings,node,database'])
  t.is(exitCode, 0, stderr)
  const lines = stdout.trimEnd().split('\n')
  t.regex(lines[0] ?? '', /^ok +settings +the environment has what edgemesh serve needs$/)
  t.regex(lines[2] ?? '', /^warning +database +DATABASE_URL is not set/)
  t.regex(lines[3] ?? '', /^ +why: {2}\S/)
  t.regex(lines[4] ?? '', /^ +mend: set DATABASE_URL/)
  t.is(lines.at(-1), '2 ok, 1 warning, 0 failed, 0 skipped')
})

test('something has failed: exit code 1, and --json has the documented shape', async t => {
  const weak = 'tested-tested-tested-tested-tested-tested'
  const { exitCode, stdout } = await doctor(['--json', '--skip', 'ports,metrics-exposure'], {
    ...goodSettings,
    CA_KEY_PASSPHRASE: weak,
  })
  t.is(exitCode, 1)
  t.false(stdout.includes(weak))
  const document = JSON.parse(stdout)
  t.deepEqual(Object.keys(document), ['version', 'revision', 'at', 'ok', 'counts', 'findings'])
  t.false(document.ok)
  t.deepEqual(Object.keys(document.counts), ['ok', 'warning', 'failed', 'skipped'])
  const failed = document.findings.filter(({ severity }: { severity: string }) => severity === 'failed')
  t.deepEqual(Object.keys(failed[0]), ['check', 'severity', 'what', 'why', 'mend'])
  t.is(failed[0].check, 'secrets')
  t.false(document.findings.some(({ check }: { check: string }) => check === 'ports'))
})

test('an environment file is all that counts where one is named', async t => {
  const { url } = await testDatabase(t)
  const path = await envFile(
    t,
    `# of the servers\nENROLLMENT_TOKEN_SECRET="${strongSecret()}"\nCA_KEY_PASSPHRASE='${strongSecret()}'\nDATABASE_URL=${url}\n`,
  )
  const args = ['--settings-file', path, '--only', 'settings,database,secret-files']
  const { exitCode, stdout } = await doctor(args, { ...goodSettings, DATABASE_URL: 'nonsense' })
  t.is(exitCode, 0, stdout)
  t.regex(stdout, /^ok +database +PostgreSQL/m)
  t.regex(stdout, /^ok +secret-files +one file is closed/m)

  const partial = await envFile(t, 'API_PORT=8000\n')
  const missing = await doctor(['--settings-file', partial, '--only', 'settings'])
  t.is(missing.exitCode, 1)
  t.regex(missing.stdout, /^FAILED +settings +ENROLLMENT_TOKEN_SECRET: is missing$/m)
})

for (const [args, says] of [
  [['--settings-file', '/nonexistent/env'], /^error: \/nonexistent\/env can not be read \(ENOENT\)$/m],
  [['--only', 'weather'], /^error: there is no check weather\nhint: there are: settings, secrets, /m],
  [['--only', 'node', '--skip', 'node'], /^error: --skip leaves nothing to look at$/m],
  [['--idle', '60'], /^error: --idle needs --public/m],
  [['--public', 'somewhere'], /^error: .*host:port/m],
  [['--workers', '0'], /^error: .*auto or a whole number/m],
] as const) {
  test(`it can not look, exit code 2: doctor ${args.join(' ')}`, async t => {
    const { exitCode, stdout, stderr } = await doctor([...args])
    t.is(exitCode, 2)
    t.is(stdout, '')
    t.regex(stderr, says)
  })
}
