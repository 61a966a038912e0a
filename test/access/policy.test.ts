/** The policy: one table of cases, two engines, and what each does when it has no answer. */
import { once } from 'node:events'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type RequestListener } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { buildPolicy, type PolicyManifest } from '../../policies/build.ts'
import { readBundle } from '../../src/access/policy-bundle.ts'
import { type PolicyEngine, type PolicyEntrypoint, parseDecision } from '../../src/access/policy-engine.ts'
import { type OpaPolicyOptions, startOpaPolicy } from '../../src/access/policy-server.ts'
import { compilePolicy, startShippedPolicy } from '../../src/access/policy-wasm.ts'
import { Fault } from '../../src/fault.ts'
import { findOpa, policyDirectory, startOpa } from '../support/opa.ts'

type Case = {
  name: string
  entrypoint: PolicyEntrypoint
  input: unknown
  want: { allow: boolean; codes: string[] }
}

const { cases }: { cases: Case[] } = JSON.parse(readFileSync(join(policyDirectory, 'cases.json'), 'utf8'))
const good = cases.find(({ name }) => name === 'everything as it should be')!.input
const silentLog = { error() {}, warn() {}, info() {} }

/** Asks with any input at all: the table holds what the types forbid. */
async function ask(engine: PolicyEngine, entrypoint: PolicyEntrypoint, input: unknown) {
  return await engine.evaluate(entrypoint, input as never)
}

async function startServerEngine(t: ExecutionContext, options: Partial<OpaPolicyOptions> & { url: string }) {
  const engine = await startOpaPolicy({ timeoutMs: 10_000, pollMs: 50, log: silentLog, ...options })
  t.teardown(() => engine.stop())
  return engine
}

async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  for (let waitedMs = 0; waitedMs < 10_000; waitedMs += 20) {
    if (await condition()) return
    await sleep(20)
  }
  throw new Error('waited 10 s in vain')
}

/** That the question is refused for want of an answer, in the words that a caller sees. */
async function assertUnavailable(t: ExecutionContext, question: Promise<unknown>, reason = 'POLICY_UNAVAILABLE') {
  const fault = await t.throwsAsync(question, { instanceOf: Fault, message: /so nothing is allowed$/ })
  t.like(fault, { code: 'UNAVAILABLE', reason })
  if (reason === 'POLICY_UNAVAILABLE') t.is(fault?.retryAfterMs, 1000)
}

/** A test that needs the real server, and says so where there is none. */
const withOpa = test.macro({
  title: title => title ?? '',
  async exec(t: ExecutionContext, run: (t: ExecutionContext, opa: string) => Promise<void>) {
    const opa = findOpa()
    if (opa === undefined) {
      t.log('skipped: no opa binary in $OPA, PATH, .tools/bin or /go/bin')
      return t.pass('skipped: no opa binary')
    }
    return await run(t, opa)
  },
})

test('the compiled policy answers every case of the table', async t => {
  const engine = await startShippedPolicy()
  for (const { name, entrypoint, input, want } of cases) {
    const { allow, reasons } = await ask(engine, entrypoint, input)
    t.deepEqual({ allow, codes: reasons.map(reason => reason.code) }, want, name)
  }
})

test('the compiled policy never allows what differs from a good question in anything but a harmless part', async t => {
  const engine = await startShippedPolicy()
  const harmless = /^(device\.(id|type|labels.*|health\.(attributes|firewall_enabled|disk_percent))|user\.id)$/
  const alsoHarmless = /^(service\.(id|labels.*)|hours\.exempt_roles.*)$/
  for (const path of pathsOf(good)) {
    const { allow } = await ask(engine, 'authz', without(good, path))
    const name = path.join('.')
    // A role that is not exempt may as well be missing: what a role may do is looked up before the policy is asked.
    t.is(allow, harmless.test(name) || alsoHarmless.test(name) || name === 'user.role' || isSpareDay(name), name)
  }
})

test('an instance that a question has broken is replaced', async t => {
  const engine = await startShippedPolicy()
  const enormous = { ...(good as object), action: 'x'.repeat(40_000_000) }
  await t.throwsAsync(ask(engine, 'authz', enormous), { instanceOf: Fault, message: /could not be evaluated/ })
  const { allow } = await ask(engine, 'authz', good)
  t.true(allow)
})

