/**
 * The one way to ask the policy, whoever evaluates it: the compiled policy in this process (`policy-wasm.ts`) or an
 * OPA server (`policy-server.ts`). Both run the same Rego, `policies/*.rego`, and give the same answers.
 *
 * The policy keeps nothing: all that it may look at is in the input, so a decision can be replayed from its input and
 * the revision of the policy. An engine never guesses. Where it has no answer it throws, and who asked denies.
 */
import { z } from 'zod'
import { Fault } from '../fault.ts'
import type { PostureRequirements } from '../fleet/posture.ts'

export type PolicyEntrypoint = 'authz' | 'admin'

/** One thing that stands against an allow. Programs compare `code` and `field`; `message` is for a person. */
export type PolicyReason = { code: string; field: string; actual: string; required: string; message: string }

export type PolicyDecision = {
  allow: boolean
  /** Everything that stands against it, sorted by code and field. Empty when allowed, never when denied. */
  reasons: PolicyReason[]
  /** How long the answer may be used again if nothing in the input changes but the time: 1 to 3600. */
  validForSeconds: number
  /** Whether the time of day was looked at; if not, the answer holds at any hour. */
  clockUsed: boolean
  /** Names the policy that has decided, which may be another one than decides now. */
  revision: string
}

/** How the policy that decides came to do so. */
export type PolicyStatus = {
  /** Empty until there is one that can decide. */
  revision: string
  /** Since when it decides at this instance, ms since epoch. */
  activatedAtMs: number | undefined
  /** When it was last seen that it is still the one that should decide, ms since epoch. */
  checkedAtMs: number | undefined
  /** What was found in its place and not taken: the one before it goes on deciding. */
  refused: { problem: string; hint: string; sinceMs: number } | undefined
  /** How often something has been refused since the start. */
  refusals: number
}

/** What `edgemesh.authz` is asked. The names are those of the policy's input. */
export type AuthzInput = {
  device: {
    id: string
    type: string
    /** `unknown`: there is no such device, or no longer. */
    status: 'active' | 'pending' | 'quarantined' | 'revoked' | 'unknown'
    labels: Record<string, string>
    authenticated: boolean
    /** null: the device has never reported. */
    health: DeviceHealth | null
  }
  /** null: there is no such user. */
  user: { id: string; role: string; status: 'active' | 'disabled' } | null
  /** null: there is no such service. */
  service: { id: string; labels: Record<string, string>; status: 'active' | 'disabled' } | null
  action: string
  /** What the user's role may do on this service; `*` is anything. */
  grants: string[]
  requirements: HealthRequirements
  /** When those whose role is not exempt may connect. null: at any time. */
  hours: AccessHours | null
  /** Now, in the time zone of the hours. `minute` counts from midnight, `second` within the minute. */
  time: { weekday: Weekday; minute: number; second: number }
}

/** An item is null where the device did not report it. What is required and not reported is refused. */
export type DeviceHealth = {
  age_seconds: number
  cpu_percent: number | null
  memory_percent: number | null
  disk_percent: number | null
  patches_current: boolean | null
  antivirus_enabled: boolean | null
  disk_encrypted: boolean | null
  firewall_enabled: boolean | null
  attributes: Record<string, unknown>
}

/** What the database requires of posture, and how old a report may be at most. */
export type HealthRequirements = PostureRequirements & { health_max_age_seconds: number }

/** A window within one day, from `start_minute` up to and without `end_minute`; 1440 is the end of the day. */
export type AccessHours = {
  timezone: string
  days: Weekday[]
  start_minute: number
  end_minute: number
  exempt_roles: string[]
}

export type Weekday = 'mon' | 'tue' | 'wed' | 'thu' | 'fri' | 'sat' | 'sun'

/** What `edgemesh.admin` is asked: the operator of the certificate, and the method by its name in the contract. */
export type AdminInput = { operator: { name: string; role: string }; method: string }

/** What one rule makes of a question. Where nothing is required, `required` says so, and the rule holds. */
export type RuleFinding = { field: string; actual: string; required: string; holds: boolean }

export type PolicyInput = { authz: AuthzInput; admin: AdminInput }

export type PolicyEngine = {
  /** Names the policy that answers now. */
  revision(): string
  /**
   * @throws {Fault} UNAVAILABLE, `POLICY_UNAVAILABLE` when the policy can't be evaluated, `POLICY_INVALID_RESULT` when
   * it can but its answer is not a decision
   */
  evaluate<E extends PolicyEntrypoint>(entrypoint: E, input: PolicyInput[E]): Promise<PolicyDecision> | PolicyDecision
  /**
   * Every rule with what it looked at, in the order in which a person would look. The question is allowed when all hold.
   * undefined where the policy has no explanation: whoever has written one of their own may do without.
   *
   * @throws {Fault} UNAVAILABLE, like `evaluate`
   */
  explain(input: AuthzInput): Promise<RuleFinding[] | undefined> | RuleFinding[] | undefined
  /** Whether a question asked now would probably be answered: for /readyz. */
  ready(): boolean
  status(): PolicyStatus
  /** Calls `listener` whenever another policy has taken over: what was decided before may no longer hold. */
  onRevision(listener: (revision: string) => void): void
  stop(): Promise<void>
}

const validForSecondsMax = 3600

const decisionDocument = z
  .object({
    allow: z.boolean(),
    reasons: z.array(
      z.object({
        code: z.string().regex(/^[A-Z][A-Z0-9_]*$/),
        field: z.string(),
        actual: z.string(),
        required: z.string(),
        message: z.string(),
      }),
    ),
    valid_for_seconds: z.int().min(1).max(validForSecondsMax),
    clock_used: z.boolean(),
  })
  .refine(({ allow, reasons }) => allow === (reasons.length === 0), 'an allow has no reasons, a deny has some')

/**
 * Reads what the policy of that revision answered. Nothing but a whole, well-formed document is a decision, least of all an allow: an
 * undefined result, `"true"`, or an allow with reasons against it are faults.
 *
 * @throws {Fault} UNAVAILABLE, `POLICY_INVALID_RESULT`
 */
export function parseDecision(document: unknown, revision: string): PolicyDecision {
  const parsed = decisionDocument.safeParse(document)
  if (!parsed.success) {
    throw new Fault('UNAVAILABLE', 'POLICY_INVALID_RESULT', 'the policy gave no usable answer, so nothing is allowed', {
      cause: parsed.error,
    })
  }
  const { allow, reasons, valid_for_seconds, clock_used } = parsed.data
  return { allow, reasons, validForSeconds: valid_for_seconds, clockUsed: clock_used, revision }
}

const findings = z
  .array(z.object({ field: z.string(), actual: z.string(), required: z.string(), holds: z.boolean() }))
  .min(1)

/** Reads how a policy explains itself. @throws {Fault} UNAVAILABLE, `POLICY_INVALID_RESULT` */
export function parseExplanation(document: unknown): RuleFinding[] | undefined {
  if (document === undefined) return undefined
  const parsed = findings.safeParse(document)
  if (parsed.success) return parsed.data
  throw new Fault('UNAVAILABLE', 'POLICY_INVALID_RESULT', 'the policy gave no usable explanation', {
    cause: parsed.error,
  })
}
