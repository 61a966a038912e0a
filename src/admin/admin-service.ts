/**
 * AdminService: what operators do, one file a noun.
 *
 * Who may call what has been decided (policies/admin.rego) before a handler runs. Each one checks its request whole
 * before it touches anything; each change is one transaction with its announcement and its audit event (`change.ts`).
 */
import type { handleServerStreamingCall, handleUnaryCall } from '@grpc/grpc-js'
import type { PolicyEngine } from '../access/policy-engine.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { Database } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import type { AdminServiceServer } from '../gen/edgemesh/v1/admin.ts'
import { auditEventHandlers } from './audit-events.ts'
import { type AuditStreamDeps, auditStreamHandlers } from './audit-streams.ts'
import { type AuthorityDeps, authorityHandlers } from './authority.ts'
import { connectionHandlers } from './connections.ts'
import { decisionHandlers } from './decisions.ts'
import { deviceHandlers } from './devices.ts'
import { grantHandlers } from './grants.ts'
import { lifecycleHandlers } from './lifecycle.ts'
import { operatorHandlers } from './operators.ts'
import { policyDataHandlers } from './policy-data.ts'
import { serviceHandlers } from './services.ts'
import { tokenHandlers } from './tokens.ts'
import { userHandlers } from './users.ts'

export type AdminDeps = {
  db: Database
  /** Where lists and reports are read. */
  reports: Reports
  clock: Clock
  /** HEALTH_CHECK_MAX_AGE_MINUTES. */
  maxAgeMs: number
  /** LEASE_GRACE_SECONDS. */
  leaseGraceMs: number
  /** ENROLLMENT_TOKEN_SECRET: what the hashes of tokens are made under. */
  tokenSecret: string
  authority: AuthorityDeps
  policy: {
    /** Names the policy that decides now. */
    revision(): string
    explain: PolicyEngine['explain']
    status: PolicyEngine['status']
    engine: 'in-process' | 'opa-server'
  }
}

/** Every unary method that the proto declares, as a handler. */
type AdminHandlers = {
  [Method in keyof AdminServiceServer as string extends Method
    ? never
    : Method]: AdminServiceServer[Method] extends handleUnaryCall<infer Request, infer Response>
    ? (request: Request, call: Call) => Promise<Response>
    : never
}

export function adminHandlers(deps: AdminDeps) {
  return {
    ...tokenHandlers(deps),
    ...deviceHandlers(deps),
    ...userHandlers(deps),
    ...serviceHandlers(deps),
    ...grantHandlers(deps),
    ...lifecycleHandlers(deps),
    ...connectionHandlers(deps),
    ...decisionHandlers(deps),
    ...auditEventHandlers(deps),
    ...authorityHandlers(deps),
    ...operatorHandlers(deps),
    ...policyDataHandlers(deps),
  } satisfies Partial<AdminHandlers>
}

/** Every method that the proto declares with a stream of answers, as a handler. */
type AdminStreamHandlers = {
  [Method in keyof AdminServiceServer as string extends Method
    ? never
    : Method]: AdminServiceServer[Method] extends handleServerStreamingCall<infer Request, infer Response>
    ? (request: Request, call: Call) => AsyncIterable<Response>
    : never
}

export function adminStreams(deps: AuditStreamDeps) {
  return { ...auditStreamHandlers(deps) } satisfies Partial<AdminStreamHandlers>
}