test('a decision takes well below a millisecond', async t => {
  const engine = await startShippedPolicy()
  const rounds = 2000
  for (let round = 0; round < rounds; round++) engine.evaluate('authz', good as never)
  const startedAt = performance.now()
  for (let round = 0; round < rounds; round++) engine.evaluate('authz', good as never)
  const microseconds = ((performance.now() - startedAt) * 1000) / rounds
  t.log(`${microseconds.toFixed(1)} µs a decision`)
  t.true(microseconds < 1000)
})

test('only a whole document is a decision', t => {
  const reason = { code: 'A_CODE', field: 'f', actual: 'a', required: 'r', message: 'm' }
  const allowed = { allow: true, reasons: [], valid_for_seconds: 60, clock_used: false }
  const denied = { ...allowed, allow: false, reasons: [reason] }
  t.deepEqual(parseDecision(allowed, 'r1'), {
    ...{ allow: true, reasons: [], validForSeconds: 60, clockUsed: false, revision: 'r1' },
  })
  t.deepEqual(parseDecision(denied, 'r1').reasons, [reason])

  const wrong: Record<string, unknown> = {
    undefined: undefined,
    null: null,
    'a bare true': true,
    'a list': [allowed],
    'allow as text': { ...allowed, allow: 'true' },
    'allow as number': { ...allowed, allow: 1 },
    'allow left out': { ...allowed, allow: undefined },
    'an allow with reasons against it': { ...denied, allow: true },
    'a deny without a reason': { ...denied, reasons: [] },
    'a reason without a code': { ...denied, reasons: [{ ...reason, code: '' }] },
    'a reason with a number': { ...denied, reasons: [{ ...reason, actual: 91 }] },
    'valid for ever': { ...allowed, valid_for_seconds: 3601 },
    'valid for no time': { ...allowed, valid_for_seconds: 0 },
    'valid for a fraction': { ...allowed, valid_for_seconds: 1.5 },
    'clock_used left out': { ...allowed, clock_used: undefined },
  }
  for (const [name, document] of Object.entries(wrong)) {
    const error = t.throws(() => parseDecision(document, 'r1'), { instanceOf: Fault }, name)
    t.is(error?.reason, 'POLICY_INVALID_RESULT', name)
  }
})

test('both engines give the same answers, to the byte', withOpa, async t => {
  const { url } = await startOpa(t)
  const server = await startServerEngine(t, { url })
  const compiled = await compilePolicy(await readBundle(join(policyDirectory, 'bundle')), ['authz', 'admin'])
  const ofServer = async (path: string, input: unknown) => {
    const response = await fetch(`${url}/v1/data/edgemesh/${path}`, { method: 'POST', body: JSON.stringify({ input }) })
    return canonical(((await response.json()) as { result: unknown }).result)
  }
  const compare = async (entrypoint: PolicyEntrypoint, input: unknown, name?: string) => {
    t.is(await ofServer(`${entrypoint}/decision`, input), canonical(compiled.document(entrypoint, input)), name)
    const explanation = compiled.explain(input as never)
    t.deepEqual(await server.explain(input as never), explanation, name)
    return explanation
  }
  t.true(cases.length >= 200)
  for (const { name, entrypoint, input } of cases) await compare(entrypoint, input, name)
  await fc.assert(
    fc.asyncProperty(anyQuestion, async ({ entrypoint, input }) => {
      const explanation = await compare(entrypoint, input)
      const { allow } = compiled.evaluate(entrypoint, input as never)
      if (entrypoint === 'authz' && explanation) {
        t.is(
          explanation.every(({ holds }) => holds),
          allow,
        )
      }
    }),
    { numRuns: 2000 },
  )
})

test('the server lets in only who knows the token', withOpa, async t => {
  const { url } = await startOpa(t, { token: 'a-token-for-this-test' })
  const welcome = await startServerEngine(t, { url, bearerToken: 'a-token-for-this-test' })
  t.true((await ask(welcome, 'authz', good)).allow)
  t.true(welcome.ready())
  t.regex(welcome.revision(), /^[0-9a-f]{12}$/)

  for (const bearerToken of [undefined, '', 'another-token']) {
    const stranger = await startServerEngine(t, { url, ...(bearerToken === undefined ? {} : { bearerToken }) })
    await assertUnavailable(t, ask(stranger, 'authz', good))
    t.false(stranger.ready())
  }
})

