/**
 * Asks for a certificate: a new key, and the PKCS#10 request (RFC 2986) that proves who holds it.
 *
 * The subject stays empty, because the server takes nothing but the public key from a request: who the certificate
 * names is known from the token or from the certificate that is renewed.
 */
import { createPrivateKey, createPublicKey, generateKeyPairSync, sign } from 'node:crypto'
import { bitString, contextConstructed, integer, oid, sequence, setOf, utf8String } from '../identity/der.ts'

/** RFC 5758 section 3.2: its AlgorithmIdentifier has no parameters. */
const ecdsaWithSha256 = sequence(oid('1.2.840.10045.4.3.2'))

/** RFC 2985 section 5.4.1. */
const challengePassword = oid('1.2.840.113549.1.9.7')

/** A new P-256 key, PKCS#8 in PEM. It is for this device alone: it is never sent. */
export function createKey(): string {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  return privateKey.export({ format: 'pem', type: 'pkcs8' })
}

/**
 * The request for a key, in DER. Made anew from the same key it asks for the same identity.
 *
 * @param challenge what the server gave out (`GetChallenge`) and wants to see signed; absent where nobody asks for one
 */
export function signingRequestFor(keyPem: string, challenge?: string): Buffer {
  const privateKey = createPrivateKey(keyPem)
  if (privateKey.asymmetricKeyDetails?.namedCurve !== 'prime256v1') throw new RangeError('the key is not a P-256 key')
  const version = integer(0)
  const emptySubject = sequence()
  const publicKey = createPublicKey(keyPem).export({ format: 'der', type: 'spki' })
  const attributes = challenge === undefined ? [] : [sequence(challengePassword, setOf(utf8String(challenge)))]
  const info = sequence(version, emptySubject, publicKey, contextConstructed(0, ...attributes))
  return sequence(info, ecdsaWithSha256, bitString(sign('sha256', info, privateKey)))
}
