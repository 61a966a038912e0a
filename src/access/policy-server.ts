/**
 * The policy in an OPA server: the production path, where policies change without a restart of ours.
 *
 * Questions go through a circuit breaker:
 *
 *   closed     every question is asked. `failuresUntilOpen` questions in a row without an answer: open.
 *   open       nothing is asked, every question fails at once. After `openMs`: half-open.
 *   half-open  one question is asked, the others wait for how it fares. An answer: closed. None: open.
 *
 * Beside the questions a watch asks, every `pollMs`, which policy is loaded. It goes past the breaker: it is what finds
 * a server that came back, even when nobody asks anything.
 *
 * With each answer OPA names the bundles that it decided by, so an answer is never under the name of another policy; one of
 * a policy that the watch has not seen yet waits until it has. Loaded without bundles, a policy has only the name under
 * which the watch saw it last, which may be `pollMs` old.
 *
 * A policy that gives no decisions, or would allow anything, is not asked: unlike that of a folder, the one before it can't
 * go on, since OPA has it no more.
 */
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { SpanKind } from '@opentelemetry/api'
import {
  BrokenCircuitError,
  bulkhead,
  CircuitState,
  ConsecutiveBreaker,
  circuitBreaker,
  handleWhen,
  wrap,
} from 'cockatiel'
import { LRUCache } from 'lru-cache'
import { type Dispatcher, Pool } from 'undici'
import { z } from 'zod'
import { type Clock, systemClock } from '../clock.ts'
import { Fault } from '../fault.ts'
import { passOnTrace, spanned } from '../telemetry/tracing.ts'
import { UnusablePolicy } from './policy-bundle.ts'
import {
  type PolicyDecision,
  type PolicyEngine,
  type PolicyEntrypoint,
  type PolicyStatus,
  parseDecision,
  parseExplanation,
} from './policy-engine.ts'
import { proveUsable } from './policy-probe.ts'

const connectionsMax = 64
/** Asked at once, those included that wait for a connection. At 1 ms an answer, 64 connections clear 1,024 in 16 ms. */
const questionsMax = 1024
const failuresUntilOpen = 5
const openMs = 1000
/** A decision with every reason there is takes about 4 KiB. */
const decisionBytesMax = 64 * 1024
/** The list of policies carries the syntax tree of each: about 120 KiB for ours. */
const policiesBytesMax = 8 * 1024 * 1024
/** Answers of a policy that is new make the watch look at once, but no more often than this. */
const looksApartMs = 100
/** Servers behind one address may have so many policies at a time. */
const provenMax = 16

const pathOf = {
  authz: 'v1/data/edgemesh/authz/decision?provenance=true',
  explanation: 'v1/data/edgemesh/authz/explanation',
  admin: 'v1/data/edgemesh/admin/decision?provenance=true',
}

export type OpaPolicyOptions = {
  /** Where OPA listens, such as `http://127.0.0.1:8181`; a path before `/v1` is kept. */
  url: string
  /** How long one question may take, the wait for a connection included. */
  timeoutMs: number
  /** What OPA asks for when it runs with `--authentication=token`. */
  bearerToken?: string
  clock?: Clock
  log: {
    error: (fields: Record<string, unknown>, message: string) => void
    warn: (fields: Record<string, unknown>, message: string) => void
    info: (fields: Record<string, unknown>, message: string) => void
  }
  /** How often to look which policy is loaded, 1000 unless given. A new policy is noticed this late at most. */
  pollMs?: number
}

