import { generateKeyPairSync } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseEnv } from 'node:util'
import test from 'ava'
import fc from 'fast-check'
import { describeSettings, readSettings, SETTINGS_REFERENCE, SettingsError } from '../src/settings.ts'

const ENROLLMENT_TOKEN_SECRET = 'e'.repeat(40)
const CA_KEY_PASSPHRASE = 'c'.repeat(40)
const SECRETS = { ENROLLMENT_TOKEN_SECRET, CA_KEY_PASSPHRASE }

const ENV_PRODUCTION = `
# Database Configuration
DATABASE_URL=postgresql+asyncpg://edgemesh:STRONG_PASSWORD_HERE@postgres:5432/edgemesh
DATABASE_POOL_SIZE=20
DATABASE_MAX_OVERFLOW=10

# OPA Configuration
OPA_URL=http://opa:8181
OPA_TIMEOUT=5

# Security
ENROLLMENT_TOKEN_SECRET=GENERATE_STRONG_SECRET_HERE
CERT_VALIDITY_DAYS=90
CA_CERT_VALIDITY_DAYS=3650

# Rate Limiting
RATE_LIMIT_ENROLLMENTS=5/minute
RATE_LIMIT_CONNECTIONS=100/minute
RATE_LIMIT_HEALTH=10/minute

# Health Check
HEALTH_CHECK_MAX_AGE_MINUTES=5

# Observability
LOG_LEVEL=INFO
METRICS_PORT=9090

# API Configuration
API_TITLE=EdgeMesh Control Plane
API_VERSION=1.0.0
CORS_ORIGINS=[]  # Restrict CORS in production
`

function mistakes(env: Record<string, string>): SettingsError {
  try {
    readSettings(env)
  } catch (error) {
    if (error instanceof SettingsError) return error
    throw error
  }
  throw new Error('no mistake was found')
}

test("the deployment guide's .env.production works once its placeholders are filled in", t => {
  const filled = ENV_PRODUCTION.replace('GENERATE_STRONG_SECRET_HERE', ENROLLMENT_TOKEN_SECRET).replace(
    'STRONG_PASSWORD_HERE',
    'ab/cd+ef==',
  )
  const settings = readSettings({ ...parseEnv(filled), CA_KEY_PASSPHRASE })
  t.is(settings.database.url, 'postgresql://edgemesh:ab%2Fcd%2Bef%3D%3D@postgres:5432/edgemesh')
  t.is(settings.database.poolMax, 30)
  t.deepEqual(settings.opa, { url: 'http://opa:8181', timeoutMs: 5_000, bearerToken: undefined })
  t.deepEqual(settings.rateLimits.connections, { count: 100, windowSeconds: 60 })
  t.deepEqual(settings.health, { maxAgeMs: 300_000, heartbeatIntervalMs: 30_000 })
  t.is(settings.api.port, 8_000)
  t.is(settings.metrics.port, 9_090)
})

test("the guide's placeholders are refused as secrets", t => {
  const { problems } = mistakes({ ...(parseEnv(ENV_PRODUCTION) as Record<string, string>), CA_KEY_PASSPHRASE })
  t.deepEqual(
    problems.map(({ variable }) => variable),
    ['DATABASE_URL', 'ENROLLMENT_TOKEN_SECRET'],
  )
})

test('every mistake is reported at once, by variable name', t => {
  const { problems, message } = mistakes({
    DATABASE_URL: 'mysql://root@db/edgemesh',
    API_PORT: '99999',
    RATE_LIMIT_HEALTH: 'often',
    LOG_LEVEL: 'LOUD',
    SERVER_NAMES: 'localhost,not a name',
    POLICY_ON_ERROR: 'allow',
    HEARTBEAT_INTERVAL_SECONDS: '200',
    CERT_VALIDITY_DAYS: '100',
    CA_CERT_VALIDITY_DAYS: '50',
  })
  const wrong = [
    'API_PORT',
    'CA_CERT_VALIDITY_DAYS',
    'CA_KEY_PASSPHRASE',
    'DATABASE_URL',
    'ENROLLMENT_TOKEN_SECRET',
    'HEARTBEAT_INTERVAL_SECONDS',
    'LOG_LEVEL',
    'POLICY_ON_ERROR',
    'RATE_LIMIT_HEALTH',
    'SERVER_NAMES',
  ]
  t.deepEqual(problems.map(({ variable }) => variable).sort(), wrong)
  for (const variable of wrong) t.true(message.includes(variable))
})

test("a secret's value is in no message and in no description", t => {
  const message = mistakes({ ENROLLMENT_TOKEN_SECRET: 'hunter2', DATABASE_URL: 'x://u:hunter2@h/d' }).message
  t.false(message.includes('hunter2'))

  const settings = readSettings({
    ...SECRETS,
    DATABASE_URL: 'postgresql://u:hunter2@h/d',
    DATABASE_REPLICA_URLS: 'postgresql://u:hunter2@r1/d,postgresql://u@r2/d?password=hunter2',
    OPA_BEARER_TOKEN: 'hunter2',
  })
  const described = JSON.stringify(describeSettings(settings))
  for (const value of ['hunter2', ENROLLMENT_TOKEN_SECRET, CA_KEY_PASSPHRASE]) t.false(described.includes(value))
})

