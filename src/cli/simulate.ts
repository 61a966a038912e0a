/** `edgemesh simulate`: a fleet of devices against a server, as one sees it. */
import { randomBytes } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { clearScreenDown, moveCursor } from 'node:readline'
import { SingleBar } from 'cli-progress'
import { Command, InvalidArgumentError } from 'commander'
import { type PostureMix, parsePostureMix } from '../simulate/mix.ts'
import { parseScript, type Step, scriptBytesMax } from '../simulate/script.ts'
import { type Progress, type Summary, simulate } from '../simulate/simulate.ts'
import { serverDefault } from './admin-client.ts'
import { parseDuration } from './duration.ts'
import { CommandFailure } from './failure.ts'
import { hostAndPort, wholeNumber } from './option-values.ts'
import { stopSignal } from './stop-signal.ts'
import { renderFacts } from './table.ts'

const devicesMax = 1_000_000
const processesMax = 256
/** Beyond that a process comes near the usual limit of open files. */
const devicesPerProcessMax = 5_000
/** Between two lines where nobody looks at a terminal. */
const lineEveryMs = 5_000

type SimulateOptions = {
  server?: string
  tokenFile?: string
  devices: number
  processes?: number
  idPrefix?: string
  postureMix: PostureMix
  user?: string
  service?: string
  askEvery: number
  script?: string
  reconnectEvery?: number
  killShare: number
  duration?: number
  ramp?: number
  json?: true
}

export function simulateCommand(): Command {
  return new Command('simulate')
    .description('a fleet of simulated devices against a server: enrolls them, reports, asks, and counts')
    .option('--server <host:port>', 'the server (default: EDGEMESH_SERVER, else localhost:8000)', hostAndPort)
    .option('--token-file <path>', 'a file that holds the enrollment token (default: the variable EDGEMESH_TOKEN)')
    .requiredOption('--devices <number>', 'how many', wholeNumber(1, devicesMax))
    .option(
      '--processes <number>',
      'in how many processes (default: one a core, more for many devices)',
      wholeNumber(1, processesMax),
    )
    .option('--id-prefix <text>', 'what their names begin with (default: another each time)')
    .option('--posture-mix <shares>', 'how many are how', postureMix, parsePostureMix('healthy=100'))
    .option('--user <user>', 'each device asks whether this user may reach --service')
    .option('--service <service>', 'the service to ask for')
    .option('--ask-every <duration>', 'how often each device asks', parseDuration, 10_000)
    .option('--script <path>', 'a JSON list of what happens to them, and when')
    .option('--reconnect-every <duration>', 'how often --kill-share of the devices loses its streams', parseDuration)
    .option('--kill-share <share>', 'above 0, up to 1', share, 0.1)
    .option('--duration <duration>', 'how long to go on once all are enrolled (default: until stopped)', parseDuration)
    .option('--ramp <duration>', 'over how long the enrollments are spread', parseDuration)
    .option('--json', 'one JSON document a line, the last is the summary')
    .addHelpText(
      'after',
      `
The token has to be good for that many uses. No option takes its text: arguments show in the list of processes. A script
is a list such as [{"at": "30s", "action": "disconnect", "share": 0.5}], with the actions disconnect, posture (and
"posture": "failing", "stale" or "healthy") and stop-heartbeats. Where the server limits enrollments, each waits as long
as it is told to; see docs/simulate.md for the limits to raise.

Exit code 1: some devices were refused, or had no session in the end, and the script was not why.

Examples:
  EDGEMESH_TOKEN=$(edgemesh token create --uses 50) edgemesh simulate --devices 50 --duration 1m
  edgemesh simulate --token-file token --devices 1000 --posture-mix healthy=90,stale=5,failing=5 --json
  edgemesh simulate --token-file token --devices 200 --user ada@example.com --service orders --reconnect-every 30s
`,
    )
    .action(run)
}

async function run(options: SimulateOptions): Promise<void> {
  const { devices, user, service, reconnectEvery, duration, json } = options
  if ((user === undefined) !== (service === undefined)) {
    throw new CommandFailure('--user and --service belong together', 'give both, or neither')
  }
  const token = options.tokenFile === undefined ? process.env.EDGEMESH_TOKEN : await readFile(options.tokenFile, 'utf8')
  if (!token?.trim()) {
    throw new CommandFailure('there is no enrollment token', `make one with: edgemesh token create --uses ${devices}`)
  }
  const script = options.script === undefined ? [] : await readScript(options.script)
  const show = json ? printJson : process.stdout.isTTY ? onTerminal() : inLines()
  const summary = await simulate({
    server: options.server || process.env.EDGEMESH_SERVER || serverDefault,
    token: token.trim(),
    idPrefix: options.idPrefix || `sim-${randomBytes(3).toString('hex')}`,
    devices,
    processes: options.processes ?? Math.max(availableParallelism(), Math.ceil(devices / devicesPerProcessMax)),
    mix: options.postureMix,
    ...(user !== undefined && service !== undefined && { asking: { user, service, everyMs: options.askEvery } }),
    script,
    ...(reconnectEvery !== undefined && { reconnecting: { everyMs: reconnectEvery, share: options.killShare } }),
    ...(duration !== undefined && { durationMs: duration }),
    rampMs: options.ramp ?? 0,
    onProgress: progress => show(progress),
    signal: stopSignal(),
  })
  show(summary)
  if (summary.failedDevices > 0) {
    throw new CommandFailure(
      `${summary.failedDevices} of ${devices} devices failed: ${counted(summary.errors) || 'they were never enrolled'}`,
      'docs/simulate.md tells which limits of a server to raise for a large fleet',
    )
  }
}