test('a server that dies denies, and is found again on its own', withOpa, async t => {
  const opa = await startOpa(t)
  const engine = await startServerEngine(t, { url: opa.url })
  t.true((await ask(engine, 'authz', good)).allow)

  await opa.kill()
  for (let attempt = 0; attempt < 10; attempt++) {
    await assertUnavailable(t, ask(engine, 'authz', good))
  }
  await until(() => !engine.ready())

  await opa.restart()
  await until(() => engine.ready())
  // The circuit tries again a second after it opened.
  await until(() =>
    ask(engine, 'authz', good).then(
      ({ allow }) => allow,
      () => false,
    ),
  )
  t.pass()
})

test('starting before the server is fine', withOpa, async t => {
  const opa = await startOpa(t)
  await opa.kill()
  const engine = await startServerEngine(t, { url: opa.url })
  t.false(engine.ready())
  t.is(engine.revision(), 'unknown')
  await opa.restart()
  await until(() => engine.ready())
  t.true((await ask(engine, 'authz', good)).allow)
})

test('a new policy is noticed and counts at once', withOpa, async t => {
  const policies = mkdtempSync(join(tmpdir(), 'edgemesh-policies-'))
  t.teardown(() => rmSync(policies, { recursive: true }))
  for (const name of ['authz.rego', 'admin.rego']) cpSync(join(policyDirectory, name), join(policies, name))
  const { url } = await startOpa(t, { policies })
  const engine = await startServerEngine(t, { url })
  t.true((await ask(engine, 'authz', good)).allow)

  const before = engine.revision()
  const seen: string[] = []
  engine.onRevision(revision => seen.push(revision))
  const authz = readFileSync(join(policies, 'authz.rego'), 'utf8')
  writeFileSync(
    join(policies, 'authz.rego'),
    authz.replace('input.user.status == "active"', 'input.user.status == "x"'),
  )
  await until(() => seen.length > 0)
  t.not(engine.revision(), before)
  t.is(seen.at(-1), engine.revision())
  const { reasons } = await ask(engine, 'authz', good)
  t.deepEqual(
    reasons.map(reason => reason.code),
    ['USER_DISABLED'],
  )
})

test('bundles name their own revision', async t => {
  const url = await startImpostor(t, async (request, response) => {
    const result = await documentFor(request)
    response.end(JSON.stringify({ result, provenance: { bundles: { b: { revision: '2' }, a: { revision: '1' } } } }))
  })
  const engine = await startServerEngine(t, { url })
  t.is(engine.revision(), 'a@1,b@2')
  t.is((await ask(engine, 'authz', good)).revision, 'a@1,b@2')
})

test('a policy without an explanation decides all the same', async t => {
  const url = await startImpostor(t, async (request, response) => {
    const result = await documentFor(request)
    if (request.method === 'GET') response.writeHead(403).end('{}')
    else response.end(JSON.stringify(request.url?.endsWith('/explanation') ? {} : { result }))
  })
  const engine = await startServerEngine(t, { url })
  t.true((await ask(engine, 'authz', good)).allow)
  t.is(await engine.explain(good as never), undefined)
})

test('an explanation that is none is no explanation', async t => {
  let result: unknown
  const url = await startImpostor(t, (_, response) => response.end(JSON.stringify({ result })))
  const engine = await startServerEngine(t, { url })
  const finding = { field: 'f', actual: 'a', required: 'r', holds: true }
  for (result of ['all is well', [], [finding, { ...finding, holds: 'true' }], [{ ...finding, field: undefined }]]) {
    const fault = await t.throwsAsync(async () => engine.explain(good as never), { instanceOf: Fault })
    t.is(fault?.reason, 'POLICY_INVALID_RESULT')
  }
  result = [finding]
  t.deepEqual(await engine.explain(good as never), [finding])
})

test('a server that may not list its policies is unversioned', async t => {
  const url = await startImpostor(t, async (request, response) => {
    if (request.method === 'GET') response.writeHead(403).end('{}')
    else response.end(JSON.stringify({ result: await documentFor(request) }))
  })
  const engine = await startServerEngine(t, { url })
  t.is(engine.revision(), 'unversioned')
  t.true(engine.ready())
})

