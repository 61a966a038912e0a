/**
 * Who the user is, by the signed word of an issuer that is trusted with it (a JWT, RFC 7519, verified after RFC 8725).
 *
 *     const { user, expiresAtMs } = await assertions.identify(text, ['ada@example.com'])
 *
 * An assertion's life: bounded → remembered by its hash, or verified once: algorithm, signature by one of the issuer's
 * keys, issuer, audience, times, lifetime → the user whom it names is the one who was named otherwise, if one was. It says
 * who asks and nothing about what may be done; so decisions and their cache know nothing of it, and what rests on it ends
 * with it.
 *
 * Its text is a secret as long as it lasts: it is in no message, no log and no record.
 */
import { hash } from 'node:crypto'
import {
  createLocalJWKSet,
  createRemoteJWKSet,
  customFetch,
  errors,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
} from 'jose'
import { LRUCache } from 'lru-cache'
import type { Caller } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import type { Settings } from '../settings.ts'
import type { Log } from '../telemetry/log.ts'
import type { Facts } from './facts.ts'
import type { PolicyReason } from './policy-engine.ts'

export type Asserted = {
  /** An id or an e-mail address, as the issuer has it. */
  user: string
  /** Nothing that rests on it may last longer, ms since epoch. */
  expiresAtMs: number
}

export type UserAssertions = {
  /** Whether the user of a message is to be known by its assertion, which may be missing; if not, by the name given. */
  demanded(text: string, caller: Caller['kind']): boolean
  /**
   * @param named users by the caller's own word; empty ones say nothing
   * @throws UserAssertionRefused; Fault UNAVAILABLE when the issuer's keys can't be had
   */
  identify(text: string, named: string[]): Promise<Asserted>
  /** How many signatures have been checked. */
  verifications(): number
  stop(): void
}

/** An assertion that is missing, wrong, over or somebody else's. */
export class UserAssertionRefused extends Fault {
  readonly why: PolicyReason

  constructor(why: PolicyReason) {
    super('PERMISSION_DENIED', why.code, why.message.replace(/\.$/, ''))
    this.why = why
  }
}

/** Asymmetric ones only. What an algorithm needs of its key, such as 2048 bits of RSA, `jose` sees to. */
const algorithms = ['ES256', 'ES384', 'RS256', 'PS256', 'EdDSA', 'Ed25519']
const charactersMax = 8 * 1_024
/** An issuer's clock and ours. An assertion that is over is over, though. */
const skewSeconds = 30
/** What is signed for longer is not about somebody who is there. */
const lifetimeSecondsMax = 24 * 3_600
/** An e-mail address is of 254 characters at most (RFC 5321). */
const userCharactersMax = 254
/** Assertions remembered, about 300 bytes each. */
const assertionsMax = 50_000
/** `typ` of tokens that say who somebody is. Others of the same issuer, such as for a logout, are signed with the same keys. */
const types = new Set(['jwt', 'at+jwt'])

const keysRefreshMs = 300_000
const keysTimeoutMs = 5_000
/** Keys that nobody knows make us look at the issuer's once in so long. */
const keysCooldownMs = 5_000
/** The same while the issuer does not answer. */
const keysFailureCooldownMs = 1_000
const keysBytesMax = 256 * 1_024

export function createUserAssertions(options: {
  settings: NonNullable<Settings['userAssertions']>
  facts: Pick<Facts, 'user'>
  clock: Clock
  log: Log
  keysCooldownMs?: number
}): UserAssertions {
  const { settings, facts, clock, log } = options
  const kept = new LRUCache<string, Asserted>({ max: assertionsMax })
  const underWay = new Map<string, Promise<Asserted>>()
  let verifications = 0
  /** Counts the sets of keys: what was verified with one that is no more is not kept. */
  let keySet = 0
  const keys = issuerKeys(options, () => {
    keySet++
    kept.clear()
  })

  async function verify(text: string, key: string): Promise<Asserted> {
    if (!text.split('.').every(isBase64url)) throw notSigned()
    const verifiedWith = keySet
    verifications++
    const now = clock()
    const { payload, protectedHeader } = await jwtVerify(text, keys.find, {
      algorithms,
      issuer: settings.issuer,
      audience: settings.audience,
      requiredClaims: ['exp'],
      currentDate: new Date(now),
      clockTolerance: skewSeconds,
    }).catch(error => {
      throw refusalOf(error, log)
    })
    demandType(protectedHeader.typ, payload)
    const asserted = { user: userIn(payload, settings.claim), expiresAtMs: endOf(payload, now) }
    if (verifiedWith === keySet) kept.set(key, asserted)
    return asserted
  }

  return {
    // An operator asks about others, of whom there is no assertion; policy has let the role do so.
    demanded: (text, caller) => text !== '' || (settings.required && caller !== 'operator'),

    async identify(text, named) {
      if (text === '') throw new UserAssertionRefused(missing)
      if (text.length > charactersMax) {
        throw invalid(
          'user_assertion',
          'longer',
          `of at most ${charactersMax} characters`,
          'The assertion is too long.',
        )
      }
      const key = hash('sha256', text, 'base64url')
      let asserted = kept.get(key)
      if (!asserted) {
        let verifying = underWay.get(key)
        if (!verifying) {
          verifying = verify(text, key).finally(() => underWay.delete(key))
          underWay.set(key, verifying)
        }
        asserted = await verifying
      }
      if (asserted.expiresAtMs <= clock()) {
        kept.delete(key)
        throw new UserAssertionRefused(assertionExpired(asserted.expiresAtMs))
      }
      for (const name of new Set(named)) {
        if (name !== '' && !(await isSame(name, asserted.user))) throw wrongUser(name, asserted.user)
      }
      return asserted
    },

    verifications: () => verifications,
    stop: keys.stop,
  }

  /** By any of the names that the user has. */
  async function isSame(name: string, other: string): Promise<boolean> {
    if (name === other) return true
    const [one, another] = await Promise.all([facts.user(name), facts.user(other)])
    return one !== undefined && one.id === another?.id
  }
}