/** Starts although OPA is down: `ready()` is false, and questions fail, until it answers. */
export async function startOpaPolicy(options: OpaPolicyOptions): Promise<PolicyEngine> {
  const { timeoutMs, bearerToken, log, clock = systemClock, pollMs = 1000 } = options
  const base = new URL(options.url.endsWith('/') ? options.url : `${options.url}/`)
  const pool = new Pool(base.origin, { connections: connectionsMax, connect: { timeout: timeoutMs } })
  const breaker = circuitBreaker(isOutage, {
    breaker: new ConsecutiveBreaker(failuresUntilOpen),
    halfOpenAfter: openMs,
  })
  const guarded = wrap(bulkhead(questionsMax), breaker)
  breaker.onStateChange(state => log.warn({ state: CircuitState[state] }, 'circuit breaker of the policy server'))

  const listeners: ((revision: string) => void)[] = []
  let revision = 'unknown'
  /** Revisions that have been seen to be usable. */
  const proven = new LRUCache<string, true>({ max: provenMax })
  let activatedAtMs: number | undefined
  let checkedAtMs: number | undefined
  let refused: (NonNullable<PolicyStatus['refused']> & { revision: string }) | undefined
  let refusals = 0
  let isAnswering: boolean | undefined
  let isStopped = false
  let timer: NodeJS.Timeout | undefined
  let looking: Promise<void> | undefined
  let lookedAt = Number.NEGATIVE_INFINITY

  function request(method: 'GET' | 'POST', path: string, bytesMax: number, signal: AbortSignal, question?: unknown) {
    const headers: Record<string, string> = { accept: 'application/json' }
    if (question !== undefined) headers['content-type'] = 'application/json'
    if (bearerToken !== undefined) headers.authorization = `Bearer ${bearerToken}`
    passOnTrace(headers)
    const body = question === undefined ? null : JSON.stringify(question)
    return pool
      .request({ method, path: base.pathname + path, headers, body, signal })
      .then(response => readAnswer(response, bytesMax))
  }

  /** One question with its deadline; only a server that is in trouble counts against it. */
  function ask(what: keyof typeof pathOf, input: unknown): Promise<Answer> {
    const deadline = AbortSignal.timeout(timeoutMs)
    return guarded.execute(async () => {
      const answer = await spanned(
        'ask OPA',
        { 'server.address': base.hostname, 'url.path': base.pathname + pathOf[what] },
        () => request('POST', pathOf[what], decisionBytesMax, deadline, { input }),
        SpanKind.CLIENT,
      )
      // Not 500: that is one question over which the policy stumbles.
      if ([429, 502, 503, 504].includes(answer.status)) throw new Error(`OPA answered ${answer.status}`)
      return answer
    }, deadline)
  }

  /** The document that the policy gives, undefined where it has none: OPA answers 200 then too. */
  async function answerOf(what: keyof typeof pathOf, input: unknown): Promise<DecisionAnswer> {
    const answer = await ask(what, input).catch((cause: unknown) => {
      if (cause instanceof Fault) throw cause
      throw unavailable(
        cause instanceof BrokenCircuitError ? 'was not asked: it has just failed' : 'gave no answer',
        cause,
      )
    })
    if (answer.status !== 200) throw unavailable(`answered ${answer.status}`)
    return readDecisionAnswer(answer)
  }

  async function evaluate(entrypoint: PolicyEntrypoint, input: unknown): Promise<PolicyDecision> {
    const { result, provenance } = await answerOf(entrypoint, input)
    if (result === undefined) throw unavailable('has no such policy loaded')
    const named = revisionOf(provenance)
    const decision = parseDecision(result, named ?? revision)
    // Rarely: another policy has been loaded since the watch has looked, or there are servers with different ones.
    if (decision.revision !== revision || !proven.has(decision.revision)) {
      const looked = look()
      if (!proven.has(decision.revision)) await looked
      // The look that was under way had begun before there was this policy.
      if (!proven.has(named ?? revision)) await look()
    }
    const decidedBy = named ?? revision
    if (refused || !proven.has(decidedBy)) throw unavailable('has a policy that can not be used')
    return decidedBy === decision.revision ? decision : { ...decision, revision: decidedBy }
  }

  async function watch(): Promise<void> {
    await look()
    if (!isStopped) timer = setTimeout(watch, pollMs).unref()
  }

  /** Who wants to look while somebody does, shares what is seen. Never throws. */
  function look(): Promise<void> {
    looking ??= lookOnce().finally(() => {
      looking = undefined
      lookedAt = performance.now()
    })
    return looking
  }

  async function lookOnce(): Promise<void> {
    const waitMs = lookedAt + looksApartMs - performance.now()
    if (waitMs > 0) await sleep(waitMs)
    let found: string | undefined
    try {
      found = await findRevision()
      // Not only when it is another one: whoever loads a policy without a name of its own is not missed.
      await proveUsable(`the policy ${found} of OPA`, await provable(found), evaluateUnproven)
    } catch (error) {
      if (isStopped) return
      if (error instanceof UnusablePolicy && found !== undefined) return refuse(error, found)
      if (error instanceof Fault) return refuse(stumbling(error), found ?? revision)
      if (isAnswering !== false) log.warn({ url: base.origin, err: error }, 'policy server does not answer')
      isAnswering = false
      return
    }
    if (isStopped) return
    if (isAnswering !== true) log.info({ url: base.origin }, 'policy server answers')
    isAnswering = true
    refused = undefined
    checkedAtMs = clock()
    proven.set(found, true)
    if (found === revision) return
    log.info({ before: revision, revision: found }, 'policy server has another policy')
    revision = found
    activatedAtMs = checkedAtMs
    for (const listener of listeners) listener(found)
  }

  /** A policy that says nothing about operators keeps them out, and does no harm. */
  async function provable(found: string): Promise<PolicyEntrypoint[]> {
    if (found === revision && !refused) return ['authz']
    const { result } = await answerUnproven('admin', {})
    return result === undefined ? ['authz'] : ['authz', 'admin']
  }

  /** Loud, and once for each policy. */
  function refuse({ message: problem, hint }: UnusablePolicy, found: string): void {
    isAnswering = false
    proven.delete(found)
    if (refused?.revision === found && refused.problem === problem) return
    refused = { problem, hint, revision: found, sinceMs: clock() }
    refusals++
    log.error({ url: base.origin, revision: found, problem, hint }, 'policy refused: nothing is decided')
  }

  /** The revisions of OPA's bundles; without bundles, a hash over the loaded policies, where we may read them. */
  async function findRevision(): Promise<string> {
    const ofBundles = revisionOf((await answerUnproven('authz', {})).provenance)
    if (ofBundles !== undefined) return ofBundles

    const policies = await request('GET', 'v1/policies', policiesBytesMax, AbortSignal.timeout(timeoutMs))
    if (policies.status === 401 || policies.status === 403) return 'unversioned'
    if (policies.status !== 200) throw new Error(`OPA answered ${policies.status}`)
    return hashOf(policyList.parse(JSON.parse(policies.text)).result)
  }

  async function evaluateUnproven(entrypoint: PolicyEntrypoint, input: unknown): Promise<PolicyDecision> {
    const { result, provenance } = await answerUnproven(entrypoint, input)
    return parseDecision(result, revisionOf(provenance) ?? '')
  }

  /** Past the breaker. @throws Error where OPA fails, Fault where its policy does */
  async function answerUnproven(entrypoint: PolicyEntrypoint, input: unknown): Promise<DecisionAnswer> {
    const deadline = AbortSignal.timeout(timeoutMs)
    const answer = await request('POST', pathOf[entrypoint], decisionBytesMax, deadline, { input })
    if (answer.status === 500) throw unavailable('stumbles over its policy')
    if (answer.status !== 200) throw new Error(`OPA answered ${answer.status}`)
    return readDecisionAnswer(answer)
  }

  await watch()
  return {
    revision: () => revision,
    // Not the breaker: it leaves its open state only when asked, and nobody asks an instance that is not ready.
    ready: () => isAnswering === true,
    evaluate,
    explain: async input => parseExplanation((await answerOf('explanation', input)).result),
    status: () => ({
      revision: activatedAtMs === undefined ? '' : revision,
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
      // Destroyed, not closed: whoever still waits gets UNAVAILABLE now, not at its deadline.
      await pool.destroy()
    },
  }
}

function stumbling({ message }: Fault): UnusablePolicy {
  const hint = 'see the log of OPA, and whether OPA_URL is the address of one'
  return new UnusablePolicy(`an empty question has no answer: ${message}`, hint)
}

/** A fault is about one question, such as an answer that is too long; it must not shut everyone else out. */
const isOutage = handleWhen(error => !(error instanceof Fault))

type Answer = { status: number; text: string }

async function readAnswer({ statusCode, body }: Dispatcher.ResponseData, bytesMax: number): Promise<Answer> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of body as AsyncIterable<Buffer>) {
    bytes += chunk.length
    // To leave the loop this way also destroys the body and its connection.
    if (bytes > bytesMax) throw unavailable(`gave an answer of more than ${bytesMax} bytes`)
    chunks.push(chunk)
  }
  return { status: statusCode, text: Buffer.concat(chunks).toString('utf8') }
}

