import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { look, strongSecret, told } from '../support/doctor.ts'

async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-'))
  t.teardown(() => rm(path, { recursive: true }))
  return path
}

// ── Settings ───────────────────────────────────────────────────────────────────────────────────────────────────────

test('settings that a server starts with are found right', async t => {
  t.deepEqual(await told({}, 'settings'), ['ok: the environment has what edgemesh serve needs'])
})

test('every wrong setting is a finding with its name, and what rests on settings says that it waits for them', async t => {
  const found = await look({ OPA_TIMEOUT: 'soon', CA_KEY_PASSPHRASE: '' }, ['settings', 'secrets', 'node', 'authority'])
  t.deepEqual(
    found.map(({ check, severity }) => [check, severity]),
    [
      ['settings', 'failed'],
      ['settings', 'failed'],
      ['secrets', 'skipped'],
      ['node', 'ok'],
      ['authority', 'skipped'],
    ],
  )
  t.regex(found[0]!.what, /^OPA_TIMEOUT: /)
  t.like(found[1], { what: 'CA_KEY_PASSPHRASE: is missing', mend: 'make one with: openssl rand -hex 32' })
  t.is(found[2]!.what, 'the settings are wrong: see the check settings')
})

test('a name that is nearly that of a setting is told, one of somebody else is not', async t => {
  const env = { RATE_LIMIT_CONECTIONS: '1/minute', DATABASE_URI: 'x', LANG: 'C', PGPASSWORD: 'x' }
  t.deepEqual(await told(env, 'settings'), [
    'warning: RATE_LIMIT_CONECTIONS is no setting; it looks like RATE_LIMIT_CONNECTIONS',
    'warning: DATABASE_URI is no setting; it looks like DATABASE_URL',
  ])
})

// ── Secrets ────────────────────────────────────────────────────────────────────────────────────────────────────────

test('secrets made as the documentation says are found strong', async t => {
  const DATABASE_URL = `postgresql://edgemesh:${strongSecret()}@db/edgemesh`
  t.deepEqual(await told({ DATABASE_URL }, 'secrets'), ['ok: 3 secrets, none of which can be guessed'])
})

for (const [secret, said] of [
  ['a-secret-that-was-in-an-example-somewhere', 'has a word in it that examples have, and that is tried first'],
  ['0123456789abcdef0123456789abcdef', 'is a pattern, not a random text'],
  ['abcdefghijklmnopqrstuvwxyzabcdefgh', 'is a pattern, not a random text'],
  ['aaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbbbc', 'is too simple: about 41 bits, want 96'],
] as const) {
  test(`the secret ${secret} fails, and is not shown`, async t => {
    const found = await look({ ENROLLMENT_TOKEN_SECRET: secret }, 'secrets')
    t.deepEqual(
      found.map(({ severity, what }) => `${severity}: ${what}`),
      [`failed: ENROLLMENT_TOKEN_SECRET ${said}`],
    )
    t.false(JSON.stringify(found).includes(secret))
  })
}

test('words, one secret for two things and a password that is tried first are found', async t => {
  const words = 'correct horse battery staple lighthouse'
  t.deepEqual(await told({ CA_KEY_PASSPHRASE: words }, 'secrets'), ['warning: CA_KEY_PASSPHRASE looks like words'])
  const same = strongSecret()
  t.deepEqual(await told({ CA_KEY_PASSPHRASE: same, ENROLLMENT_TOKEN_SECRET: same }, 'secrets'), [
    'failed: CA_KEY_PASSPHRASE is the same as ENROLLMENT_TOKEN_SECRET',
  ])
  t.deepEqual(await told({ DATABASE_URL: 'postgresql://edgemesh:edgemesh@db/edgemesh' }, 'secrets'), [
    'failed: DATABASE_URL has a word in it that examples have, and that is tried first',
  ])
  t.deepEqual(await told({ OPA_URL: 'http://localhost:1', OPA_BEARER_TOKEN: 'x7Kq' }, 'secrets'), [
    'failed: OPA_BEARER_TOKEN is too simple: about 8 bits, want 96',
  ])
})

test('a secret that is in the words of somebody else is taken out of them', async t => {
  const password = strongSecret()
  const found = await look(
    { DATABASE_URL: `postgresql://edgemesh:${password}@${password}.invalid/edgemesh` },
    'database',
  )
  t.is(found[0]?.severity, 'failed')
  t.false(JSON.stringify(found).includes(password))
  t.regex(found[0]!.what, /\*\*\*\.invalid/)
})

// ── Files ──────────────────────────────────────────────────────────────────────────────────────────────────────────

for (const [mode, severity, said] of [
  [0o600, 'ok', /^one file is closed to everybody else$/],
  [0o640, 'ok', /^one file/],
  [0o644, 'failed', /can be read by everybody: 0644$/],
  [0o666, 'failed', /can be written by everybody: 0666$/],
  [0o660, 'warning', /can be written by its group: 0660$/],
] as const) {
  test(`a file of a secret with mode ${mode.toString(8)}: ${severity}`, async t => {
    const path = join(await folder(t), 'secret')
    await writeFile(path, strongSecret())
    await chmod(path, mode)
    const found = await look({ CA_KEY_PASSPHRASE: '', CA_KEY_PASSPHRASE_FILE: path }, 'secret-files')
    t.is(found[0]?.severity, severity)
    t.regex(found[0]!.what, said)
    if (severity !== 'ok') t.is(found[0]?.mend, `chmod 600 ${path}`)
  })
}

test('an environment file with secrets, and those that edgemesh dev has made, are looked at', async t => {
  const path = await folder(t)
  const [envFile, dataDir] = [join(path, 'edgemesh.env'), join(path, 'data')]
  await mkdir(dataDir)
  for (const file of [envFile, join(dataDir, 'secrets.json')]) {
    await writeFile(file, '')
    await chmod(file, 0o604)
  }
  t.deepEqual(await told({ DATA_DIR: dataDir }, 'secret-files', { envFile }), [
    `failed: the environment file (${envFile}) can be read by everybody: 0604`,
    `failed: the secrets of edgemesh dev (${dataDir}/secrets.json) can be read by everybody: 0604`,
  ])
})
