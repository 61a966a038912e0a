/** `edgemesh user`: the people whose access is decided. */
import { Command, Option } from 'commander'
import { User, UserStatus } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { renderFacts } from './table.ts'

export function userCommand(): Command {
  return new Command('user')
    .description('users: the people whose access is decided')
    .addCommand(createCommand())
    .addCommand(listCommand())
    .addCommand(showCommand())
    .addCommand(updateCommand())
    .addCommand(deleteCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh user create --email ada@example.com --name 'Ada Lovelace' --role developer
  edgemesh user list
  edgemesh user update ada --status disabled
`,
    )
}

function createCommand(): Command {
  return connecting(new Command('create'))
    .description('make a user')
    .argument('[id]', 'letters, digits, ".", "_" and "-"; the server chooses one when it is absent')
    .requiredOption('--email <address>', "the user's e-mail address, by which questions may name the user too")
    .requiredOption('--role <role>', 'such as developer; says which services may be reached')
    .option('--name <text>', 'for people', '')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh user create --email ada@example.com --role developer
  edgemesh user create ada --email ada@example.com --name 'Ada Lovelace' --role admin
`,
    )
    .action(
      (
        id: string | undefined,
        options: ConnectionOptions & { email: string; role: string; name: string; json?: true },
      ) =>
        withAdmin(options, async admin => {
          const { email, role, name } = options
          const { user } = await admin.call('createUser', { id: id ?? '', email, role, name })
          if (options.json) console.log(JSON.stringify(user && User.toJSON(user)))
          else console.log(`user ${user?.id} is made, with role ${user?.role}`)
        }),
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('users and their roles')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh user list
  edgemesh user list --json | jq -r .email
`,
    )
    .action((options: ConnectionOptions & ListOptions) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'users',
          page: async at => {
            const { users, nextPageToken } = await admin.call('listUsers', at)
            return { rows: users, nextPageToken }
          },
          columns: {
            id: user => user.id,
            email: user => user.email,
            name: user => user.name,
            role: user => user.role,
            status: user => wordFor(UserStatus, user.status),
            created: user => user.createdAt,
          },
          toJson: User.toJSON,
        }),
      ),
    )
}

function updateCommand(): Command {
  return connecting(new Command('update'))
    .description('change a user; what is not given stays, and connections are decided anew at once')
    .argument('<id>')
    .option('--name <text>', 'for people')
    .option('--role <role>', 'such as developer')
    .addOption(new Option('--status <status>', 'whether the user may do anything').choices(wordsOf(UserStatus)))
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh user update ada --role admin
  edgemesh user update ada --status disabled
`,
    )
    .action(
      (
        id: string,
        options: ConnectionOptions & { name?: string; role?: string; status?: string; json?: true },
        command: Command,
      ) => {
        const { name, role } = options
        const status = options.status === undefined ? undefined : valueFor(UserStatus, options.status)
        if (name === undefined && role === undefined && status === undefined) {
          command.error('error: nothing to change: give --name, --role or --status')
        }
        return withAdmin(options, async admin => {
          const { user } = await admin.call('updateUser', { id, name, role, status })
          if (options.json) console.log(JSON.stringify(user && User.toJSON(user)))
          else console.log(`user ${id} is ${wordFor(UserStatus, user?.status ?? 0)}, with role ${user?.role}`)
        })
      },
    )
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('everything that is known of a user')
    .argument('<id>', 'or the e-mail address')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh user show ada@example.com
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { user } = await admin.call('getUser', { id })
        if (!user) throw new CommandFailure(`the server has sent no user ${id}`)
        if (options.json) console.log(JSON.stringify(User.toJSON(user)))
        else {
          const { email, name, role, createdAt } = user
          console.log(
            renderFacts({
              id: user.id,
              email,
              name,
              role,
              status: wordFor(UserStatus, user.status),
              created: createdAt,
            }),
          )
        }
      }),
    )
}

function deleteCommand(): Command {
  return connecting(new Command('delete'))
    .description('remove a user; the connections of the user end at once, and what was decided stays on record')
    .argument('<id>')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
To keep somebody out for a while: edgemesh user update ID --status disabled

Examples:
  edgemesh user delete ada
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        await admin.call('deleteUser', { id })
        console.log(options.json ? JSON.stringify({ id, deleted: true }) : `user ${id} is deleted`)
      }),
    )
}
