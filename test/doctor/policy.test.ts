/** Policies in process and real OPA servers, with and without a guard. */
import { copyFile, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { look, outsideAddress, strongSecret, told } from '../support/doctor.ts'
import { startEdgeMesh } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { findOpa, policyDirectory, startOpa } from '../support/opa.ts'
import { buildOpaBundle } from '../support/opa-bundle.ts'
import { relay } from '../support/relay.ts'

async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-policy-'))
  t.teardown(() => rm(path, { recursive: true }))
  return path
}

// ── In process ─────────────────────────────────────────────────────────────────────────────────────────────────────

test('the policy that comes with the program decides, and there is no OPA to guard', async t => {
  const [policy, guard] = await told({}, ['policy', 'opa-guard'])
  t.regex(policy ?? '', /^ok: the policy that comes with the program, \w+$/)
  t.is(guard, 'skipped: OPA_URL is not set: policy is evaluated in the process')
})

test('a folder with a policy decides; one without, or with a broken one, is told', async t => {
  const POLICY_BUNDLE_DIR = await folder(t)
  const [empty] = await look({ POLICY_BUNDLE_DIR }, 'policy')
  t.like(empty, { severity: 'failed', mend: 'build one with: edgemesh policy build FOLDER-OF-REGO --out FOLDER' })
  for (const name of ['policy.wasm', 'manifest.json']) {
    await copyFile(join(policyDirectory, 'bundle', name), join(POLICY_BUNDLE_DIR, name))
  }
  t.regex((await told({ POLICY_BUNDLE_DIR }, 'policy')).join(), /^ok: the policy of .*, \w+$/)
  await writeFile(join(POLICY_BUNDLE_DIR, 'policy.wasm'), 'half of it')
  t.regex(
    (await told({ POLICY_BUNDLE_DIR }, 'policy')).join(),
    /^failed: .* is not the file that manifest\.json beside it names$/,
  )
})

test('an instance that decides by another policy than is configured is told', async t => {
  const POLICY_BUNDLE_DIR = await folder(t)
  await copyFile(join(policyDirectory, 'bundle', 'policy.wasm'), join(POLICY_BUNDLE_DIR, 'policy.wasm'))
  await writeFile(join(POLICY_BUNDLE_DIR, 'manifest.json'), JSON.stringify({ revision: 'mine' }))
  const mesh = await startEdgeMesh(t)
  const env = { DATABASE_URL: mesh.databaseUrl, METRICS_PORT: String(mesh.server.metricsPort), POLICY_BUNDLE_DIR }
  t.regex((await told(env, 'policy')).join(), /^warning: the instance decides by \w+, and what is configured is mine/)
})

// ── OPA ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const checks = ['policy', 'opa-guard'] as const
if (findOpa() === undefined) {
  test.skip('what is wrong with an OPA server: opa is missing, .ci/tools installs it', t => t.pass())
} else {
  test('an OPA that is started as deploy/opa says has no finding', async t => {
    const token = strongSecret()
    const opa = await startOpa(t, { token, bundle: await buildOpaBundle(t, 'r1') })
    const [policy, guard] = await told({ OPA_URL: opa.url, OPA_BEARER_TOKEN: token }, checks)
    t.regex(policy ?? '', /^ok: OPA decides by .*@r1, in \d+\.\d ms$/)
    t.is(guard, 'ok: OPA refuses who has no token, and lets ours ask for decisions alone')
  })

  test('an OPA that answers to anybody, and whose policy has no revision, is told', async t => {
    const opa = await startOpa(t)
    const found = await told({ OPA_URL: opa.url }, checks)
    t.true(found.includes(`failed: OPA at ${opa.url} answers to anybody, without a token`))
    t.regex(found[0] ?? '', /^warning: the policy of OPA has no revision of its own; it is called \w+$/)
  })

  test('an OPA that does not take our token, or has no policy of ours, is told', async t => {
    const opa = await startOpa(t, { token: strongSecret() })
    const [policy, guard] = await look({ OPA_URL: opa.url, OPA_BEARER_TOKEN: strongSecret() }, checks)
    t.like(policy, { severity: 'failed', what: `OPA at ${opa.url} does not take our token (401)` })
    t.is(guard?.severity, 'ok')
    const empty = await startOpa(t, { policies: await folder(t) })
    t.regex((await told({ OPA_URL: empty.url }, 'policy')).join(), /^failed: .* gives no decision on an empty question/)
  })

  test('an OPA that is far away is told', async t => {
    const token = strongSecret()
    const opa = await startOpa(t, { token, bundle: await buildOpaBundle(t, 'r1') })
    const port = await relay(t, Number(new URL(opa.url).port), { lateMs: 40 })
    const env = { OPA_URL: `http://127.0.0.1:${port}`, OPA_BEARER_TOKEN: token }
    t.regex((await told(env, 'policy')).join(), /^warning: OPA takes \d+\.\d ms for an answer at the least$/)
  })

  const host = outsideAddress()
  const plainTitle = 'a token that crosses a network in plain text is told'
  if (host === undefined) test.skip(`${plainTitle}: this host has no address beside 127.0.0.1`, t => t.pass())
  else {
    test(plainTitle, async t => {
      const token = strongSecret()
      const opa = await startOpa(t, { token, bundle: await buildOpaBundle(t, 'r1') })
      const port = await relay(t, Number(new URL(opa.url).port), { on: host })
      t.deepEqual(await told({ OPA_URL: `http://${host}:${port}`, OPA_BEARER_TOKEN: token }, 'opa-guard'), [
        `warning: the token goes to ${host} in plain text`,
      ])
    })
  }

  test('a token that opens all of OPA is told', async t => {
    const token = strongSecret()
    const policies = await folder(t)
    for (const name of ['authz.rego', 'admin.rego']) await copyFile(join(policyDirectory, name), join(policies, name))
    const guard =
      'package system.authz\ndefault allow := false\nallow if input.identity == opa.runtime().env.EDGEMESH_OPA_TOKEN\n'
    await writeFile(join(policies, 'guard.rego'), guard)
    const opa = await startOpa(t, { token, policies })
    const found = await told({ OPA_URL: opa.url, OPA_BEARER_TOKEN: token }, 'opa-guard')
    t.deepEqual(found, ['warning: the token that EdgeMesh shows may ask OPA for everything, not for decisions alone'])
  })
}

test('an OPA that is not there is told, and its guard waits', async t => {
  const OPA_URL = `http://127.0.0.1:${await freePort()}`
  const [policy, guard] = await told({ OPA_URL }, checks)
  t.regex(policy ?? '', /^failed: OPA at .* does not answer: .*ECONNREFUSED/)
  t.is(guard, 'skipped: OPA does not answer: see the check policy')
})
