/** `edgemesh audit`: who did what. */
import { Command } from 'commander'
import { AuditEvent } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { moment } from './option-values.ts'

export function auditCommand(): Command {
  return new Command('audit')
    .description('the audit log: every call, denied ones too')
    .addCommand(searchCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh audit search --target device/laptop-7
`,
    )
}

type Filters = { actor?: string; method?: string; target?: string; code?: string; after?: Date; before?: Date }

function searchCommand(): Command {
  return listing(connecting(new Command('search')))
    .description('events that match all of the filters')
    .option('--actor <spiffe-id>', 'who called, such as spiffe://edgemesh.local/operator/admin')
    .option('--method <name>', 'full method name, such as /edgemesh.v1.AdminService/RevokeDevice')
    .option('--target <target>', 'what was acted on, such as device/laptop-7')
    .option('--code <code>', 'how it ended, such as OK or PERMISSION_DENIED')
    .option('--after <moment>', 'not before this, such as 2026-01-31 or 2026-01-31T08:00:00Z', moment)
    .option('--before <moment>', 'before this', moment)
    .addHelpText(
      'after',
      `
Examples:
  edgemesh audit search --target device/laptop-7
  edgemesh audit search --code PERMISSION_DENIED --after 2026-01-31
  edgemesh audit search --json --limit 100000 > audit.ndjson
`,
    )
    .action((options: ConnectionOptions & ListOptions & Filters) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'events',
          page: async at => {
            const { actor = '', method = '', target = '', code = '', after, before } = options
            const filter = { actor, method, target, code, after, before }
            const { events, nextPageToken } = await admin.call('searchAuditEvents', { ...at, ...filter })
            return { rows: events, nextPageToken }
          },
          columns: {
            at: event => event.at,
            actor: event => event.actor,
            method: event => event.method,
            target: event => event.target,
            code: event => event.code,
            reason: event => event.reason,
            from: event => event.sourceAddress,
          },
          toJson: AuditEvent.toJSON,
        }),
      ),
    )
}
