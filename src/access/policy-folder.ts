/**
 * The policy in this process, out of a folder in which an operator replaces it while the service runs.
 *
 * Every `pollMs` the folder is looked at. Something else than before in it is, in this order,
 *
 *   read       whole (`policy-bundle.ts`); while files change under the reading, nothing is taken and nothing is said
 *   proven     it answers what it has to, and would not allow just anything (`policy-probe.ts`)
 *   activated  from one question to the next: each is decided by one policy, whose revision its answer names
 *
 * or, where it fails in one of these, refused: the policy before it goes on deciding, and log, metrics and readiness say so.
 * Files count as failing when two looks in a row have found them the same. Where there is no policy before it, as at the
 * start, nothing is decided until there is one.
 *
 * Polled, not watched: that works with mounts, links that are moved, and network file systems, and costs five `stat` a look.
 */
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Clock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { bundleFiles, type PolicyBundle, readBundle, UnusablePolicy } from './policy-bundle.ts'
import type { PolicyEngine, PolicyStatus } from './policy-engine.ts'
import { proveUsable } from './policy-probe.ts'
import { type CompiledPolicy, compilePolicy } from './policy-wasm.ts'

const pollMsDefault = 250

export type PolicyFolderOptions = {
  directory: string
  clock: Clock
  log: {
    info: (fields: Record<string, unknown>, message: string) => void
    error: (fields: Record<string, unknown>, message: string) => void
  }
  /** How often to look, 250 unless given. What needs two looks is taken this much later. */
  pollMs?: number
}

/** Starts although there is no usable policy: `ready()` is false, and questions fail, until there is. */
export async function startFolderPolicy(options: PolicyFolderOptions): Promise<PolicyEngine> {
  const { directory, clock, log, pollMs = pollMsDefault } = options
  const listeners: ((revision: string) => void)[] = []
  let active: CompiledPolicy | undefined
  let activatedAtMs: number | undefined
  let checkedAtMs: number | undefined
  let refused: (NonNullable<PolicyStatus['refused']> & { content: string }) | undefined
  let refusals = 0
  /** What the look before has found, by the signature of the files. */
  let before: { signature: string; content: string } | undefined
  /** The signature of files that need not be read again. */
  let settled: string | undefined
  let isStopped = false
  let timer: NodeJS.Timeout | undefined
  let looking = Promise.resolve()

  async function look(): Promise<void> {
    const signature = await signatureOf(directory)
    if (signature !== settled) await readAnew(signature)
    // What is refused has been looked at too; but nobody has seen that the policy which decides should.
    if (signature === settled && !refused) checkedAtMs = clock()
  }

  async function readAnew(signature: string): Promise<void> {
    const found = await readBundle(directory).catch((error: unknown) => error)
    if ((await signatureOf(directory)) !== signature) return
    const content = found instanceof Error ? found.message : contentOf(found as PolicyBundle)
    const isSeenTwice = before?.signature === signature && before.content === content
    before = { signature, content }
    // Two changes within one tick of the file system's clock look like one: what is read once more is what is there.
    if (isSeenTwice) settled = signature
    if (found instanceof Error) {
      if (isSeenTwice) refuse(found, content)
      return
    }
    const bundle = found as PolicyBundle
    if (!bundle.isWhole && !isSeenTwice) return
    await take(bundle).catch((error: unknown) => refuse(error, content))
  }

  async function take(bundle: PolicyBundle): Promise<void> {
    const { revision, digest } = bundle
    if (active && active.digest === digest && active.revision === revision) {
      if (refused) log.info({ directory, revision }, 'the policy that decides is in its folder again')
      refused = undefined
      return
    }
    if (refused?.content === contentOf(bundle)) return
    if (active?.revision === revision) {
      const problem = `${bundle.name} is another policy under the name of the one that decides, ${revision}`
      throw new UnusablePolicy(problem, 'give it a revision of its own, such as opa build --revision')
    }
    const startedAt = performance.now()
    const policy = await compilePolicy(bundle, ['authz', 'admin'])
    await proveUsable(bundle.name, ['authz', 'admin'], (entrypoint, input) =>
      policy.evaluate(entrypoint, input as never),
    )
    if (isStopped) return
    const ms = Math.round(performance.now() - startedAt)
    log.info({ directory, before: active?.revision, revision, ms }, 'another policy decides')
    active = policy
    activatedAtMs = clock()
    checkedAtMs = activatedAtMs
    refused = undefined
    for (const listener of listeners) listener(revision)
  }

  function refuse(error: unknown, content: string): void {
    if (refused?.content === content || isStopped) return
    const { message: problem, hint = 'see the log' } = error as Error & { hint?: string }
    refused = { problem, hint, sinceMs: clock(), content }
    refusals++
    const consequence = active ? 'the one before it goes on deciding' : 'nothing is decided'
    const fields = { directory, revision: active?.revision, problem, hint }
    log.error(error instanceof UnusablePolicy ? fields : { ...fields, err: error }, `policy refused: ${consequence}`)
  }

  function lookAgain(): void {
    if (isStopped) return
    timer = setTimeout(() => {
      looking = look()
        .catch(error => refuse(error, String(error)))
        .then(lookAgain)
    }, pollMs)
    timer.unref()
  }

  function current(): CompiledPolicy {
    if (active) return active
    throw new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', 'there is no usable policy, so nothing is allowed', {
      retryAfterMs: 1_000,
    })
  }

  await look()
  if (!active) {
    // What has to be seen twice is, before anybody asks.
    await sleep(pollMs)
    await look()
  }
  lookAgain()
  return {
    revision: () => active?.revision ?? '',
    evaluate: (entrypoint, input) => current().evaluate(entrypoint, input),
    explain: input => current().explain(input),
    ready: () => active !== undefined,
    status: () => ({
      revision: active?.revision ?? '',
      activatedAtMs,
      checkedAtMs,
      refused: refused && { problem: refused.problem, hint: refused.hint, sinceMs: refused.sinceMs },
      refusals,
    }),
    onRevision(listener) {
      listeners.push(listener)
    },
    async stop() {
      isStopped = true
      clearTimeout(timer)
      await looking
    },
  }
}

function contentOf({ revision, digest }: PolicyBundle): string {
  return `${revision} ${digest}`
}

/** Changes whenever one of the files is replaced or written to. */
async function signatureOf(directory: string): Promise<string> {
  const signatures = await Promise.all(
    bundleFiles.map(async name => {
      try {
        const { dev, ino, size, mtimeNs, ctimeNs } = await stat(join(directory, name), { bigint: true })
        return `${dev}:${ino}:${size}:${mtimeNs}:${ctimeNs}`
      } catch (error) {
        return (error as NodeJS.ErrnoException).code
      }
    }),
  )
  return signatures.join()
}
