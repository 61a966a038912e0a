/**
 * The certificate authorities that all instances share.
 *
 * There is one that issues; while a fleet changes from one to the next (`rotation.ts`) there are two. Each is a row, made
 * by the first instance to start, or registered by it from CA_CERT and CA_KEY; its key is in the row, sealed under
 * CA_KEY_PASSPHRASE, or in those files and nowhere else. A row's stages:
 *
 * - `prepared`: loaded from a file, trusted by nobody yet.
 * - `trusted`: in every trust bundle; issues nothing. The next one before it issues, or the last one after it has.
 * - `issuing`: signs all that is signed. Exactly one.
 * - `retired`: trusted no more. Kept for the way back, until the rotation is finished.
 *
 * Every instance holds them in memory and hears of changes through the change feed, under `authority:`.
 */
import { createHash, type X509Certificate } from 'node:crypto'
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { announce } from '../db/change-feed.ts'
import type { Database, EntityManager } from '../db/orm.ts'
import type { Log } from '../telemetry/log.ts'
import { type Authority, createAuthority, openAuthority, openAuthorityFiles } from './certificate-authority.ts'
import { StoredAuthority } from './entities.ts'
import { decodePem } from './pem.ts'

export type AuthorityStage = StoredAuthority['stage']

export type Generation = Authority & {
  /** From 1, greater for each that comes after. */
  generation: number
  stage: AuthorityStage
  keyInFile: boolean
  createdAt: Date
}

/** How far a rotation is; see `rotation.ts`. */
export type RotationStage = 'stable' | 'published' | 'issuing' | 'retiring'

/** All authorities at one moment. */
export type AuthoritySet = {
  rotation: RotationStage
  issuing: Generation
  /** The other party of a rotation: the next one while `published`, else the last one. */
  other: Generation | undefined
  /** Those whose certificates count, the one that issues first. */
  trusted: Generation[]
  all: Generation[]
  /** Names the set of trusted roots: the same for the same roots, whatever their order. */
  bundleId: string
}

export type Authorities = {
  current(): AuthoritySet
  /** Loads them anew, for who can't wait for the change feed to tell of a change that was just made. */
  refresh(): Promise<void>
  /** Called after `current` has changed. */
  onChange(listener: (now: AuthoritySet, before: AuthoritySet) => void): void
  stop(): void
}

export type AuthorityOptions = {
  db: Database
  trustDomain: string
  /** CA_CERT_VALIDITY_DAYS, for authorities made here. */
  validityDays: number
  /** CA_KEY_PASSPHRASE. */
  passphrase: string
  /** CA_CERT and CA_KEY, where the operator brings an authority. */
  files: { certPem: string; keyPem: string } | undefined
  clock: Clock
}

/** The key of the change feed under which authorities are announced. */
export const authorityChanged = 'authority:changed'
/** Any number will do, as long as every version of EdgeMesh uses the same. */
const authorityLock = 7_306_472
const reloadRetryMs = 500

/**
 * Loads them; makes the first one if there is none yet, exactly once however many instances start, and registers those
 * of CA_CERT that the database does not know.
 *
 * @throws Error naming the setting that does not fit
 */
export async function openAuthorities(options: AuthorityOptions): Promise<{ set: AuthoritySet; created: boolean }> {
  const { db, trustDomain, validityDays, passphrase, files, clock } = options
  const fromFiles = openFiles(files, passphrase, clock())
  const created = await db.transaction(async em => {
    const stored = await lockedAuthorities(em)
    demandTrustDomain(stored, trustDomain)
    if (stored.length === 0 && fromFiles.length === 0) {
      const material = await createAuthority({ trustDomain, validityDays, now: new Date(clock()), passphrase })
      insertAuthority(em, { id: 1, stage: 'issuing', trustDomain, createdAt: new Date(clock()), ...material })
      return true
    }
    const unknown = fromFiles.filter(({ issuerKeyId }) => !stored.some(row => issuerKeyIdOf(row) === issuerKeyId))
    let id = stored.at(-1)?.id ?? 0
    for (const authority of unknown) {
      id += 1
      insertAuthority(em, {
        id,
        stage: id === 1 ? 'issuing' : 'prepared',
        trustDomain,
        createdAt: new Date(clock()),
        ...pemsOf(authority),
        rootKeyPem: null,
        intermediateKeyPem: null,
      })
    }
    if (unknown.length > 0) await announce(em, [authorityChanged])
    return stored.length === 0
  })
  return { set: await loadAuthorities(options, fromFiles), created }
}

