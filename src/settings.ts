/**
 * What the environment says, checked and typed.
 *
 *     const settings = readSettings(process.env)
 *     settings.api.port           // 8000
 *     settings.health.maxAgeMs    // 300000, from HEALTH_CHECK_MAX_AGE_MINUTES=5
 *
 * Every variable stands once, in `VARIABLES`: name, default, unit, meaning and check. Any `X` may be given as `X_FILE`,
 * the path of a file that holds the value, as Docker and Kubernetes hand out secrets. A variable set to the empty
 * string counts as not set. All mistakes are reported together, by name, in one `SettingsError`; the value of a secret
 * is in no message and in no log.
 */
import { createPublicKey, randomBytes, type webcrypto } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { isIP } from 'node:net'
import { hostname } from 'node:os'
import { resolve } from 'node:path'
import { z } from 'zod'
import { DatabaseUrlError, readDatabaseUrl } from './db/database-url.ts'
import { isNetwork } from './network.ts'

/** Durations are milliseconds, except where the name says otherwise. */
export type Settings = Readonly<{
  /** Names this process among its siblings, in logs, metrics and rows that it owns. */
  instanceId: string
  /** Absolute path of the folder for the embedded database and files made on first start. */
  dataDir: string
  /** How long calls under way may take to finish when the process stops. */
  drainMs: number
  api: Readonly<{
    host: string
    port: number
    title: string
    version: string
    corsOrigins: readonly string[]
    /** Networks in CIDR notation, from which connections begin with a PROXY protocol header. */
    trustedProxies: readonly string[]
  }>
  database: Readonly<{
    /** In the form that `pg` reads, TLS included; undefined means the embedded server. */
    url: string | undefined
    /** As the owner of the tables, where that is another role. */
    migrationUrl: string | undefined
    replicaUrls: readonly string[]
    poolMax: number
  }>
  opa: Readonly<{
    /** Undefined means that policies are evaluated in this process. */
    url: string | undefined
    timeoutMs: number
    bearerToken: string | undefined
  }>
  policy: Readonly<{
    /** Absolute path of a folder with a compiled policy; undefined means the one that is shipped. */
    bundleDir: string | undefined
    onError: 'deny' | 'last-known'
  }>
  identity: Readonly<{
    trustDomain: string
    enrollmentTokenSecret: string
    certValidityDays: number
    caCertValidityDays: number
    caKeyPassphrase: string
    /** An authority of the operator's own, PEM; undefined means one in the database. */
    caCertPem: string | undefined
    caKeyPem: string | undefined
    recovery: Readonly<{ windowMs: number; into: 'quarantine' | 'approval' }>
    serverNames: readonly string[]
    serverCertValidityMs: number
    crlUrl: string | undefined
  }>
  /** Undefined: users are known by the caller's word. */
  userAssertions:
    | Readonly<{
        /** Whether devices and services have to present one. */
        required: boolean
        issuer: string
        audience: string
        claim: 'sub' | 'email'
        /** One of the two: a JSON Web Key Set, or where there is one. */
        jwks: string | undefined
        jwksUrl: string | undefined
      }>
    | undefined
  rateLimits: Readonly<{ enrollments: RateLimit; connections: RateLimit; health: RateLimit }>
  health: Readonly<{ maxAgeMs: number; heartbeatIntervalMs: number }>
  leases: Readonly<{ graceMs: number }>
  audit: Readonly<{ retentionDays: number }>
  log: Readonly<{ level: LogLevel }>
  metrics: Readonly<{ host: string; port: number }>
}>

/** At most `count` within any `windowSeconds`. */
export type RateLimit = Readonly<{ count: number; windowSeconds: number }>

export type LogLevel = 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'fatal'

export type SettingsProblem = { variable: string; problem: string; hint?: string }

/** The environment is wrong. `problems` lists every mistake; the message is the same list for people. */
export class SettingsError extends Error {
  readonly problems: readonly SettingsProblem[]

  constructor(problems: readonly SettingsProblem[]) {
    const lines = problems.map(
      ({ variable, problem, hint }) => `  ${variable}: ${problem}${hint ? `\n    hint: ${hint}` : ''}`,
    )
    const count = problems.length === 1 ? 'one setting is wrong' : `${problems.length} settings are wrong`
    super([`${count}:`, ...lines].join('\n'))
    this.name = 'SettingsError'
    this.problems = problems
  }
}

// ── The checks: each takes a variable's text and gives its value, or says what would be right ──────────────────────

