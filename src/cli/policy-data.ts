/** `edgemesh policy hours` and `edgemesh policy require`: the data that the policy is given, changed a part at a time. */
import { Command, InvalidArgumentError, Option } from 'commander'
import { type BusinessHours, PolicyData, type PostureRequirements } from '../gen/edgemesh/v1/admin.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { several } from './option-values.ts'
import { renderFacts } from './table.ts'

type Facts = Record<string, string>

const weekdays = ['mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun']
const workdays = weekdays.slice(0, 5)

type HoursOptions = ConnectionOptions & {
  days: string[]
  from?: number
  until?: number
  timezone: string
  exempt: string[]
  any?: true
  json?: true
}

/** @param factsOf how policy data is shown */
export function hoursCommand(factsOf: (data: PolicyData | undefined) => Facts): Command {
  return connecting(new Command('hours'))
    .description('say when roles that are not exempt may connect; connections that are outside end at once')
    .option('--days <days>', 'such as mon,tue,wed', days, workdays)
    .option('--from <hh:mm>', 'when they begin', minuteOfDay)
    .option('--until <hh:mm>', 'when they end; 24:00 is the end of the day', minuteOfDay)
    .option('--timezone <name>', 'of the IANA database, such as Europe/Berlin', 'UTC')
    .option('--exempt <role>', 'a role that may connect at any hour; may be repeated', several, [])
    .option('--any', 'let everybody connect at any hour')
    .option('--json', 'one JSON document: the data as it is now')
    .addHelpText(
      'after',
      `
All of the hours are replaced, so name every exempt role.

Examples:
  edgemesh policy hours --from 08:00 --until 18:00 --timezone Europe/Berlin --exempt admin
  edgemesh policy hours --days mon,tue,wed,thu,fri,sat --from 06:00 --until 24:00
  edgemesh policy hours --any
`,
    )
    .action((options: HoursOptions, command: Command) => {
      const { days, from: startMinute, until: endMinute, timezone, exempt: exemptRoles } = options
      if (options.any) return changeData(options, factsOf, data => ({ ...data, hours: undefined }))
      if (startMinute === undefined || endMinute === undefined) {
        command.error('error: give --from and --until, or --any')
      }
      const hours: BusinessHours = { days, startMinute, endMinute, timezone, exemptRoles }
      return changeData(options, factsOf, data => ({ ...data, hours }))
    })
}

/** By option: the requirement that is there or not. */
const required = {
  patches: 'patchesCurrent',
  antivirus: 'antivirusEnabled',
  diskEncryption: 'diskEncrypted',
  firewall: 'firewallEnabled',
} as const

/** By option: the requirement that has a limit. */
const limited = { cpu: 'cpuPercentMax', memory: 'memoryPercentMax', disk: 'diskPercentMax' } as const

type RequireOptions = ConnectionOptions & { [Name in keyof typeof required]?: 'yes' | 'no' } & {
  [Name in keyof typeof limited]?: number | 'none'
} & { json?: true }

/** @param factsOf how policy data is shown */
export function requireCommand(factsOf: (data: PolicyData | undefined) => Facts): Command {
  const yesOrNo = (flag: string, what: string) => new Option(`${flag} <yes|no>`, what).choices(['yes', 'no'])
  return connecting(new Command('require'))
    .description('say what is required of devices; what is not given stays, and connections are decided anew at once')
    .addOption(yesOrNo('--patches', 'whether patches have to be current'))
    .addOption(yesOrNo('--antivirus', 'whether an antivirus has to be on'))
    .addOption(yesOrNo('--disk-encryption', 'whether the disk has to be encrypted'))
    .addOption(yesOrNo('--firewall', 'whether a firewall has to be on'))
    .option('--cpu <percent>', 'the load has to be under it; none: no limit', percentOrNone)
    .option('--memory <percent>', 'the used memory has to be under it; none: no limit', percentOrNone)
    .option('--disk <percent>', 'the used disk has to be under it; none: no limit', percentOrNone)
    .option('--json', 'one JSON document: the data as it is now')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh policy require --firewall yes --disk 95
  edgemesh policy require --cpu none
`,
    )
    .action((options: RequireOptions, command: Command) => {
      const asked: Partial<PostureRequirements> = {}
      for (const [option, field] of Object.entries(required) as [
        keyof typeof required,
        (typeof required)['patches'],
      ][]) {
        if (options[option] !== undefined) asked[field] = options[option] === 'yes'
      }
      for (const [option, field] of Object.entries(limited) as [keyof typeof limited, (typeof limited)['cpu']][]) {
        const limit = options[option]
        if (limit !== undefined) asked[field] = limit === 'none' ? undefined : limit
      }
      if (Object.keys(asked).length === 0)
        command.error('error: nothing to change: give --patches, --cpu or another one')
      return changeData(options, factsOf, data => ({
        ...data,
        requirements: { ...(data.requirements as PostureRequirements), ...asked },
      }))
    })
}

/** Of two operators who change it in the same moment the second one wins. */
function changeData(
  options: ConnectionOptions & { json?: true },
  factsOf: (data: PolicyData | undefined) => Facts,
  change: (data: PolicyData) => PolicyData,
): Promise<void> {
  return withAdmin(options, async admin => {
    const state = await admin.call('getPolicyState', {})
    const { data } = await admin.call('updatePolicyData', { data: change(state.data as PolicyData) })
    console.log(options.json ? JSON.stringify(data && PolicyData.toJSON(data)) : renderFacts(factsOf(data)))
  })
}

function days(text: string): string[] {
  const given = text.split(',').map(day => day.trim().toLowerCase())
  if (given.every(day => weekdays.includes(day))) return given
  throw new InvalidArgumentError(`It must be of ${weekdays.join(', ')}, separated by commas.`)
}

function minuteOfDay(text: string): number {
  const [, hour = '', minute = ''] = /^(\d{1,2}):(\d{2})$/.exec(text) ?? []
  const minutes = Number(hour) * 60 + Number(minute)
  if (hour === '' || Number(minute) > 59 || minutes > 24 * 60) {
    throw new InvalidArgumentError('It must be a time such as 08:30; 24:00 is the end of the day.')
  }
  return minutes
}

function percentOrNone(text: string): number | 'none' {
  if (text === 'none') return text
  const percent = /^\d+(\.\d+)?$/.test(text) ? Number(text) : Number.NaN
  if (!(percent <= 100)) throw new InvalidArgumentError('It must be a number from 0 to 100, or none.')
  return percent
}