const decisionAnswer = z.object({
  /** Absent where OPA has no such policy. */
  result: z.unknown().optional(),
  provenance: z
    .object({ bundles: z.record(z.string(), z.object({ revision: z.string().optional() })).optional() })
    .optional(),
})

const policyList = z.object({ result: z.array(z.object({ id: z.string(), raw: z.string() })) })

type DecisionAnswer = z.infer<typeof decisionAnswer>

function readDecisionAnswer(answer: Answer): DecisionAnswer {
  try {
    return decisionAnswer.parse(JSON.parse(answer.text))
  } catch (cause) {
    throw unavailable('gave an answer that is not JSON of OPA', cause)
  }
}

/** Undefined where OPA has no bundles, or such as name no revision. */
function revisionOf(provenance: DecisionAnswer['provenance']): string | undefined {
  const bundles = Object.entries(provenance?.bundles ?? {}).filter(([, bundle]) => bundle.revision)
  if (bundles.length === 0) return undefined
  return bundles
    .map(([name, bundle]) => `${name}@${bundle.revision}`)
    .sort()
    .join()
}

function hashOf(policies: { id: string; raw: string }[]): string {
  const texts = policies.map(({ id, raw }) => JSON.stringify([id, raw])).sort()
  return createHash('sha256').update(texts.join('\n')).digest('hex').slice(0, 12)
}

function unavailable(what: string, cause?: unknown): Fault {
  return new Fault('UNAVAILABLE', 'POLICY_UNAVAILABLE', `the policy server ${what}, so nothing is allowed`, {
    retryAfterMs: openMs,
    cause,
  })
}
