/** What the fleet keeps: devices, their latest posture, and the history of their reports. */
import { defineEntity, type InferEntity, p } from '@mikro-orm/core'
import type { PostureValues } from './posture.ts'

export type DeviceTypeName = 'laptop' | 'server' | 'iot' | 'gateway' | 'unspecified'
export type DeviceStatusName = 'pending' | 'active' | 'quarantined' | 'revoked'

export const Device = defineEntity({
  name: 'Device',
  tableName: 'devices',
  properties: {
    id: p.text().primary(),
    type: p.text().$type<DeviceTypeName>(),
    os: p.text(),
    osVersion: p.text(),
    labels: p.json<Record<string, string>>(),
    status: p.text().$type<DeviceStatusName>(),
    statusReason: p.text().default(''),
    spiffeId: p.text(),
    /** The key that enrolled; another key can't take over the id. */
    publicKeySha256: p.text(),
    /** The expired certificate with which it came back and asked to be let in again; null: none. */
    recoverySerial: p.text().nullable(),
    enrolledAt: p.datetime(),
    updatedAt: p.datetime(),
  },
})
export type Device = InferEntity<typeof Device>

/** The newest posture of a device: one row a device, rewritten by every batch of heartbeats. */
export const DevicePosture = defineEntity({
  name: 'DevicePosture',
  tableName: 'device_postures',
  properties: {
    deviceId: p.text().primary(),
    posture: p.json<PostureValues>(),
    /** Names of the requirements that it misses. */
    failing: p.json<string[]>(),
    measuredAt: p.datetime(),
    receivedAt: p.datetime(),
    /** `TrustBundle.id` as the device reported it; empty: never. */
    trustBundleId: p.text().default(''),
    /** Key identifier of the issuer of the certificate with which it reported. */
    issuerKeyId: p.text().default(''),
    /** How far the device's clock was ahead of ours; null: never told. */
    clockOffsetMs: p.bigint('number').nullable(),
  },
})
export type DevicePosture = InferEntity<typeof DevicePosture>

/** One acknowledged heartbeat. Partitioned by day of `receivedAt`. */
export const HealthReport = defineEntity({
  name: 'HealthReport',
  tableName: 'health_reports',
  properties: {
    receivedAt: p.datetime().primary(),
    deviceId: p.text().primary(),
    sequence: p.bigint('number').primary(),
    posture: p.json<PostureValues>(),
    measuredAt: p.datetime(),
  },
})
export type HealthReport = InferEntity<typeof HealthReport>

/** What becomes of devices with these labels that have not been seen for so many days. */
export const LifecycleRule = defineEntity({
  name: 'LifecycleRule',
  tableName: 'lifecycle_rules',
  properties: {
    id: p.text().primary(),
    labels: p.json<Record<string, string>>(),
    action: p.text().$type<'quarantine' | 'delete'>(),
    unseenDays: p.integer(),
    createdAt: p.datetime(),
  },
})
export type LifecycleRule = InferEntity<typeof LifecycleRule>

export const fleetEntities = [Device, DevicePosture, HealthReport, LifecycleRule]