const text = z.string().trim()

function wholeNumber(min: number, max: number) {
  return text
    .refine(digits => /^\d+$/.test(digits) && Number(digits) >= min && Number(digits) <= max, {
      error: `must be a whole number from ${min} to ${max}`,
    })
    .transform(Number)
    .describe(`whole number, ${min} to ${max}`)
}

/** More than nothing, fractions allowed. */
function decimal(max: number) {
  return text
    .refine(number => /^\d+(\.\d+)?$/.test(number) && Number(number) > 0 && Number(number) <= max, {
      error: `must be a number above 0 and at most ${max}, such as 5 or 0.5`,
    })
    .transform(Number)
    .describe(`number above 0, at most ${max}`)
}

function decimalOrZero(max: number) {
  return text
    .refine(number => /^\d+(\.\d+)?$/.test(number) && Number(number) <= max, {
      error: `must be a number from 0 to ${max}, such as 7 or 0.5`,
    })
    .transform(Number)
    .describe(`number, 0 to ${max}`)
}

function oneOf<const Words extends readonly [string, ...string[]]>(words: Words) {
  const list = `${words.slice(0, -1).join(', ')} or ${words.at(-1)}`
  return text.pipe(z.enum(words, { error: `must be ${list}` })).describe(list)
}

/** Whether there is a block of that kind at all. What it says is checked by who opens it. */
function pem(label: string) {
  const block = z.string().refine(value => new RegExp(`-----BEGIN ${label}-----`).test(value), {
    error: 'must be PEM: -----BEGIN …-----',
  })
  return block.describe('PEM')
}

/** 0 lets the system choose a free port. */
const port = wholeNumber(0, 65_535)

const WINDOW_SECONDS = { second: 1, minute: 60, hour: 3_600, day: 86_400 } as const

const rateLimit = text.transform((limit, context): RateLimit => {
  const match = /^([1-9]\d{0,8})\/(second|minute|hour|day)$/.exec(limit)
  if (!match) return refuse(context, 'must be a count and a window: 5/second, 5/minute, 5/hour or 5/day')
  return { count: Number(match[1]), windowSeconds: WINDOW_SECONDS[match[2] as keyof typeof WINDOW_SECONDS] }
})

const LOG_LEVELS: Readonly<Record<string, LogLevel>> = {
  TRACE: 'trace',
  DEBUG: 'debug',
  INFO: 'info',
  WARN: 'warn',
  WARNING: 'warn',
  ERROR: 'error',
  CRITICAL: 'fatal',
  FATAL: 'fatal',
}

const logLevel = text.transform((word, context) => {
  return LOG_LEVELS[word.toUpperCase()] ?? refuse(context, 'must be one of TRACE, DEBUG, INFO, WARN, ERROR, FATAL')
})

const httpUrl = text.refine(url => URL.canParse(url) && /^https?:$/.test(new URL(url).protocol), {
  error: 'must be a URL that begins with http:// or https://',
})

/** Whoever can change what it answers can be anybody. */
const keysUrl = text.refine(
  url => {
    if (!URL.canParse(url)) return false
    const { protocol, hostname, username, password } = new URL(url)
    if (username || password) return false
    return protocol === 'https:' || (protocol === 'http:' && /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/.test(hostname))
  },
  { error: 'must be a URL that begins with https://, without a password; http:// for localhost only' },
)

const keySet = z.string().superRefine((given, context) => {
  const problem = keySetProblem(given)
  if (problem) context.addIssue({ code: 'custom', message: problem })
})

/** What is wrong with a JSON Web Key Set whose keys verify signatures. */
function keySetProblem(given: string): string | undefined {
  let keys: Record<string, unknown>[]
  try {
    keys = z.object({ keys: z.array(z.record(z.string(), z.unknown())).min(1) }).parse(JSON.parse(given)).keys
  } catch {
    return 'must be a JSON Web Key Set: {"keys": [...]}, with one key at least'
  }
  for (const [at, key] of keys.entries()) {
    if (key.kty === 'oct') return `keys[${at}] is a secret that signs as well; only public keys are taken`
    if ('d' in key) return `keys[${at}] is a private key; leave it with the issuer`
    try {
      createPublicKey({ key: key as webcrypto.JsonWebKey, format: 'jwk' })
    } catch {
      return `keys[${at}] is not a key that can be read`
    }
  }
  return undefined
}

/** What documentation puts where a secret belongs. Whoever copies it must not be left with a secret known to all. */
const PLACEHOLDER = /^[A-Z_]+_HERE$|^PASSWORD$|^change[-_]?me/i

