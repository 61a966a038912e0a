/** `edgemesh device`: the fleet. */
import { Command, Option } from 'commander'
import { millisecondsOf } from '../client/channel.ts'
import { Device } from '../gen/edgemesh/v1/admin.ts'
import { DevicePresence, DeviceStatus, DeviceType, type Posture } from '../gen/edgemesh/v1/types.ts'
import { type AdminClient, type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { formatRoughly } from './duration.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { type Labels, label } from './option-values.ts'
import { renderFacts, renderLabels, renderTable } from './table.ts'

export function deviceCommand(): Command {
  return new Command('device')
    .description('devices: list, look at, approve, quarantine, release, revoke, delete')
    .addCommand(listCommand())
    .addCommand(showCommand())
    .addCommand(
      changeCommand({
        name: 'approve',
        does: 'let a device in that waits for it: one that has just enrolled, or one that came back after its time',
        asksReason: false,
        change: (admin, id) => admin.call('approveDevice', { id }),
      }),
    )
    .addCommand(
      changeCommand({
        name: 'quarantine',
        does: 'deny every connection of a device until it is released; it keeps its identity and goes on reporting',
        asksReason: true,
        change: (admin, id, reason) => admin.call('quarantineDevice', { id, reason }),
      }),
    )
    .addCommand(
      changeCommand({
        name: 'release',
        does: 'let a quarantined device connect again',
        asksReason: false,
        change: (admin, id) => admin.call('releaseDevice', { id }),
      }),
    )
    .addCommand(
      changeCommand({
        name: 'revoke',
        does: 'throw a device out for good: certificates refused, streams cut, connections revoked',
        asksReason: true,
        change: (admin, id, reason) => admin.call('revokeDevice', { id, reason }),
      }),
    )
    .addCommand(deleteCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh device list --status active
  edgemesh device show laptop-7
  edgemesh device quarantine laptop-7 --reason 'left in a taxi'
  edgemesh device list --status pending
  edgemesh device approve laptop-8
`,
    )
}

function listCommand(): Command {
  return listing(connecting(new Command('list')))
    .description('devices and how they are')
    .addOption(new Option('--status <status>', 'only those of this status').choices(wordsOf(DeviceStatus)))
    .addOption(
      new Option('--presence <presence>', 'only those that are there now, or are not').choices(wordsOf(DevicePresence)),
    )
    .option('--label <key=value>', 'only those that carry it; may be repeated', label, {})
    .addHelpText(
      'after',
      `
Examples:
  edgemesh device list
  edgemesh device list --status quarantined
  edgemesh device list --presence offline
  edgemesh device list --label site=berlin --json
`,
    )
    .action((options: ConnectionOptions & ListOptions & { status?: string; presence?: string; label: Labels }) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'devices',
          page: async at => {
            const status = valueFor(DeviceStatus, options.status)
            const presence = valueFor(DevicePresence, options.presence)
            const filter = { status, presence, labels: options.label }
            const { devices, nextPageToken } = await admin.call('listDevices', { ...at, ...filter })
            return { rows: devices, nextPageToken }
          },
          columns: {
            id: device => device.id,
            type: device => wordFor(DeviceType, device.type),
            status: device => wordFor(DeviceStatus, device.status),
            presence: device => wordFor(DevicePresence, device.presence),
            'last seen': device => device.lastSeenAt,
            os: device => `${device.os} ${device.osVersion}`.trim(),
            failing: device => device.failingPosture.join(' '),
            labels: device => renderLabels(device.labels),
          },
          toJson: Device.toJSON,
        }),
      ),
    )
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('everything that is known of a device')
    .argument('<id>')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh device show laptop-7
  edgemesh device show laptop-7 --json | jq .posture
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const { device } = await admin.call('getDevice', { id })
        if (!device) throw new CommandFailure(`the server has sent no device ${id}`)
        console.log(options.json ? JSON.stringify(Device.toJSON(device)) : describe(device))
      }),
    )
}

function describe(device: Device): string {
  const facts = renderFacts({
    id: device.id,
    'spiffe id': device.spiffeId,
    type: wordFor(DeviceType, device.type),
    status: wordFor(DeviceStatus, device.status),
    because: device.statusReason,
    os: `${device.os} ${device.osVersion}`.trim(),
    labels: renderLabels(device.labels),
    enrolled: device.enrolledAt,
    presence: presenceWords(device),
    'last seen': device.lastSeenAt ?? 'never',
    clock: device.clockOffset && describeClock(millisecondsOf(device.clockOffset)),
    'trust bundle': device.trustBundleId,
    posture: device.posture && describePosture(device.posture),
    failing: device.failingPosture.join(' '),
  })
  if (device.certificates.length === 0) return facts
  const certificates = renderTable(
    {
      serial: certificate => certificate.serial,
      issuer: certificate => certificate.issuerKeyId,
      from: certificate => certificate.notBefore,
      until: certificate => certificate.notAfter,
      revoked: certificate => certificate.revokedAt,
      because: certificate => certificate.revocationReason,
    },
    device.certificates,
  )
  return `${facts}\n\ncertificates\n${certificates}`
}

function describePosture({ attributes, measuredAt: _, ...measured }: Posture): string {
  const facts = Object.entries(measured).filter(([, value]) => value !== undefined)
  return [...facts, ...Object.entries(attributes)].map(([name, value]) => `${name}=${value}`).join(' ')
}

/** As the server measured it when the device last reported. */
function describeClock(offsetMs: number): string {
  const rough = formatRoughly(Math.abs(offsetMs))
  if (rough === '0s') return 'right'
  return `${rough} ${offsetMs < 0 ? 'behind' : 'ahead'}`
}

function deleteCommand(): Command {
  return connecting(new Command('delete'))
    .description(
      'remove a device and revoke its certificates; its id may be enrolled anew, and its past stays on record',
    )
    .argument('<id>')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
To throw a device out for good, revoke it: its id then stays taken.

Examples:
  edgemesh device delete laptop-7
`,
    )
    .action((id: string, options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        await admin.call('deleteDevice', { id })
        console.log(options.json ? JSON.stringify({ id, deleted: true }) : `device ${id} is deleted`)
      }),
    )
}

/** The changes of a device's status differ in nothing but the call. */
function changeCommand(change: {
  name: string
  does: string
  asksReason: boolean
  change: (admin: AdminClient, id: string, reason: string) => Promise<{ device: Device | undefined }>
}): Command {
  const command = connecting(new Command(change.name)).description(change.does).argument('<id>')
  if (change.asksReason) command.requiredOption('--reason <text>', 'why, for people; kept in the audit log')
  return command
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh device ${change.name} laptop-7${change.asksReason ? " --reason 'left in a taxi'" : ''}
`,
    )
    .action((id: string, options: ConnectionOptions & { reason?: string; json?: true }) =>
      withAdmin(options, async admin => {
        const { device } = await change.change(admin, id, options.reason ?? '')
        if (options.json) console.log(JSON.stringify(device && Device.toJSON(device)))
        else console.log(`device ${id} is ${wordFor(DeviceStatus, device?.status ?? 0)}`)
      }),
    )
}

function presenceWords({ presence, presentSince, instanceId }: Device): string {
  const word = wordFor(DevicePresence, presence)
  return presentSince ? `${word} since ${presentSince.toISOString()}, at ${instanceId}` : word
}
