/** `edgemesh simulate`: a fleet of devices against a server, as one sees it. */
import { randomBytes } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { Command, InvalidArgumentError } from 'commander'
import { type PostureMix, parsePostureMix } from '../simulate/mix.ts'
import { parseScript, type Step, scriptBytesMax } from '../simulate/script.ts'
import { simulate } from '../simulate/simulate.ts'
import { serverDefault } from './admin-client.ts'
import { parseDuration } from './duration.ts'
import { CommandFailure } from './failure.ts'
import { hostAndPort, wholeNumber } from './option-values.ts'
import { counted, inLines, onTerminal, printJson } from './simulate-display.ts'
import { stopSignal } from './stop-signal.ts'

const devicesMax = 1_000_000
const processesMax = 256
/** Beyond that a process is busy with one core. */
const devicesPerProcessMax = 5_000
/** What a process opens beside one for each device: those that are enrolling, and its own. */
const filesBesideDevices = 200

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
  const show = json ? printJson : process.stdout.isTTY ? onTerminal(process.stdout) : inLines()
  const summary = await simulate({
    server: options.server || process.env.EDGEMESH_SERVER || serverDefault,
    token: token.trim(),
    idPrefix: options.idPrefix || `sim-${randomBytes(3).toString('hex')}`,
    devices,
    processes: processesFor(devices, options.processes),
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

/** @throws CommandFailure when so many processes may not open a file for each device */
function processesFor(devices: number, given: number | undefined, filesMax = openFilesMax()): number {
  const most = filesMax - filesBesideDevices
  if (given === undefined) {
    const atOnce = Math.max(1, Math.min(devicesPerProcessMax, most))
    return Math.min(processesMax, Math.max(availableParallelism(), Math.ceil(devices / atOnce)))
  }
  const each = Math.ceil(devices / given)
  if (each <= most) return given
  throw new CommandFailure(
    `${each} devices in each of ${given} processes need ${each + filesBesideDevices} open files, and a process may have ${filesMax}`,
    'give more --processes, or raise ulimit -n',
  )
}

/** What `ulimit -n` says. Node has raised it as far as it may. */
function openFilesMax(): number {
  // Looking up names takes its time.
  Object.assign(process.report, { excludeNetwork: true })
  const { userLimits } = process.report.getReport() as { userLimits?: { open_files?: { soft: unknown } } }
  const max = Number(userLimits?.open_files?.soft)
  return Number.isNaN(max) ? Number.POSITIVE_INFINITY : max
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
