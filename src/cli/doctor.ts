/** `edgemesh doctor`: what is wrong with a configuration, or with what runs under it, and what mends it. */
import { readFile } from 'node:fs/promises'
import { parseEnv } from 'node:util'
import { Command } from 'commander'
import type { CheckedFinding, Examination } from '../doctor/examine.ts'
import type { Severity } from '../doctor/finding.ts'
import type { Environment } from '../doctor/subject.ts'
import { revision, version } from '../version.ts'
import { hostAndPort, wholeNumber, workerCount } from './option-values.ts'
import { printable } from './table.ts'

type DoctorOptions = {
  settingsFile?: string
  public?: string
  idle?: number
  workers: number | 'auto'
  instances?: number
  backupMetrics?: string
  only?: string[]
  skip?: string[]
  json?: true
}

const idleSecondsMax = 7_200
const instancesMax = 1_000

export function doctorCommand(): Command {
  return new Command('doctor')
    .description('look for what is wrong with a configuration, or with what runs, and say what mends it')
    .option('--settings-file <path>', 'read the settings there, and there alone; the environment, unless given')
    .option('--public <host:port>', 'where devices connect: look at the balancer too', hostAndPort)
    .option('--idle <seconds>', 'leave a stream alone there for so long, and see whether it is cut', idle)
    .option('--workers <number>', 'as for edgemesh serve', workerCount, 1)
    .option('--instances <number>', 'how many there are to be (default: as many as run)', wholeNumber(1, instancesMax))
    .option('--backup-metrics <path>', 'the file, or the folder, where the backup leaves its age for node-exporter')
    .option('--only <checks>', 'only these, separated by commas', checkNames)
    .option('--skip <checks>', 'not these', checkNames)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
It reads the settings as edgemesh serve does, on the host of an instance or
before there is one. Nothing is changed. docs/doctor.md explains each check.

Exit codes: 0 nothing has failed, 1 something has, 2 it could not look.

Examples:
  edgemesh doctor
  edgemesh doctor --settings-file /etc/edgemesh/edgemesh.env --workers auto --instances 3
  edgemesh doctor --public mesh.example.com:8000 --idle 120
  edgemesh doctor --only secrets,database-role --json | jq '.findings[] | select(.severity == "failed")'
`,
    )
    .action(examineAll)
}

function idle(text: string): number {
  return wholeNumber(1, idleSecondsMax)(text)
}

function checkNames(text: string): string[] {
  return text.split(',').map(name => name.trim())
}

async function examineAll(options: DoctorOptions, command: Command): Promise<void> {
  const [{ checks }, { examine }, { openSubject }] = await Promise.all([
    import('../doctor/checks.ts'),
    import('../doctor/examine.ts'),
    import('../doctor/subject.ts'),
  ])
  const names = checks.map(({ name }) => name)
  for (const name of [...(options.only ?? []), ...(options.skip ?? [])]) {
    if (!names.includes(name)) command.error(`error: there is no check ${name}\nhint: there are: ${names.join(', ')}`)
  }
  const wanted = checks.filter(({ name }) => (options.only ?? names).includes(name) && !options.skip?.includes(name))
  if (wanted.length === 0) command.error('error: --skip leaves nothing to look at')
  if (options.idle !== undefined && options.public === undefined) {
    command.error('error: --idle needs --public: where the stream is to be opened')
  }
  const subject = openSubject({
    env: await environmentOf(options, command),
    envFile: options.settingsFile,
    workers: options.workers,
    instances: options.instances,
    publicAddress: options.public === undefined ? undefined : addressOf(options.public),
    idleMs: options.idle === undefined ? undefined : options.idle * 1_000,
    backupMetrics: options.backupMetrics,
  })
  try {
    const examination = await examine(wanted, subject)
    console.log(options.json ? json(examination) : render(examination))
    if (examination.counts.failed > 0) process.exitCode = 1
  } finally {
    await subject.close()
  }
}

/**
 * What a container is given as its environment file, a unit as `EnvironmentFile`: nothing of this shell is in it. The option is not
 * `--env-file`, because Node takes that one for itself wherever it stands.
 */
async function environmentOf({ settingsFile }: DoctorOptions, command: Command): Promise<Environment> {
  if (settingsFile === undefined) return process.env
  try {
    const { PATH, NODE_OPTIONS } = process.env
    return { PATH, NODE_OPTIONS, ...parseEnv(await readFile(settingsFile, 'utf8')) }
  } catch (error) {
    return command.error(`error: ${settingsFile} can not be read (${(error as NodeJS.ErrnoException).code})`)
  }
}

function addressOf(text: string): { host: string; port: number } {
  const colon = text.lastIndexOf(':')
  return { host: text.slice(0, colon).replace(/^\[(.*)\]$/, '$1'), port: Number(text.slice(colon + 1)) }
}

function json({ at, findings, counts }: Examination): string {
  return JSON.stringify({ version, revision: revision() ?? null, at, ok: counts.failed === 0, counts, findings })
}

const words: Record<Severity, string> = { ok: 'ok', warning: 'warning', failed: 'FAILED', skipped: 'skipped' }

function render({ findings, counts }: Examination): string {
  const checkWidth = Math.max(...findings.map(({ check }) => check.length))
  const wordWidth = Math.max(...Object.values(words).map(({ length }) => length))
  const lines = findings.flatMap(({ check, severity, what, why, mend }: CheckedFinding) => {
    const indent = ' '.repeat(wordWidth + checkWidth + 4)
    return [
      `${words[severity].padEnd(wordWidth)}  ${check.padEnd(checkWidth)}  ${printable(what)}`,
      ...(why === undefined ? [] : [`${indent}why:  ${printable(why)}`]),
      ...(mend === undefined ? [] : [`${indent}mend: ${printable(mend)}`]),
    ]
  })
  const sum = (['ok', 'warning', 'failed', 'skipped'] as const).map(severity => `${counts[severity]} ${severity}`)
  return [...lines, '', sum.join(', ')].join('\n')
}
