import test from 'ava'
import { shared, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { laptopAndOrders, question } from './laptop-and-orders.ts'

const scene = shared(test, laptopAndOrders)

test.serial('an allow is explained: every rule with what it found and what it requires, and every fact', async t => {
  const { edgemesh } = scene()
  const { exitCode, stdout, stderr } = await edgemesh('check', ...question, '--explain')
  t.is(exitCode, 0, stderr)
  for (const line of [
    /^allowed: ada may connect to orders on laptop-7$/m,
    /^RULE +HOLDS +ACTUAL +REQUIRED$/m,
    /^device\.status +yes +active +active$/m,
    /^device\.health\.age_seconds +yes +\d+ +< 300$/m,
    /^device\.health\.cpu_percent +yes +10 +< 90$/m,
    /^device\.health\.firewall_enabled +yes +true +anything$/m,
    /^grants +yes +\*, connect +connect$/m,
    /^time +yes +\w{3} \d\d:\d\d +any$/m,
    /^good until +\d{4}-\S+Z$/m,
    /^facts of +\d{4}-\S+Z$/m,
    /^device\.labels\.site +berlin$/m,
    /^service\.labels\.tier +shop$/m,
    /^requirements\.cpu_percent_max +90$/m,
  ]) {
    t.regex(stdout, line)
  }
  t.notRegex(stdout, / NO /)
  t.is(stderr, '')
})

test.serial('a denial is explained with the rules that fail first', async t => {
  const { edgemesh, stream } = scene()
  await stream.beat({ ...healthy, diskEncrypted: false, cpuPercent: 95 })
  const { exitCode, stdout } = await edgemesh('check', ...question, '--explain')
  await stream.beat(healthy)
  t.is(exitCode, 1)
  const rules = stdout.slice(stdout.search(/^RULE/m)).split('\n')
  t.deepEqual(
    rules.slice(1, 4).map(line => line.split(/ {2,}/)),
    [
      ['device.health.disk_encrypted', 'NO', 'false', 'true'],
      ['device.health.cpu_percent', 'NO', '95', '< 90'],
      ['device.status', 'yes', 'active', 'active'],
    ],
  )
})

test.serial('as JSON an explanation carries each rule, the facts, and both revisions', async t => {
  const { edgemesh } = scene()
  const { stdout } = await edgemesh('check', ...question, '--explain', '--json')
  const answer = JSON.parse(stdout)
  t.true(answer.allowed)
  t.is(answer.explanation.policyRevision, answer.policyRevision)
  t.is(answer.explanation.rules.length, 18)
  t.true(answer.explanation.rules.every(({ holds }: { holds: unknown }) => holds === true))
  t.is(answer.input.device.id, 'laptop-7')
  t.true(Date.parse(answer.evaluatedAt) < Date.parse(answer.expiresAt))
  const denied = await edgemesh('check', '--user', 'eve', ...question.slice(2), '--explain', '--json')
  const failing = JSON.parse(denied.stdout).explanation.rules.filter(({ holds }: { holds: unknown }) => holds === false)
  t.deepEqual(
    failing.map(({ field }: { field: string }) => field),
    ['user', 'user.status', 'grants'],
  )
  t.is(denied.exitCode, 1)
})

test('a device can not read the record of its decision, and says so before it asks', async t => {
  const { edgemesh } = scene()
  const { exitCode, stderr } = await edgemesh(
    ...['check', '--user', 'ada', '--service', 'orders', '--state', '.', '--explain'],
  )
  t.is(exitCode, 2)
  t.regex(stderr, /^error: --explain .* give --device instead of --state$/m)
})

test.serial('a decision is listed, and shown with the facts of then, though they have changed since', async t => {
  const { edgemesh, mesh, stream } = scene()
  await stream.beat({ ...healthy, memoryPercent: 99 })
  const asked = JSON.parse((await edgemesh('check', ...question, '--json')).stdout)
  await stream.beat(healthy)

  const listed = await edgemesh('decision', 'list', '--device', 'laptop-7', '--limit', '1')
  t.is(listed.exitCode, 0, listed.stderr)
  const [heading = '', line = ''] = listed.stdout.split('\n')
  t.regex(heading, /^ID +AT +ANSWER +DEVICE +USER +SERVICE +ACTION +BECAUSE$/)
  t.regex(line, new RegExp(`^${asked.decisionId} +\\S+ +denied +laptop-7 +ada +orders +connect +MEMORY_TOO_HIGH$`))
  t.is((await edgemesh('decision', 'list', '--after', '2999-01-01')).stderr, 'no decisions\n')

  const shown = await edgemesh('decision', 'show', asked.decisionId)
  t.is(shown.exitCode, 0, shown.stderr)
  for (const fact of [
    /^denied: ada may not connect to orders on laptop-7$/m,
    /^Too much of the memory of the device is in use\.$/m,
    /^asked by +spiffe:\/\/\S+\/operator\/tester$/m,
    /^device\.health\.memory_percent +NO +99 +< 90$/m,
    /^device\.health\.memory_percent +99$/m,
    /^hours +none$/m,
  ]) {
    t.regex(shown.stdout, fact)
  }
  const { stdout } = await edgemesh('decision', 'show', asked.decisionId, '--json')
  const decision = JSON.parse(stdout)
  t.is(decision.allowed, false)
  t.is(decision.expiresAt, asked.expiresAt)
  t.is(decision.input.device.health.memory_percent, 99)

  // A policy that has been replaced since explains in its own words, and the reader is told.
  await mesh.pool.query(
    `insert into decisions (at, id, device_id, caller, method, source_address, instance_id, policy_revision, latency_us, questions)
     select at, '00000000-0000-4000-8000-000000000001', device_id, caller, method, source_address, instance_id, 'older',
       latency_us, jsonb_build_array((questions -> 0) - 'policyRevision') from decisions where id = $1`,
    [asked.decisionId.split('.')[0]],
  )
  const older = await edgemesh('decision', 'show', '00000000-0000-4000-8000-000000000001.0')
  t.is(older.exitCode, 0)
  t.regex(older.stderr, /^note: policy older decided, policy [0-9a-f]{12} explains; they may see things differently$/m)
})

test('a decision that is not there, and an id that is none, are told', async t => {
  const { edgemesh } = scene()
  const absent = await edgemesh('decision', 'show', '00000000-0000-4000-8000-00000000dead.0')
  t.is(absent.exitCode, 1)
  t.is(absent.stderr, 'error: there is no decision 00000000-0000-4000-8000-00000000dead.0\n')
  t.regex((await edgemesh('decision', 'show', 'x')).stderr, /^error: id has to be the id of a decision: a UUID/m)
})

test('what a caller wrote into a question can not move the cursor of who reads it', async t => {
  const { edgemesh, mesh } = scene()
  const asked = await unary(mesh.clients(mesh.operator).authorize, 'check', {
    question: { id: '', user: 'e\u001b[2Jve\nallowed: root', service: 'orders', action: '' },
    deviceId: 'laptop-7',
  })
  const { stdout } = await edgemesh('decision', 'show', asked.answer?.decisionId ?? '')
  t.regex(stdout, /^denied: e \[2Jve allowed: root may not connect/)
  t.false(stdout.includes('\u001b'))
})
