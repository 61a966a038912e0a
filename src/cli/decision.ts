/** `edgemesh decision`: what was asked, what was answered, and the facts that it rested on. */
import { Command } from 'commander'
import { Decision, type Explanation } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { explanationJson, explanationNote, renderInput, renderRules } from './explanation.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { moment } from './option-values.ts'
import { printable, renderFacts } from './table.ts'

export function decisionCommand(): Command {
  return new Command('decision')
    .description('decisions that were made, and why')
    .addCommand(listCommand())
    .addCommand(showCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh decision list --device laptop-7
  edgemesh decision show DECISION
`,
    )
}

type Filters = { device?: string; after?: Date; before?: Date }

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('decisions, the newest first')
    .option('--device <id>', 'only those about this device')
    .option('--after <moment>', 'not before this, such as 2026-01-31 or 2026-01-31T08:00:00Z', moment)
    .option('--before <moment>', 'before this', moment)
    .addHelpText(
      'after',
      `
Examples:
  edgemesh decision list --device laptop-7 --limit 20
  edgemesh decision list --after 2026-01-31T08:00:00Z --json | jq -r 'select(.allowed | not).id'
`,
    )
    .action((options: ConnectionOptions & ListOptions & Filters) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'decisions',
          page: async at => {
            const { device = '', after, before } = options
            const pageSize = Math.min(at.pageSize, decisionsAPage)
            const request = { ...at, pageSize, deviceId: device, after, before }
            const { decisions, nextPageToken } = await admin.call('listDecisions', request)
            return { rows: decisions, nextPageToken }
          },
          columns: {
            id: decision => decision.id,
            at: decision => decision.decidedAt,
            answer: wordOf,
            device: decision => decision.deviceId,
            user: decision => decision.user,
            service: decision => decision.service,
            action: decision => decision.action,
            because: decision => decision.reasons.map(reason => reason.code).join(' '),
          },
          toJson: jsonOf,
        }),
      ),
    )
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('one decision: every rule, and every fact that it rested on')
    .argument('<id>', 'as answers, audit events and lists name it: a UUID, a dot and the position of the question')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh decision show 0199c0de-5c1e-7d4f-8a7b-0123456789ab.0
  edgemesh decision show 0199c0de-5c1e-7d4f-8a7b-0123456789ab.0 --json | jq .input.device.health
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { decision, explanation } = await admin.call('getDecision', { id, explain: true })
        if (!decision) throw new Error('the server has answered without the decision')
        if (options.json) console.log(JSON.stringify({ ...jsonOf(decision), ...explanationJson(explanation) }))
        else console.log(describe(decision, explanation))
        const note = explanationNote(explanation, decision.policyRevision)
        if (note) console.error(note)
      }),
    )
}

/** A decision carries what policy was given, some 3 kB and 30 kB at most: what a message may be bounds a page. */
export const decisionsAPage = 100

function describe(decision: Decision, explanation: Explanation | undefined): string {
  const { user, action, service, deviceId, allowed } = decision
  const sentence = `${user} may ${allowed ? '' : 'not '}${action} to ${service} on ${deviceId}`
  const facts = renderFacts({
    'decision id': decision.id,
    'decided at': decision.decidedAt,
    'facts of': decision.evaluatedAt,
    'good until': decision.expiresAt,
    'policy revision': decision.policyRevision,
    'asked by': decision.caller,
    instance: decision.instanceId,
  })
  return [
    `${wordOf(decision)}: ${printable(sentence)}`,
    ...(decision.reasons.length > 0 ? [decision.reasons.map(({ message }) => printable(message)).join('\n')] : []),
    facts,
    ...(explanation ? [renderRules(explanation)] : []),
    renderInput(decision.input),
  ].join('\n\n')
}

export function wordOf({ allowed }: Pick<Decision, 'allowed'>): string {
  return allowed ? 'allowed' : 'denied'
}

/** A denial has an explicit `allowed` too, which the JSON of the proto leaves out. */
export function jsonOf(decision: Decision): object {
  return { allowed: decision.allowed, ...(Decision.toJSON(decision) as object) }
}
