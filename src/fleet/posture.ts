/**
 * Posture: what a device says of its health, how messages merge into it, and what of it misses the requirements.
 */
import { type FieldViolation, invalidFields } from '../fault.ts'
import type { Posture } from '../gen/edgemesh/v1/types.ts'

/** A device's health as it is kept. What is absent is unknown. Percentages are 0 to 100. */
export type PostureValues = {
  cpuPercent?: number
  memoryPercent?: number
  diskPercent?: number
  patchesCurrent?: boolean
  antivirusEnabled?: boolean
  diskEncrypted?: boolean
  firewallEnabled?: boolean
  attributes: Record<string, string>
}

/** What policy requires of posture. Flags: has to be true. Maxima: the value has to be under it; null: no limit. */
export type PostureRequirements = {
  patches_current: boolean
  antivirus_enabled: boolean
  disk_encrypted: boolean
  firewall_enabled: boolean
  cpu_percent_max: number | null
  memory_percent_max: number | null
  disk_percent_max: number | null
}

const percentages = ['cpuPercent', 'memoryPercent', 'diskPercent'] as const
const flags = ['patchesCurrent', 'antivirusEnabled', 'diskEncrypted', 'firewallEnabled'] as const

const attributesMax = 32
const attributeKeyCharactersMax = 63
const attributeValueCharactersMax = 255
/** A measurement older than this is as good as none; the bound keeps ages in range. */
const ageMsMax = 365 * 86_400_000

/** @throws Fault INVALID_ARGUMENT that names every field out of bounds */
export function checkPosture(posture: Posture): void {
  const violations: FieldViolation[] = []
  for (const field of percentages) {
    const value = posture[field]
    if (value !== undefined && !(value >= 0 && value <= 100)) {
      violations.push({ field: `posture.${protoNames[field]}`, description: 'has to be from 0 to 100' })
    }
  }
  const attributes = Object.entries(posture.attributes)
  if (attributes.length > attributesMax) {
    violations.push({ field: 'posture.attributes', description: `has to have at most ${attributesMax} entries` })
  }
  for (const [key, value] of attributes.slice(0, attributesMax)) {
    if (key.length === 0 || key.length > attributeKeyCharactersMax) {
      violations.push({ field: 'posture.attributes', description: 'keys have to be of 1 to 63 characters' })
    }
    if (value.length > attributeValueCharactersMax) {
      violations.push({ field: 'posture.attributes', description: 'values have to be of at most 255 characters' })
    }
    // PostgreSQL's text knows no NUL.
    if (key.includes('\0') || value.includes('\0')) {
      violations.push({ field: 'posture.attributes', description: 'must not contain NUL characters' })
    }
  }
  if (violations.length > 0) throw invalidFields(violations)
}

/** What is known after `posture`, on top of what a stream has reported before; `undefined` before its first message. */
export function mergePosture(before: PostureValues | undefined, posture: Posture): PostureValues {
  const merged: PostureValues = before ? { ...before, attributes: before.attributes } : { attributes: {} }
  for (const field of percentages) {
    const value = posture[field]
    if (value !== undefined) merged[field] = value
  }
  for (const field of flags) {
    const value = posture[field]
    if (value !== undefined) merged[field] = value
  }
  // Attributes are whole or absent: an empty map means that they have not changed.
  if (Object.keys(posture.attributes).length > 0) merged.attributes = posture.attributes
  return merged
}

/**
 * When the posture was measured, by the server's clock: the device's clock only gives the age, so that a device that
 * believes it is 1970 is as good as any other.
 *
 * @param sentAt the device's clock when it sent the message
 */
export function measuredAtMs(posture: Posture, sentAt: Date | undefined, receivedAtMs: number): number {
  if (!posture.measuredAt || !sentAt) return receivedAtMs
  const ageMs = sentAt.getTime() - posture.measuredAt.getTime()
  if (!(ageMs > 0)) return receivedAtMs
  return receivedAtMs - Math.min(ageMs, ageMsMax)
}

/** Which requirements the posture misses, by the proto's field names, sorted. What is required and unknown is missed. */
export function failingPosture(posture: PostureValues, requirements: PostureRequirements): string[] {
  const failing: string[] = []
  for (const field of flags) {
    if (requirements[protoNames[field]] && posture[field] !== true) failing.push(protoNames[field])
  }
  for (const field of percentages) {
    const max = requirements[`${protoNames[field]}_max`]
    if (max !== null && !((posture[field] ?? Number.POSITIVE_INFINITY) < max)) failing.push(protoNames[field])
  }
  return failing.sort()
}

/**
 * What of the posture policy can see, as a string to compare: equal strings decide equally.
 *
 * Percentages count only by the side of their limit on which they are: a fleet whose load goes up and down all day must
 * not re-decide all its connections with each heartbeat. So limits belong into the policy's data, where this sees them.
 */
export function postureGround(posture: PostureValues, failing: readonly string[]): string {
  return JSON.stringify([
    failing,
    flags.map(field => posture[field] ?? null),
    percentages.map(field => posture[field] === undefined),
    Object.entries(posture.attributes).sort(),
  ])
}

const protoNames = {
  cpuPercent: 'cpu_percent',
  memoryPercent: 'memory_percent',
  diskPercent: 'disk_percent',
  patchesCurrent: 'patches_current',
  antivirusEnabled: 'antivirus_enabled',
  diskEncrypted: 'disk_encrypted',
  firewallEnabled: 'firewall_enabled',
} as const
