/**
 * What a policy has to answer before it decides anything. Whether it is right, nobody can tell by a few questions; whether it
 * answers at all, and whether it would allow anything to anybody, they can.
 */
import { z } from 'zod'
import { Fault } from '../fault.ts'
import { UnusablePolicy, zodSentence } from './policy-bundle.ts'
import type { AuthzInput, PolicyDecision, PolicyEntrypoint } from './policy-engine.ts'

const requirements = {
  health_max_age_seconds: 300,
  patches_current: true,
  antivirus_enabled: true,
  disk_encrypted: true,
  firewall_enabled: false,
  cpu_percent_max: 90,
  memory_percent_max: 90,
  disk_percent_max: null,
}
const hours = { timezone: 'UTC', days: ['mon' as const], start_minute: 480, end_minute: 1080, exempt_roles: ['admin'] }

/** Nothing speaks for it. */
const stranger: AuthzInput = {
  device: { id: 'probe', type: 'unspecified', status: 'unknown', labels: {}, authenticated: false, health: null },
  user: null,
  service: null,
  action: 'connect',
  grants: [],
  requirements,
  hours,
  time: { weekday: 'mon', minute: 600, second: 0 },
}

const typical: AuthzInput = {
  ...stranger,
  device: {
    id: 'probe',
    type: 'laptop',
    status: 'active',
    labels: {},
    authenticated: true,
    health: {
      age_seconds: 10,
      cpu_percent: 20,
      memory_percent: 40,
      disk_percent: 60,
      patches_current: true,
      antivirus_enabled: true,
      disk_encrypted: true,
      firewall_enabled: true,
      attributes: {},
    },
  },
  user: { id: 'probe', role: 'engineer', status: 'active' },
  service: { id: 'probe', labels: {}, status: 'active' },
  grants: ['connect'],
}

type Probe = { entrypoint: PolicyEntrypoint; what: string; input: unknown; mustDeny: boolean }

const probes: readonly Probe[] = [
  { entrypoint: 'authz', what: 'an empty question', input: {}, mustDeny: true },
  { entrypoint: 'authz', what: 'a question of whom nothing is known', input: stranger, mustDeny: true },
  { entrypoint: 'authz', what: 'a question like any other', input: typical, mustDeny: false },
  { entrypoint: 'admin', what: 'an empty question', input: {}, mustDeny: true },
  {
    entrypoint: 'admin',
    what: 'a question like any other',
    input: { operator: { name: 'probe', role: 'admin' }, method: 'GetPolicyState' },
    mustDeny: false,
  },
]

/**
 * @param ask how the policy is asked; what it throws but a Fault is no fault of the policy
 * @throws {UnusablePolicy}
 */
export async function proveUsable(
  name: string,
  entrypoints: readonly PolicyEntrypoint[],
  ask: (entrypoint: PolicyEntrypoint, input: unknown) => PolicyDecision | Promise<PolicyDecision>,
): Promise<void> {
  for (const { entrypoint, what, input, mustDeny } of probes) {
    if (!entrypoints.includes(entrypoint)) continue
    const asked = `${what} (edgemesh/${entrypoint}/decision)`
    let decision: PolicyDecision
    try {
      decision = await ask(entrypoint, input)
    } catch (cause) {
      if (!(cause instanceof Fault)) throw cause
      const hint = 'the policy has to answer with a whole decision, whatever it is asked: see policies/authz.rego'
      throw new UnusablePolicy(`${name} gives no decision on ${asked}: ${whyOf(cause)}`, hint, { cause })
    }
    if (mustDeny && decision.allow) {
      const hint = 'begin with "default allow := false", and state what must hold'
      throw new UnusablePolicy(`${name} allows ${asked}, and so anything`, hint)
    }
  }
}

function whyOf(error: unknown): string {
  const { message, cause } = error as Error
  if (cause instanceof z.ZodError) return zodSentence(cause)
  return cause instanceof Error ? `${message}: ${cause.message}` : message
}
