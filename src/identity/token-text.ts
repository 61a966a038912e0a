/**
 * The text of an enrollment token: what an operator hands to whoever sets up a device.
 *
 *     em1.<id>.<secret>.<SHA-256 of the root's key>
 *
 * `em1` is the version. The id finds the token in the database and may be shown; the secret, 32 random bytes, redeems
 * it and is kept nowhere but in the text; the last part lets the device know its server before it has any file from
 * it: the server's chain must end in a root whose SubjectPublicKeyInfo has that hash. Secret and hash are base64url
 * without padding.
 */
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import { Fault } from '../fault.ts'

export type ParsedToken = {
  /** 12 lower-case hex digits. */
  id: string
  /** 32 bytes. */
  secret: Buffer
  /** SHA-256 of the root's SubjectPublicKeyInfo, lower-case hex. */
  rootKeySha256: string
}

const version = 'em1'
const idBytes = 6
const secretBytes = 32

const idPattern = /^[0-9a-f]{12}$/
const sha256HexPattern = /^[0-9a-f]{64}$/

/** 3 + 12 + 43 + 43 characters and 3 dots. */
const textLength = 104

export function mintToken({ rootKeySha256 }: { rootKeySha256: string }): { text: string; id: string; secret: Buffer } {
  if (!sha256HexPattern.test(rootKeySha256)) throw new RangeError('rootKeySha256 is 64 lower-case hex digits')
  const id = randomBytes(idBytes).toString('hex')
  const secret = randomBytes(secretBytes)
  const pin = Buffer.from(rootKeySha256, 'hex').toString('base64url')
  return { text: `${version}.${id}.${secret.toString('base64url')}.${pin}`, id, secret }
}

/** Blanks around the text are forgiven, since it is pasted. @throws Fault INVALID_ARGUMENT TOKEN_MALFORMED */
export function parseToken(text: string): ParsedToken {
  // Looked at from the length on, so that a megabyte of blanks costs nothing.
  const trimmed = text.length <= 2 * textLength ? text.trim() : ''
  const [prefix, id = '', secretText = '', pinText = '', ...more] = trimmed.split('.')
  const secret = decode32Bytes(secretText)
  const pin = decode32Bytes(pinText)
  if (prefix !== version || !idPattern.test(id) || !secret || !pin || more.length > 0) throw malformedToken()
  return { id, secret, rootKeySha256: pin.toString('hex') }
}

/** Only the one spelling of 32 bytes: no padding, no loose bits at the end, no characters that Buffer would skip. */
function decode32Bytes(base64url: string): Buffer | undefined {
  const bytes = Buffer.from(base64url, 'base64url')
  return bytes.length === secretBytes && bytes.toString('base64url') === base64url ? bytes : undefined
}

/** Says nothing of what was given: a token with a typing error in it is still nine tenths of a secret. */
function malformedToken(): Fault {
  const description = `not an enrollment token; want ${version}.<id>.<secret>.<key hash>, copied whole`
  return new Fault('INVALID_ARGUMENT', 'TOKEN_MALFORMED', `token: ${description}`, {
    violations: [{ field: 'token', description }],
  })
}

/** What the database keeps of a secret: HMAC-SHA256 (RFC 2104) under `key`, ENROLLMENT_TOKEN_SECRET. */
export function hashSecret(secret: Uint8Array, key: string | Uint8Array): Buffer {
  return createHmac('sha256', key).update(secret).digest()
}

/** More than the 32 bytes of a secret, so that it can't be the hash of one. */
const restrictedTokens = 'edgemesh enrollment tokens with restrictions, version 1'

/**
 * The key for a token's secret, from ENROLLMENT_TOKEN_SECRET. Tokens with restrictions that the first version did not
 * know have another one: during an update its instances run beside ours and would redeem them without those. So they
 * find the secret wrong.
 */
export function secretKeyOf(
  { requiresApproval, deviceIdPattern, sourceNetworks }: Restrictions,
  tokenSecret: string,
): string | Buffer {
  const isRestricted = requiresApproval || deviceIdPattern || sourceNetworks.length > 0
  return isRestricted ? hashSecret(Buffer.from(restrictedTokens), tokenSecret) : tokenSecret
}

type Restrictions = { requiresApproval: boolean; deviceIdPattern?: string | null; sourceNetworks: string[] }

/** Takes the same time however much of the hash is right. */
export function secretMatches(secret: Uint8Array, key: string | Uint8Array, storedHash: Uint8Array): boolean {
  const computed = hashSecret(secret, key)
  return computed.length === storedHash.length && timingSafeEqual(computed, storedHash)
}
