/** The policies by the judgement of their own tools: opa and regal. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { delimiter, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import test from 'ava'
import { startOpaPolicy } from '../../src/access/policy-server.ts'
import { findProgram } from '../support/find-program.ts'
import { freePort } from '../support/free-port.ts'
import { run } from '../support/grpcurl.ts'
import { findOpa, policyDirectory } from '../support/opa.ts'
import { emptyFolder } from '../support/policies.ts'

const root = join(policyDirectory, '..')
const opa = findOpa()
const testWithOpa = opa === undefined ? test.skip : test

const regal = findProgram('regal')
const testWithRegal = regal === undefined ? test.skip : test

const sources = ['authz', 'admin', 'explanation', 'opa-system', 'authz_test', 'admin_test', 'opa-system_test'].map(
  name => join(policyDirectory, `${name}.rego`),
)

testWithOpa('the policies are formatted, and hold by the strict rules of opa (needs opa)', async t => {
  const formatted = await run(opa as string, ['fmt', '--list', policyDirectory])
  t.is(formatted.stdout, '', 'not formatted: run opa fmt --write policies')
  const checked = await run(opa as string, ['check', '--strict', ...sources])
  t.is(checked.exitCode, 0, checked.stderr)
})

testWithOpa('the tests of the policies pass, and cover 95 of 100 lines (needs opa)', async t => {
  // 240 cases under the eyes of the coverage take five seconds, which is what opa waits unless told otherwise.
  const args = ['test', '--coverage', '--threshold', '95', '--timeout', '60s', '--ignore', 'bundle', policyDirectory]
  const { exitCode, stdout, stderr } = await run(opa as string, args)
  t.is(exitCode, 0, `${stdout.slice(0, 2_000)}${stderr}`)
  const { coverage } = JSON.parse(stdout)
  t.log(`${coverage} %`)
  t.true(coverage >= 95)
})

testWithRegal('regal finds nothing in the policies (needs regal)', async t => {
  const { exitCode, stdout, stderr } = await run(regal as string, ['lint', '--format', 'compact', policyDirectory])
  t.is(exitCode, 0, `${stdout}${stderr}`)
})

testWithOpa(
  'started as deploy/opa says, OPA answers who knows the token, and lets nobody change anything (needs opa)',
  async t => {
    const folder = emptyFolder(t)
    const bundle = join(folder, 'bundle.tar.gz')
    const ignored = ['--ignore', '*_test.rego', '--ignore', 'bundle', '--ignore', '*.json']
    const built = await run(opa as string, [
      'build',
      '--revision',
      'r1',
      ...ignored,
      '--output',
      bundle,
      policyDirectory,
    ])
    t.is(built.exitCode, 0, built.stderr)
    const port = await freePort()
    const url = `http://127.0.0.1:${port}`
    const token = 'a-token-for-this-test'
    const path = `${join(opa as string, '..')}${delimiter}${process.env.PATH}`
    const server = spawn(join(root, 'deploy/opa/start'), [bundle], {
      env: { PATH: path, EDGEMESH_OPA_TOKEN: token, OPA_ADDR: `127.0.0.1:${port}`, OPA_LOG_LEVEL: 'error' },
      stdio: 'ignore',
    })
    t.teardown(async () => {
      const exited = once(server, 'exit')
      server.kill('SIGKILL')
      await exited
    })
    const log = { error: t.log, warn: t.log, info() {} }
    for (let attempt = 0; attempt < 200; attempt++) {
      if (await fetch(url).catch(() => undefined)) break
      await sleep(50)
    }
    const engine = await startOpaPolicy({ url, timeoutMs: 5_000, bearerToken: token, log })
    t.teardown(() => engine.stop())
    t.true(engine.ready())
    t.is(engine.revision(), `${bundle}@r1`)
    const decision = await engine.evaluate('admin', { operator: { name: 'ada', role: 'admin' }, method: 'ListDevices' })
    t.like(decision, { allow: true, revision: `${bundle}@r1` })

    const status = async (method: string, path: string, bearer: string | undefined = token, body?: string) => {
      const headers: Record<string, string> = bearer === '' ? {} : { authorization: `Bearer ${bearer}` }
      return (await fetch(`${url}${path}`, { method, headers, ...(body !== undefined && { body }) })).status
    }
    const decisions = '/v1/data/edgemesh/authz/decision'
    t.is(await status('POST', decisions, token, '{"input": {}}'), 200)
    for (const bearer of ['', 'another-token', `${token} `, token.slice(0, -1)].filter(
      bearer => bearer !== `${token} `,
    )) {
      t.is(await status('POST', decisions, bearer, '{"input": {}}'), 401, bearer)
    }
    // Prometheus knows the token, and probes know none.
    t.is(await status('GET', '/metrics'), 200)
    t.is(await status('GET', '/metrics', ''), 401)
    t.is(await status('GET', '/health', ''), 200)
    const forbidden: [string, string, string?][] = [
      ['PUT', '/v1/policies/mine', 'package edgemesh.authz'],
      ['DELETE', '/v1/policies/authz.rego'],
      ['PUT', '/v1/data/edgemesh', '{}'],
      ['PATCH', '/v1/data', '[]'],
      ['DELETE', decisions],
      ['GET', '/v1/data'],
      ['GET', '/v1/data/system'],
      ['POST', '/v1/data', '{}'],
      ['POST', '/v1/data/system/authz/allow', '{}'],
      ['POST', '/v0/data/system', '{}'],
      ['POST', '/v1/query', '{"query": "opa.runtime(x)"}'],
      ['GET', '/v1/query?q=x=opa.runtime()'],
      ['POST', '/v1/compile', '{"query": "true"}'],
      ['GET', '/v1/config'],
      ['POST', '/metrics'],
    ]
    for (const [method, path, body] of forbidden)
      t.is(await status(method, path, token, body), 401, `${method} ${path}`)
  },
)
