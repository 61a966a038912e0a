/** `edgemesh service`: what users want to reach. */
import { Command } from 'commander'
import { Service, ServiceStatus } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { wordFor } from './enum-words.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label, several } from './option-values.ts'
import { renderLabels } from './table.ts'

export function serviceCommand(): Command {
  return new Command('service')
    .description('services: what users want to reach')
    .addCommand(createCommand())
    .addCommand(listCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service create orders --name 'Order database' --owner shop-team --role developer --role admin
  edgemesh service list
`,
    )
}

type CreateOptions = ConnectionOptions & {
  name: string
  owner: string
  role: string[]
  label: Labels
  json?: true
}

function createCommand(): Command {
  return connecting(new Command('create'))
    .description('make a service, and say who may connect to it')
    .argument('<id>', 'letters, digits, ".", "_" and "-"')
    .option('--name <text>', 'for people', '')
    .option('--owner <text>', 'who answers for it', '')
    .option('--role <role>', 'users of this role may connect; may be repeated', several, [])
    .option('--label <key=value>', 'may be repeated', label, {})
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service create orders --name 'Order database' --owner shop-team --role developer --role admin
`,
    )
    .action((id: string, options: CreateOptions) =>
      withAdmin(options, async admin => {
        const { name, owner, role: roles, label: labels } = options
        const { service } = await admin.call('createService', { id, name, owner, roles, labels })
        if (options.json) console.log(JSON.stringify(service && Service.toJSON(service)))
        else
          console.log(
            `service ${id} is made; ${roles.length > 0 ? `it is open to ${roles.join(', ')}` : 'nobody may connect yet'}`,
          )
      }),
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('services')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service list
  edgemesh service list --json | jq -r .id
`,
    )
    .action((options: ConnectionOptions & ListOptions) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'services',
          page: async at => {
            const { services, nextPageToken } = await admin.call('listServices', at)
            return { rows: services, nextPageToken }
          },
          columns: {
            id: service => service.id,
            name: service => service.name,
            owner: service => service.owner,
            status: service => wordFor(ServiceStatus, service.status),
            created: service => service.createdAt,
            labels: service => renderLabels(service.labels),
          },
          toJson: Service.toJSON,
        }),
      ),
    )
}
