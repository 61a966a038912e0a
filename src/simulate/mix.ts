/** Which share of a fleet is how: `healthy=90,stale=5,failing=5`. */
import type { Posture } from '../gen/edgemesh/v1/types.ts'

/** Stale: what it reports was measured a day ago. Failing: its disk is not encrypted, and its patches are behind. */
export const healths = ['healthy', 'stale', 'failing'] as const
export type Health = (typeof healths)[number]

/** Weights: whole numbers of any sum above 0. */
export type PostureMix = Readonly<Record<Health, number>>

export const weightMax = 1_000_000

/** Longer than any HEALTH_CHECK_MAX_AGE_MINUTES. */
const staleAgeMs = 2 * 86_400_000

/** @throws RangeError that says what is wrong and what would be right */
export function parsePostureMix(text: string): PostureMix {
  const mix = { healthy: 0, stale: 0, failing: 0 }
  const named = new Set<string>()
  for (const part of text.split(',')) {
    const [, name = '', weight = ''] = /^\s*([a-z]+)=(\d{1,7})\s*$/.exec(part) ?? []
    const health = healths.find(known => known === name)
    if (!health || named.has(name) || Number(weight) > weightMax) {
      throw new RangeError(`${JSON.stringify(part)} is not a share, each once: healthy=90,stale=5,failing=5`)
    }
    named.add(name)
    mix[health] = Number(weight)
  }
  if (mix.healthy + mix.stale + mix.failing === 0) throw new RangeError('at least one share has to be above 0')
  return mix
}

/**
 * How each device of a fleet is, by its number. Any run from the first on holds the shares as nearly as whole devices can:
 * each device goes to the health that lacks most.
 */
export function healthsOf(mix: PostureMix, devices: number): Health[] {
  const sum = mix.healthy + mix.stale + mix.failing
  const lacking = { healthy: 0, stale: 0, failing: 0 }
  return Array.from({ length: devices }, () => {
    for (const health of healths) lacking[health] += mix[health]
    const chosen = healths.reduce((most, health) => (lacking[health] > lacking[most] ? health : most))
    lacking[chosen] -= sum
    return chosen
  })
}

/** What a device of this health reports now. */
export function postureOf(health: Health, nowMs: number, random: () => number = Math.random): Partial<Posture> {
  const failing = health === 'failing'
  return {
    cpuPercent: 5 + Math.round(40 * random()),
    memoryPercent: 20 + Math.round(40 * random()),
    diskPercent: 40,
    patchesCurrent: !failing,
    antivirusEnabled: true,
    diskEncrypted: !failing,
    firewallEnabled: true,
    measuredAt: new Date(health === 'stale' ? nowMs - staleAgeMs : nowMs),
  }
}