/** In its one spelling: decoders overlook blanks and spare bits, and each assertion is to have one text. */
function isBase64url(part: string): boolean {
  return Buffer.from(part, 'base64url').toString('base64url') === part
}

// ── The issuer's keys ──────────────────────────────────────────────────────────────────────────────────────────────

/** The keys could not be had: it is not the assertion's fault. */
class KeysUnavailable extends Error {}

/** @param onChange the keys are not those that they were */
function issuerKeys(
  { settings, log, keysCooldownMs: cooldownDuration = keysCooldownMs }: Parameters<typeof createUserAssertions>[0],
  onChange: () => void,
): { find: JWTVerifyGetKey; stop(): void } {
  if (settings.jwks !== undefined) {
    return { find: createLocalJWKSet(JSON.parse(settings.jwks)), stop: () => {} }
  }
  let seen: string | undefined
  let failed: { at: number; error: unknown } | undefined

  /** One answer of the issuer, bounded. */
  async function get(url: string, init: RequestInit): Promise<Response> {
    if (failed && performance.now() - failed.at < keysFailureCooldownMs) throw failed.error
    try {
      const response = await fetch(url, init)
      const text = await boundedText(response)
      if (response.status === 200 && text !== seen) {
        seen = text
        onChange()
      }
      failed = undefined
      return new Response(text, { status: response.status })
    } catch (error) {
      failed = { at: performance.now(), error }
      throw error
    }
  }

  const remote = createRemoteJWKSet(new URL(settings.jwksUrl as string), {
    timeoutDuration: keysTimeoutMs,
    cooldownDuration,
    // Keys that are known go on being used while the issuer is away; they are kept fresh below.
    cacheMaxAge: Number.POSITIVE_INFINITY,
    [customFetch]: (url, init) => get(url, init as RequestInit),
  })
  const refresh = () =>
    remote.reload().catch(error => log.warn({ err: error }, 'the keys of USER_ASSERTION_JWKS_URL can not be had'))
  void refresh()
  const refreshing = setInterval(refresh, keysRefreshMs)
  refreshing.unref()
  return {
    find: (header, token) =>
      remote(header, token).catch(error => {
        if (tokensFault.some(kind => error instanceof kind)) throw error
        throw new KeysUnavailable('no keys', { cause: error })
      }),
    stop: () => clearInterval(refreshing),
  }
}

/** What may be wrong with a token's header; all else that finding a key can end in is the issuer's. */
const tokensFault = [errors.JWKSNoMatchingKey, errors.JWKSMultipleMatchingKeys, errors.JOSENotSupported]

