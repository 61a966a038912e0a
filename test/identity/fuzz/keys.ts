/** Keys that sign requests: of every kind that is allowed, and of kinds and sizes that must never be. */
import { generateKeyPairSync, type KeyObject, sign } from 'node:crypto'
import { nullValue, oid, sequence } from '../../../src/identity/der.ts'

export type SigningKey = { privateKey: KeyObject; spki: Buffer; kind: 'ec' | 'rsa' | 'edwards' | 'dsa' }

const ec = (namedCurve: string) => () => generateKeyPairSync('ec', { namedCurve })
const rsa = (modulusLength: number, publicExponent = 65537) => {
  return () => generateKeyPairSync('rsa', { modulusLength, publicExponent })
}

type Makers = Record<string, { kind: SigningKey['kind']; make: () => { privateKey: KeyObject; publicKey: KeyObject } }>

const quick: Makers = {
  'P-256': { kind: 'ec', make: ec('P-256') },
  'P-384': { kind: 'ec', make: ec('P-384') },
  Ed25519: { kind: 'edwards', make: () => generateKeyPairSync('ed25519') },
  'RSA 2048': { kind: 'rsa', make: rsa(2048) },
  'P-521': { kind: 'ec', make: ec('P-521') },
  'P-224': { kind: 'ec', make: ec('secp224r1') },
  secp256k1: { kind: 'ec', make: ec('secp256k1') },
  Ed448: { kind: 'edwards', make: () => generateKeyPairSync('ed448') },
  'RSA 1024': { kind: 'rsa', make: rsa(1024) },
  'RSA 2047': { kind: 'rsa', make: rsa(2047) },
  'RSA 2048 with exponent 3': { kind: 'rsa', make: rsa(2048, 3) },
  'RSA-PSS': { kind: 'rsa', make: () => generateKeyPairSync('rsa-pss', { modulusLength: 2048 }) },
}

/** These take a second or more to make. */
const slow: Makers = {
  DSA: { kind: 'dsa', make: () => generateKeyPairSync('dsa', { modulusLength: 2048, divisorLength: 256 }) },
  'RSA 2049': { kind: 'rsa', make: rsa(2049) },
  'RSA 3072': { kind: 'rsa', make: rsa(3072) },
  'RSA 4096': { kind: 'rsa', make: rsa(4096) },
  'RSA 4097': { kind: 'rsa', make: rsa(4097) },
  'RSA 4608': { kind: 'rsa', make: rsa(4608) },
}

/** Those of the quick ones that have to be accepted. */
export const allowedKeyNames = ['P-256', 'P-384', 'Ed25519', 'RSA 2048']
export const quickKeyNames = Object.keys(quick)
export const slowKeyNames = Object.keys(slow)

const made = new Map<string, SigningKey>()

/** Made when it is first asked for. */
export function keyNamed(name: string): SigningKey {
  const known = made.get(name)
  if (known !== undefined) return known
  const { kind, make } = { ...quick, ...slow }[name]!
  const { privateKey, publicKey } = make()
  const key = { kind, privateKey, spki: publicKey.export({ format: 'der', type: 'spki' }) }
  made.set(name, key)
  return key
}

const rsaWith = (last: number, digest: string) => ({
  algorithm: sequence(oid(`1.2.840.113549.1.1.${last}`), nullValue()),
  digest,
})
/** How each kind of key can sign, and how that is written. Old and broken ways come last. */
const signatures: Record<SigningKey['kind'], { algorithm: Buffer; digest: string | null }[]> = {
  ec: [
    { algorithm: sequence(oid('1.2.840.10045.4.3.2')), digest: 'sha256' },
    { algorithm: sequence(oid('1.2.840.10045.4.3.3')), digest: 'sha384' },
    { algorithm: sequence(oid('1.2.840.10045.4.3.4')), digest: 'sha512' },
    { algorithm: sequence(oid('1.2.840.10045.4.3.1')), digest: 'sha224' },
    { algorithm: sequence(oid('1.2.840.10045.4.1')), digest: 'sha1' },
  ],
  rsa: [rsaWith(11, 'sha256'), rsaWith(12, 'sha384'), rsaWith(13, 'sha512'), rsaWith(5, 'sha1'), rsaWith(4, 'md5')],
  edwards: [{ algorithm: sequence(oid('1.3.101.112')), digest: null }],
  dsa: [{ algorithm: sequence(oid('2.16.840.1.101.3.4.3.2')), digest: 'sha256' }],
}

/** Signs in one of the ways that the key can, and says so. */
export function signWith(key: SigningKey, way: number, bytes: Buffer): { algorithm: Buffer; signature: Buffer } {
  const ways = signatures[key.kind]
  const { algorithm, digest } = ways[way % ways.length]!
  return { algorithm, signature: sign(digest, bytes, key.privateKey) }
}
