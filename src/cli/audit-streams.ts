/** `edgemesh audit tail` and `edgemesh audit export`: the audit log as a stream. */
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { Command, Option } from 'commander'
import { LRUCache } from 'lru-cache'
import { describeCallError, isCallError } from '../client/channel.ts'
import { backoffDelayMs } from '../client/waiting.ts'
import { AuditEvent, AuditRecordKind, type ExportAuditRecordsResponse } from '../gen/edgemesh/v1/admin.ts'
import { everyoneReads, readIfThere, writeWhole } from '../whole-file.ts'
import { type AdminClient, type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { jsonOf } from './decision.ts'
import { CommandFailure } from './failure.ts'
import { moment, wholeNumber } from './option-values.ts'
import { stopSignal } from './stop-signal.ts'
import { printable } from './table.ts'

const lastDefault = 10
const lastMax = 1_000
/** A person is looking: never longer than this until the next attempt. */
const reconnectMsMax = 10_000
/** What is committed together may be thousands of events; those since the last checkpoint come again. */
const rememberedIdsMax = 50_000
/** As long as the longest code, but for RESOURCE_EXHAUSTED. */
const codeWidth = 17

type TailOptions = ConnectionOptions & Filters & { last: number; since?: Date; json?: true }
type Filters = { actor?: string; method?: string; target?: string; code?: string }

/** The options by which search and tail pick events. */
export function filtering(command: Command): Command {
  return command
    .option('--actor <spiffe-id>', 'who called, such as spiffe://edgemesh.local/operator/admin')
    .option('--method <name>', 'full method name, such as /edgemesh.v1.AdminService/RevokeDevice')
    .option('--target <target>', 'what was acted on, such as device/laptop-7')
    .option('--code <code>', 'how it ended, such as OK or PERMISSION_DENIED')
}

export function tailCommand(): Command {
  return filtering(connecting(new Command('tail')))
    .description('follow the events of all instances as they are written, until Ctrl-C')
    .option('-n, --last <n>', 'begin with so many of the newest', wholeNumber(0, lastMax), lastDefault)
    .addOption(
      new Option('--since <moment>', 'begin with all that are not older, such as 2026-01-31T08:00:00Z')
        .argParser(moment)
        .conflicts('last'),
    )
    .option('--json', 'one JSON document a line')
    .addHelpText(
      'after',
      `
Each event comes once, in the order in which they were committed. When the server or its database is lost, this says
so on stderr, connects again and goes on without a gap.

Examples:
  edgemesh audit tail
  edgemesh audit tail --code PERMISSION_DENIED -n 100
  edgemesh audit tail --json --since 2026-01-31T08:00:00Z | jq -r .actor
`,
    )
    .action(tail)
}

async function tail(options: TailOptions): Promise<void> {
  const stopping = stopSignal()
  const { actor = '', method = '', target = '', code = '', last, since, json } = options
  const shown = new LRUCache<string, true>({ max: rememberedIdsMax })
  let checkpoint = ''
  let failures = 0

  const show = async (event: AuditEvent) => {
    if (shown.has(event.id)) return
    shown.set(event.id, true)
    await print(json ? JSON.stringify(AuditEvent.toJSON(event)) : lineOf(event))
  }
  const follow = async (admin: AdminClient) => {
    const request = { actor, method, target, code, last, since, afterCheckpoint: checkpoint }
    const stream = admin.stream('tailAuditEvents', request)
    const cancel = () => stream.cancel()
    stopping.addEventListener('abort', cancel)
    try {
      for await (const message of stream) {
        if (failures > 0) console.error('note: connected again')
        failures = 0
        if (message.event) await show(message.event)
        if (message.checkpoint) checkpoint = message.checkpoint
      }
    } finally {
      stopping.removeEventListener('abort', cancel)
      cancel()
    }
  }

  while (!stopping.aborted) {
    let retryAfterMs: number | undefined
    try {
      await withAdmin(options, follow)
    } catch (error) {
      if (stopping.aborted) return
      // Who has never been connected is told why at once.
      if (checkpoint === '' || !isPassing(error)) throw error
      const described = describeCallError(error)
      ;({ retryAfterMs } = described)
      if (failures === 0) console.error(`note: ${described.message}; connecting again`)
    }
    const delayMs = Math.min(reconnectMsMax, backoffDelayMs(failures++, Math.random, retryAfterMs))
    await sleep(delayMs, undefined, { signal: stopping }).catch(() => {})
  }
}

const passingCodes = new Set(['UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'ABORTED', 'CANCELLED', 'INTERNAL', 'UNKNOWN'])

/** Whether it may be otherwise a moment later. */
function isPassing(error: unknown): boolean {
  return isCallError(error) && passingCodes.has(describeCallError(error).code)
}

/** Columns that are as wide as most values; what is longer moves the rest of its line. */
function lineOf({ at, code, reason, method, actor, target, sourceAddress }: AuditEvent): string {
  const ended = reason === '' ? code : `${code} ${reason}`
  const words = [at?.toISOString() ?? '', ended.padEnd(codeWidth), method, actor, target || '-', sourceAddress]
  return words.map(printable).join('  ')
}

type ExportOptions = ConnectionOptions & {
  since?: Date
  until?: Date
  what: keyof typeof kindsOf
  afterCheckpoint?: string
  checkpointFile?: string
  follow?: true
}

const kindsOf = { events: [AuditRecordKind.EVENT], decisions: [AuditRecordKind.DECISION], all: [] }

export function exportCommand(): Command {
  return connecting(new Command('export'))
    .description('all that is on record as NDJSON on stdout, one document a line: {"type": "event" or "decision", …}')
    .option('--since <moment>', 'not before this, such as 2026-01-31 or 2026-01-31T08:00:00Z', moment)
    .addOption(new Option('--until <moment>', 'before this; gives no checkpoint').argParser(moment))
    .addOption(
      new Option('--what <kind>', 'which documents')
        .choices(Object.keys(kindsOf))
        .default('all' satisfies keyof typeof kindsOf),
    )
    .option('--after-checkpoint <text>', 'go on where another export has ended')
    .addOption(
      new Option(
        '--checkpoint-file <path>',
        'go on from what the file holds, if it is there, and keep the end in it',
      ).conflicts(['afterCheckpoint', 'until']),
    )
    .addOption(new Option('--follow', 'do not end, but go on with what is written from now on').conflicts('until'))
    .addHelpText(
      'after',
      `
Where the export has ended is told on stderr as "checkpoint: …", or kept in --checkpoint-file: the next one goes on
behind it, at whichever instance, without a gap and without repeating anything. docs/audit.md says what fields mean.

Exit code 0: it is whole. 1: it was cut short, and the file of its checkpoint is as it was; the records that are out
are whole lines, and come again.

Examples:
  edgemesh audit export --since 2026-01-31 --until 2026-02-01 > audit.ndjson
  edgemesh audit export --what events --checkpoint-file audit.checkpoint | ship-logs
  edgemesh audit export --follow --checkpoint-file audit.checkpoint | ship-logs
`,
    )
    .action(exportRecords)
}

async function exportRecords(options: ExportOptions): Promise<void> {
  const { since, until, what, checkpointFile, follow = false } = options
  const stopping = stopSignal()
  const kept = checkpointFile === undefined ? undefined : await readIfThere(checkpointFile)
  const afterCheckpoint = (kept ?? options.afterCheckpoint ?? '').trim()
  let records = 0
  let checkpoint = ''

  const keep = async () => {
    if (checkpointFile !== undefined && checkpoint !== '') {
      await writeWhole(checkpointFile, `${checkpoint}\n`, everyoneReads)
    }
  }
  await withAdmin(options, async admin => {
    const stream = admin.stream('exportAuditRecords', { kinds: kindsOf[what], since, until, afterCheckpoint, follow })
    const cancel = () => stream.cancel()
    stopping.addEventListener('abort', cancel)
    try {
      for await (const message of stream) {
        const document = documentOf(message)
        if (document) {
          await print(JSON.stringify(document))
          if (++records % progressEvery === 0) showProgress(records, document.at ?? document.decidedAt)
        }
        if (!message.checkpoint) continue
        ;({ checkpoint } = message)
        if (follow) await keep()
      }
    } catch (error) {
      // Ctrl-C is how one that follows ends.
      if (!stopping.aborted || !isCallError(error)) throw error
      if (!follow)
        throw new CommandFailure('stopped before the end', 'what is out already comes again with the next export')
    } finally {
      cancel()
    }
  })
  await keep()
  clearProgress()
  console.error(`${records} records`)
  if (checkpointFile === undefined && checkpoint !== '') console.error(`checkpoint: ${checkpoint}`)
}

type Document = { type: string; at?: unknown; decidedAt?: unknown }

function documentOf({ record }: ExportAuditRecordsResponse): Document | undefined {
  if (record?.$case === 'event') return { type: 'event', ...(AuditEvent.toJSON(record.value) as object) }
  if (record?.$case === 'decision') return { type: 'decision', ...jsonOf(record.value) }
  return undefined
}

const progressEvery = 1_000

function showProgress(records: number, at: unknown): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K  ${records} records, at ${at}`)
}

function clearProgress(): void {
  if (process.stderr.isTTY) process.stderr.write('\r\x1b[K')
}

/** At the pace at which stdout takes it: no more is read from the server meanwhile. */
async function print(line: string): Promise<void> {
  if (!process.stdout.write(`${line}\n`)) await once(process.stdout, 'drain')
}
