/** `edgemesh agent`: the reference edge daemon, on this machine. */
import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { platform, release } from 'node:os'
import { promisify } from 'node:util'
import { Command, Option } from 'commander'
import { z } from 'zod'
import { runAgent } from '../agent/agent.ts'
import type { AgentEvent } from '../agent/events.ts'
import { hostPosture } from '../agent/host-posture.ts'
import { sentenceOf } from '../client/server-clock.ts'
import { clockOffsetSentence } from '../clock.ts'
import { DeviceType, type Posture } from '../gen/edgemesh/v1/types.ts'
import { serverDefault } from './admin-client.ts'
import { valueFor, wordsOf } from './enum-words.ts'
import { CommandFailure, printFailure } from './failure.ts'
import { hostAndPort, type Labels, label } from './option-values.ts'
import { stopSignal } from './stop-signal.ts'

/** As the contract has it. */
const osVersionCharactersMax = 64
/** The longest name of an event. */
const eventWidth = 'trust-bundle-changed'.length

type AgentOptions = {
  server?: string
  tokenFile?: string
  state: string
  id?: string
  type: string
  label: Labels
  posture?: string
  postureCommand?: string
  json?: true
}

export function agentCommand(): Command {
  return new Command('agent')
    .description('the daemon of a device: enrolls it, keeps its certificate renewed, reports its health until stopped')
    .option('--server <host:port>', 'the server (default: EDGEMESH_SERVER, else localhost:8000)', hostAndPort)
    .option('--token-file <path>', 'a file that holds the enrollment token (default: the variable EDGEMESH_TOKEN)')
    .requiredOption('--state <folder>', 'where its key and certificate are kept')
    .option('--id <id>', "the device's name (default: the server chooses one)")
    .addOption(new Option('--type <type>', 'what it is').choices(wordsOf(DeviceType)).default('server'))
    .option('--label <key=value>', 'may be repeated', label, {})
    .option('--posture <path>', 'report what this JSON file says over what is measured; it is read for each report')
    .option(
      '--posture-command <path>',
      'likewise what this program prints; it is run, without arguments, for each report',
    )
    .option('--json', 'one JSON document a line and event')
    .addHelpText(
      'after',
      `
The token is needed the first time only. No option takes its text: arguments show in the list of processes. Given
again it changes nothing, but another token lets a device back in that an operator has deleted, as has to be done for
one that was away for too long.

The posture is measured on this machine. A file given with --posture may hold any of cpuPercent, memoryPercent,
diskPercent, patchesCurrent, antivirusEnabled, diskEncrypted, firewallEnabled. A program given with --posture-command
prints the same within 10 seconds and 64 KiB. Where it fails, what it said last is reported as of when it said it: the
device's health goes stale and is not taken for good.

Examples:
  EDGEMESH_TOKEN=$(edgemesh token create) edgemesh agent --server localhost:8000 --state ./laptop-7 --id laptop-7
  edgemesh agent --server edgemesh.example.com:8000 --state /var/lib/edgemesh --token-file /run/secrets/token
  echo '{"diskEncrypted": false}' > posture.json && edgemesh agent --state ./laptop-7 --posture posture.json
`,
    )
    .action(run)
}

async function run(options: AgentOptions): Promise<void> {
  const token = options.tokenFile === undefined ? process.env.EDGEMESH_TOKEN : await readToken(options.tokenFile)
  await runAgent({
    server: options.server || process.env.EDGEMESH_SERVER || serverDefault,
    stateDirectory: options.state,
    ...(token && { token }),
    device: {
      ...(options.id && { id: options.id }),
      type: valueFor(DeviceType, options.type),
      os: platform(),
      osVersion: release().slice(0, osVersionCharactersMax),
      labels: options.label,
    },
    posture: await postureSource(options),
    log: options.json ? event => console.log(JSON.stringify({ at: new Date(), ...event })) : tell,
    signal: stopSignal(),
  })
}

/** One line for a person. Trouble goes to stderr, since it passes by itself or needs somebody. */
function tell(event: AgentEvent): void {
  const at = new Date().toISOString().slice(11, 19)
  const trouble = 'error' in event || event.event === 'clock-wrong'
  const line = `${at}  ${event.event.padEnd(eventWidth)}  ${sentenceFor(event)}`.trimEnd()
  if (trouble) console.error(line)
  else console.log(line)
}

