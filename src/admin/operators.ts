/** Operators: taken back by others. They are made beside the database (`edgemesh operator create`), and renew by themselves. */
import { z } from 'zod'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import type { RevokeOperatorRequest, RevokeOperatorResponse } from '../gen/edgemesh/v1/admin.ts'
import type { RevocationReason } from '../identity/crl.ts'
import { Certificate } from '../identity/entities.ts'
import { demandStandingNow, lockOperators } from '../identity/standing.ts'
import { change } from './change.ts'
import { check, id, reason } from './request.ts'

const revokeRequest = z.object({ name: id, reason })
const revocationReason: RevocationReason = 'privilegeWithdrawn'

export function operatorHandlers({ db, clock }: { db: Database; clock: Clock }) {
  return {
    async revokeOperator(request: RevokeOperatorRequest, call: Call): Promise<RevokeOperatorResponse> {
      const { name, reason } = check(revokeRequest, request)
      const { caller } = call
      if (caller.kind !== 'operator') throw new Error('only operators administrate')
      call.audit.target = `operator/${name}`
      if (name === caller.id) throw operatorIsCaller(name)
      return change(db, call, async em => {
        // Step 1. Neither of the two renews, nor is revoked, until this transaction has ended. Of two who revoke each
        // other the second is out before it does: somebody stays.
        await lockOperators(em, [name, caller.id])
        await demandStandingNow(em, caller)

        // Step 2. All certificates, the expired ones too: another instance's clock may be behind.
        const ofOperator = { subjectKind: 'operator' as const, subjectId: name }
        const certificatesRevoked = await em.nativeUpdate(
          Certificate,
          { ...ofOperator, revokedAt: null },
          { revokedAt: new Date(clock()), revocationReason },
        )
        if (certificatesRevoked === 0 && (await em.count(Certificate, ofOperator)) === 0) throw operatorNotFound(name)

        call.audit.detail = { reason, certificates_revoked: certificatesRevoked }
        return { answer: { certificatesRevoked }, keys: [`operator:${name}`, 'crl:revoked'] }
      })
    },
  }
}

function operatorIsCaller(name: string): Fault {
  const message = `you call as operator ${name}: have another administrator revoke it, so that one is left`
  return new Fault('FAILED_PRECONDITION', 'OPERATOR_IS_CALLER', message)
}

function operatorNotFound(name: string): Fault {
  return new Fault(
    'NOT_FOUND',
    'OPERATOR_NOT_FOUND',
    `there is no operator ${name}: no certificate was ever made for one`,
  )
}
