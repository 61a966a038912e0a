/** What access rests on and leaves behind: users, services, grants, policy data; connections and decisions. */
import { defineEntity, type InferEntity, p } from '@mikro-orm/core'
import type { PostureRequirements } from '../fleet/posture.ts'
import type { AuthzInput, PolicyReason } from './policy-engine.ts'

export const User = defineEntity({
  name: 'User',
  tableName: 'users',
  properties: {
    id: p.text().primary(),
    email: p.text(),
    name: p.text(),
    role: p.text(),
    status: p.text().$type<'active' | 'disabled'>(),
    createdAt: p.datetime(),
  },
})
export type User = InferEntity<typeof User>

export const Service = defineEntity({
  name: 'Service',
  tableName: 'services',
  properties: {
    id: p.text().primary(),
    name: p.text(),
    labels: p.json<Record<string, string>>(),
    owner: p.text(),
    status: p.text().$type<'active' | 'disabled'>(),
    createdAt: p.datetime(),
  },
})
export type Service = InferEntity<typeof Service>

/** What a role may do on a service; service `*` is every service, action `*` every action. */
export const RoleGrant = defineEntity({
  name: 'RoleGrant',
  tableName: 'role_grants',
  properties: {
    role: p.text().primary(),
    service: p.text().primary(),
    actions: p.json<string[]>(),
    createdAt: p.datetime(),
  },
})
export type RoleGrant = InferEntity<typeof RoleGrant>

export type BusinessHours = NonNullable<AuthzInput['hours']>

/** The data that policy is evaluated over, one row. */
export const PolicyData = defineEntity({
  name: 'PolicyData',
  tableName: 'policy_data',
  properties: {
    id: p.integer().primary(),
    requirements: p.json<PostureRequirements>(),
    hours: p.json<BusinessHours>().nullable(),
    updatedAt: p.datetime(),
  },
})
export type PolicyData = InferEntity<typeof PolicyData>

export const Connection = defineEntity({
  name: 'Connection',
  tableName: 'connections',
  properties: {
    id: p.uuid().primary(),
    deviceId: p.text(),
    userId: p.text(),
    serviceId: p.text(),
    action: p.text(),
    instanceId: p.text(),
    status: p.text().$type<'active' | 'revoked' | 'closed'>(),
    grantedAt: p.datetime(),
    endedAt: p.datetime().nullable(),
    endReasons: p.json<PolicyReason[]>().nullable(),
    decisionId: p.text(),
    /** Its stream is gone: until when the device may resume it, by the database's clock. */
    resumeBy: p.datetime().nullable(),
  },
})
export type Connection = InferEntity<typeof Connection>

/** One answered question inside a decision row. Its id is `<row id>.<position>`. */
export type DecidedQuestion = {
  user: string
  service: string
  action: string
  allow: boolean
  reasons: PolicyReason[]
  /** Rows of older versions have it only for all their questions together. */
  policyRevision?: string
  /** ISO 8601: when the input was gathered, and until when the answer held. Rows of older versions have neither. */
  evaluatedAt?: string
  expiresAt?: string
  /** What policy was asked. */
  input?: AuthzInput
  /** Instead of it: the decision, an earlier one by the same verdict, that has it, and the time of that, ISO 8601. */
  inputOf?: string
  inputAt?: string
}

/** All that one message asked, in one row. Partitioned by day of `at`. */
export const Decision = defineEntity({
  name: 'Decision',
  tableName: 'decisions',
  properties: {
    at: p.datetime().primary(),
    id: p.uuid().primary(),
    deviceId: p.text(),
    caller: p.text(),
    method: p.text(),
    sourceAddress: p.text(),
    instanceId: p.text(),
    policyRevision: p.text(),
    latencyUs: p.integer(),
    questions: p.json<DecidedQuestion[]>(),
  },
})
export type Decision = InferEntity<typeof Decision>

export const accessEntities = [User, Service, RoleGrant, PolicyData, Connection, Decision]
