/**
 * The policy in this process: the Rego of `policies/`, compiled to WebAssembly by `policies/build.ts`.
 *
 * The default where no OPA server is configured. It can't be out of reach, and takes some 30 µs of this thread to allow
 * and 100 µs to deny, where asking an OPA server on the same machine takes a millisecond. It changes only with a restart.
 */
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { z } from 'zod'
import { Fault } from '../fault.ts'
import { type PolicyEngine, type PolicyEntrypoint, parseDecision, parseExplanation } from './policy-engine.ts'

// Its ES module leaves out the synchronous loader, which is what replaces a broken instance without a gap.
const { loadPolicySync }: typeof import('@open-policy-agent/opa-wasm') = createRequire(import.meta.url)(
  '@open-policy-agent/opa-wasm',
)

const shippedBundle = join(import.meta.dirname, '..', '..', 'policies', 'bundle')

const compiledNames = {
  authz: 'edgemesh/authz/decision',
  admin: 'edgemesh/admin/decision',
  explanation: 'edgemesh/authz/explanation',
}

// Pages of 64 KiB. Memory grows to what the largest question ever asked has taken, three times its length, and never
// shrinks. At 64 MiB the policy's own allocator refuses that question, and the instance is replaced.
const memoryLimits = { initial: 5, maximum: 1024 }

/** @param options.bundleDirectory where `policy.wasm` and `manifest.json` are; the shipped ones unless told otherwise */
export async function startWasmPolicy(options: { bundleDirectory?: string } = {}): Promise<PolicyEngine> {
  const directory = options.bundleDirectory ?? shippedBundle
  const { revision } = z
    .object({ revision: z.string().min(1) })
    .parse(JSON.parse(await readFile(join(directory, 'manifest.json'), 'utf8')))
  const compiled = await readFile(join(directory, 'policy.wasm'))
  return wasmPolicy({ compiled, revision, name: `${directory}/policy.wasm`, answers: ['authz', 'admin'] })
}

/**
 * @param policy.name what it is called where something is wrong with it
 * @param policy.answers what it must be able to answer
 * @throws Error when it can't
 */
export function wasmPolicy(policy: {
  compiled: Buffer
  revision: string
  name: string
  answers: PolicyEntrypoint[]
}): PolicyEngine {
  const { compiled, revision, name } = policy
  const instantiate = () => loadPolicySync(compiled, { ...memoryLimits })
  let instance = instantiate()

  // By number, since the name of an entry point is otherwise looked up for every decision.
  const numbers = {
    authz: numberOf(compiledNames.authz),
    admin: numberOf(compiledNames.admin),
    explanation: numberOf(compiledNames.explanation),
  }
  for (const entrypoint of policy.answers) {
    if (numbers[entrypoint] === undefined) throw new Error(`${name} does not answer ${compiledNames[entrypoint]}`)
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
    revision: () => revision,
    ready: () => true,
    evaluate: (entrypoint, input) => parseDecision(ask(numbers[entrypoint], input)),
    explain: input => parseExplanation(ask(numbers.explanation, input)),
    // The policy that was loaded stays until the process ends.
    onRevision() {},
    async stop() {},
  }
}
