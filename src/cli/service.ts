/** `edgemesh service`: what users want to reach. */
import { Command, Option } from 'commander'
import { Service, ServiceStatus } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label, several } from './option-values.ts'
import { renderFacts, renderLabels } from './table.ts'

export function serviceCommand(): Command {
  return new Command('service')
    .description('services: what users want to reach')
    .addCommand(createCommand())
    .addCommand(listCommand())
    .addCommand(showCommand())
    .addCommand(updateCommand())
    .addCommand(deleteCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service create orders --name 'Order database' --owner shop-team --role developer --role admin
  edgemesh service list
  edgemesh service update orders --status disabled
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

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('everything that is known of a service; who may reach it: edgemesh grant list')
    .argument('<id>')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service show orders
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { service } = await admin.call('getService', { id })
        if (!service) throw new CommandFailure(`the server has sent no service ${id}`)
        if (options.json) console.log(JSON.stringify(Service.toJSON(service)))
        else {
          const { name, owner, status, createdAt: created } = service
          const labels = renderLabels(service.labels)
          console.log(renderFacts({ id, name, owner, status: wordFor(ServiceStatus, status), created, labels }))
        }
      }),
    )
}

type UpdateOptions = ConnectionOptions & { name?: string; owner?: string; status?: string; json?: true }

function updateCommand(): Command {
  return connecting(new Command('update'))
    .description('change a service; what is not given stays, and connections are decided anew at once')
    .argument('<id>')
    .option('--name <text>', 'for people')
    .option('--owner <text>', 'who answers for it')
    .addOption(new Option('--status <status>', 'whether it may be reached').choices(wordsOf(ServiceStatus)))
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service update orders --status disabled
  edgemesh service update orders --owner shop-team
`,
    )
    .action((id: string, options: UpdateOptions, command: Command) => {
      const { name, owner } = options
      const status = options.status === undefined ? undefined : valueFor(ServiceStatus, options.status)
      if (name === undefined && owner === undefined && status === undefined) {
        command.error('error: nothing to change: give --name, --owner or --status')
      }
      return withAdmin(options, async admin => {
        const { service } = await admin.call('updateService', { id, name, owner, status })
        if (options.json) console.log(JSON.stringify(service && Service.toJSON(service)))
        else console.log(`service ${id} is ${wordFor(ServiceStatus, service?.status ?? 0)}`)
      })
    })
}

function deleteCommand(): Command {
  return connecting(new Command('delete'))
    .description('remove a service and the grants on it; connections to it end at once')
    .argument('<id>')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service delete orders
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        await admin.call('deleteService', { id })
        console.log(options.json ? JSON.stringify({ id, deleted: true }) : `service ${id} is deleted`)
      }),
    )
}
