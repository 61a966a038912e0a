/** `edgemesh connection`: permissions in use. */
import { Command, Option } from 'commander'
import { Connection, ConnectionStatus } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { type ListOptions, listing, printList } from './listing.ts'

export function connectionCommand(): Command {
  return new Command('connection')
    .description('connections: permissions that devices hold')
    .addCommand(listCommand())
    .addCommand(closeCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh connection list --status active
  edgemesh connection close CONNECTION --reason 'maintenance'
`,
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('connections that have lasted two seconds or were taken back, and why those that ended have ended')
    .option('--device <id>', 'only those of this device')
    .addOption(new Option('--status <status>', 'only those of this status').choices(wordsOf(ConnectionStatus)))
    .addHelpText(
      'after',
      `
Examples:
  edgemesh connection list
  edgemesh connection list --device laptop-7 --status revoked
`,
    )
    .action((options: ConnectionOptions & ListOptions & { device?: string; status?: string }) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'connections',
          page: async at => {
            const filter = { deviceId: options.device ?? '', status: valueFor(ConnectionStatus, options.status) }
            const { connections, nextPageToken } = await admin.call('listConnections', { ...at, ...filter })
            return { rows: connections, nextPageToken }
          },
          columns: {
            id: connection => connection.id,
            device: connection => connection.deviceId,
            user: connection => connection.userId,
            service: connection => connection.serviceId,
            action: connection => connection.action,
            status: connection => wordFor(ConnectionStatus, connection.status),
            granted: connection => connection.grantedAt,
            ended: connection => connection.endedAt,
            'resume by': connection => connection.resumeBy,
            because: connection => connection.reasons.map(reason => reason.code).join(' '),
          },
          toJson: Connection.toJSON,
        }),
      ),
    )
}

function closeCommand(): Command {
  return connecting(new Command('close'))
    .description('revoke one connection, wherever it is held')
    .argument('<id>')
    .option('--reason <text>', 'why, for people; kept in the audit log', '')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh connection close CONNECTION --reason 'maintenance'
`,
    )
    .action((id: string, options: ConnectionOptions & { reason: string; json?: true }) =>
      withAdmin(options, async admin => {
        const { connection } = await admin.call('closeConnection', { id, reason: options.reason })
        if (options.json) console.log(JSON.stringify(connection && Connection.toJSON(connection)))
        else console.log(`connection ${id} is ${wordFor(ConnectionStatus, connection?.status ?? 0)}`)
      }),
    )
}