test('a value may come from a file; both forms, and a missing file, are mistakes', async t => {
  const folder = await mkdtemp(join(tmpdir(), 'settings-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const file = join(folder, 'secret')
  await writeFile(file, `${ENROLLMENT_TOKEN_SECRET}\n`)
  const settings = readSettings({ ENROLLMENT_TOKEN_SECRET_FILE: file, CA_KEY_PASSPHRASE })
  t.is(settings.identity.enrollmentTokenSecret, ENROLLMENT_TOKEN_SECRET)
  t.is(mistakes({ ...SECRETS, ENROLLMENT_TOKEN_SECRET_FILE: file }).problems[0]?.variable, 'ENROLLMENT_TOKEN_SECRET')
  t.is(mistakes({ ...SECRETS, API_PORT_FILE: join(folder, 'none') }).problems[0]?.variable, 'API_PORT_FILE')
})

test('without DATABASE_URL the embedded database is meant, and empty variables count as not set', t => {
  t.is(readSettings({ ...SECRETS, DATABASE_URL: '' }).database.url, undefined)
})

for (const [given, mode] of [
  ['ssl=require', 'require'],
  ['sslmode=verify-full', 'verify-full'],
  ['ssl=false', 'disable'],
]) {
  test(`?${given} in DATABASE_URL is what pg calls sslmode=${mode}`, t => {
    const { url } = readSettings({ ...SECRETS, DATABASE_URL: `postgresql+asyncpg://u:p@h/d?${given}` }).database
    t.is(url, `postgresql://u:p@h/d?sslmode=${mode}&uselibpqcompat=true`)
  })
}

for (const [given, servers] of [
  ['one:5433,two/d', 'one:5433/d?host=one%2Ctwo&port=5433%2C5432'],
  ['[::1]:5433,[fd00::2]/d', '[::1]:5433/d?host=%5B%3A%3A1%5D%2C%5Bfd00%3A%3A2%5D&port=5433%2C5432'],
  [
    'one,two/d?target_session_attrs=read-write',
    'one:5432/d?target_session_attrs=read-write&host=one%2Ctwo&port=5432%2C5432',
  ],
  ['one/d?host=one,two&port=5433', 'one/d?host=one,two&port=5433'],
]) {
  test(`DATABASE_URL may name several servers as libpq takes them: ${given}`, t => {
    const { url } = readSettings({ ...SECRETS, DATABASE_URL: `postgresql://u:p@${given}` }).database
    t.is(url, `postgresql://u:p@${servers}`)
    t.is(new URL(url!).password, 'p')
  })
}

for (const [given, problem] of [
  ['one:5433,/d', /names several servers, not as host:5432,host:5432\/edgemesh/],
  ['one,two:port/d', /names several servers, not as/],
  ['one/d?host=one,two,three&port=1,2', /names 3 servers and 2 ports/],
  ['one,two/d?target_session_attrs=standby', /target_session_attrs must be read-write/],
] as const) {
  test(`DATABASE_URL can not be ${given}`, t => {
    const { problems } = mistakes({ ...SECRETS, DATABASE_URL: `postgresql://u:secret@${given}` })
    t.deepEqual(
      problems.map(({ variable }) => variable),
      ['DATABASE_URL'],
    )
    t.regex(problems[0]!.problem, problem)
    t.false(problems[0]!.problem.includes('secret'))
  })
}

test('the heartbeat interval follows a short health maximum age unless it is given', t => {
  const { health } = readSettings({ ...SECRETS, HEALTH_CHECK_MAX_AGE_MINUTES: '0.05' })
  t.deepEqual(health, { maxAgeMs: 3_000, heartbeatIntervalMs: 1_000 })
})

test("Python's names of log levels are understood", t => {
  t.is(readSettings({ ...SECRETS, LOG_LEVEL: 'WARNING' }).log.level, 'warn')
  t.is(readSettings({ ...SECRETS, LOG_LEVEL: 'critical' }).log.level, 'fatal')
})

const WINDOWS = { second: 1, minute: 60, hour: 3_600, day: 86_400 }

test('any count per second, minute, hour or day is a rate limit', t => {
  const windows = fc.constantFrom(...(Object.keys(WINDOWS) as (keyof typeof WINDOWS)[]))
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 999_999_999 }), windows, (count, window) => {
      const { rateLimits } = readSettings({ ...SECRETS, RATE_LIMIT_ENROLLMENTS: `${count}/${window}` })
      t.deepEqual(rateLimits.enrollments, { count, windowSeconds: WINDOWS[window] })
    }),
  )
})