type Shown = Progress | Summary

function printJson(shown: Shown): void {
  console.log(JSON.stringify({ type: isSummary(shown) ? 'summary' : 'progress', ...shown }))
}

function inLines(): (shown: Shown) => void {
  let dueMs = 0
  return shown => {
    if (isSummary(shown)) return console.log(summaryOf(shown))
    if (shown.elapsedMs < dueMs) return
    dueMs = shown.elapsedMs + lineEveryMs
    const { phase, enrolled, devices, heartbeatsPerSecond, acknowledgedMs, decisionsPerSecond, errors } = shown
    const facts = [
      `${(shown.elapsedMs / 1_000).toFixed(0)} s`,
      phase,
      `${enrolled}/${devices} enrolled`,
      `${shown.states.reporting} reporting`,
      `${heartbeatsPerSecond} heartbeats/s (p50 ${milliseconds(acknowledgedMs.p50)}, p99 ${milliseconds(acknowledgedMs.p99)})`,
      `${decisionsPerSecond} decisions/s`,
    ]
    console.log([...facts, counted(errors)].filter(Boolean).join('  '))
  }
}

/** A bar while devices are enrolled, then a table in place. */
function onTerminal(): (shown: Shown) => void {
  let bar: SingleBar | undefined
  let linesDrawn = 0
  return shown => {
    if (shown.phase === 'enrolling') {
      if (!bar) {
        bar = new SingleBar({
          format: 'enrolling {bar} {value}/{total}  {errors}',
          stream: process.stdout,
          hideCursor: true,
        })
        bar.start(shown.devices, 0, { errors: '' })
      }
      bar.update(shown.enrolled, { errors: counted(shown.errors) })
      return
    }
    bar?.update(shown.enrolled)
    bar?.stop()
    bar = undefined
    if (linesDrawn > 0) {
      moveCursor(process.stdout, 0, -linesDrawn)
      clearScreenDown(process.stdout)
    }
    const text = isSummary(shown) ? summaryOf(shown) : tableOf(shown)
    linesDrawn = isSummary(shown) ? 0 : text.split('\n').length
    process.stdout.write(`${text}\n`)
  }
}

function isSummary(shown: Shown): shown is Summary {
  return 'failedDevices' in shown
}

function tableOf(shown: Progress): string {
  return renderFacts({
    elapsed: `${(shown.elapsedMs / 1_000).toFixed(0)} s`,
    devices: counted(isSummary(shown) ? shown.statesAtEnd : shown.states),
    enrolled: `${shown.enrolled} of ${shown.devices}`,
    heartbeats: `${shown.heartbeats}, ${shown.heartbeatsPerSecond}/s`,
    acknowledged: `p50 ${milliseconds(shown.acknowledgedMs.p50)}, p99 ${milliseconds(shown.acknowledgedMs.p99)}`,
    decisions: `${shown.allowed} allowed, ${shown.denied} denied, ${shown.decisionsPerSecond}/s`,
    revocations: shown.revocations,
    reconnects: shown.reconnects,
    script: counted(shown.scripted),
    errors: counted(shown.errors),
    memory: `${(shown.bytesPerDevice / 1_024).toFixed(0)} KiB a device`,
  })
}

function summaryOf(summary: Summary): string {
  return `${tableOf(summary)}\n${renderFacts({
    'enrolled in': `${(summary.enrolledInMs / 1_000).toFixed(1)} s`,
    failed: summary.failedDevices,
  })}`
}

function counted(counts: Readonly<Record<string, number>>): string {
  return Object.entries(counts)
    .filter(([, count]) => count > 0)
    .map(([name, count]) => `${count} ${name}`)
    .join(', ')
}

function milliseconds(ms: number | undefined): string {
  return ms === undefined ? '-' : `${ms} ms`
}

async function readScript(path: string): Promise<Step[]> {
  const hint = 'see edgemesh simulate --help for what a script is'
  if ((await stat(path)).size > scriptBytesMax)
    throw new CommandFailure(`${path}: more than ${scriptBytesMax} bytes`, hint)
  const text = await readFile(path, 'utf8')
  try {
    return parseScript(text, parseDuration)
  } catch (error) {
    if (error instanceof RangeError) throw new CommandFailure(`${path}: ${error.message}`, hint)
    throw error
  }
}

function postureMix(text: string): PostureMix {
  try {
    return parsePostureMix(text)
  } catch (error) {
    throw new InvalidArgumentError(error instanceof RangeError ? `${error.message}.` : '')
  }
}

function share(text: string): number {
  const number = /^[01](\.\d{1,6})?$/.test(text) ? Number(text) : Number.NaN
  if (!(number > 0 && number <= 1)) throw new InvalidArgumentError('It must be above 0 and at most 1, such as 0.1.')
  return number
}
