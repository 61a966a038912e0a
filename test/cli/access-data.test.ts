/** Users, services, grants, hours and requirements, changed by command, as a device with an open connection sees it. */
import test from 'ava'
import { authorizations } from '../support/device.ts'
import { shared } from '../support/edgemesh.ts'
import { laptopAndOrders } from './laptop-and-orders.ts'

const scene = shared(test, file => laptopAndOrders(file))

const dayMs = 86_400_000
const weekdays = ['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat']
/** Neither today nor, should midnight come, tomorrow. */
const anotherDay = weekdays[new Date(Date.now() + 3 * dayMs).getUTCDay()] as string

for (const { what, before = [], command, code, after } of [
  {
    what: 'the user is disabled',
    command: 'user update ada --status disabled',
    code: 'USER_DISABLED',
    after: ['user update ada --status active'],
  },
  {
    what: 'the user gets a role that may not reach it',
    command: 'user update ada --role guest',
    code: 'ROLE_NOT_GRANTED',
    after: ['user update ada --role admin'],
  },
  {
    what: 'the grant that it rests on is deleted',
    before: ['grant set developer orders', 'user update ada --role developer'],
    command: 'grant delete developer orders',
    code: 'ROLE_NOT_GRANTED',
    after: ['user update ada --role admin'],
  },
  {
    what: 'the grant that it rests on is for something else from now on',
    before: ['grant set developer orders --action connect', 'user update ada --role developer'],
    command: 'grant set developer orders --action read',
    code: 'ROLE_NOT_GRANTED',
    after: ['user update ada --role admin', 'grant delete developer orders'],
  },
  {
    what: 'the service is disabled',
    command: 'service update orders --status disabled',
    code: 'SERVICE_DISABLED',
    after: ['service update orders --status active'],
  },
  {
    what: 'the hours are over',
    command: `policy hours --days ${anotherDay} --from 08:00 --until 18:00`,
    code: 'OUTSIDE_HOURS',
    after: ['policy hours --any'],
  },
  {
    what: 'more is required of the device',
    command: 'policy require --disk 25',
    code: 'DISK_TOO_FULL',
    after: ['policy require --disk none'],
  },
  {
    what: 'the user is deleted',
    command: 'user delete ada',
    code: 'USER_UNKNOWN',
    after: ['user create ada --email ada@example.com --role admin'],
  },
  {
    what: 'the service is deleted',
    command: 'service delete orders',
    code: 'SERVICE_UNKNOWN',
    after: ['service create orders --role admin'],
  },
] as { what: string; before?: string[]; command: string; code: string; after: string[] }[]) {
  test.serial(`an open connection is taken back at once when ${what}, by command`, async t => {
    const { mesh, edgemesh, device } = scene()
    const run = async (line: string) => {
      const { exitCode, stdout, stderr } = await edgemesh(...line.split(' '))
      t.is(exitCode, 0, stderr)
      t.not(stdout, '')
    }
    for (const line of before) await run(line)
    const access = authorizations(t, mesh, device)
    const answer = await access.ask('ada', 'orders')
    t.true(answer.allowed, JSON.stringify(answer.reasons))
    await run(command)
    const { reasons } = await access.revocationOf(answer.connectionId)
    t.true(
      reasons.some(reason => reason.code === code),
      JSON.stringify(reasons),
    )
    for (const line of after) await run(line)
    t.true((await access.ask('ada', 'orders')).allowed, 'it is as it was')
  })
}

test.serial('an exempt role connects at any hour', async t => {
  const { mesh, edgemesh, device } = scene()
  const hours = ['policy', 'hours', '--days', anotherDay, '--from', '08:00', '--until', '24:00', '--json']
  const { stdout } = await edgemesh(...hours, '--timezone', 'Europe/Berlin', '--exempt', 'admin')
  const { startMinute, endMinute, timezone, exemptRoles } = JSON.parse(stdout).hours
  t.deepEqual([startMinute, endMinute, timezone, exemptRoles], [480, 1_440, 'Europe/Berlin', ['admin']])
  t.true((await authorizations(t, mesh, device).ask('ada', 'orders')).allowed)
  t.regex((await edgemesh('policy', 'show')).stdout, /exempt roles +admin/)
  await edgemesh('policy', 'hours', '--any')
})

test.serial('what is there is shown and listed, and what is not is told', async t => {
  const { edgemesh } = scene()
  t.regex((await edgemesh('user', 'show', 'ADA@example.com')).stdout, /^id +ada\nemail +ada@example.com\n/)
  t.is(JSON.parse((await edgemesh('user', 'show', 'ada', '--json')).stdout).role, 'admin')
  t.regex((await edgemesh('service', 'show', 'orders')).stdout, /^id +orders\n[\s\S]*status +active/)
  t.regex((await edgemesh('grant', 'list')).stdout, /^admin +orders +connect$/m)
  for (const [line, message] of [
    ['user show nobody', /there is no user nobody/],
    ['user delete nobody', /there is no user nobody/],
    ['service update nothing --owner me', /there is no service nothing/],
    ['service delete nothing', /there is no service nothing/],
    ['grant set developer nothing', /there is no service nothing/],
    ['grant delete developer orders', /role developer has no grant on service orders/],
    ['policy hours --from 18:00 --until 08:00', /end_minute has to be greater than start_minute/],
    ['policy hours --from 08:00 --until 18:00 --timezone Nowhere/City', /time zone/],
  ] as const) {
    const { exitCode, stdout, stderr } = await edgemesh(...line.split(' '))
    t.is(exitCode, 1, line)
    t.is(stdout, '')
    t.regex(stderr, message)
  }
  for (const line of [
    'service update orders',
    'policy require',
    'policy require --cpu 101',
    'policy hours --from 8',
    'policy hours --from 08:00 --until 24:01',
    'policy hours --days someday --from 08:00 --until 18:00',
  ]) {
    t.is((await edgemesh(...line.split(' '))).exitCode, 2, line)
  }
})