const impostors: Record<string, { reason: string; listener: RequestListener }> = {
  'answers 500': { reason: 'POLICY_UNAVAILABLE', listener: (_, response) => response.writeHead(500).end('{}') },
  'answers 503': { reason: 'POLICY_UNAVAILABLE', listener: (_, response) => response.writeHead(503).end('{}') },
  redirects: {
    reason: 'POLICY_UNAVAILABLE',
    listener: (_, response) => response.writeHead(302, { location: '/' }).end(),
  },
  'has no such policy': { reason: 'POLICY_UNAVAILABLE', listener: (_, response) => response.end('{}') },
  'speaks no JSON': { reason: 'POLICY_UNAVAILABLE', listener: (_, response) => response.end('<html>allow</html>') },
  'says a bare true': { reason: 'POLICY_INVALID_RESULT', listener: (_, response) => response.end('{"result": true}') },
  'never answers': { reason: 'POLICY_UNAVAILABLE', listener: () => {} },
  'never stops answering': {
    reason: 'POLICY_UNAVAILABLE',
    listener: (_, response) => {
      const flood = () => {
        while (!response.destroyed && response.write(' '.repeat(16_384)));
      }
      response.on('drain', flood)
      flood()
    },
  },
  'stalls in the middle': {
    reason: 'POLICY_UNAVAILABLE',
    listener: (_, response) => {
      response.writeHead(200, { 'content-length': '1000' })
      response.write('{"result": {"allow": true')
    },
  },
  'drips its answer': {
    reason: 'POLICY_UNAVAILABLE',
    listener: (_, response) => {
      response.writeHead(200, { 'content-length': '1000' })
      const dripping = setInterval(() => response.write(' '), 20)
      response.on('close', () => clearInterval(dripping))
    },
  },
  'stops in the middle': {
    reason: 'POLICY_UNAVAILABLE',
    listener: (_, response) => {
      response.writeHead(200, { 'content-length': '1000' })
      response.write('{"result": {"allow": true', () => response.destroy())
    },
  },
}

for (const [what, { reason, listener }] of Object.entries(impostors)) {
  test(`a server that ${what} allows nothing`, async t => {
    // Those that do not end are ended by the deadline, or this test never ends.
    const timeoutMs = /^(never|stalls|drips)/.test(what) ? 300 : 10_000
    const engine = await startServerEngine(t, { url: await startImpostor(t, listener), timeoutMs })
    t.false(engine.ready())
    await assertUnavailable(t, ask(engine, 'authz', good), reason)
  })
}

test('a question over which the policy stumbles does not shut others out', async t => {
  const url = await startImpostor(t, async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    if (request.method === 'GET') response.writeHead(403).end('{}')
    else if (body.includes('stumble')) response.writeHead(500).end('{}')
    else response.end(JSON.stringify({ result: body.includes('"active"') ? allowed : denied }))
  })
  const engine = await startServerEngine(t, { url })
  for (let attempt = 0; attempt < 20; attempt++) await assertUnavailable(t, ask(engine, 'authz', 'stumble'))
  t.true((await ask(engine, 'authz', good)).allow)
})

test('an open circuit answers without asking', async t => {
  let asked = 0
  const url = await startImpostor(t, (_, response) => {
    asked += 1
    response.writeHead(503).end('{}')
  })
  const engine = await startServerEngine(t, { url, pollMs: 60_000 })
  for (let attempt = 0; attempt < 5; attempt++) await assertUnavailable(t, ask(engine, 'authz', good))
  const askedBefore = asked
  for (let attempt = 0; attempt < 100; attempt++) await assertUnavailable(t, ask(engine, 'authz', good))
  t.is(asked, askedBefore)
})

test('a circuit that was open lets one question try, and opens again or closes by how it fares', async t => {
  let mode: 'good' | 'bad' = 'good'
  let asked = 0
  const url = await startImpostor(t, async (request, response) => {
    if (request.method === 'GET') return void response.writeHead(403).end('{}')
    asked++
    const result = await documentFor(request)
    await sleep(50)
    if (mode === 'good') response.end(JSON.stringify({ result }))
    else response.writeHead(503).end('{}')
  })
  const engine = await startServerEngine(t, { url, pollMs: 60_000 })
  const askMany = () => Promise.allSettled(Array.from({ length: 20 }, () => ask(engine, 'authz', good)))
  mode = 'bad'
  for (let attempt = 0; attempt < 5; attempt++) await assertUnavailable(t, ask(engine, 'authz', good))

  await sleep(1_100)
  asked = 0
  const refused = await askMany()
  t.true(refused.every(({ status }) => status === 'rejected'))
  t.is(asked, 1, 'one has tried for all')
  await askMany()
  t.is(asked, 1, 'it is open again')

  await sleep(1_100)
  mode = 'good'
  const answered = await askMany()
  t.true(answered.every(({ status }) => status === 'fulfilled'))
  t.is(asked, 21)
})

