/**
 * RenewCertificate: the same identity, a new certificate, for the key of the CSR.
 *
 * Who renews is who the connection's certificate says. The old certificate stays valid until it expires, so that a device
 * can change over without a gap.
 */
import { recordCall } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import type { RenewCertificateRequest, RenewCertificateResponse } from '../gen/edgemesh/v1/enroll.ts'
import { checkCsr } from './csr.ts'
import { type EnrollDeps, identityOf } from './enroll.ts'
import { csrReplayed } from './issuance.ts'
import { deviceRevoked } from './standing.ts'

export function createRenew(deps: EnrollDeps) {
  return async (request: RenewCertificateRequest, call: Call): Promise<RenewCertificateResponse> => {
    if (call.caller.kind !== 'device') throw new Error('the method is for devices only')
    const { id } = call.caller
    const key = checkCsr(request.csr)
    deps.challenges.demand(key)
    const reservation = await deps.db
      .em()
      .transactional(async em => {
        // A revocation that is under way either sees the new serial or is seen here.
        const [device] = await em.execute<{ status: string }[]>('select status from devices where id = ? for update', [
          id,
        ])
        if (device?.status === 'revoked') throw deviceRevoked(id)
        const reserved = deps.issuance.reserve(em, { kind: 'device', id }, key, deps.certValidityMs)
        call.audit.target = `device/${id}`
        call.audit.detail = { serial: reserved.serial }
        await recordCall(em, call, { code: 'OK' })
        return reserved
      })
      .catch(error => {
        throw csrReplayed(error)
      })
    const certificate = await deps.issuance.sign(reservation)
    return { identity: await identityOf(deps, id, certificate), serverTime: new Date(deps.clock()) }
  }
}
