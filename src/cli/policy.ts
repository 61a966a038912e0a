/** `edgemesh policy`: which policy decides, and what another one would change. */
import { once } from 'node:events'
import { Command } from 'commander'
import { GetPolicyStateResponse, type PolicyData } from '../gen/edgemesh/v1/admin.ts'
import { type AdminClient, type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { loadCandidate } from './candidate-policy.ts'
import { decisionsAPage, wordOf } from './decision.ts'
import { parseDuration } from './duration.ts'
import { wholeNumber } from './option-values.ts'
import { buildCommand } from './policy-build.ts'
import { hoursCommand, requireCommand } from './policy-data.ts'
import { compare, flipJson, type Tally, tallyOf } from './policy-diff.ts'
import { renderFacts, renderTable } from './table.ts'

export function policyCommand(): Command {
  return new Command('policy')
    .description('the policy that decides, and what another one would change')
    .addCommand(showCommand())
    .addCommand(hoursCommand(dataFacts))
    .addCommand(requireCommand(dataFacts))
    .addCommand(diffCommand())
    .addCommand(buildCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh policy show
  edgemesh policy hours --from 08:00 --until 18:00 --timezone Europe/Berlin --exempt admin
  edgemesh policy diff ./policies --since 24h
  edgemesh policy build ./policies --out /etc/edgemesh/policy
`,
    )
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('which policy decides, and the requirements and hours that it is given')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh policy show
  edgemesh policy show --json | jq -r .revision
`,
    )
    .action((options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const state = await admin.call('getPolicyState', {})
        if (options.json) console.log(JSON.stringify(GetPolicyStateResponse.toJSON(state)))
        else console.log(renderFacts({ ...policyFacts(state), ...dataFacts(state.data) }))
      }),
    )
}

function policyFacts({ refused, ...state }: GetPolicyStateResponse): Record<string, string | Date | undefined> {
  return {
    revision: state.revision || 'none: nothing is decided',
    engine: state.engine,
    instance: state.instanceId || undefined,
    'decides since': state.activatedAt,
    'last checked': state.checkedAt,
    ...(refused && { refused: refused.problem, 'refused since': refused.since, hint: refused.hint }),
  }
}

function dataFacts(data: PolicyData | undefined): Record<string, string> {
  const { requirements, hours } = data ?? {}
  const required = (is: boolean | undefined) => (is ? 'required' : 'not required')
  const below = (most: number | undefined) => (most === undefined ? 'no limit' : `< ${most} %`)
  return {
    'patches current': required(requirements?.patchesCurrent),
    'antivirus enabled': required(requirements?.antivirusEnabled),
    'disk encrypted': required(requirements?.diskEncrypted),
    'firewall enabled': required(requirements?.firewallEnabled),
    cpu: below(requirements?.cpuPercentMax),
    memory: below(requirements?.memoryPercentMax),
    disk: below(requirements?.diskPercentMax),
    hours: hours
      ? `${hours.days.join(',')} ${clockText(hours.startMinute)}-${clockText(hours.endMinute)} ${hours.timezone}`
      : 'any',
    'exempt roles': hours?.exemptRoles.join(', ') ?? '',
  }
}

function clockText(minute: number): string {
  const twoDigits = (number: number) => String(number).padStart(2, '0')
  return `${twoDigits(Math.floor(minute / 60))}:${twoDigits(minute % 60)}`
}

type DiffOptions = ConnectionOptions & { since: number; device?: string; limit: number; json?: true }

const sinceDefault = '24h'
/** Lines of flips held in memory, at some 4 kB each. */
const linesDefault = 1_000
const linesMax = 10_000
/** Where no terminal shows how far it is. */
const progressMs = 10_000

