/**
 * A policy in this process: Rego compiled to WebAssembly. It can't be out of reach, and takes some 30 µs of this thread to
 * allow and 100 µs to deny, where asking an OPA server on the same machine takes a millisecond.
 *
 * `startShippedPolicy` runs the one that comes with the program, until the process ends. `policy-folder.ts` runs what an
 * operator puts into a folder.
 */
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { buildHint, type PolicyBundle, readBundle, UnusablePolicy } from './policy-bundle.ts'
import {
  type AuthzInput,
  type PolicyDecision,
  type PolicyEngine,
  type PolicyEntrypoint,
  type PolicyInput,
  parseDecision,
  parseExplanation,
  type RuleFinding,
} from './policy-engine.ts'

// Its ES module leaves out the synchronous loader, which is what replaces a broken instance without a gap.
const { loadPolicySync }: typeof import('@open-policy-agent/opa-wasm') = createRequire(import.meta.url)(
  '@open-policy-agent/opa-wasm',
)

// Node has it; its types come with those of browsers only.
declare const WebAssembly: { compile(compiled: Uint8Array): Promise<CompiledModule> }
type CompiledModule = Parameters<typeof loadPolicySync>[0]

const shippedBundle = join(import.meta.dirname, '..', '..', 'policies', 'bundle')

const compiledNames = {
  authz: 'edgemesh/authz/decision',
  admin: 'edgemesh/admin/decision',
  explanation: 'edgemesh/authz/explanation',
}

// Pages of 64 KiB. Memory grows to what the largest question ever asked has taken, three times its length, and never
// shrinks. At 64 MiB the policy's own allocator refuses that question, and the instance is replaced.
const memoryLimits = { initial: 5, maximum: 1024 }

/** Answers at once, by one policy, and stays what it is. */
export type CompiledPolicy = {
  revision: string
  digest: string
  /** @throws {Fault} UNAVAILABLE, like `PolicyEngine.evaluate` */
  evaluate<E extends PolicyEntrypoint>(entrypoint: E, input: PolicyInput[E]): PolicyDecision
  /** @throws {Fault} UNAVAILABLE */
  explain(input: AuthzInput): RuleFinding[] | undefined
  /** What the policy says, unread. */
  document(entrypoint: PolicyEntrypoint, input: unknown): unknown
}

export async function startShippedPolicy(clock: Clock = systemClock): Promise<PolicyEngine> {
  const policy = await compilePolicy(await readBundle(shippedBundle), ['authz', 'admin'])
  const activatedAtMs = clock()
  return {
    revision: () => policy.revision,
    evaluate: policy.evaluate,
    explain: policy.explain,
    ready: () => true,
    // It can't change while the process lives, and so need not be looked at again.
    status: () => ({
      revision: policy.revision,
      activatedAtMs,
      checkedAtMs: clock(),
      refused: undefined,
      refusals: 0,
    }),
    onRevision() {},
    async stop() {},
  }
}

/**
 * @param answers what it must be able to answer
 * @throws {UnusablePolicy} when it can't
 */
export async function compilePolicy(
  { compiled, data, revision, digest, name }: PolicyBundle,
  answers: readonly PolicyEntrypoint[],
): Promise<CompiledPolicy> {
  let module: CompiledModule
  let instance: ReturnType<typeof instantiate>
  try {
    module = await WebAssembly.compile(compiled)
    instance = instantiate()
  } catch (cause) {
    throw new UnusablePolicy(`${name} is no compiled policy: ${messageOf(cause)}`, buildHint, { cause })
  }

  function instantiate() {
    const instance = loadPolicySync(module, { ...memoryLimits })
    instance.setData(data)
    return instance
  }

  // By number, since the name of an entry point is otherwise looked up for every decision.
  const numbers = {
    authz: numberOf(compiledNames.authz),
    admin: numberOf(compiledNames.admin),
    explanation: numberOf(compiledNames.explanation),
  }
  for (const entrypoint of answers) {
    if (numbers[entrypoint] !== undefined) continue
    throw new UnusablePolicy(`${name} does not answer ${compiledNames[entrypoint]}`, buildHint)
  }

  function numberOf(entrypoint: string): number | undefined {
    const number: unknown = instance.entrypoints[entrypoint]
    return typeof number === 'number' ? number : undefined
  }

  function ask(number: number | undefined, input: unknown): unknown {
    if (number === undefined) return undefined
    try {
      // Each evaluation starts on a fresh heap behind the policy's data: no decision can see another one's input.
      const results: { result?: unknown }[] = instance.evaluate(input, number)
      return results[0]?.result
    } catch (cause) {
      // A trap leaves the stack and the heap of the instance as they were in the middle of the work.
      instance = instantiate()
      throw new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', 'the policy could not be evaluated', { cause })
    }
  }

  return {
    revision,
    digest,
    evaluate: (entrypoint, input) => parseDecision(ask(numbers[entrypoint], input), revision),
    explain: input => parseExplanation(ask(numbers.explanation, input)),
    document: (entrypoint, input) => ask(numbers[entrypoint], input),
  }
}

/** What the library throws is a text where the policy is of another ABI. */
function messageOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause)
}