/** The same, kept current for as long as the change feed tells of changes. */
export async function keepAuthorities(
  options: AuthorityOptions & { feed: Pick<ChangeFeed, 'onChange' | 'onReset'>; log: Log },
): Promise<{ authorities: Authorities; created: boolean }> {
  const { feed, log, clock } = options
  const fromFiles = openFiles(options.files, options.passphrase, clock())
  const { set, created } = await openAuthorities(options)
  if (set.issuing.issuer.privateKey === undefined) throw keyMissing(set.issuing)
  for (const { stage, generation } of set.all) {
    if (stage !== 'prepared') continue
    log.warn({ generation }, 'CA_CERT holds an authority that issues nothing yet: change to it with edgemesh ca rotate')
  }
  const listeners: ((now: AuthoritySet, before: AuthoritySet) => void)[] = []
  let current = set
  let loading = 0
  let retry: NodeJS.Timeout | undefined

  /** Of loads that overlap the last one to start wins: it has seen every change that the others have. */
  async function reload(): Promise<void> {
    clearTimeout(retry)
    const turn = ++loading
    try {
      const loaded = await loadAuthorities(options, fromFiles)
      if (turn !== loading) return
      const before = current
      current = loaded
      if (fingerprint(before) !== fingerprint(loaded)) {
        const { rotation, issuing, bundleId } = loaded
        log.info({ rotation, issuing: issuing.generation, bundleId }, 'certificate authorities have changed')
        for (const listener of listeners) listener(loaded, before)
      }
    } catch (error) {
      log.warn({ err: error }, 'the certificate authorities can not be loaded yet')
      if (turn === loading) retry = setTimeout(reload, reloadRetryMs).unref()
    }
  }

  feed.onChange(keys => {
    if (keys.includes(authorityChanged)) void reload()
  })
  feed.onReset(() => void reload())
  return {
    created,
    authorities: {
      current: () => current,
      refresh: reload,
      onChange: listener => void listeners.push(listener),
      stop() {
        loading++
        clearTimeout(retry)
      },
    },
  }
}

/** What rows of these stages mean together. @throws Error when no authority issues */
export function authoritySet(all: Generation[]): AuthoritySet {
  const issuing = all.find(({ stage }) => stage === 'issuing')
  if (!issuing) throw new Error('no certificate authority of this database issues; restore its table authorities')
  const others = all.filter(({ stage }) => stage === 'trusted' || stage === 'retired')
  const [other] = others
  if (others.length > 1) throw new Error('more than two certificate authorities are in a rotation')
  const trusted = [issuing, ...others.filter(({ stage }) => stage === 'trusted')]
  const roots = trusted.flatMap(({ rootPem }) => decodePem('CERTIFICATE', rootPem))
  const digests = roots.map(der => createHash('sha256').update(der).digest('hex')).sort()
  return {
    rotation: rotationStage(issuing, other),
    issuing,
    other,
    trusted,
    all: [issuing, ...all.filter(one => one !== issuing)],
    bundleId: createHash('sha256').update(digests.join('\n')).digest('hex'),
  }
}

/** Whose signature a certificate carries; nothing is said of its dates. One that is only prepared is nobody yet. */
export function issuerOf(
  certificate: X509Certificate,
  { trusted, all }: AuthoritySet,
): 'trusted' | 'retired' | undefined {
  if (trusted.some(({ hasIssued }) => hasIssued(certificate))) return 'trusted'
  const retired = all.filter(({ stage }) => stage === 'retired')
  return retired.some(({ hasIssued }) => hasIssued(certificate)) ? 'retired' : undefined
}

function rotationStage(
  issuing: { generation: number },
  other: { generation: number; stage: AuthorityStage } | undefined,
): RotationStage {
  if (!other) return 'stable'
  if (other.stage === 'retired') return 'retiring'
  return other.generation > issuing.generation ? 'published' : 'issuing'
}

async function loadAuthorities(
  { db, trustDomain, passphrase }: AuthorityOptions,
  fromFiles: readonly Authority[],
): Promise<AuthoritySet> {
  const stored = await storedAuthorities(db.em())
  return openStored(stored, { trustDomain, passphrase }, fromFiles)
}

/**
 * The same, for who only looks: makes and registers nothing.
 *
 * @returns undefined where there is none yet
 * @throws Error naming what does not fit
 */
