/** `edgemesh token`: enrollment tokens, which let devices in. */
import { Command, Option } from 'commander'
import { EnrollmentToken, EnrollmentTokenStatus } from '../gen/edgemesh/v1/admin.ts'
import { DeviceType } from '../gen/edgemesh/v1/types.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { parseDuration } from './duration.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label, several, wholeNumber } from './option-values.ts'
import { renderFacts, renderLabels, renderTable } from './table.ts'

const usesMax = 10_000
const lifetimeMsDefault = 3_600_000

export function tokenCommand(): Command {
  return new Command('token')
    .description('enrollment tokens: what a device shows once to get its identity')
    .addCommand(createCommand())
    .addCommand(listCommand())
    .addCommand(showCommand())
    .addCommand(revokeCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token create --uses 3 --expires 1d
  edgemesh token list
  edgemesh token show 0123456789ab
  edgemesh token revoke 0123456789ab --reason 'posted in a chat' --with-devices
`,
    )
}

type CreateOptions = ConnectionOptions & {
  uses: number
  reusable?: true
  expires: number
  label: Labels
  type?: string
  device?: string
  devicePattern?: string
  network?: string[]
  approval?: true
  json?: true
}

function createCommand(): Command {
  return connecting(new Command('create'))
    .description('make a token; its text is printed alone on stdout and can not be shown again')
    .option('--uses <n>', 'how many devices it may enroll', wholeNumber(1, usesMax), 1)
    .addOption(new Option('--reusable', 'any number of devices, until it expires').conflicts('uses'))
    .addOption(
      new Option('--expires <duration>', 'how long it is good for, such as 15m, 1h or 7d')
        .argParser(parseDuration)
        .default(lifetimeMsDefault, '1h'),
    )
    .option('--label <key=value>', 'given to every device that it enrolls; may be repeated', label, {})
    .addOption(new Option('--type <type>', 'only for devices of this type').choices(wordsOf(DeviceType)))
    .option('--device <id>', 'only for this device')
    .addOption(
      new Option(
        '--device-pattern <pattern>',
        'only for devices whose id matches, such as press-*; "*" is any text, "?" one character',
      ).conflicts('device'),
    )
    .option('--network <cidr>', 'only for devices that call from there, such as 10.0.0.0/8; may be repeated', several)
    .option('--approval', 'what it enrolls waits for an operator: edgemesh device approve')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token create
  edgemesh token create --uses 20 --expires 7d --label site=berlin --type iot
  edgemesh token create --reusable --expires 8h --device-pattern 'press-*' --network 10.7.0.0/16 --approval
  EDGEMESH_TOKEN=$(edgemesh token create --device laptop-7) edgemesh agent --server localhost:8000 --state ./laptop-7
`,
    )
    .action((options: CreateOptions) =>
      withAdmin(options, async admin => {
        const { token, tokenText } = await admin.call('createEnrollmentToken', {
          usesMax: options.reusable ? 0 : options.uses,
          lifetime: { seconds: options.expires / 1_000, nanos: 0 },
          labels: options.label,
          deviceType: valueFor(DeviceType, options.type),
          deviceId: options.device ?? '',
          requiresApproval: options.approval ?? false,
          reusable: options.reusable ?? false,
          deviceIdPattern: options.devicePattern ?? '',
          sourceNetworks: options.network ?? [],
        })
        if (options.json) {
          console.log(JSON.stringify({ tokenText, token: token && EnrollmentToken.toJSON(token) }))
          return
        }
        console.log(tokenText)
        const approval = options.approval ? '; what it enrolls waits for approval' : ''
        console.error(
          `note: token ${token?.id}, good for ${allowance(options)} until ${token?.expiresAt?.toISOString()}${approval}`,
        )
      }),
    )
}

function allowance({ uses, reusable }: CreateOptions): string {
  if (reusable) return 'any number of uses'
  return uses === 1 ? 'one use' : `${uses} uses`
}

/** `3/10`; `3/∞` where there is no limit. */
function usesOf({ uses, usesMax, reusable }: EnrollmentToken): string {
  return `${uses}/${reusable ? '∞' : usesMax}`
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
            uses: usesOf,
            expires: token => token.expiresAt,
            'last used': token => token.redemptions[0]?.redeemedAt,
            from: token => token.redemptions[0]?.sourceAddress,
            by: token => token.redemptions[0]?.deviceId,
            type: token => wordFor(DeviceType, token.deviceType),
            device: token => token.deviceId || token.deviceIdPattern,
            'created by': token => token.createdBy,
            labels: token => renderLabels(token.labels),
          },
          toJson: EnrollmentToken.toJSON,
        }),
      ),
    )
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('a token and its uses, the newest first; never its text')
    .argument('<id>', 'the part of its text after "em1."')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token show 0123456789ab
  edgemesh token show 0123456789ab --json | jq -r '.redemptions[].deviceId'
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { token } = await admin.call('getEnrollmentToken', { id })
        if (!token) throw new CommandFailure(`the server has sent no token ${id}`)
        console.log(options.json ? JSON.stringify(EnrollmentToken.toJSON(token)) : describe(token))
      }),
    )
}

function describe(token: EnrollmentToken): string {
  const facts = renderFacts({
    id: token.id,
    status: wordFor(EnrollmentTokenStatus, token.status),
    uses: usesOf(token),
    expires: token.expiresAt,
    approval: token.requiresApproval ? 'required' : 'not required',
    type: token.deviceType === DeviceType.UNSPECIFIED ? undefined : wordFor(DeviceType, token.deviceType),
    device: token.deviceId || token.deviceIdPattern,
    networks: token.sourceNetworks.join(' '),
    labels: renderLabels(token.labels),
    created: token.createdAt,
    'created by': token.createdBy,
  })
  if (token.redemptions.length === 0) return facts
  const redemptions = renderTable(
    {
      device: redemption => redemption.deviceId,
      at: redemption => redemption.redeemedAt,
      from: redemption => redemption.sourceAddress,
      'key sha-256': redemption => redemption.publicKeySha256,
    },
    token.redemptions,
  )
  const older = token.uses - token.redemptions.length
  return `${facts}\n\nuses\n${redemptions}${older > 0 ? `\nand ${older} before these` : ''}`
}

type RevokeOptions = ConnectionOptions & { withDevices?: true; reason?: string; json?: true }

function revokeCommand(): Command {
  return connecting(new Command('revoke'))
    .description('end a token now; devices that it has enrolled stay, unless they are to go with it')
    .argument('<id>', 'the part of its text after "em1."')
    .option('--reason <text>', 'why, for people; kept in the audit log')
    .option('--with-devices', 'throw out all devices that it has enrolled, too, for good; takes a --reason')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh token revoke 0123456789ab
  edgemesh token revoke 0123456789ab --reason 'posted in a chat' --with-devices
`,
    )
    .action((id: string, options: RevokeOptions, command: Command) => {
      if (options.withDevices && !options.reason) {
        command.error('error: say why the devices are thrown out: give --reason')
      }
      return withAdmin(options, async admin => {
        const { token, devicesRevoked } = await admin.call('revokeEnrollmentToken', {
          id,
          revokeDevices: options.withDevices ?? false,
          reason: options.reason ?? '',
        })
        if (options.json) {
          console.log(JSON.stringify({ ...(token && (EnrollmentToken.toJSON(token) as object)), devicesRevoked }))
          return
        }
        const devices = options.withDevices ? `; devices revoked with it: ${devicesRevoked}` : ''
        console.log(`token ${id} is revoked; it was used ${token ? usesOf(token) : '?'} times${devices}`)
      })
    })
}
