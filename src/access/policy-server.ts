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
 */
import { createHash } from 'node:crypto'
import {
  BrokenCircuitError,
  bulkhead,
  CircuitState,
  ConsecutiveBreaker,
  circuitBreaker,
  handleWhen,
  wrap,
} from 'cockatiel'
import { type Dispatcher, Pool } from 'undici'
import { z } from 'zod'
import { Fault } from '../fault.ts'
import {
  type PolicyDecision,
  type PolicyEngine,
  type PolicyEntrypoint,
  parseDecision,
  parseExplanation,
} from './policy-engine.ts'

const connectionsMax = 64
/** Asked at once, those included that wait for a connection. At 1 ms an answer, 64 connections clear 1,024 in 16 ms. */
const questionsMax = 1024
const failuresUntilOpen = 5
const openMs = 1000
/** A decision with every reason there is takes about 4 KiB. */
const decisionBytesMax = 64 * 1024
/** The list of policies carries the syntax tree of each: about 120 KiB for ours. */
const policiesBytesMax = 8 * 1024 * 1024

const pathOf = {
  authz: 'v1/data/edgemesh/authz/decision',
  explanation: 'v1/data/edgemesh/authz/explanation',
  admin: 'v1/data/edgemesh/admin/decision',
}

export type OpaPolicyOptions = {
  /** Where OPA listens, such as `http://127.0.0.1:8181`; a path before `/v1` is kept. */
  url: string
  /** How long one question may take, the wait for a connection included. */
  timeoutMs: number
  /** What OPA asks for when it runs with `--authentication=token`. */
  bearerToken?: string
  log: {
    warn: (fields: Record<string, unknown>, message: string) => void
    info: (fields: Record<string, unknown>, message: string) => void
  }
  /** How often to look which policy is loaded, 1000 unless given. A new policy is noticed this late at most. */
  pollMs?: number
}

/** Starts although OPA is down: `ready()` is false, and questions fail, until it answers. */
export async function startOpaPolicy(options: OpaPolicyOptions): Promise<PolicyEngine> {
  const { timeoutMs, bearerToken, log, pollMs = 1000 } = options
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
  let isAnswering: boolean | undefined
  let isStopped = false
  let timer: NodeJS.Timeout | undefined

  function request(method: 'GET' | 'POST', path: string, bytesMax: number, signal: AbortSignal, question?: unknown) {
    const headers: Record<string, string> = { accept: 'application/json' }
    if (question !== undefined) headers['content-type'] = 'application/json'
    if (bearerToken !== undefined) headers.authorization = `Bearer ${bearerToken}`
    const body = question === undefined ? null : JSON.stringify(question)
    return pool
      .request({ method, path: base.pathname + path, headers, body, signal })
      .then(response => readAnswer(response, bytesMax))
  }

  /** One question with its deadline; only a server that is in trouble counts against it. */
  function ask(what: keyof typeof pathOf, input: unknown): Promise<Answer> {
    const deadline = AbortSignal.timeout(timeoutMs)
    return guarded.execute(async () => {
      const answer = await request('POST', pathOf[what], decisionBytesMax, deadline, { input })
      // Not 500: that is one question over which the policy stumbles.
      if ([429, 502, 503, 504].includes(answer.status)) throw new Error(`OPA answered ${answer.status}`)
      return answer
    }, deadline)
  }

  /** The document that the policy gives, undefined where it has none: OPA answers 200 then too. */
  async function resultOf(what: keyof typeof pathOf, input: unknown): Promise<unknown> {
    const answer = await ask(what, input).catch((cause: unknown) => {
      if (cause instanceof Fault) throw cause
      throw unavailable(
        cause instanceof BrokenCircuitError ? 'was not asked: it has just failed' : 'gave no answer',
        cause,
      )
    })
    if (answer.status !== 200) throw unavailable(`answered ${answer.status}`)
    return readDecisionAnswer(answer).result
  }

  async function evaluate(entrypoint: PolicyEntrypoint, input: unknown): Promise<PolicyDecision> {
    const result = await resultOf(entrypoint, input)
    if (result === undefined) throw unavailable('has no such policy loaded')
    return parseDecision(result)
  }

  async function watch(): Promise<void> {
    const found = await findRevision().catch((error: unknown) => {
      if (isAnswering !== false && !isStopped)
        log.warn({ url: base.origin, err: error }, 'policy server does not answer')
      return undefined
    })
    if (isStopped) return
    timer = setTimeout(watch, pollMs).unref()

    if (found !== undefined && isAnswering !== true) log.info({ url: base.origin }, 'policy server answers')
    isAnswering = found !== undefined
    if (found === undefined || found === revision) return
    log.info({ before: revision, revision: found }, 'policy server has another policy')
    revision = found
    for (const listener of listeners) listener(found)
  }

  /** The revisions of OPA's bundles; without bundles, a hash over the loaded policies, where we may read them. */
  async function findRevision(): Promise<string> {
    // An empty question is enough: a policy that is loaded refuses it with a decision.
    const probePath = `${pathOf.authz}?provenance=true`
    const probe = await request('POST', probePath, decisionBytesMax, AbortSignal.timeout(timeoutMs), { input: {} })
    if (probe.status !== 200) throw new Error(`OPA answered ${probe.status}`)
    const { result, provenance } = readDecisionAnswer(probe)
    parseDecision(result)

    const bundles = Object.entries(provenance?.bundles ?? {}).filter(([, bundle]) => bundle.revision)
    if (bundles.length > 0) {
      const revisions = bundles.map(([name, bundle]) => `${name}@${bundle.revision}`)
      return revisions.sort().join(',')
    }

    const policies = await request('GET', 'v1/policies', policiesBytesMax, AbortSignal.timeout(timeoutMs))
    if (policies.status === 401 || policies.status === 403) return 'unversioned'
    if (policies.status !== 200) throw new Error(`OPA answered ${policies.status}`)
    return hashOf(policyList.parse(JSON.parse(policies.text)).result)
  }

  await watch()
  return {
    revision: () => revision,
    // Not the breaker: it leaves its open state only when asked, and nobody asks an instance that is not ready.
    ready: () => isAnswering === true,
    evaluate,
    explain: async input => parseExplanation(await resultOf('explanation', input)),
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

function readDecisionAnswer(answer: Answer): z.infer<typeof decisionAnswer> {
  try {
    return decisionAnswer.parse(JSON.parse(answer.text))
  } catch (cause) {
    throw unavailable('gave an answer that is not JSON of OPA', cause)
  }
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