const secret = z
  .string()
  .refine(value => !PLACEHOLDER.test(value), { error: 'is still the placeholder of the documentation', abort: true })
  .refine(value => value.length >= 32, { error: 'must be at least 32 characters long' })

const isPlaceholder = (password: string) => PLACEHOLDER.test(password)

/** One that can't be read is refused in the words of its mistake. */
function databaseUrlFrom(given: string, context: z.RefinementCtx): string {
  try {
    return readDatabaseUrl(given, isPlaceholder)
  } catch (error) {
    if (error instanceof DatabaseUrlError) return refuse(context, error.message)
    throw error
  }
}

const databaseUrl = text.transform((given, context) => {
  const url = databaseUrlFrom(given, context)
  const wanted = URL.canParse(url) ? new URL(url).searchParams.get('target_session_attrs') : null
  if (wanted === null || /^(read-write|primary|any)$/.test(wanted)) return url
  return refuse(
    context,
    'target_session_attrs must be read-write: a server of EdgeMesh writes; any is for what only reads',
  )
})

const databaseUrls = text.transform((list, context) =>
  list
    .split(',')
    .filter(url => url.trim() !== '')
    .map(url => databaseUrlFrom(url.trim(), context)),
)

const DNS_NAME = /^(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$/i

const serverNames = text.transform((list, context) => {
  const names = list
    .split(',')
    .map(name => name.trim())
    .filter(name => name !== '')
  const wrong = names.filter(name => isIP(name) === 0 && !DNS_NAME.test(name))
  return wrong.length === 0 ? names : refuse(context, `neither DNS names nor IP addresses: ${wrong.join(', ')}`)
})

const networks = text.transform((list, context) => {
  const given = list
    .split(',')
    .map(network => network.trim())
    .filter(network => network !== '')
  const wrong = given.filter(network => !isNetwork(network))
  return wrong.length === 0
    ? given
    : refuse(context, `not networks such as 10.0.0.0/8 or fd00::/8: ${wrong.join(', ')}`)
})

const trustDomain = text.regex(/^[a-z0-9._-]{1,255}$/, {
  error: 'must be a SPIFFE trust domain: lower-case letters, digits, dots, dashes, underscores',
})

const instanceId = text.regex(/^[A-Za-z0-9._-]{1,63}$/, {
  error: 'must be 1 to 63 letters, digits, dots, dashes or underscores',
})

const corsOrigins = text.transform((given, context): string[] => {
  // `docker run --env-file` hands on a comment at the end of a line as part of the value.
  const list = given.replace(/\s+#.*$/, '')
  try {
    return z.array(z.string()).parse(JSON.parse(list))
  } catch {
    return refuse(context, 'must be a JSON list of origins, such as [] or ["https://admin.example.com"]')
  }
})

/** What they take, in a few words. What is in neither this list nor described by its maker is text. */
const DESCRIPTIONS: readonly (readonly [z.ZodType, string])[] = [
  [port, 'port'],
  [rateLimit, 'count/window; second, minute, hour or day'],
  [httpUrl, 'URL, http:// or https://'],
  [keysUrl, 'URL, https://'],
  [keySet, 'JSON Web Key Set'],
  [secret, 'text, 32 characters or more'],
  [databaseUrl, 'URL, postgresql://'],
  [databaseUrls, 'URLs, postgresql://'],
  [logLevel, 'level'],
  [serverNames, 'DNS names and IP addresses'],
  [networks, 'networks'],
  [trustDomain, 'SPIFFE trust domain'],
  [instanceId, 'letters, digits, dots, dashes, underscores; 63 at most'],
  [corsOrigins, 'JSON list'],
]
for (const [check, description] of DESCRIPTIONS) z.globalRegistry.add(check, { description })

function refuse(context: z.RefinementCtx, problem: string): never {
  context.addIssue({ code: 'custom', message: problem })
  return z.NEVER
}

// ── The table ──────────────────────────────────────────────────────────────────────────────────────────────────────

type Variable<T> = {
  check: z.ZodType<T, string>
  /** The default as one would write it, read by the same check; or, in words, how it is found. */
  default?: string
  /** Set when `default` is words: the variable's value is undefined, and `readSettings` fills it in. */
  defaultInWords?: true
  required?: true
  /** Its value is not repeated in messages. */
  secret?: true
  unit?: string
  meaning: string
  hint?: string
}

type About<T> = Omit<Variable<T>, 'check' | 'default' | 'defaultInWords' | 'required'>

function required<T>(check: z.ZodType<T, string>, about: About<T>): Variable<T> {
  return { check, required: true, ...about }
}

function optional<T>(check: z.ZodType<T, string>, defaultInWords: string, about: About<T>): Variable<T | undefined> {
  return { check, default: defaultInWords, defaultInWords: true, ...about }
}

function defaulted<T>(check: z.ZodType<T, string>, value: string, about: About<T>): Variable<T> {
  return { check, default: value, ...about }
}

const MAKE_SECRET = 'make one with: openssl rand -hex 32'

const VARIABLES = {
  DATABASE_URL: optional(databaseUrl, 'an embedded PostgreSQL under DATA_DIR', {
    secret: true,
    meaning:
      'the PostgreSQL database; postgresql+asyncpg:// and ?ssl=require are understood, and several servers as ' +
      'host:5432,host:5432, of which the primary is used',
    hint: 'for example postgresql://edgemesh:PASSWORD@postgres:5432/edgemesh?ssl=require',
  }),
  DATABASE_MIGRATION_URL: optional(databaseUrl, 'DATABASE_URL', {
    secret: true,
    meaning:
      'the same database as the role that owns its tables; read by edgemesh migrate, and not to be given to servers',
    hint: 'for example postgresql://edgemesh_owner:PASSWORD@postgres:5432/edgemesh?ssl=require',
  }),
  DATABASE_REPLICA_URLS: defaulted(databaseUrls, '', {
    secret: true,
    meaning:
      'streaming replicas of the same database, separated by commas: lists and reports are read there once they have ' +
      'caught up; decisions never use them',
  }),
  DATABASE_POOL_SIZE: defaulted(wholeNumber(1, 1_000), '20', {
    unit: 'connections',
    meaning:
      'database connections of an instance, shared by its workers, two at least for each; with DATABASE_MAX_OVERFLOW the ' +
      'most it opens, beside one for each process that hears of changes',
  }),
  DATABASE_MAX_OVERFLOW: defaulted(wholeNumber(0, 1_000), '10', {
    unit: 'connections',
    meaning: 'database connections beyond DATABASE_POOL_SIZE under load; idle ones are closed',
  }),
  OPA_URL: optional(httpUrl, 'policies are evaluated in the process', {
    meaning: 'an Open Policy Agent server to ask for decisions',
  }),
  OPA_TIMEOUT: defaulted(decimal(60), '5', { unit: 'seconds', meaning: 'the longest wait for an answer of OPA' }),
  OPA_BEARER_TOKEN: optional(z.string(), 'none', {
    secret: true,
    meaning: 'sent to OPA when it runs with --authentication=token',
  }),
  POLICY_BUNDLE_DIR: optional(text, 'the policy that comes with the program', {
    meaning:
      'folder of the compiled policy that is evaluated in the process, bundle.tar.gz or policy.wasm; ' +
      'what is put there takes effect within a second',
    hint: 'make one with: edgemesh policy build FOLDER-OF-REGO --out FOLDER',
  }),
  POLICY_ON_ERROR: defaulted(oneOf(['deny', 'last-known']), 'deny', {
    meaning: 'what to answer while policy cannot be evaluated: deny, or the last known decision',
  }),
  ENROLLMENT_TOKEN_SECRET: required(secret, {
    secret: true,
    meaning: 'the key under which enrollment tokens are kept; at least 32 characters, the same for all instances',
    hint: MAKE_SECRET,
  }),
  CA_KEY_PASSPHRASE: required(secret, {
    secret: true,
    meaning:
      "encrypts the authority's private keys in the database; at least 32 characters, the same for all instances",
    hint: MAKE_SECRET,
  }),
  CA_CERT: optional(pem('CERTIFICATE'), 'an authority made on the first start, in the database', {
    meaning:
      'the certificate authority that issues, PEM: its certificate, what is above it, and the root; ' +
      'usually given as CA_CERT_FILE. During a rotation the new one stands beside the old one',
  }),
  CA_KEY: optional(pem('(?:[A-Z]+ )*PRIVATE KEY'), 'in the database', {
    secret: true,
    meaning:
      'the private key of CA_CERT, PEM, plain or encrypted under CA_KEY_PASSPHRASE; usually given as CA_KEY_FILE',
  }),
  CERT_RECOVERY_DAYS: defaulted(decimalOrZero(3_650), '7', {
    unit: 'days',
    meaning: 'how long after its certificate has expired a device may come back with its key; 0: never',
  }),
  CERT_RECOVERY: defaulted(oneOf(['quarantine', 'approval']), 'quarantine', {
    meaning: 'what becomes of a device that came back: quarantined until released, or kept out until approved',
  }),
  CERT_VALIDITY_DAYS: defaulted(wholeNumber(1, 825), '90', {
    unit: 'days',
    meaning: 'validity of device certificates',
  }),
  CA_CERT_VALIDITY_DAYS: defaulted(wholeNumber(2, 36_500), '3650', {
    unit: 'days',
    meaning: 'validity of an authority that is made here, root and issuing CA; longer than CERT_VALIDITY_DAYS',
  }),
  TRUST_DOMAIN: defaulted(trustDomain, 'edgemesh.local', { meaning: 'the SPIFFE trust domain in every certificate' }),
  SERVER_NAMES: optional(serverNames, "localhost and the host's name", {
    meaning: "DNS names and IP addresses in the server's certificate, separated by commas",
  }),
  SERVER_CERT_VALIDITY_HOURS: defaulted(decimal(2_160), '168', {
    unit: 'hours',
    meaning: "validity of the server's certificate, which renews itself; fractions allowed",
  }),
  CRL_URL: optional(httpUrl, 'none', {
    meaning:
      'where others reach /crl of METRICS_PORT; certificates carry CRL_URL/<key id of their issuer>.crl ' +
      'as distribution point',
  }),
  USER_ASSERTION: defaulted(oneOf(['off', 'optional', 'required']), 'off', {
    meaning:
      'whether users are known by a signed assertion (JWT) of their issuer rather than by the word of the device or ' +
      'service that asks; with optional, only where there is one',
  }),
  USER_ASSERTION_ISSUER: optional(text, 'none', { meaning: 'the iss that assertions have to have' }),
  USER_ASSERTION_AUDIENCE: optional(text, 'none', { meaning: 'the aud that assertions have to have: this EdgeMesh' }),
  USER_ASSERTION_JWKS_URL: optional(keysUrl, 'none', {
    meaning: "where the issuer's keys are, as a JSON Web Key Set; read anew every five minutes and for unknown keys",
  }),
  USER_ASSERTION_JWKS: optional(keySet, 'none', {
    secret: true,
    meaning: 'the keys themselves, instead of their URL; usually given as USER_ASSERTION_JWKS_FILE, read at start',
  }),
  USER_ASSERTION_CLAIM: defaulted(oneOf(['sub', 'email']), 'sub', {
    meaning: 'the claim that names the user, by id or e-mail address as EdgeMesh knows them',
  }),
  RATE_LIMIT_ENROLLMENTS: defaulted(rateLimit, '5/minute', {
    meaning:
      'enrollment attempts of one source address, and refused ones with one token, at all instances together; ' +
      'twenty times as many of the other calls that need no certificate, at each process',
  }),
  RATE_LIMIT_CONNECTIONS: defaulted(rateLimit, '100/minute', {
    meaning: 'authorization requests of one device, at all instances together; those may exceed it by a tenth',
  }),
  RATE_LIMIT_HEALTH: defaulted(rateLimit, '10/minute', {
    meaning: 'heartbeats of one device, at all instances together; those may exceed it by a tenth',
  }),
  HEALTH_CHECK_MAX_AGE_MINUTES: defaulted(decimal(1_440), '5', {
    unit: 'minutes',
    meaning: 'a device whose last heartbeat is older counts as unhealthy; fractions allowed',
  }),
  HEARTBEAT_INTERVAL_SECONDS: optional(decimal(43_200), '30, or a third of HEALTH_CHECK_MAX_AGE_MINUTES if less', {
    unit: 'seconds',
    meaning: 'how often devices are asked to report; less than half of HEALTH_CHECK_MAX_AGE_MINUTES',
  }),
  LEASE_GRACE_SECONDS: defaulted(decimal(3_600), '30', {
    unit: 'seconds',
    meaning: 'how long a permission outlives its stream, and its instance being out of touch with the database',
  }),
  AUDIT_RETENTION_DAYS: defaulted(wholeNumber(1, 3_650), '90', { unit: 'days', meaning: 'age at which audit rows go' }),
  LOG_LEVEL: defaulted(logLevel, 'INFO', {
    meaning: 'TRACE, DEBUG, INFO, WARN, ERROR or FATAL; WARNING and CRITICAL are understood',
  }),
  METRICS_PORT: defaulted(port, '9090', {
    meaning: 'HTTP port of /metrics, /healthz, /readyz and /crl; 0 takes a free one',
  }),
  METRICS_HOST: defaulted(text, '0.0.0.0', {
    meaning: 'address that METRICS_PORT listens on; Prometheus comes from another host, so keep the port inside',
  }),
  API_PORT: defaulted(port, '8000', { meaning: 'gRPC port; 0 takes a free one' }),
  API_HOST: defaulted(text, '0.0.0.0', { meaning: 'address that API_PORT listens on' }),
  TRUSTED_PROXIES: defaulted(networks, '', {
    meaning:
      'networks of load balancers, separated by commas, whose connections begin with a PROXY protocol header ' +
      '(version 1 or 2) that tells the address of the client',
  }),
  API_TITLE: defaulted(text, 'EdgeMesh Control Plane', { meaning: 'name of the service in its own descriptions' }),
  API_VERSION: defaulted(text, '1.0.0', { meaning: 'version of the service in its own descriptions' }),
  CORS_ORIGINS: defaulted(corsOrigins, '[]', {
    meaning: 'a JSON list, checked and without effect: gRPC is not called by browsers',
  }),
  DATA_DIR: defaulted(text, '.edgemesh', {
    meaning: 'folder of the embedded database; relative to the working folder',
  }),
  DRAIN_SECONDS: defaulted(decimal(600), '10', {
    unit: 'seconds',
    meaning: 'time that devices have to leave, and calls under way to finish, when the process stops',
  }),
  INSTANCE_ID: optional(instanceId, "the host's name and a random ending", {
    meaning: 'names the process in logs, metrics and presence; workers add an ending of their own',
  }),
} as const

type Values = { [Name in keyof typeof VARIABLES]: (typeof VARIABLES)[Name] extends Variable<infer T> ? T : never }

export type SettingReference = {
  name: string
  /** As it would be written in a file, or words where the default is found at start; undefined when required. */
  default: string | undefined
  /** Whether the default is words. */
  isWords: boolean
  required: boolean
  secret: boolean
  unit: string | undefined
  /** What it takes, in a few words. */
  type: string
  meaning: string
}

/** Every variable, in the order of the table, for documentation. */
export const SETTINGS_REFERENCE: readonly SettingReference[] = Object.entries<Variable<unknown>>(VARIABLES).map(
  ([name, variable]) => ({
    name,
    default: variable.default,
    isWords: variable.defaultInWords ?? false,
    required: variable.required ?? false,
    secret: variable.secret ?? false,
    unit: variable.unit,
    type: variable.check.description ?? 'text',
    meaning: variable.meaning,
  }),
)

// ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────────

type Environment = Readonly<Record<string, string | undefined>>

/** @throws {SettingsError} with every mistake at once */
export function readSettings(env: Environment): Settings {
  const problems: SettingsProblem[] = []
  const values: Record<string, unknown> = {}
  for (const [name, variable] of Object.entries<Variable<unknown>>(VARIABLES)) {
    values[name] = readVariable(name, variable, env, problems)
  }
  checkTogether(values as Partial<Values>, problems)
  if (problems.length > 0) throw new SettingsError(problems)
  return assemble(values as Values)
}

/** The variable's value; undefined when it has none or when a problem was noted. */
function readVariable(
  name: string,
  variable: Variable<unknown>,
  env: Environment,
  problems: SettingsProblem[],
): unknown {
  const fileName = `${name}_FILE`
  const path = env[fileName] || undefined
  let given = env[name] || undefined
  if (given !== undefined && path !== undefined) {
    problems.push({ variable: name, problem: `is given twice: as ${name} and as ${fileName}`, hint: 'remove one' })
    return undefined
  }
  if (path !== undefined) {
    try {
      given = readFileSync(path, 'utf8').replace(/\r?\n$/, '') || undefined
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      problems.push({ variable: fileName, problem: `cannot be read: ${path} (${code})` })
      return undefined
    }
  }

  const source = path === undefined ? name : fileName
  const hint = variable.hint === undefined ? {} : { hint: variable.hint }
  if (given === undefined && variable.required) {
    problems.push({
      variable: source,
      problem: path === undefined ? 'is missing' : `is an empty file: ${path}`,
      ...hint,
    })
    return undefined
  }
  const effective = given ?? (variable.defaultInWords ? undefined : variable.default)
  if (effective === undefined) return undefined

  const checked = variable.check.safeParse(effective)
  if (checked.success) return checked.data
  const shown = variable.secret ? '' : `, not ${JSON.stringify(effective)}`
  for (const issue of checked.error.issues) problems.push({ variable: source, problem: issue.message + shown, ...hint })
  return undefined
}

/** Mistakes that show only when two variables are seen together. Those with a problem of their own are undefined. */
function checkTogether(values: Partial<Values>, problems: SettingsProblem[]): void {
  const maxAgeMinutes = values.HEALTH_CHECK_MAX_AGE_MINUTES
  const interval = values.HEARTBEAT_INTERVAL_SECONDS
  if (maxAgeMinutes !== undefined && interval !== undefined && interval >= (maxAgeMinutes * 60) / 2) {
    problems.push({
      variable: 'HEARTBEAT_INTERVAL_SECONDS',
      problem: `must be less than half of HEALTH_CHECK_MAX_AGE_MINUTES (${maxAgeMinutes * 60} seconds), not ${interval}`,
      hint: 'one lost heartbeat must not make a device unhealthy',
    })
  }
  if (Number(values.CERT_VALIDITY_DAYS) >= Number(values.CA_CERT_VALIDITY_DAYS)) {
    problems.push({
      variable: 'CA_CERT_VALIDITY_DAYS',
      problem: 'must be longer than CERT_VALIDITY_DAYS',
      hint: 'a certificate is worth nothing once its authority has expired',
    })
  }
  if (values.OPA_URL !== undefined && values.POLICY_BUNDLE_DIR !== undefined) {
    problems.push({
      variable: 'POLICY_BUNDLE_DIR',
      problem: 'is of no use with OPA_URL: OPA has a policy of its own',
      hint: 'remove one',
    })
  }
  for (const [one, other] of [
    ['CA_CERT', 'CA_KEY'],
    ['CA_KEY', 'CA_CERT'],
  ] as const) {
    if (values[one] === undefined || values[other] !== undefined) continue
    if (problems.some(({ variable }) => variable.startsWith(other))) continue
    problems.push({ variable: other, problem: `is missing: ${one} is of no use without it` })
  }
  checkUserAssertions(values, problems)
  const { API_PORT, API_HOST, METRICS_PORT, METRICS_HOST } = values
  if (API_PORT !== undefined && API_PORT !== 0 && API_PORT === METRICS_PORT && API_HOST === METRICS_HOST) {
    problems.push({ variable: 'METRICS_PORT', problem: `is the same as API_PORT: ${API_PORT}` })
  }
}

function checkUserAssertions(values: Partial<Values>, problems: SettingsProblem[]): void {
  const mode = values.USER_ASSERTION
  if (mode === undefined) return
  const names = [
    'USER_ASSERTION_ISSUER',
    'USER_ASSERTION_AUDIENCE',
    'USER_ASSERTION_JWKS_URL',
    'USER_ASSERTION_JWKS',
  ] as const
  if (mode === 'off') {
    for (const name of names.filter(name => values[name] !== undefined)) {
      const hint = 'set USER_ASSERTION=required, or optional'
      problems.push({ variable: name, problem: 'is of no use while USER_ASSERTION is off', hint })
    }
    return
  }
  const toldOf = (name: string) => problems.some(({ variable }) => variable === name || variable === `${name}_FILE`)
  const demand = (name: (typeof names)[number], problem: string) => {
    if (!toldOf(name)) problems.push({ variable: name, problem })
  }
  for (const name of ['USER_ASSERTION_ISSUER', 'USER_ASSERTION_AUDIENCE'] as const) {
    if (values[name] === undefined) demand(name, `is missing: USER_ASSERTION is ${mode}`)
  }
  const { USER_ASSERTION_JWKS: jwks, USER_ASSERTION_JWKS_URL: jwksUrl } = values
  if (jwks !== undefined && jwksUrl !== undefined) demand('USER_ASSERTION_JWKS', 'is given beside its URL: remove one')
  if (jwks === undefined && jwksUrl === undefined && !toldOf('USER_ASSERTION_JWKS')) {
    demand('USER_ASSERTION_JWKS_URL', `is missing, and so is USER_ASSERTION_JWKS_FILE: USER_ASSERTION is ${mode}`)
  }
}

const HEARTBEAT_INTERVAL_MS_DEFAULT = 30_000

function assemble(values: Values): Settings {
  const maxAgeMs = values.HEALTH_CHECK_MAX_AGE_MINUTES * 60_000
  const heartbeatIntervalMs =
    values.HEARTBEAT_INTERVAL_SECONDS === undefined
      ? Math.min(HEARTBEAT_INTERVAL_MS_DEFAULT, maxAgeMs / 3)
      : values.HEARTBEAT_INTERVAL_SECONDS * 1_000
  return {
    instanceId: values.INSTANCE_ID ?? `${hostname().slice(0, 54)}-${randomBytes(4).toString('hex')}`,
    dataDir: resolve(values.DATA_DIR),
    drainMs: values.DRAIN_SECONDS * 1_000,
    api: {
      host: values.API_HOST,
      port: values.API_PORT,
      title: values.API_TITLE,
      version: values.API_VERSION,
      corsOrigins: values.CORS_ORIGINS,
      trustedProxies: values.TRUSTED_PROXIES,
    },
    database: {
      url: values.DATABASE_URL,
      migrationUrl: values.DATABASE_MIGRATION_URL,
      replicaUrls: values.DATABASE_REPLICA_URLS,
      poolMax: values.DATABASE_POOL_SIZE + values.DATABASE_MAX_OVERFLOW,
    },
    opa: { url: values.OPA_URL, timeoutMs: values.OPA_TIMEOUT * 1_000, bearerToken: values.OPA_BEARER_TOKEN },
    policy: {
      bundleDir: values.POLICY_BUNDLE_DIR && resolve(values.POLICY_BUNDLE_DIR),
      onError: values.POLICY_ON_ERROR,
    },
    identity: {
      trustDomain: values.TRUST_DOMAIN,
      enrollmentTokenSecret: values.ENROLLMENT_TOKEN_SECRET,
      certValidityDays: values.CERT_VALIDITY_DAYS,
      caCertValidityDays: values.CA_CERT_VALIDITY_DAYS,
      caKeyPassphrase: values.CA_KEY_PASSPHRASE,
      caCertPem: values.CA_CERT,
      caKeyPem: values.CA_KEY,
      recovery: { windowMs: values.CERT_RECOVERY_DAYS * 86_400_000, into: values.CERT_RECOVERY },
      serverNames: values.SERVER_NAMES ?? [...new Set(['localhost', hostname()])],
      serverCertValidityMs: values.SERVER_CERT_VALIDITY_HOURS * 3_600_000,
      crlUrl: values.CRL_URL,
    },
    userAssertions:
      values.USER_ASSERTION === 'off'
        ? undefined
        : {
            required: values.USER_ASSERTION === 'required',
            issuer: values.USER_ASSERTION_ISSUER as string,
            audience: values.USER_ASSERTION_AUDIENCE as string,
            claim: values.USER_ASSERTION_CLAIM,
            jwks: values.USER_ASSERTION_JWKS,
            jwksUrl: values.USER_ASSERTION_JWKS_URL,
          },
    rateLimits: {
      enrollments: values.RATE_LIMIT_ENROLLMENTS,
      connections: values.RATE_LIMIT_CONNECTIONS,
      health: values.RATE_LIMIT_HEALTH,
    },
    health: { maxAgeMs, heartbeatIntervalMs },
    leases: { graceMs: values.LEASE_GRACE_SECONDS * 1_000 },
    audit: { retentionDays: values.AUDIT_RETENTION_DAYS },
    log: { level: values.LOG_LEVEL },
    metrics: { host: values.METRICS_HOST, port: values.METRICS_PORT },
  }
}

// ── Showing ────────────────────────────────────────────────────────────────────────────────────────────────────────

const MASK = '***'

/** The settings as they may be logged: the same shape, secrets masked. */
export function describeSettings(settings: Settings): Settings {
  const { database, opa, identity } = settings
  return {
    ...settings,
    database: {
      ...database,
      url: database.url && maskPassword(database.url),
      migrationUrl: database.migrationUrl && maskPassword(database.migrationUrl),
      replicaUrls: database.replicaUrls.map(maskPassword),
    },
    opa: { ...opa, url: opa.url && maskPassword(opa.url), bearerToken: opa.bearerToken && MASK },
    identity: { ...identity, enrollmentTokenSecret: MASK, caKeyPassphrase: MASK, caKeyPem: identity.caKeyPem && MASK },
  }
}

function maskPassword(url: string): string {
  const masked = new URL(url)
  if (masked.password !== '') masked.password = MASK
  // libpq also takes the password as a parameter.
  if (masked.searchParams.has('password')) masked.searchParams.set('password', MASK)
  return masked.href
}
