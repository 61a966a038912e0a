import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { type Compared, tallyOf } from '../../src/cli/policy-diff.ts'
import { Decision } from '../../src/gen/edgemesh/v1/admin.ts'
import { shared, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { findOpa, policyDirectory } from '../support/opa.ts'
import { laptopAndOrders } from './laptop-and-orders.ts'

/** Three decisions on record: two equal allows, and a denial because of the disk. */
const scene = shared(test, async file => {
  const { mesh, edgemesh, stream } = await laptopAndOrders(file)
  const ask = async () => {
    const question = { id: '', user: 'ada', service: 'orders', action: '' }
    const { answer } = await unary(mesh.clients(mesh.operator).authorize, 'check', { question, deviceId: 'laptop-7' })
    return answer?.decisionId as string
  }
  await ask()
  const newestAllow = await ask()
  await stream.beat({ ...healthy, diskEncrypted: false })
  const denial = await ask()
  return { mesh, edgemesh, newestAllow, denial }
})

const bundle = join(policyDirectory, 'bundle')

function temporaryFolder(t: ExecutionContext): string {
  const folder = mkdtempSync(join(tmpdir(), 'edgemesh-policies-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  return folder
}

/** The shipped policy, changed. */
function changedPolicy(t: ExecutionContext, ...changes: [from: string, to: string][]): string {
  const folder = temporaryFolder(t)
  const authz = readFileSync(join(policyDirectory, 'authz.rego'), 'utf8')
  const changed = changes.reduce((text, [from, to]) => {
    if (!text.includes(from)) throw new Error(`the policy has no ${from}`)
    return text.replace(from, to)
  }, authz)
  writeFileSync(join(folder, 'authz.rego'), changed)
  return folder
}

/** A test that needs the compiler, and says so where there is none. */
const withOpa = test.macro({
  title: title => title ?? '',
  async exec(t: ExecutionContext, run: (t: ExecutionContext) => Promise<void>) {
    if (findOpa() !== undefined) return run(t)
    t.log('skipped: no opa binary in $OPA, PATH, .tools/bin or /go/bin')
    t.pass('skipped: no opa binary')
  },
})

test('the policy that decides changes nothing of what it decided', async t => {
  const { edgemesh } = scene()
  for (const policy of [bundle, join(bundle, 'policy.wasm')]) {
    const { exitCode, stdout, stderr } = await edgemesh('policy', 'diff', policy, '--device', 'laptop-7')
    t.is(exitCode, 0, stderr)
    t.regex(stdout, /^decisions looked at +3$/m)
    t.regex(stdout, /^stay as they were +3$/m)
    t.regex(stdout, /^would be denied +0$/m)
    t.notRegex(stdout, /^WAS/m)
    const [, decides, compared] = /^policy that decides +(\S+)\npolicy compared +(\S+)$/m.exec(stdout) ?? []
    t.is(compared, decides)
    t.is(stderr, '')
  }
})

test('a stricter and laxer policy flips decisions both ways, and says why and how often', withOpa, async t => {
  const { edgemesh, newestAllow, denial } = scene()
  const policy = changedPolicy(
    t,
    ['actual < most', 'actual < most - 75'],
    [
      'state_is_met(item) if input.requirements',
      'state_is_met("disk_encrypted")\n\nstate_is_met(item) if input.requirements',
    ],
  )
  const { exitCode, stdout, stderr } = await edgemesh('policy', 'diff', policy, '--since', '1h', '--device', 'laptop-7')
  t.is(exitCode, 0, stderr)
  const lines = stdout.split('\n').map(line => line.split(/ {2,}/))
  const flip = ['laptop-7', 'ada', 'orders', 'connect', 'MEMORY_TOO_HIGH']
  t.deepEqual(lines[0]?.slice(0, 8), ['WAS', 'WOULD', 'TIMES', 'DEVICE', 'USER', 'SERVICE', 'ACTION', 'BECAUSE'])
  t.deepEqual(lines[1]?.slice(0, 8), ['allowed', 'denied', '2', ...flip])
  t.is(lines[1]?.at(-1), newestAllow)
  t.regex(stdout, /^would be denied +2 +MEMORY_TOO_HIGH 2$/m)
  // Its memory speaks against the third one too, so it stays denied.
  t.regex(stdout, /^stay as they were +1$/m)

  const lax = changedPolicy(t, [
    'state_is_met(item) if input.requirements',
    'state_is_met("disk_encrypted")\n\nstate_is_met(item) if input.requirements',
  ])
  const laxly = await edgemesh('policy', 'diff', lax, '--json', '--device', 'laptop-7')
  t.is(laxly.exitCode, 0, laxly.stderr)
  const flips = laxly.stdout
    .trim()
    .split('\n')
    .map(line => JSON.parse(line))
  t.is(flips.length, 1)
  t.like(flips[0], { id: denial, deviceId: 'laptop-7', was: false, would: true, because: ['DISK_NOT_ENCRYPTED'] })
  t.regex(laxly.stderr, /^would be allowed +1 +DISK_NOT_ENCRYPTED 1$/m)
})

test('only what was decided since then, and about the device that is named, is looked at', async t => {
  const { edgemesh, mesh } = scene()
  await mesh.pool.query(
    `insert into decisions (at, id, device_id, caller, method, source_address, instance_id, policy_revision, latency_us, questions)
     select now() - interval '5 minutes', gen_random_uuid(), 'press-1', caller, method, source_address, instance_id,
       policy_revision, latency_us, questions from decisions limit 1`,
  )
  const lookedAt = async (...args: string[]) => {
    const { stdout } = await edgemesh('policy', 'diff', bundle, ...args)
    return Number(/^decisions looked at +(\d+)$/m.exec(stdout)?.[1])
  }
  t.is(await lookedAt('--device', 'press-1'), 1)
  t.is(await lookedAt('--device', 'press-1', '--since', '4m'), 0)
  t.is(await lookedAt('--device', 'press-1', '--since', '60m'), 1)
})

test('more decisions than a page are all looked at, and lines beyond the limit are counted', withOpa, async t => {
  const { edgemesh, mesh } = scene()
  await mesh.pool.query(
    `insert into decisions (at, id, device_id, caller, method, source_address, instance_id, policy_revision, latency_us, questions)
     select now(), gen_random_uuid(), 'many', caller, method, source_address, instance_id, policy_revision, latency_us,
       jsonb_set(questions, '{0,user}', to_jsonb('user-' || n % 5))
     from generate_series(1, 250) as n, (select * from decisions where questions->0->'allow' = 'true' limit 1) as one`,
  )
  const policy = changedPolicy(t, ['user_is_active if input.user.status == "active"', 'user_is_active if false'])
  const { stdout, exitCode } = await edgemesh('policy', 'diff', policy, '--device', 'many', '--limit', '2')
  t.is(exitCode, 0)
  t.regex(stdout, /^decisions looked at +250$/m)
  t.regex(stdout, /^flips not listed +150$/m)
  t.is(stdout.match(/^allowed +denied +50 /gm)?.length, 2)
  const { stdout: documents } = await edgemesh('policy', 'diff', policy, '--device', 'many', '--json')
  t.is(documents.trim().split('\n').length, 250)
})

test('a policy that gives no decision is no flip: it is said to have none, and why', withOpa, async t => {
  const { edgemesh } = scene()
  const folder = temporaryFolder(t)
  writeFileSync(join(folder, 'authz.rego'), 'package edgemesh.authz\n\ndecision := input.device.status\n')
  const { stdout, exitCode } = await edgemesh('policy', 'diff', folder, '--device', 'laptop-7')
  t.is(exitCode, 0)
  t.regex(stdout, /^could not be decided +3 +the policy gave no usable answer/m)
  t.regex(stdout, /^would be denied +0$/m)
})

test('what is no policy is told, and nothing is compared', async t => {
  const { edgemesh } = scene()
  const folder = temporaryFolder(t)
  const refused = async (path: string, ...words: RegExp[]) => {
    const { exitCode, stdout, stderr } = await edgemesh('policy', 'diff', path)
    t.is(exitCode, 1)
    t.is(stdout, '')
    for (const word of words) t.regex(stderr, word)
  }
  await refused(join(folder, 'absent'), /^error: there is nothing at .*absent$/m, /^hint: name a folder of \.rego/m)
  await refused(
    folder,
    /^error: there is neither bundle\.tar\.gz nor policy\.wasm in /m,
    /^hint: build one with: edgemesh policy build/m,
  )
  writeFileSync(join(folder, 'policy.wasm'), 'no WebAssembly')
  await refused(folder, /^error: \S+policy\.wasm is no compiled policy: /m, /^hint: build one/m)
})

test('a policy that does not compile is told in the words of the compiler', withOpa, async t => {
  const { edgemesh } = scene()
  const folder = changedPolicy(t, ['default allow := false', 'default allow := nowhere'])
  const broken = await edgemesh('policy', 'diff', folder)
  t.is(broken.exitCode, 1)
  t.regex(broken.stderr, /^error: opa can not compile .*authz\.rego:\d+: /ms)
  const other = join(folder, 'other')
  mkdirSync(other)
  writeFileSync(join(other, 'x.rego'), 'package other\n\ndecision := true\n')
  t.regex((await edgemesh('policy', 'diff', other)).stderr, /^error: opa can not compile .*edgemesh\/authz\/decision/ms)
})

test('a bundle of sources is compiled anew, not believed', withOpa, async t => {
  const { edgemesh } = scene()
  const folder = changedPolicy(t, ['user_is_active if input.user.status == "active"', 'user_is_active if false'])
  cpSync(join(bundle, 'policy.wasm'), join(folder, 'policy.wasm'))
  t.regex((await edgemesh('policy', 'diff', folder, '--device', 'laptop-7')).stdout, /^would be denied +2 /m)
})

test('the policy that decides is shown with the data that it is given', async t => {
  const { edgemesh } = scene()
  const { stdout, exitCode } = await edgemesh('policy', 'show')
  t.is(exitCode, 0)
  for (const fact of [
    /^revision +[0-9a-f]{12}$/m,
    /^engine +in-process$/m,
    /^disk encrypted +required$/m,
    /^firewall enabled +not required$/m,
    /^cpu +< 90 %$/m,
    /^disk +no limit$/m,
    /^hours +any$/m,
  ]) {
    t.regex(stdout, fact)
  }
  t.is(JSON.parse((await edgemesh('policy', 'show', '--json')).stdout).engine, 'in-process')
})

test('a tally loses no decision, however many there are and however few lines it may hold', t => {
  const compared: fc.Arbitrary<Compared> = fc.oneof(
    fc.constant({ kind: 'same' as const }),
    fc.record({
      kind: fc.constant('flip' as const),
      allowed: fc.boolean(),
      because: fc.subarray(['A', 'B', 'C']),
    }),
    fc.constant({ kind: 'undecided' as const, why: 'no' }),
  )
  const user = fc.constantFrom('ada', 'eve', 'bob')
  fc.assert(
    fc.property(fc.array(fc.tuple(user, compared), { maxLength: 200 }), fc.integer({ min: 1, max: 5 }), (all, most) => {
      const tally = tallyOf(most)
      for (const [user, one] of all) tally.add(Decision.fromPartial({ user }), one)
      const listed = [...tally.lines.values()].reduce((sum, { times }) => sum + times, 0)
      t.true(tally.lines.size <= most)
      t.is(tally.decisions, all.length)
      t.is(tally.same + tally.denied + tally.allowed + tally.undecided, all.length)
      t.is(listed + tally.unlisted, tally.denied + tally.allowed)
    }),
  )
})

test(
  'a policy is built into a folder, replaces the one that is there at once, and is compared by the same name',
  withOpa,
  async t => {
    const { edgemesh } = scene()
    const rego = changedPolicy(t, ['actual < most', 'actual < most - 75'])
    cpSync(join(policyDirectory, 'admin.rego'), join(rego, 'admin.rego'))
    const out = join(temporaryFolder(t), 'not-there-yet')
    const built = await edgemesh('policy', 'build', rego, '--out', out, '--json')
    t.is(built.exitCode, 0, built.stderr)
    const { revision, file, bytes } = JSON.parse(built.stdout)
    t.is(file, join(out, 'bundle.tar.gz'))
    t.is(bytes, readFileSync(file).length)
    t.deepEqual(readdirSync(out), ['bundle.tar.gz'])
    for (const policy of [out, file, rego]) {
      const { stdout, stderr } = await edgemesh('policy', 'diff', policy, '--device', 'laptop-7')
      t.regex(stdout, new RegExp(`^policy compared +${revision}$`, 'm'), stderr)
    }
    const again = await edgemesh('policy', 'build', policyDirectory, '--out', out)
    t.regex(again.stdout, /^revision +[0-9a-f]{12}\nfile +\S+bundle\.tar\.gz\nbytes +\d+$/m)
    t.notRegex(again.stdout, new RegExp(revision))
  },
)

test('a policy that is not usable is not built, and the one that is there stays', withOpa, async t => {
  const { edgemesh } = scene()
  const out = temporaryFolder(t)
  const refused = async (rego: string, error: RegExp, hint: RegExp) => {
    const { exitCode, stdout, stderr } = await edgemesh('policy', 'build', rego, '--out', out)
    t.is(exitCode, 1)
    t.is(stdout, '')
    t.regex(stderr, error)
    t.regex(stderr, hint)
    t.deepEqual(readdirSync(out), [])
  }
  await refused(join(out, 'absent'), /^error: there is no \.rego in /m, /^hint: name the folder with authz\.rego/m)
  const alone = changedPolicy(t)
  await refused(
    alone,
    /^error: opa can not compile /m,
    /^hint: who may administer is policy too: copy policies\/admin/m,
  )
  const lax = temporaryFolder(t)
  cpSync(join(policyDirectory, 'admin.rego'), join(lax, 'admin.rego'))
  const decision = '{"allow": true, "reasons": [], "valid_for_seconds": 60, "clock_used": false}'
  writeFileSync(join(lax, 'authz.rego'), `package edgemesh.authz\ndecision := ${decision}\n`)
  await refused(
    lax,
    /^error: \S+ allows an empty question .*, and so anything$/m,
    /^hint: begin with "default allow := false"/m,
  )
  t.is((await edgemesh('policy', 'build', policyDirectory)).exitCode, 2)

  const shipped = temporaryFolder(t)
  cpSync(bundle, shipped, { recursive: true })
  const beside = await edgemesh('policy', 'build', policyDirectory, '--out', shipped)
  t.is(beside.exitCode, 1)
  t.regex(beside.stderr, /^error: there is a policy\.wasm in .*, and only one policy can decide$/m)
})

test('policy show tells which policy decides at which instance, and since when', async t => {
  const { edgemesh, mesh } = scene()
  const { stdout } = await edgemesh('policy', 'show')
  t.regex(stdout, /^revision +[0-9a-f]{12}$/m)
  t.regex(stdout, new RegExp(`^instance +${mesh.server.instanceId}$`, 'm'))
  t.regex(stdout, /^decides since +\d{4}-\d\d-\d\dT[\d:]+Z\nlast checked +\d{4}-/m)
})
