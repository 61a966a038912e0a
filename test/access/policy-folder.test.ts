/** A policy that is replaced while it decides: what is taken, what is refused, and that no decision is of half a policy. */
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { appendFileSync, mkdirSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { startFolderPolicy } from '../../src/access/policy-folder.ts'
import { Fault } from '../../src/fault.ts'
import { eventually } from '../support/edgemesh.ts'
import { findOpa, policyDirectory } from '../support/opa.ts'
import {
  archiveOf,
  builtBundle,
  changedBundle,
  emptyFolder,
  putBundle,
  shippedAs,
  shippedWasm,
} from '../support/policies.ts'

const testWithOpa = findOpa() === undefined ? test.skip : test

const { cases } = JSON.parse(readFileSync(join(policyDirectory, 'cases.json'), 'utf8'))
const good = cases.find(({ name }: { name: string }) => name === 'everything as it should be').input
const pollMs = 20

async function watched(t: ExecutionContext, directory: string) {
  const said: { level: 'info' | 'error'; message: string; fields: Record<string, unknown> }[] = []
  const time = { now: 1_000 }
  const engine = await startFolderPolicy({
    directory,
    pollMs,
    clock: () => time.now,
    log: {
      info: (fields, message) => void said.push({ level: 'info', message, fields }),
      error: (fields, message) => void said.push({ level: 'error', message, fields }),
    },
  })
  t.teardown(() => engine.stop())
  const ask = async () => engine.evaluate('authz', good)
  return { engine, said, time, ask, errors: () => said.filter(({ level }) => level === 'error') }
}

/** The shipped policy as `v1`, deciding. */
async function decidingAsV1(t: ExecutionContext) {
  const folder = emptyFolder(t)
  await putBundle(folder, await shippedAs('v1'))
  return { folder, ...(await watched(t, folder)) }
}

const refusesUsers: [string, string] = ['input.user.status == "active"', 'input.user.status == "nobody"']

testWithOpa('a policy that is put into the folder decides, and names itself (needs opa)', async t => {
  const { folder, engine, said, time, ask } = await decidingAsV1(t)
  t.like(await ask(), { allow: true, revision: 'v1' })
  t.like(engine.status(), { revision: 'v1', activatedAtMs: 1_000, refused: undefined, refusals: 0 })
  const seen: string[] = []
  engine.onRevision(revision => seen.push(revision))

  time.now = 2_000
  const { archive, revision } = changedBundle(t, refusesUsers)
  await putBundle(folder, archive)
  await eventually('the other policy decides', () => engine.revision() === revision)
  const decision = await ask()
  t.like(decision, { allow: false, revision })
  t.deepEqual(
    decision.reasons.map(({ code }) => code),
    ['USER_DISABLED'],
  )
  t.deepEqual(seen, [revision])
  t.is(engine.status().activatedAtMs, 2_000)
  t.like(said.at(-1), { level: 'info', message: 'another policy decides', fields: { before: 'v1', revision } })

  time.now = 3_000
  await eventually('it is seen to be there still', () => engine.status().checkedAtMs === 3_000)
  t.is(engine.status().activatedAtMs, 2_000)
  t.deepEqual(seen, [revision])
})

const anything = `package edgemesh.authz\nimport rego.v1\n
decision := {"allow": true, "reasons": [], "valid_for_seconds": 60, "clock_used": false}\n`
const adminRego = readFileSync(join(policyDirectory, 'admin.rego'), 'utf8')
const allowsStrangers = anything.replace(
  '}\n',
  '} if input.requirements else := {"allow": false, "reasons": [{"code": "NO", "field": "", "actual": "", "required": "", "message": ""}], "valid_for_seconds": 60, "clock_used": false}\n',
)

type Wrong = { needsOpa?: true; put(t: ExecutionContext, folder: string): Promise<void> | void; told: RegExp }

/** Beside bundle.tar.gz nothing may lie that could be a policy, so most replace it. */
const archive = (make: (t: ExecutionContext) => Promise<Buffer> | Buffer) => ({
  put: async (t: ExecutionContext, folder: string) => putBundle(folder, await make(t)),
})

const wrong: Record<string, Wrong> = {
  'is cut off': { ...archive(async () => (await shippedAs('v2')).subarray(0, 50_000)), told: /is no whole archive/ },
  'is empty': { ...archive(() => Buffer.alloc(0)), told: /is no whole archive/ },
  'is no archive': { ...archive(() => Buffer.from('package edgemesh.authz')), told: /is no whole archive/ },
  'has a wrong checksum': {
    ...archive(async () => {
      const bytes = await shippedAs('v2')
      bytes[bytes.length - 6]! ^= 1
      return bytes
    }),
    told: /is no whole archive/,
  },
  'is an archive that is cut off inside': {
    ...archive(() => gzipSync(Buffer.concat([Buffer.alloc(512, 'x'), Buffer.alloc(100)]))),
    told: /is no whole archive/,
  },
  'is a bomb': { ...archive(() => gzipSync(Buffer.alloc(17 * 1024 * 1024))), told: /holds more than 16777216 bytes/ },
  'is larger than a policy may be': {
    put: (_t, folder) => execFileSync('truncate', ['-s', '17M', join(folder, 'bundle.tar.gz')]) && undefined,
    told: /holds more than 16777216 bytes/,
  },
  'was not built for WebAssembly': {
    ...archive(() => archiveOf({ 'authz.rego': 'package edgemesh.authz', '.manifest': '{"revision":"v2"}' })),
    told: /holds no policy\.wasm: it was not built for WebAssembly/,
  },
  'holds two policies': {
    put: (_t, folder) => writeFileSync(join(folder, 'policy.wasm'), shippedWasm),
    told: /there are both bundle\.tar\.gz and policy\.wasm/,
  },
  'is no WebAssembly': {
    ...archive(() => archiveOf({ 'policy.wasm': 'no WebAssembly', '.manifest': '{"revision":"v2"}' })),
    told: /is no compiled policy/,
  },
  'is WebAssembly, and no policy': {
    ...archive(() => archiveOf({ 'policy.wasm': Buffer.from('0061736d01000000', 'hex'), '.manifest': '{}' })),
    told: /is no compiled policy/,
  },
  'has a manifest that is none': {
    ...archive(() => archiveOf({ 'policy.wasm': shippedWasm, '.manifest': 'v2' })),
    told: /\.manifest is not as it should be/,
  },
  'has a name of several lines': {
    ...archive(() => shippedAs('v2\nlevel=info')),
    told: /has to be of at most 64 characters, without spaces/,
  },
  'has data that are none': {
    ...archive(() => archiveOf({ 'policy.wasm': shippedWasm, '.manifest': '{"revision":"v2"}', 'data.json': '[1]' })),
    told: /data\.json of .* is not as it should be/,
  },
  'is another one under the same name': {
    ...archive(() =>
      archiveOf({ 'policy.wasm': shippedWasm, '.manifest': '{"revision":"v1"}', 'data.json': '{"a":1}' }),
    ),
    told: /is another policy under the name of the one that decides, v1/,
  },
  'is a folder': {
    put(_t, folder) {
      rmSync(join(folder, 'bundle.tar.gz'))
      mkdirSync(join(folder, 'bundle.tar.gz'))
    },
    told: /is no file/,
  },
  'is a pipe': {
    put(_t, folder) {
      rmSync(join(folder, 'bundle.tar.gz'))
      execFileSync('mkfifo', [join(folder, 'bundle.tar.gz')])
    },
    told: /is no file/,
  },
  'has gone': {
    put: (_t, folder) => rmSync(join(folder, 'bundle.tar.gz')),
    told: /there is neither bundle\.tar\.gz nor policy\.wasm/,
  },
  'says nothing about operators': {
    needsOpa: true,
    ...archive(t => {
      const files = emptyFolder(t)
      const rego = readFileSync(join(policyDirectory, 'authz.rego'), 'utf8')
      writeFileSync(join(files, 'authz.rego'), rego)
      const opa = findOpa() as string
      const built = ['build', '--target', 'wasm', '--revision', 'v2', '-e', 'edgemesh/authz/decision']
      execFileSync(opa, [...built, '-o', 'b.tar.gz', 'authz.rego'], { cwd: files, stdio: 'pipe' })
      return readFileSync(join(files, 'b.tar.gz'))
    }),
    told: /does not answer edgemesh\/admin\/decision/,
  },
  'allows an empty question': {
    needsOpa: true,
    ...archive(t => builtBundle(t, { 'authz.rego': anything, 'admin.rego': adminRego }).archive),
    told: /allows an empty question \(edgemesh\/authz\/decision\), and so anything/,
  },
  'allows whom nobody knows': {
    needsOpa: true,
    ...archive(t => builtBundle(t, { 'authz.rego': allowsStrangers, 'admin.rego': adminRego }).archive),
    told: /allows a question of whom nothing is known/,
  },
  'answers with a bare true': {
    needsOpa: true,
    ...archive(
      t =>
        builtBundle(t, { 'authz.rego': 'package edgemesh.authz\ndecision := true', 'admin.rego': adminRego }).archive,
    ),
    told: /gives no decision on an empty question .*expected object/,
  },
  'has no answer': {
    needsOpa: true,
    ...archive(
      t =>
        builtBundle(t, {
          'authz.rego': 'package edgemesh.authz\ndecision := {"allow": false} if input.never',
          'admin.rego': adminRego,
        }).archive,
    ),
    told: /gives no decision on an empty question/,
  },
}

for (const [what, { needsOpa, put, told }] of Object.entries(wrong)) {
  const run = needsOpa ? testWithOpa : test
  run(
    `a policy that ${what} is refused, once and loudly, and the one before it goes on${needsOpa ? ' (needs opa)' : ''}`,
    async t => {
      const { folder, engine, time, ask, errors } = await decidingAsV1(t)
      engine.onRevision(revision => t.fail(`${revision} has taken over`))
      time.now = 2_000
      await put(t, folder)
      const { problem, hint, sinceMs } = await eventually('it is refused', () => engine.status().refused)
      t.regex(problem, told)
      t.not(hint, '')
      t.is(sinceMs, 2_000)
      time.now = 3_000
      await sleep(pollMs * 10)
      t.is(errors().length, 1, JSON.stringify(errors()))
      t.like(errors()[0], {
        message: 'policy refused: the one before it goes on deciding',
        fields: { problem, hint, revision: 'v1' },
      })
      t.like(engine.status(), { revision: 'v1', activatedAtMs: 1_000, refusals: 1 })
      t.true((engine.status().checkedAtMs ?? 0) < 3_000, 'nobody has seen lately that v1 should decide')
      t.true(engine.ready())
      t.like(await ask(), { allow: true, revision: 'v1' })
    },
  )
}

test('what is refused is forgotten when it is taken away, and a policy that follows it decides', async t => {
  const { folder, engine, errors } = await decidingAsV1(t)
  const file = join(folder, 'bundle.tar.gz')
  const v1 = readFileSync(file)
  await putBundle(folder, Buffer.from('no archive'))
  await eventually('it is refused', () => engine.status().refused)
  // Touched, it is still the same.
  utimesSync(file, new Date(), new Date())
  await sleep(pollMs * 5)
  t.is(errors().length, 1)

  await putBundle(folder, v1)
  await eventually('nothing is refused', () => engine.status().refused === undefined)
  t.is(engine.revision(), 'v1')

  await putBundle(folder, Buffer.from('no archive'))
  await eventually('it is refused again', () => engine.status().refusals === 2)
  await putBundle(folder, await shippedAs('v2'))
  await eventually('v2 decides', () => engine.revision() === 'v2')
  t.is(engine.status().refused, undefined)
})

test('without a usable policy at the start nothing is allowed, until there is one', async t => {
  const folder = emptyFolder(t)
  writeFileSync(join(folder, 'bundle.tar.gz'), 'no archive')
  const { engine, ask, errors } = await watched(t, folder)
  t.false(engine.ready())
  t.is(engine.revision(), '')
  t.regex(engine.status().refused?.problem ?? '', /is no whole archive/)
  t.is(errors()[0]?.message, 'policy refused: nothing is decided')
  const fault = await t.throwsAsync(ask(), { instanceOf: Fault, message: /so nothing is allowed$/ })
  t.like(fault, { code: 'UNAVAILABLE', reason: 'POLICY_UNAVAILABLE' })

  await putBundle(folder, await shippedAs('v1'))
  await eventually('it is ready', () => engine.ready())
  t.like(await ask(), { allow: true, revision: 'v1' })
})

test('a folder that is not there yet is no different', async t => {
  const folder = join(emptyFolder(t), 'mounted-later')
  const { engine } = await watched(t, folder)
  t.false(engine.ready())
  mkdirSync(folder)
  await putBundle(folder, await shippedAs('v1'))
  await eventually('it is ready', () => engine.ready())
  t.is(engine.revision(), 'v1')
})

test('an archive that is written slowly into its place is taken whole, or not at all', async t => {
  const { folder, engine, ask } = await decidingAsV1(t)
  const seen: string[] = []
  engine.onRevision(revision => seen.push(revision))
  const bytes = await shippedAs('v2')
  const file = join(folder, 'bundle.tar.gz')
  writeFileSync(file, '')
  for (let at = 0; at < bytes.length; at += 10_000) {
    appendFileSync(file, bytes.subarray(at, at + 10_000))
    t.like(await ask(), { allow: true, revision: 'v1' })
    await sleep(15)
  }
  await eventually('v2 decides', () => engine.revision() === 'v2')
  t.deepEqual(seen, ['v2'])
})

testWithOpa('unpacked, a policy is not taken under the name of another (needs opa)', async t => {
  const folder = emptyFolder(t)
  const manifestOf = (revision: string, wasm: Buffer) =>
    JSON.stringify({ revision, wasm: `sha256:${createHash('sha256').update(wasm).digest('hex')}` })
  const other = await unpackedWasm(t, changedBundle(t, refusesUsers).archive)
  writeFileSync(join(folder, 'policy.wasm'), shippedWasm)
  writeFileSync(join(folder, 'manifest.json'), manifestOf('v1', shippedWasm))
  const { engine, ask } = await watched(t, folder)
  const seen: string[] = []
  engine.onRevision(revision => seen.push(revision))
  t.like(await ask(), { allow: true, revision: 'v1' })

  writeFileSync(join(folder, 'policy.wasm'), other)
  await eventually('it is refused', () =>
    /is not the file that manifest\.json/.test(engine.status().refused?.problem ?? ''),
  )
  t.like(await ask(), { allow: true, revision: 'v1' })
  writeFileSync(join(folder, 'manifest.json'), manifestOf('v2', other))
  await eventually('v2 decides', () => engine.revision() === 'v2')
  t.like(await ask(), { allow: false, revision: 'v2' })

  // A manifest without a hash says nothing sure: what is there is part of the name.
  writeFileSync(join(folder, 'manifest.json'), '{"revision":"v3"}')
  await eventually('v3 decides', () => /^v3\+[0-9a-f]{8}$/.test(engine.revision()))
  const nameOfOther = engine.revision()
  writeFileSync(join(folder, 'policy.wasm'), shippedWasm)
  await eventually('the shipped one decides', () => engine.revision() !== nameOfOther)
  t.like(await ask(), { allow: true })
  t.regex(engine.revision(), /^v3\+[0-9a-f]{8}$/)
  t.is(seen.length, 3)
})

async function unpackedWasm(t: ExecutionContext, archive: Buffer): Promise<Buffer> {
  const folder = emptyFolder(t)
  writeFileSync(join(folder, 'b.tar.gz'), archive)
  execFileSync('tar', ['-xzf', 'b.tar.gz'], { cwd: folder, stdio: 'pipe' })
  return readFileSync(join(folder, 'policy.wasm'))
}

testWithOpa('whatever happens to the folder, each decision is of the policy that it names (needs opa)', async t => {
  t.timeout(120_000)
  const strict = changedBundle(t, refusesUsers)
  const lax = { archive: await shippedAs('lax'), revision: 'lax' }
  const allows = new Map([
    [strict.revision, false],
    [lax.revision, true],
  ])
  const happening = fc.record({
    what: fc.constantFrom('strict', 'lax', 'strict in place', 'lax cut off', 'nothing', 'no archive'),
    ms: fc.nat(40),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(happening, { minLength: 3, maxLength: 8 }), async happenings => {
      const folder = emptyFolder(t)
      await putBundle(folder, lax.archive)
      const { engine, ask } = await watched(t, folder)
      let isOver = false
      let decisions = 0
      const asking = (async () => {
        while (!isOver) {
          const { allow, revision } = await ask()
          if (allow !== allows.get(revision)) t.fail(`${revision} decided otherwise`)
          decisions++
          await sleep(1)
        }
      })()
      let last = lax.revision
      for (const { what, ms } of happenings) {
        const file = join(folder, 'bundle.tar.gz')
        if (what === 'strict') await putBundle(folder, strict.archive)
        else if (what === 'lax') await putBundle(folder, lax.archive)
        else if (what === 'strict in place') writeFileSync(file, strict.archive)
        else if (what === 'lax cut off') writeFileSync(file, lax.archive.subarray(0, lax.archive.length - 1))
        else if (what === 'nothing') rmSync(file, { force: true })
        else writeFileSync(file, what)
        if (what.startsWith('strict')) last = strict.revision
        else if (what === 'lax') last = lax.revision
        await sleep(ms)
      }
      const isRefused = !['strict', 'lax', 'strict in place'].includes(happenings.at(-1)?.what ?? '')
      await eventually('what came last is what is so', () => Boolean(engine.status().refused) === isRefused)
      // What was overwritten before anybody has looked at it never was.
      if (!isRefused) await eventually('the last policy decides', () => engine.revision() === last)
      isOver = true
      await asking
      await engine.stop()
      t.true(decisions > 0)
    }),
    { numRuns: 12, endOnFailure: true },
  )
})