export async function readAuthorities(
  em: EntityManager,
  options: Pick<AuthorityOptions, 'trustDomain' | 'passphrase' | 'files' | 'clock'>,
): Promise<AuthoritySet | undefined> {
  const fromFiles = openFiles(options.files, options.passphrase, options.clock())
  const stored = await storedAuthorities(em)
  return stored.length === 0 ? undefined : openStored(stored, options, fromFiles)
}

function storedAuthorities(em: EntityManager): Promise<StoredAuthority[]> {
  return em.find(StoredAuthority, {}, { orderBy: { id: 'asc' } })
}

function openStored(
  stored: readonly StoredAuthority[],
  { trustDomain, passphrase }: Pick<AuthorityOptions, 'trustDomain' | 'passphrase'>,
  fromFiles: readonly Authority[],
): AuthoritySet {
  demandTrustDomain(stored, trustDomain)
  return authoritySet(
    stored.map(row => {
      const keyInFile = row.intermediateKeyPem == null
      const inFile = keyInFile ? fromFiles.find(({ issuerKeyId }) => issuerKeyId === issuerKeyIdOf(row)) : undefined
      const opened = openAuthority({ ...row, passphrase })
      const { id: generation, stage, createdAt } = row
      return {
        ...opened,
        ...(inFile && { ...inFile, crosses: opened.crosses }),
        generation,
        stage,
        keyInFile,
        createdAt,
      }
    }),
  )
}

/** @throws Error naming what does not fit, dates included: an authority that has expired signs nothing that counts */
function openFiles(files: AuthorityOptions['files'], passphrase: string, nowMs: number): Authority[] {
  if (!files) return []
  const opened = openAuthorityFiles({ ...files, passphrase })
  for (const { issuer, rootNotAfter } of opened) {
    if (issuer.notBefore.getTime() > nowMs) {
      throw new Error(`CA_CERT is not valid before ${issuer.notBefore.toISOString()}; see that the clock is right`)
    }
    const notAfter = issuer.notAfter < rootNotAfter ? issuer.notAfter : rootNotAfter
    if (notAfter.getTime() <= nowMs) throw new Error(`CA_CERT has expired at ${notAfter.toISOString()}; bring another`)
  }
  return opened
}

/** All rows, oldest first; nobody else changes or adds any until the transaction of `em` has ended. */
export async function lockedAuthorities(em: EntityManager): Promise<StoredAuthority[]> {
  await em.execute('select pg_advisory_xact_lock(?)', [authorityLock])
  return storedAuthorities(em)
}

export function insertAuthority(
  em: EntityManager,
  row: Pick<StoredAuthority, 'id' | 'stage' | 'trustDomain' | 'createdAt' | 'rootPem' | 'intermediatePem'> & {
    rootKeyPem: string | null
    intermediateKeyPem: string | null
    crossPem?: string
  },
): void {
  em.persist(em.create(StoredAuthority, { crossPem: '', ...row }))
}

function pemsOf({ rootPem, intermediates }: Authority): { rootPem: string; intermediatePem: string } {
  // A root that issues by itself is its own intermediate: see `openAuthority`.
  return { rootPem, intermediatePem: intermediates.join('') || rootPem }
}

function issuerKeyIdOf({ rootPem, intermediatePem }: { rootPem: string; intermediatePem: string }): string {
  return openAuthority({ rootPem, intermediatePem }).issuerKeyId
}

/** What listeners care about. */
function fingerprint({ all }: AuthoritySet): string {
  return all.map(({ generation, stage, issuerKeyId, crosses }) => [generation, stage, issuerKeyId, crosses]).join('|')
}

function demandTrustDomain(stored: readonly StoredAuthority[], trustDomain: string): void {
  const stranger = stored.find(row => row.trustDomain !== trustDomain)
  if (!stranger) return
  throw new Error(
    `TRUST_DOMAIN is ${trustDomain}, but the authority in this database is that of ${stranger.trustDomain}: ` +
      `set TRUST_DOMAIN=${stranger.trustDomain}, or use another database`,
  )
}

function keyMissing({ generation, issuerKeyId }: Generation): Error {
  return new Error(
    `the authority that issues (generation ${generation}, key ${issuerKeyId}) has its key in a file: ` +
      'give CA_CERT_FILE and CA_KEY_FILE to this instance too',
  )
}