test('when every connection hangs, nobody waits for longer than the deadline', async t => {
  let hangs = false
  const url = await startImpostor(t, async (request, response) => {
    if (hangs) return
    if (request.method === 'GET') response.writeHead(403).end('{}')
    else response.end(JSON.stringify({ result: await documentFor(request) }))
  })
  const engine = await startServerEngine(t, { url, pollMs: 60_000, timeoutMs: 300 })
  hangs = true
  // More than there are connections: some wait for one.
  const questions = Array.from({ length: 200 }, () => ask(engine, 'authz', good))
  const late = sleep(5_000).then(() => t.fail('somebody still waits'))
  await Promise.race([Promise.allSettled(questions), late])
  for (const question of questions) await assertUnavailable(t, question)
})

test('an answer is under the name of the policy that gave it, and a policy that is new is noticed by it', async t => {
  let revision = 'r1'
  const url = await startImpostor(t, async (request, response) => {
    const document = await documentFor(request)
    const result = revision === 'r1' ? document : denied
    response.end(JSON.stringify({ result, provenance: { bundles: { main: { revision } } } }))
  })
  const engine = await startServerEngine(t, { url, pollMs: 60_000 })
  const seen: string[] = []
  engine.onRevision(revision => seen.push(revision))
  t.like(await ask(engine, 'authz', good), { allow: true, revision: 'main@r1' })
  revision = 'r2'
  t.like(await ask(engine, 'authz', good), { allow: false, revision: 'main@r2' })
  t.deepEqual(seen, ['main@r2'], 'before the answer has left')
  t.is(engine.revision(), 'main@r2')
  // Back to one that is known: its answers need not wait, and yet it is noticed.
  revision = 'r1'
  t.like(await ask(engine, 'authz', good), { allow: true, revision: 'main@r1' })
  await until(() => engine.revision() === 'main@r1')
  t.deepEqual(seen, ['main@r2', 'main@r1'])
})

test('a policy in OPA that would allow anything allows nothing, and is told loudly, once', async t => {
  let loaded: 'usable' | 'lax' | 'broken' | 'stumbling' = 'usable'
  const url = await startImpostor(t, async (request, response) => {
    const document = await documentFor(request)
    if (loaded === 'stumbling') return void response.writeHead(500).end('{}')
    const result = { usable: document, lax: allowed, broken: true }[loaded]
    response.end(JSON.stringify({ result, provenance: { bundles: { main: { revision: loaded } } } }))
  })
  const errors: Record<string, unknown>[] = []
  const log = { ...silentLog, error: (fields: Record<string, unknown>) => void errors.push(fields) }
  const engine = await startServerEngine(t, { url, log })
  t.true((await ask(engine, 'authz', good)).allow)

  loaded = 'lax'
  await assertUnavailable(t, ask(engine, 'authz', good))
  t.false(engine.ready())
  t.regex(engine.status().refused?.problem ?? '', /the policy main@lax of OPA allows an empty question/)
  await sleep(500)
  t.is(errors.length, 1)
  t.like(errors[0], { revision: 'main@lax' })
  t.is(engine.status().refusals, 1)

  loaded = 'broken'
  await until(() => /main@broken of OPA gives no decision/.test(engine.status().refused?.problem ?? ''))
  await assertUnavailable(t, ask(engine, 'authz', good), 'POLICY_INVALID_RESULT')

  loaded = 'stumbling'
  await until(() => /the policy server stumbles over its policy/.test(engine.status().refused?.problem ?? ''))
  t.is(errors.length, 3)

  loaded = 'usable'
  await until(() => engine.ready())
  t.true((await ask(engine, 'authz', good)).allow)
  t.is(engine.status().refused, undefined)
})

