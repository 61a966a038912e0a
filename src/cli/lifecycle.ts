/** `edgemesh lifecycle`: what becomes of devices that have not been seen for long. */
import { Command, Option } from 'commander'
import { LifecycleAction, LifecycleRule } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label, wholeNumber } from './option-values.ts'
import { renderLabels } from './table.ts'

export function lifecycleCommand(): Command {
  return new Command('lifecycle')
    .description(
      'rules: what becomes of devices that have not been seen for long; applied every ten minutes by servers that have ' +
        'run for an hour, since after an outage devices need time to come back',
    )
    .addCommand(setCommand())
    .addCommand(listCommand())
    .addCommand(deleteCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh lifecycle set forgotten-laptops --label kind=laptop --unseen-days 60 --action quarantine
  edgemesh lifecycle list
  edgemesh lifecycle delete forgotten-laptops
`,
    )
}

const unseenDaysMax = 3_650

type SetOptions = ConnectionOptions & { label: Labels; unseenDays: number; action: string; json?: true }

function setCommand(): Command {
  return connecting(new Command('set'))
    .description('make a rule, or replace the one of this name')
    .argument('<id>', 'such as forgotten-laptops')
    .option('--label <key=value>', 'for devices that carry it; may be repeated; without: for every device', label, {})
    .requiredOption('--unseen-days <days>', 'days without a report and without a stream', wholeNumber(1, unseenDaysMax))
    .addOption(
      new Option('--action <action>', 'what becomes of them').choices(wordsOf(LifecycleAction)).makeOptionMandatory(),
    )
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh lifecycle set forgotten --unseen-days 90 --action quarantine
  edgemesh lifecycle set rented-scanners --label fleet=rental --unseen-days 7 --action delete
`,
    )
    .action((id: string, { label: labels, unseenDays, action, ...options }: SetOptions) =>
      withAdmin(options, async admin => {
        const given = { id, labels, unseenDays, action: valueFor(LifecycleAction, action), createdAt: undefined }
        const { rule } = await admin.call('setLifecycleRule', { rule: given })
        const which = Object.keys(labels).length > 0 ? `devices with ${renderLabels(labels)}` : 'devices'
        if (options.json) console.log(JSON.stringify(rule && LifecycleRule.toJSON(rule)))
        else console.log(`${which} that have not been seen for ${unseenDays} days: ${action}`)
      }),
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('rules, by name')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh lifecycle list
  edgemesh lifecycle list --json
`,
    )
    .action((options: ConnectionOptions & ListOptions) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'rules',
          page: async at => {
            const { rules, nextPageToken } = await admin.call('listLifecycleRules', at)
            return { rows: rules, nextPageToken }
          },
          columns: {
            id: rule => rule.id,
            labels: rule => renderLabels(rule.labels),
            'unseen days': rule => String(rule.unseenDays),
            action: rule => wordFor(LifecycleAction, rule.action),
            created: rule => rule.createdAt,
          },
          toJson: LifecycleRule.toJSON,
        }),
      ),
    )
}

function deleteCommand(): Command {
  return connecting(new Command('delete'))
    .description('take a rule away; what it has done stays')
    .argument('<id>')
    .addHelpText('after', '\nExamples:\n  edgemesh lifecycle delete forgotten-laptops\n')
    .action((id: string, options: ConnectionOptions) =>
      withAdmin(options, async admin => {
        await admin.call('deleteLifecycleRule', { id })
        console.log(`rule ${id} is deleted`)
      }),
    )
}
