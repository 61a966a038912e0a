/** Whether an operator's role may call a method: policy says (policies/admin.rego), not code. */
import type { PolicyEngine } from '../access/policy-engine.ts'
import type { Identified } from '../caller.ts'
import { Fault } from '../fault.ts'
import { spanned } from '../telemetry/tracing.ts'

/** @param method full name, such as `/edgemesh.v1.AdminService/ListDevices` */
export function permissionDemand(engine: PolicyEngine) {
  return async (operator: Identified, method: string): Promise<void> => {
    const name = method.slice(method.lastIndexOf('/') + 1)
    const question = { operator: { name: operator.id, role: operator.role }, method: name }
    const { allow, reasons } = await spanned('policy admin', {}, () => engine.evaluate('admin', question))
    if (allow) return
    const [reason] = reasons
    const message = `the role "${operator.role}" may not call ${name}; it takes ${reason?.required ?? 'another role'}`
    throw new Fault('PERMISSION_DENIED', reason?.code ?? 'OPERATOR_NOT_PERMITTED', message)
  }
}
