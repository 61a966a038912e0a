/** What identity keeps: enrollment tokens and their redemptions, certificates, and the certificate authority itself. */
import { defineEntity, type InferEntity, p } from '@mikro-orm/core'

export const EnrollmentToken = defineEntity({
  name: 'EnrollmentToken',
  tableName: 'enrollment_tokens',
  properties: {
    id: p.text().primary(),
    /** HMAC-SHA256 of the secret under the key that `secretKeyOf` says. The secret itself is never kept. */
    secretHash: p.blob(),
    /** Null: any number, until it expires. */
    usesMax: p.integer().nullable(),
    uses: p.integer().default(0),
    expiresAt: p.datetime(),
    revokedAt: p.datetime().nullable(),
    labels: p.json<Record<string, string>>(),
    /** Binds the token to one kind of device; null: any. */
    deviceType: p.text().nullable(),
    /** Binds the token to one device; null: any. */
    deviceId: p.text().nullable(),
    /** Binds the token to devices whose id matches, `*` and `?` being wildcards; null: any. */
    deviceIdPattern: p.text().nullable(),
    /** Binds the token to callers from these networks, CIDR; empty: any. */
    sourceNetworks: p.json<string[]>().default([]),
    requiresApproval: p.boolean().default(false),
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
    /** When the device was first given a certificate; null while it waits for approval. */
    completedAt: p.datetime().nullable(),
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
    /** Key identifier of the issuer, hex; null: the first authority, before there were others. */
    issuerKeyId: p.text().nullable(),
    /** SHA-256 of the request that it was issued for: each is good once. Null for our own. */
    csrSha256: p.text().nullable(),
    revokedAt: p.datetime().nullable(),
    revocationReason: p.text().nullable(),
    createdAt: p.datetime(),
  },
})
export type Certificate = InferEntity<typeof Certificate>

/** A certificate authority, its keys encrypted under CA_KEY_PASSPHRASE. Its stages are those of `authority-store.ts`. */
export const StoredAuthority = defineEntity({
  name: 'StoredAuthority',
  tableName: 'authorities',
  properties: {
    id: p.integer().primary(),
    trustDomain: p.text(),
    rootPem: p.text(),
    /** Null: it is not here. */
    rootKeyPem: p.text().nullable(),
    intermediatePem: p.text(),
    /** Null: it is in CA_KEY_FILE. */
    intermediateKeyPem: p.text().nullable(),
    /** Certificates for this root by other roots, for who trusts only those. */
    crossPem: p.text().default(''),
    stage: p.text().$type<'prepared' | 'trusted' | 'issuing' | 'retired'>(),
    createdAt: p.datetime(),
  },
})
export type StoredAuthority = InferEntity<typeof StoredAuthority>

export const identityEntities = [EnrollmentToken, TokenRedemption, Certificate, StoredAuthority]