test('the compiled policy is what its sources say', withOpa, async (t, opa) => {
  const directory = mkdtempSync(join(tmpdir(), 'edgemesh-bundle-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  const built = buildPolicy(opa, directory)
  const committed: PolicyManifest = JSON.parse(readFileSync(join(policyDirectory, 'bundle', 'manifest.json'), 'utf8'))
  const mend = 'the committed artefact is of other sources: run node policies/build.ts'
  t.deepEqual(built.sources, committed.sources, mend)
  t.is(built.revision, committed.revision, mend)
  t.deepEqual(built.entrypoints, committed.entrypoints)
  if (built.opa !== committed.opa)
    return t.log(`bytes not compared: made by opa ${committed.opa}, here is ${built.opa}`)
  const bytesOf = (place: string) => readFileSync(join(place, 'policy.wasm'))
  t.true(bytesOf(directory).equals(bytesOf(join(policyDirectory, 'bundle'))), mend)
})

const allowed = { allow: true, reasons: [], valid_for_seconds: 60, clock_used: false }
const denied = {
  ...allowed,
  allow: false,
  reasons: [{ code: 'NO', field: 'f', actual: 'a', required: 'r', message: 'No.' }],
}

/** What a usable policy says to the question: yes only where a device is active. */
async function documentFor(request: IncomingMessage): Promise<object> {
  let body = ''
  for await (const chunk of request) body += chunk
  return JSON.parse(body || '{}').input?.device?.status === 'active' ? allowed : denied
}

/** The one text of a document: an object's keys have no order of their own, and OPA and WebAssembly each use another. */
function canonical(document: unknown): string {
  const sorted = (_key: string, value: unknown) =>
    typeof value === 'object' && value !== null && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).sort(([one], [other]) => (one < other ? -1 : 1)))
      : value
  return JSON.stringify(document, sorted)
}

/** A server that is not OPA. */
async function startImpostor(t: ExecutionContext, listener: RequestListener): Promise<string> {
  const server = createServer(listener).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(async () => {
    server.closeAllConnections()
    server.close()
    await once(server, 'close')
  })
  const address = server.address()
  if (address === null || typeof address === 'string') throw new Error('no port was given')
  return `http://127.0.0.1:${address.port}`
}

type Path = (string | number)[]

function pathsOf(value: unknown, above: Path = []): Path[] {
  if (typeof value !== 'object' || value === null) return []
  return Object.entries(value).flatMap(([key, below]) => {
    const path = [...above, Array.isArray(value) ? Number(key) : key]
    return [path, ...pathsOf(below, path)]
  })
}

function without(value: unknown, path: Path): unknown {
  return changed(value, path, parent => {
    const last = path.at(-1)!
    if (Array.isArray(parent)) parent.splice(Number(last), 1)
    else Reflect.deleteProperty(parent, last)
  })
}

function changed(value: unknown, path: Path, change: (parent: object) => void): unknown {
  const copy = structuredClone(value)
  change(path.slice(0, -1).reduce<object>((parent, key) => Reflect.get(parent, key), copy as object))
  return copy
}

/** The good question is of a Monday; the policy does not miss the other days. */
function isSpareDay(name: string): boolean {
  return /^hours\.days\.[1-4]$/.test(name)
}

// Questions around the border between allow and deny: a case of the table with up to three parts replaced, by values
// that lie on the borders of the policy, or by anything that JSON can say.
const borderValue = fc.constantFrom<unknown>(
  ...[null, true, false, 0, 1, -1, 59, 60, 89, 89.99, 90, 90.5, 299, 299.5, 300, 479, 480, 1079, 1080, 1439, 1440],
  ...['', 'active', 'disabled', 'mon', 'sun', 'admin', 'operator', 'connect', '*', 'ListDevices', 'CloseConnection'],
  ...[[], ['*'], ['connect'], ['b', 'a'], ['mon'], {}, { status: 'active' }, 1e21, 1e-7, 0.1, 2 ** 53, -0],
)
// One engine counts in binary digits, the other in decimal ones: what vanishes beside 300 for the one need not for the other.
// Nothing that the policy counts with is so small; ages are whole seconds.
const isTiny = (value: unknown) => typeof value === 'number' && value !== 0 && Math.abs(value) < 1e-9
const anyValue = fc.oneof(
  { weight: 4, arbitrary: borderValue },
  { weight: 1, arbitrary: fc.jsonValue({ maxDepth: 2 }).filter(value => !isTiny(value)) },
)

const anyQuestion = fc
  .record({
    base: fc.constantFrom(...cases),
    changes: fc.array(fc.record({ at: fc.nat(), value: anyValue, isRemoved: fc.boolean() }), { maxLength: 3 }),
  })
  .map(({ base: { entrypoint, input }, changes }) => ({
    entrypoint,
    input: changes.reduce((current, { at, value, isRemoved }) => {
      const paths = pathsOf(current)
      const path = paths[at % paths.length]
      if (path === undefined) return value
      if (isRemoved) return without(current, path)
      return changed(current, path, parent => void Reflect.set(parent, path.at(-1)!, value))
    }, input),
  }))
