/** The certificate authority, as operators see it and change it. */
import { z } from 'zod'
import type { Call } from '../caller.ts'
import type { Database } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import {
  AuthorityRole,
  AuthorityRotationStage,
  type CertificateAuthority,
  type GetAuthorityRequest,
  type GetAuthorityResponse,
  type HolderProgress as HolderProgressMessage,
  type ListRotationProgressRequest,
  type ListRotationProgressResponse,
  type RotateAuthorityRequest,
  type RotateAuthorityResponse,
} from '../gen/edgemesh/v1/admin.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'
import type { AuthoritySet, AuthorityStage, Generation, RotationStage } from '../identity/authorities.ts'
import type { Rotation } from '../identity/rotation.ts'
import { type HolderProgress, holderProgress, rotationProgress } from '../identity/rotation-progress.ts'
import { formatSpiffeId } from '../identity/spiffe-id.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, id, specified } from './request.ts'

/** The certificate authorities, and how to change them. */
export type AuthorityDeps = {
  trustDomain: string
  current(): AuthoritySet
  refresh(): Promise<void>
  trustBundle(): Promise<TrustBundle>
  rotation: Rotation
  /** CERT_RECOVERY_DAYS, in ms. */
  recoveryMs: number
}

const stages: Record<RotationStage, AuthorityRotationStage> = {
  stable: AuthorityRotationStage.STABLE,
  published: AuthorityRotationStage.PUBLISHED,
  issuing: AuthorityRotationStage.ISSUING,
  retiring: AuthorityRotationStage.RETIRING,
}

const roles: Record<AuthorityStage, AuthorityRole> = {
  prepared: AuthorityRole.PREPARED,
  trusted: AuthorityRole.TRUSTED,
  issuing: AuthorityRole.ISSUING,
  retired: AuthorityRole.RETIRED,
}

const rotateRequest = z.object({ stage: specified(AuthorityRotationStage), force: z.boolean() })
const holderKind = z.enum(['device', 'operator'])
const progressRequest = z.object({ ...page(z.tuple([holderKind, id])), behindOnly: z.boolean() })

export function authorityHandlers({
  db,
  reports,
  authority,
}: {
  db: Database
  reports: Reports
  authority: AuthorityDeps
}) {
  return {
    async getAuthority(_request: GetAuthorityRequest, call: Call): Promise<GetAuthorityResponse> {
      call.audit.target = 'authority'
      const set = authority.current()
      return {
        trustBundle: await authority.trustBundle(),
        rootNotAfter: set.issuing.rootNotAfter,
        intermediateNotAfter: set.issuing.issuer.notAfter,
        rotationStage: stages[set.rotation],
        rootKeySha256: set.issuing.rootKeySha256,
        authorities: set.all.map(authorityMessage),
        progress: set.other && (await rotationProgress(db.em(), set, authority.recoveryMs)),
      }
    },

    /** One stage on, or one stage back. Every instance follows within a second, and tells its devices. */
    async rotateAuthority(request: RotateAuthorityRequest, call: Call): Promise<RotateAuthorityResponse> {
      const asked = check(rotateRequest, request)
      const names = Object.keys(stages) as RotationStage[]
      const to = names.find(name => stages[name] === asked.stage)!
      call.audit.target = 'authority'
      await authority.refresh()
      call.audit.detail = { before: authority.current().rotation, after: to, force: asked.force }
      return change(db, call, async em => {
        const progress = await authority.rotation.to(em, to, asked.force)
        return { answer: { stage: asked.stage, progress }, keys: [] }
      })
    },

    /** Devices before operators, each by its id. */
    async listRotationProgress(
      request: ListRotationProgressRequest,
      call: Call,
    ): Promise<ListRotationProgressResponse> {
      const { pageSize, pageToken: after, behindOnly } = check(progressRequest, request)
      call.audit.target = 'authority'
      const { recoveryMs } = authority
      const asked = { after, limit: pageSize + 1, behindOnly, recoveryMs }
      const found = await reports.read(em => holderProgress(em, authority.current(), asked))
      const { rows, nextPageToken } = cutPage(found, pageSize, holder => [holder.kind, holder.id])
      return { holders: rows.map(row => holderMessage(row, authority.trustDomain)), nextPageToken }
    },
  }
}

function authorityMessage(authority: Generation): CertificateAuthority {
  return {
    generation: authority.generation,
    role: roles[authority.stage],
    rootKeySha256: authority.rootKeySha256,
    rootNotAfter: authority.rootNotAfter,
    issuerKeyId: authority.issuerKeyId,
    issuerNotAfter: authority.issuer.notAfter,
    createdAt: authority.createdAt,
    keyInFile: authority.keyInFile,
  }
}

function holderMessage(
  { kind, id, trusting, certified, lastSeenAtMs, notAfterMs }: HolderProgress,
  trustDomain: string,
): HolderProgressMessage {
  return {
    spiffeId: formatSpiffeId({ trustDomain, kind, id }),
    trusting,
    certified,
    lastSeenAt: lastSeenAtMs === null ? undefined : new Date(lastSeenAtMs),
    notAfter: new Date(notAfterMs),
  }
}
