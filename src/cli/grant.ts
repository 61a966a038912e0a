/** `edgemesh grant`: which roles may do what on which services. */
import { Command } from 'commander'
import { RoleGrant } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { several } from './option-values.ts'

export function grantCommand(): Command {
  return new Command('grant')
    .description('grants: which roles may do what on which services')
    .addCommand(setCommand())
    .addCommand(listCommand())
    .addCommand(deleteCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh grant set developer orders
  edgemesh grant list
  edgemesh grant delete developer orders
`,
    )
}

type SetOptions = ConnectionOptions & { action: string[]; json?: true }

function setCommand(): Command {
  return connecting(new Command('set'))
    .description(
      'say what a role may do on a service; what it might do there before is replaced, for open connections too',
    )
    .argument('<role>', 'such as developer')
    .argument('<service>', `a service's id, or '*' for every service`)
    .option('--action <action>', "such as connect, the default, or '*' for all; may be repeated", several, [])
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh grant set developer orders
  edgemesh grant set developer orders --action read --action write
  edgemesh grant set admin '*' --action '*'
`,
    )
    .action((role: string, service: string, { action, ...options }: SetOptions) =>
      withAdmin(options, async admin => {
        const actions = action.length > 0 ? action : ['connect']
        const { grant } = await admin.call('setRoleGrant', { grant: { role, service, actions } })
        if (options.json) console.log(JSON.stringify(grant && RoleGrant.toJSON(grant)))
        else console.log(`role ${role} may ${actions.join(', ')} on ${service === '*' ? 'every service' : service}`)
      }),
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('grants, by role')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh grant list
  edgemesh grant list --json | jq -r 'select(.service == "orders").role'
`,
    )
    .action((options: ConnectionOptions & ListOptions) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'grants',
          page: async at => {
            const { grants, nextPageToken } = await admin.call('listRoleGrants', at)
            return { rows: grants, nextPageToken }
          },
          columns: {
            role: grant => grant.role,
            service: grant => grant.service,
            actions: grant => grant.actions.join(' '),
          },
          toJson: RoleGrant.toJSON,
        }),
      ),
    )
}

function deleteCommand(): Command {
  return connecting(new Command('delete'))
    .description('take from a role what it may do on a service; connections that rest on it end at once')
    .argument('<role>')
    .argument('<service>', "a service's id, or '*' for the grant on every service")
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh grant delete developer orders
  edgemesh grant delete admin '*'
`,
    )
    .action((role: string, service: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        await admin.call('deleteRoleGrant', { role, service })
        if (options.json) console.log(JSON.stringify({ role, service, deleted: true }))
        else console.log(`role ${role} has no grant on ${service} any more`)
      }),
    )
}
