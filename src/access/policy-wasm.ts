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
import { type PolicyEngine, type PolicyEntrypoint, parseDecision } from './policy-engine.ts'

// Its ES module leaves out the synchronous loader, which is what replaces a broken instance without a gap.
const { loadPolicySync }: typeof import('@open-policy-agent/opa-wasm') = createRequire(import.meta.url)(
  '@open-policy-agent/opa-wasm',
)

const shippedBundle = join(import.meta.dirname, '..', '..', 'policies', 'bundle')

const compiledNames: Record<PolicyEntrypoint, string> = {
  authz: 'edgemesh/authz/decision',
  admin: 'edgemesh/admin/decision',
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
  const instantiate = () => loadPolicySync(compiled, { ...memoryLimits })
  let instance = instantiate()

  // By number, since the name of an entry point is otherwise looked up for every decision.
  const numbers: Record<PolicyEntrypoint, number> = {
    authz: numberOf(compiledNames.authz),
    admin: numberOf(compiledNames.admin),
  }

  function numberOf(name: string): number {
    const number: unknown = instance.entrypoints[name]
    if (typeof number !== 'number') throw new Error(`${directory}/policy.wasm does not answer ${name}`)
    return number
  }

  return {
    revision: () => revision,
    ready: () => true,

    evaluate(entrypoint, input) {
      let results: { result?: unknown }[]
      try {
        // Each evaluation starts on a fresh heap behind the policy's data: no decision can see another one's input.
        results = instance.evaluate(input, numbers[entrypoint])
      } catch (cause) {
        // A trap leaves the stack and the heap of the instance as they were in the middle of the work.
        instance = instantiate()
        throw new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', 'the policy could not be evaluated', { cause })
      }
      return parseDecision(results[0]?.result)
    },

    // The policy that was loaded stays until the process ends.
    onRevision() {},
    async stop() {},
  }
}
