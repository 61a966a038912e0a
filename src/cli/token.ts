/** `edgemesh token`: enrollment tokens, which let devices in. */
import { Command, Option } from 'commander'
import { EnrollmentToken, EnrollmentTokenStatus } from '../gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../gen/edgemesh/v1/types.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { parseDuration } from './duration.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label, wholeNumber } from './option-values.ts'
import { renderLabels } from './table.ts'

const usesMax = 10_000
const lifetimeMsDefault = 3_600_000

export function tokenCommand(): Command {
  return new Command('token')
    .description('enrollment tokens: what a device shows once to get its identity')
    .addCommand(createCommand())
    .addCommand(listCommand())
    .addCommand(revokeCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token create --uses 3 --expires 1d
  edgemesh token list
  edgemesh token revoke 0123456789ab
`,
    )
}

type CreateOptions = ConnectionOptions & {
  uses: number
  expires: number
  label: Labels
  type?: string
  device?: string
  json?: true
}

function createCommand(): Command {
  return connecting(new Command('create'))
    .description('make a token; its text is printed alone on stdout and can not be shown again')
    .option('--uses <n>', 'how many devices it may enroll', wholeNumber(1, usesMax), 1)
    .addOption(
      new Option('--expires <duration>', 'how long it is good for, such as 15m, 1h or 7d')
        .argParser(parseDuration)
        .default(lifetimeMsDefault, '1h'),
    )
    .option('--label <key=value>', 'given to every device that it enrolls; may be repeated', label, {})
    .addOption(new Option('--type <type>', 'only for devices of this type').choices(wordsOf(DeviceType)))
    .option('--device <id>', 'only for this device')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token create
  edgemesh token create --uses 20 --expires 7d --label site=berlin --type iot
  EDGEMESH_TOKEN=$(edgemesh token create --device laptop-7) edgemesh agent --server localhost:8000 --state ./laptop-7
`,
    )
    .action((options: CreateOptions) =>
      withAdmin(options, async admin => {
        const { token, tokenText } = await admin.call('createEnrollmentToken', {
          usesMax: options.uses,
          lifetime: { seconds: options.expires / 1_000, nanos: 0 },
          labels: options.label,
          deviceType: valueFor(DeviceType, options.type),
          deviceId: options.device ?? '',
          requiresApproval: false,
          reusable: false,
          deviceIdPattern: '',
          sourceNetworks: [],
        })
        if (options.json) {
          console.log(JSON.stringify({ tokenText, token: token && EnrollmentToken.toJSON(token) }))
          return
        }
        console.log(tokenText)
        console.error(
          `note: token ${token?.id}, good for ${uses(options.uses)} until ${token?.expiresAt?.toISOString()}`,
        )
      }),
    )
}

function uses(count: number): string {
  return count === 1 ? 'one use' : `${count} uses`
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('tokens and what became of them; never their text')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token list
  edgemesh token list --json | jq -r 'select(.status == "ENROLLMENT_TOKEN_STATUS_ACTIVE").id'
`,
    )
    .action((options: ConnectionOptions & ListOptions) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'tokens',
          page: async at => {
            const { tokens, nextPageToken } = await admin.call('listEnrollmentTokens', at)
            return { rows: tokens, nextPageToken }
          },
          columns: {
            id: token => token.id,
            status: token => wordFor(EnrollmentTokenStatus, token.status),
            uses: token => `${token.uses}/${token.usesMax}`,
            expires: token => token.expiresAt,
            type: token => wordFor(DeviceType, token.deviceType),
            device: token => token.deviceId,
            'created by': token => token.createdBy,
            labels: token => renderLabels(token.labels),
          },
          toJson: EnrollmentToken.toJSON,
        }),
      ),
    )
}

function revokeCommand(): Command {
  return connecting(new Command('revoke'))
    .description('end a token now; devices that it has enrolled stay')
    .argument('<id>', 'the part of its text after "em1."')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token revoke 0123456789ab
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { token } = await admin.call('revokeEnrollmentToken', { id, revokeDevices: false, reason: '' })
        if (options.json) console.log(JSON.stringify(token && EnrollmentToken.toJSON(token)))
        else console.log(`token ${id} is revoked; it was used ${token?.uses} of ${token?.usesMax} times`)
      }),
    )
}
