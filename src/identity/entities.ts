/** What identity keeps: enrollment tokens and their redemptions, certificates, and the certificate authority itself. */
import { defineEntity, type InferEntity, p } from '@mikro-orm/core'

export const EnrollmentToken = defineEntity({
  name: 'EnrollmentToken',
  tableName: 'enrollment_tokens',
  properties: {
    id: p.text().primary(),
    /** HMAC-SHA256 of the secret under ENROLLMENT_TOKEN_SECRET. The secret itself is never kept. */
    secretHash: p.blob(),
    usesMax: p.integer(),
    uses: p.integer().default(0),
    expiresAt: p.datetime(),
    revokedAt: p.datetime().nullable(),
    labels: p.json<Record<string, string>>(),
    /** Binds the token to one kind of device; null: any. */
    deviceType: p.text().nullable(),
    /** Binds the token to one device; null: any. */
    deviceId: p.text().nullable(),
    createdBy: p.text(),
    createdAt: p.datetime(),
  },
})
export type EnrollmentToken = InferEntity<typeof EnrollmentToken>

/** One use of a token by one key. The same key repeating its call is the same use. */
export const TokenRedemption = defineEntity({
  name: 'TokenRedemption',
  tableName: 'token_redemptions',
  properties: {
    tokenId: p.text().primary(),
    publicKeySha256: p.text().primary(),
    deviceId: p.text(),
    sourceAddress: p.text(),
    redeemedAt: p.datetime(),
  },
})
export type TokenRedemption = InferEntity<typeof TokenRedemption>

export const Certificate = defineEntity({
  name: 'Certificate',
  tableName: 'certificates',
  properties: {
    /** 128 random bits, lower-case hex. Reserved here before anything is signed. */
    serial: p.text().primary(),
    subjectKind: p.text().$type<'device' | 'operator' | 'service'>(),
    subjectId: p.text(),
    publicKeySha256: p.text(),
    /** Null until the certificate is signed. */
    fingerprintSha256: p.text().nullable(),
    notBefore: p.datetime(),
    notAfter: p.datetime(),
    revokedAt: p.datetime().nullable(),
    revocationReason: p.text().nullable(),
    createdAt: p.datetime(),
  },
})
export type Certificate = InferEntity<typeof Certificate>

/** The certificate authority: one row, its keys encrypted under CA_KEY_PASSPHRASE. */
export const StoredAuthority = defineEntity({
  name: 'StoredAuthority',
  tableName: 'authorities',
  properties: {
    id: p.integer().primary(),
    trustDomain: p.text(),
    rootPem: p.text(),
    rootKeyPem: p.text(),
    intermediatePem: p.text(),
    intermediateKeyPem: p.text(),
    createdAt: p.datetime(),
  },
})
export type StoredAuthority = InferEntity<typeof StoredAuthority>

export const identityEntities = [EnrollmentToken, TokenRedemption, Certificate, StoredAuthority]