async function boundedText(response: Response): Promise<string> {
  const chunks: Uint8Array[] = []
  let bytes = 0
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength
    if (bytes > keysBytesMax) throw new RangeError(`the keys are of more than ${keysBytesMax} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('utf8')
}

// ── What an assertion says ─────────────────────────────────────────────────────────────────────────────────────────

function demandType(typ: string | undefined, payload: JWTPayload): void {
  const type = typ?.toLowerCase().replace(/^application\//, '')
  if ((type !== undefined && !types.has(type)) || payload.events !== undefined) {
    throw invalid(
      'user_assertion.typ',
      'another',
      'JWT',
      'The token is of another kind than those that say who a user is.',
    )
  }
}

function userIn(payload: JWTPayload, claim: string): string {
  const user = payload[claim]
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what must not be in a name
  if (typeof user !== 'string' || user === '' || user.length > userCharactersMax || /[\0-\x1f\x7f]/.test(user)) {
    const message = `The assertion has to name the user in its claim ${claim}.`
    throw invalid(`user_assertion.${claim}`, 'missing or malformed', 'a user', message)
  }
  if (claim === 'email' && (payload.email_verified === false || payload.email_verified === 'false')) {
    const message = 'The issuer has not verified the e-mail address.'
    throw invalid('user_assertion.email_verified', 'false', 'true', message)
  }
  return user
}

/** @returns ms since epoch */
function endOf({ exp = 0, iat }: JWTPayload, now: number): number {
  const nowSeconds = now / 1_000
  if (iat !== undefined && iat > nowSeconds + skewSeconds) {
    throw invalid('user_assertion.iat', 'in the future', 'in the past', 'The assertion has been issued in the future.')
  }
  const begin = iat ?? nowSeconds
  if (!Number.isFinite(exp) || exp - begin > lifetimeSecondsMax) {
    const message = `An assertion must not last longer than ${lifetimeSecondsMax / 3_600} hours.`
    throw invalid('user_assertion.exp', 'later', `within ${lifetimeSecondsMax / 3_600} h of iat`, message)
  }
  return exp * 1_000
}

/** Why an assertion was not accepted, without a word of it. */
function refusalOf(error: unknown, log: Log): Error {
  if (error instanceof KeysUnavailable) {
    const message = "the keys of the users' issuer can not be had; try again"
    return new Fault('UNAVAILABLE', 'USER_ASSERTION_KEYS_UNAVAILABLE', message, { retryAfterMs: 1_000, cause: error })
  }
  if (error instanceof errors.JWTExpired) {
    return new UserAssertionRefused(assertionExpired(Number(error.payload.exp) * 1_000))
  }
  if (error instanceof errors.JWTClaimValidationFailed) {
    const message = `The claim ${error.claim} of the assertion is not as it has to be.`
    const actual = error.reason === 'missing' ? 'missing' : 'another'
    return invalid(`user_assertion.${error.claim}`, actual, requiredOf[error.claim] ?? 'in order', message)
  }
  if (error instanceof errors.JOSEAlgNotAllowed) {
    const message = 'The assertion is signed in a way that is not accepted.'
    return invalid('user_assertion.alg', 'another', algorithms.join(', '), message)
  }
  if (error instanceof errors.JWKSNoMatchingKey || error instanceof errors.JWKSMultipleMatchingKeys) {
    const message = 'The assertion does not name a key that the issuer is known to have.'
    return invalid('user_assertion.kid', 'unknown', 'a key of the issuer', message)
  }
  // Such as an issuer's key that is too short: `jose` has no name for that.
  if (!(error instanceof errors.JOSEError)) log.warn({ err: error }, 'an assertion could not be verified')
  return notSigned()
}

function notSigned(): UserAssertionRefused {
  const message = 'The assertion is not a token that the issuer has signed.'
  return invalid('user_assertion', 'refused', 'a JWT signed by the issuer', message)
}

const requiredOf: Readonly<Record<string, string>> = {
  iss: 'USER_ASSERTION_ISSUER',
  aud: 'USER_ASSERTION_AUDIENCE',
  exp: 'a time in the future',
  nbf: 'a time in the past',
}

const missing: PolicyReason = {
  code: 'USER_ASSERTION_MISSING',
  field: 'user_assertion',
  actual: 'missing',
  required: "a JWT of the users' issuer",
  message: 'The user has to be named by a signed assertion.',
}

/** What is told of an assertion that has ended, and of a lease that rested on it. */
export function assertionExpired(expiredAtMs: number): PolicyReason {
  const at = new Date(expiredAtMs)
  return {
    code: 'USER_ASSERTION_EXPIRED',
    field: 'user_assertion.exp',
    actual: Number.isNaN(at.getTime()) ? 'over' : at.toISOString(),
    required: 'a time in the future',
    message: 'The assertion has expired; present one that is fresh.',
  }
}

function wrongUser(named: string, asserted: string): UserAssertionRefused {
  return new UserAssertionRefused({
    code: 'USER_ASSERTION_WRONG_USER',
    field: 'user',
    actual: named,
    required: asserted,
    message: `The assertion is of ${asserted}, the question about ${named}.`,
  })
}

function invalid(field: string, actual: string, required: string, message: string): UserAssertionRefused {
  return new UserAssertionRefused({ code: 'USER_ASSERTION_INVALID', field, actual, required, message })
}
