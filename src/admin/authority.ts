/** The certificate authority, as operators see it. */
import type { Call } from '../caller.ts'
import {
  AuthorityRotationStage,
  type GetAuthorityRequest,
  type GetAuthorityResponse,
} from '../gen/edgemesh/v1/admin.ts'
import type { TrustBundle } from '../gen/edgemesh/v1/types.ts'

/** Who signs, and until when. */
export type AuthorityState = {
  /** SHA-256 of the root's SubjectPublicKeyInfo, lower-case hex. */
  rootKeySha256: string
  trustBundle(): Promise<TrustBundle>
  rootNotAfter: Date
  intermediateNotAfter: Date
}

export function authorityHandlers({ authority }: { authority: AuthorityState }) {
  return {
    async getAuthority(_request: GetAuthorityRequest, call: Call): Promise<GetAuthorityResponse> {
      call.audit.target = 'authority'
      return {
        trustBundle: await authority.trustBundle(),
        rootNotAfter: authority.rootNotAfter,
        intermediateNotAfter: authority.intermediateNotAfter,
        rotationStage: AuthorityRotationStage.STABLE,
        rootKeySha256: authority.rootKeySha256,
        authorities: [],
        progress: undefined,
      }
    },
  }
}
