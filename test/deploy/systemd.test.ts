/** The units of systemd, judged by systemd, and held against the settings and secrets that they name. */
import { existsSync } from 'node:fs'
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import { readSettings } from '../../src/settings.ts'
import { findProgram } from '../support/find-program.ts'
import { openSecrets, unknownSettings } from '../support/known-settings.ts'
import { deploy, judged, say } from '../support/programs.ts'
import { makeSecrets, openFolder } from '../support/shipped-postgres.ts'

const analyze = findProgram('systemd-analyze')
const folder = join(deploy, 'systemd')
const units = ['edgemesh.service', 'edgemesh-migrate.service', 'edgemesh-opa.service'] as const

/** In tenths, from 0 to 100. What is left is the network, and for Node memory that becomes code. */
const exposureMax = 15

async function valuesOf(unit: string): Promise<Record<string, string[]>> {
  const values: Record<string, string[]> = {}
  for (const line of (await readFile(join(folder, unit), 'utf8')).split('\n')) {
    const [, name, value = ''] = /^(\w+)=(.*)$/.exec(line) ?? []
    if (name) values[name] = [...(values[name] ?? []), value]
  }
  return values
}

for (const unit of units) {
  judged(
    `systemd finds nothing wrong with ${unit}, and little that it could do to its host`,
    { 'systemd-analyze': analyze },
    async (t, { 'systemd-analyze': analyze }) => {
      const path = join(folder, unit)
      const verified = await say(analyze, ['verify', '--man=no', path])
      t.deepEqual({ exitCode: verified.exitCode, said: verified.said }, { exitCode: 0, said: '' })
      const args = ['security', '--offline=yes', '--no-pager', `--threshold=${exposureMax}`, path]
      const judgement = await say(analyze, args)
      t.is(judgement.exitCode, 0, judgement.said)
    },
  )
}

test('units give EdgeMesh settings that it knows, and secrets that make-secrets makes, as files of their own', async t => {
  const secrets = join(await openFolder(t, 'systemd'), 'secrets')
  await makeSecrets(secrets)
  for (const unit of units) {
    const { Environment = [], LoadCredential = [], ExecStart = [] } = await valuesOf(unit)
    const credentials = Object.fromEntries(LoadCredential.map(credential => credential.split(':')))
    const environment: Record<string, string> = {}
    for (const pair of Environment) {
      const [name = '', value = ''] = pair.split(/=(.*)/s)
      environment[name] = value
      if (!name.endsWith('_FILE')) continue
      const [, owner, credential = ''] = /^\/run\/credentials\/([\w.-]+)\/([\w-]+)$/.exec(value) ?? []
      t.is(owner, unit, `${name} of ${unit}`)
      const source = credentials[credential]?.replace('/etc/edgemesh/secrets', secrets) ?? ''
      t.true(existsSync(source), `${unit}: ${name}: ${credential} is no credential that make-secrets makes`)
      environment[name] = source
    }
    t.is(Object.keys(environment).filter(name => name.endsWith('_FILE')).length, LoadCredential.length, unit)
    if (unit === 'edgemesh-opa.service') continue
    t.deepEqual(unknownSettings(Object.keys(environment)), [], unit)
    t.deepEqual(openSecrets(environment), [], unit)
    // `migrate` makes up what only servers need.
    const made = { ENROLLMENT_TOKEN_SECRET: 'x'.repeat(32), CA_KEY_PASSPHRASE: 'x'.repeat(32) }
    const settings = readSettings(unit === 'edgemesh.service' ? environment : { ...made, ...environment })
    t.truthy(settings.database.url)
    t.is(settings.database.migrationUrl !== undefined, unit === 'edgemesh-migrate.service')
    t.true(existsSync(join(deploy, '..', /\/opt\/edgemesh\/(\S+)/.exec(ExecStart[0] ?? '')?.[1] ?? 'none')))
  }
})

test('a server is killed only when it has had the time to drain, and is not started again with settings that are wrong', async t => {
  const {
    Environment = [],
    TimeoutStopSec,
    KillMode,
    Restart,
    RestartPreventExitStatus,
  } = await valuesOf('edgemesh.service')
  const drainSeconds = Number(Environment.find(pair => pair.startsWith('DRAIN_SECONDS='))?.split('=')[1])
  t.true(Number(TimeoutStopSec) >= drainSeconds + 10, `${TimeoutStopSec} s, and DRAIN_SECONDS=${drainSeconds}`)
  t.deepEqual([KillMode, Restart, RestartPreventExitStatus], [['mixed'], ['always'], ['2']])
})

test('every unit of this folder is looked at', async t => {
  const elsewhere = /^edgemesh-(agent|backup.*)\.(service|timer)$/
  const found = (await readdir(folder)).filter(name => !elsewhere.test(name))
  t.deepEqual(found.sort(), [...units].sort())
})