function sentenceFor(event: AgentEvent): string {
  switch (event.event) {
    case 'enrolling':
    case 'connecting':
      return event.server
    case 'pending-approval':
      return `an operator has to approve ${event.deviceId}: edgemesh device approve ${event.deviceId}`
    case 'enrolled':
    case 'resumed':
      return `${event.spiffeId}, certified until ${event.notAfter.toISOString()}`
    case 'reported': {
      const health = event.failingPosture.length === 0 ? 'healthy' : `unhealthy: ${event.failingPosture.join(', ')}`
      return `${health}; the next report is due in ${seconds(event.nextInMs)}`
    }
    case 'renewed':
    case 'recovered':
      return `certified until ${event.notAfter.toISOString()}`
    case 'renewal-failed':
    case 'reconnection-failed':
    case 'disconnected':
    case 'state-unsaved':
      return `${sentenceOf(event.error)}; trying again in ${seconds(event.retryInMs)}`
    case 'recovery-pending':
      return `${sentenceOf(event.error)}; asking again until then`
    case 'certificate-expired':
      return `${sentenceOf(event.error)}; asking for a new one`
    case 'identity-lost':
      return `${sentenceOf(event.error)}; there is a new token, which is used now`
    case 'trust-bundle-refused':
      return sentenceOf(event.error)
    case 'trust-bundle-changed':
      return event.trustBundleId
    case 'policy-changed':
      return `revision ${event.revision}`
    case 'quarantined':
      return event.reason
    case 'reconnecting':
      return `in ${seconds(event.delayMs)}`
    case 'clock-wrong':
      return clockOffsetSentence(event.offsetMs) ?? ''
    case 'clock-right':
    case 'released':
    case 'stopped':
      return ''
  }
}

function seconds(ms: number): string {
  return `${(ms / 1_000).toFixed(1)} s`
}

async function readToken(path: string): Promise<string> {
  return (await readFile(path, 'utf8')).trim()
}

const share = z.number().min(0).max(100)
const postureFile = z.strictObject({
  cpuPercent: share.optional(),
  memoryPercent: share.optional(),
  diskPercent: share.optional(),
  patchesCurrent: z.boolean().optional(),
  antivirusEnabled: z.boolean().optional(),
  diskEncrypted: z.boolean().optional(),
  firewallEnabled: z.boolean().optional(),
  attributes: z.record(z.string(), z.string()).optional(),
})

/** What this machine is like, with what the file and the program say in its place. */
async function postureSource({ posture: path, postureCommand: program }: AgentOptions) {
  const measure = hostPosture()
  const file = path === undefined ? undefined : await kept(() => readPosture(path))
  const printed = program === undefined ? undefined : await kept(() => runPosture(program))
  return async (): Promise<Partial<Posture>> => {
    const measured = await measure()
    const [fromFile, fromProgram] = [await file?.(), await printed?.()]
    // A file is a person's word and holds until it is changed. A program measures: what it said is as old as it is.
    const stale = fromProgram?.failed ? { measuredAt: fromProgram.at } : {}
    return { ...measured, ...fromFile?.value, ...fromProgram?.value, ...stale }
  }
}

/** What was read last; whoever can't be read later is complained of. @throws where even the first reading fails */
async function kept<T>(read: () => Promise<T>): Promise<() => Promise<{ value: T; at: Date; failed: boolean }>> {
  let last = { value: await read(), at: new Date(), failed: false }
  return async () => {
    try {
      last = { value: await read(), at: new Date(), failed: false }
    } catch (error) {
      printFailure(error)
      last = { ...last, failed: true }
    }
    return last
  }
}

async function readPosture(path: string): Promise<Partial<Posture>> {
  return postureIn(await readFile(path, 'utf8'), path)
}

const programTimeoutMs = 10_000
const programOutputBytesMax = 64 * 1024

async function runPosture(program: string): Promise<Partial<Posture>> {
  // The token is for the server alone.
  const { EDGEMESH_TOKEN: _, ...env } = process.env
  const limits = { timeout: programTimeoutMs, maxBuffer: programOutputBytesMax, killSignal: 'SIGKILL', env } as const
  const { stdout } = await promisify(execFile)(program, [], limits).catch(failure => {
    throw new CommandFailure(
      `${program}: ${whyNot(failure)}`,
      'it has to print a posture as JSON: edgemesh agent --help',
    )
  })
  return postureIn(stdout, program)
}

function whyNot({ code, killed, signal }: { code?: unknown; killed?: boolean; signal?: string }): string {
  if (code === 'ERR_CHILD_PROCESS_STDIO_MAXBUFFER') return `it printed more than ${programOutputBytesMax} bytes`
  if (killed) return `it was not done within ${programTimeoutMs / 1_000} s`
  if (typeof code === 'string') return `it can not be run: ${code}`
  return signal ? `it was ended by ${signal}` : `it ended with exit code ${code}`
}

function postureIn(text: string, from: string): Partial<Posture> {
  try {
    return postureFile.parse(JSON.parse(text)) as Partial<Posture>
  } catch (error) {
    const what = error instanceof z.ZodError ? z.prettifyError(error).replace(/\s*\n\s*/g, ' ') : 'not JSON'
    throw new CommandFailure(`${from}: ${what}`, 'see edgemesh agent --help for what a posture may hold')
  }
}