function diffCommand(): Command {
  return connecting(new Command('diff'))
    .description(
      'what would be decided otherwise if another policy did: asked of what is on record, before it is activated',
    )
    .argument(
      '<policy>',
      'a folder of .rego, which needs opa on the path; or bundle.tar.gz or policy.wasm, or a folder with it',
    )
    .option(
      '--since <duration>',
      'the decisions of the last so many hours or days',
      parseDuration,
      parseDuration(sinceDefault),
    )
    .option('--device <id>', 'only those about this device')
    .option('--limit <n>', 'show at most so many lines of flips', wholeNumber(1, linesMax), linesDefault)
    .option('--json', 'one JSON document a flip')
    .addHelpText(
      'after',
      `
Nothing is changed: the policy runs here, over what the server has on record. Equal flips are one line, with how often.

Examples:
  edgemesh policy diff ./policies --since 7d
  edgemesh policy diff ./bundle --device laptop-7
  edgemesh policy diff ./policies --json | jq -r 'select(.would | not).user' | sort | uniq -c
`,
    )
    .action(async (path: string, options: DiffOptions) => {
      const candidate = await loadCandidate(path)
      await withAdmin(options, async admin => {
        const { revision } = await admin.call('getPolicyState', {})
        const tally = await runOver(admin, candidate, options)
        if (!options.json && tally.lines.size > 0) console.log(`${renderLines(tally)}\n`)
        const summary = summaryOf(tally, { decides: revision, compared: candidate.revision })
        if (options.json) console.error(summary)
        else console.log(summary)
      })
    })
}

/** From the newest back: pages are found by the decision before them, so what is decided meanwhile does not disturb. */
async function runOver(
  admin: AdminClient,
  candidate: Awaited<ReturnType<typeof loadCandidate>>,
  options: DiffOptions,
): Promise<Tally> {
  const tally = tallyOf(options.limit)
  const progress = progressOf(tally)
  const filter = { deviceId: options.device ?? '', after: new Date(Date.now() - options.since), before: undefined }
  let pageToken = ''
  do {
    const request = { ...filter, pageSize: decisionsAPage, pageToken }
    const { decisions, nextPageToken } = await admin.call('listDecisions', request)
    for (const decision of decisions) {
      const compared = compare(candidate, decision)
      tally.add(decision, compared)
      if (options.json && compared.kind === 'flip') console.log(JSON.stringify(flipJson(decision, compared)))
    }
    pageToken = nextPageToken
    progress.show()
    // A reader who is slower than we are must not make us hold what it has not read.
    if (process.stdout.writableNeedDrain) await once(process.stdout, 'drain')
  } while (pageToken !== '')
  progress.end()
  return tally
}

/** On stderr: one line that is written anew on a terminal, elsewhere a line now and then. */
function progressOf(tally: Tally): { show(): void; end(): void } {
  const terminal = process.stderr.isTTY
  let shownAt = performance.now()
  const text = () => `${tally.decisions} decisions, ${tally.denied + tally.allowed} would flip`
  return {
    show() {
      if (terminal) return void process.stderr.write(`\r\x1b[K… ${text()}`)
      if (performance.now() - shownAt < progressMs) return
      shownAt = performance.now()
      console.error(`… ${text()} so far`)
    },
    end: () => terminal && process.stderr.write('\r\x1b[K'),
  }
}

function renderLines({ lines }: Tally): string {
  return renderTable(
    {
      was: line => wordOf(line.newest),
      would: line => wordOf(line),
      times: line => line.times,
      device: line => line.newest.deviceId,
      user: line => line.newest.user,
      service: line => line.newest.service,
      action: line => line.newest.action,
      because: line => line.because.join(' '),
      newest: line => line.newest.decidedAt,
      decision: line => line.newest.id,
    },
    [...lines.values()].sort((one, other) => other.times - one.times),
  )
}

function summaryOf(tally: Tally, policy: { decides: string; compared: string }): string {
  const counted = (number: number, reasons: Map<string, number>) =>
    [
      String(number),
      ...[...reasons].sort(([, one], [, other]) => other - one).map(([code, times]) => `${code} ${times}`),
    ].join('  ')
  return renderFacts({
    'policy that decides': policy.decides,
    'policy compared': policy.compared,
    'decisions looked at': tally.decisions,
    'stay as they were': tally.same,
    'would be denied': counted(tally.denied, tally.reasons.denied),
    'would be allowed': counted(tally.allowed, tally.reasons.allowed),
    'flips not listed': tally.unlisted || undefined,
    'could not be decided': tally.undecided ? `${tally.undecided}  ${tally.whyUndecided}` : undefined,
  })
}