test('anything else is no rate limit', t => {
  const anythingElse = fc.string().filter(s => s !== '' && !/^\s*[1-9]\d{0,8}\/(second|minute|hour|day)\s*$/.test(s))
  fc.assert(
    fc.property(anythingElse, text => {
      t.is(mistakes({ ...SECRETS, RATE_LIMIT_ENROLLMENTS: text }).problems[0]?.variable, 'RATE_LIMIT_ENROLLMENTS')
    }),
  )
})

test('the reference names each variable once, with its meaning', t => {
  t.is(new Set(SETTINGS_REFERENCE.map(({ name }) => name)).size, SETTINGS_REFERENCE.length)
  t.true(SETTINGS_REFERENCE.every(({ meaning }) => meaning !== ''))
  t.like(SETTINGS_REFERENCE.find(({ name }) => name === 'OPA_TIMEOUT')!, {
    default: '5',
    unit: 'seconds',
    type: 'number above 0, at most 60',
  })
  t.like(SETTINGS_REFERENCE.find(({ name }) => name === 'POLICY_ON_ERROR')!, { type: 'deny or last-known' })
  t.like(SETTINGS_REFERENCE.find(({ name }) => name === 'DATABASE_URL')!, { isWords: true, secret: true })
})

test('a folder of the policy is made absolute, and is of no use beside OPA', t => {
  const { policy } = readSettings({ ...SECRETS, POLICY_BUNDLE_DIR: 'policy' })
  t.deepEqual(policy, { bundleDir: resolve('policy'), onError: 'deny' })
  t.is(readSettings(SECRETS).policy.bundleDir, undefined)
  const error = t.throws(
    () => readSettings({ ...SECRETS, POLICY_BUNDLE_DIR: '/etc/policy', OPA_URL: 'http://localhost:8181' }),
    { instanceOf: SettingsError },
  )
  t.deepEqual(
    error?.problems.map(({ variable }) => variable),
    ['POLICY_BUNDLE_DIR'],
  )
})

test('whatever is wrong with the assertions of users is told at once, by name, and never half applied', t => {
  const told = (env: Record<string, string>) =>
    Object.fromEntries(mistakes({ ...SECRETS, ...env }).problems.map(({ variable, problem }) => [variable, problem]))
  const jwk = generateKeyPairSync('ed25519').publicKey.export({ format: 'jwk' })
  const keys = JSON.stringify({ keys: [jwk] })
  const [issuer, audience] = [
    { USER_ASSERTION_ISSUER: 'https://login.example.com' },
    { USER_ASSERTION_AUDIENCE: 'mesh' },
  ]
  t.deepEqual(Object.keys(told({ USER_ASSERTION: 'required' })), [
    'USER_ASSERTION_ISSUER',
    'USER_ASSERTION_AUDIENCE',
    'USER_ASSERTION_JWKS_URL',
  ])
  t.deepEqual(Object.keys(told({ USER_ASSERTION: 'always' })), ['USER_ASSERTION'])
  t.deepEqual(Object.keys(told({ ...issuer, USER_ASSERTION_JWKS: keys })), [
    'USER_ASSERTION_ISSUER',
    'USER_ASSERTION_JWKS',
  ])
  const on = { USER_ASSERTION: 'required', ...issuer, ...audience }
  for (const url of ['http://login.example.com/keys', 'https://a:b@login.example.com/keys', 'ftp://localhost/keys']) {
    t.regex(told({ ...on, USER_ASSERTION_JWKS_URL: url }).USER_ASSERTION_JWKS_URL ?? '', /must be a URL/)
  }
  const { privateKey } = generateKeyPairSync('ed25519')
  for (const [wrong, problem] of [
    ['nonsense', /JSON Web Key Set/],
    ['{"keys": []}', /one key at least/],
    [JSON.stringify({ keys: [jwk, { kty: 'oct', k: 'c2VjcmV0' }] }), /^keys\[1\] is a secret/],
    [JSON.stringify({ keys: [privateKey.export({ format: 'jwk' })] }), /^keys\[0\] is a private key/],
    [JSON.stringify({ keys: [{ ...jwk, x: '' }] }), /^keys\[0\] is not a key/],
  ] as const) {
    const problems = told({ ...on, USER_ASSERTION_JWKS: wrong })
    t.deepEqual(Object.keys(problems), ['USER_ASSERTION_JWKS'])
    t.regex(problems.USER_ASSERTION_JWKS ?? '', problem)
    t.false(problems.USER_ASSERTION_JWKS?.includes('c2VjcmV0'))
  }
  const both = { USER_ASSERTION_JWKS: keys, USER_ASSERTION_JWKS_URL: 'http://localhost:8080/keys' }
  t.deepEqual(Object.keys(told({ ...on, ...both })), ['USER_ASSERTION_JWKS'])
  t.is(readSettings(SECRETS).userAssertions, undefined)
  t.deepEqual(readSettings({ ...SECRETS, ...on, USER_ASSERTION_JWKS: keys }).userAssertions, {
    required: true,
    issuer: 'https://login.example.com',
    audience: 'mesh',
    claim: 'sub',
    jwks: keys,
    jwksUrl: undefined,
  })
})
