/** The policy: whether it decides, which one it is, how long it takes, and who else may ask or change it. */

import { startFolderPolicy } from '../access/policy-folder.ts'
import { startOpaPolicy } from '../access/policy-server.ts'
import { startShippedPolicy } from '../access/policy-wasm.ts'
import { isLoopback } from '../network.ts'
import { CannotLook, type Check, type Finding, failed, orOk, warning } from './finding.ts'
import type { Subject } from './subject.ts'

const silent = { error: () => {}, warn: () => {}, info: () => {} }
/** A folder whose files nothing proves to belong together is taken at the second look. */
const folderLooks = 40
const folderPollMs = 50

export const policyCheck: Check<Subject> = {
  name: 'policy',
  async look(subject) {
    const { opa, policy } = subject.settings()
    if (opa.url !== undefined) return lookAtServer(subject)
    if (policy.bundleDir !== undefined) return lookAtFolder(subject, policy.bundleDir)
    const engine = await startShippedPolicy(subject.clock)
    return orOk(
      await others(subject, engine.revision()),
      `the policy that comes with the program, ${engine.revision()}`,
    )
  },
}

async function lookAtFolder(subject: Subject, directory: string): Promise<Finding[]> {
  const engine = await startFolderPolicy({ directory, clock: subject.clock, log: silent, pollMs: folderPollMs })
  try {
    for (let look = 0; look < folderLooks && !engine.ready() && !engine.status().refused; look++) {
      await new Promise(resolve => setTimeout(resolve, folderPollMs))
    }
    const { refused, revision } = engine.status()
    if (refused) {
      const why = 'a server that starts with it decides nothing; one that runs goes on with the policy before it'
      return [failed({ what: refused.problem, why, mend: refused.hint })]
    }
    return orOk(await others(subject, revision), `the policy of ${directory}, ${revision}`)
  } finally {
    await engine.stop()
  }
}

const opaTries = 15
/** Of the fastest answer; an OPA on the same host takes half a millisecond. */
const opaMsMax = 25

async function lookAtServer(subject: Subject): Promise<Finding[]> {
  const { url = '', timeoutMs, bearerToken } = subject.settings().opa
  const engine = await startOpaPolicy({ url, timeoutMs, bearerToken, clock: subject.clock, log: silent })
  try {
    const { refused, revision } = engine.status()
    const why = 'questions are answered UNAVAILABLE: nothing is allowed'
    if (refused) return [failed({ what: refused.problem, why, mend: refused.hint })]
    if (!engine.ready()) return [await whySilent(subject, why)]
    const troubles = await others(subject, revision)
    if (!revision.includes('@')) {
      troubles.push(
        warning({
          what: `the policy of OPA has no revision of its own; it is called ${revision}`,
          why: 'what is on record does not say for sure which policy has decided',
          mend: 'load a bundle that has one: opa build --revision, deploy/opa',
        }),
      )
    }
    const bestMs = await fastestAnswer(subject)
    if (bestMs > opaMsMax) {
      troubles.push(
        warning({
          what: `OPA takes ${bestMs.toFixed(1)} ms for an answer at the least`,
          why: 'each decision that is not in memory waits for it',
          mend: 'run an OPA beside each instance: deploy/opa',
        }),
      )
    }
    return orOk(troubles, `OPA decides by ${revision}, in ${bestMs.toFixed(1)} ms`)
  } finally {
    await engine.stop()
  }
}

const decisionPath = 'v1/data/edgemesh/authz/decision'

/** @param token undefined: as anybody */
async function askOpa(subject: Subject, path: string, token: string | undefined, input?: unknown): Promise<Response> {
  const { url = '', timeoutMs } = subject.settings().opa
  const headers = { 'content-type': 'application/json', ...(token && { authorization: `Bearer ${token}` }) }
  const body = input === undefined ? null : JSON.stringify({ input })
  const method = body === null ? 'GET' : 'POST'
  const target = new URL(path, url.endsWith('/') ? url : `${url}/`)
  const response = await fetch(target, { method, headers, body, signal: AbortSignal.timeout(timeoutMs) })
  await response.arrayBuffer()
  return response
}

async function whySilent(subject: Subject, why: string): Promise<Finding> {
  const { url, bearerToken } = subject.settings().opa
  try {
    const { status } = await askOpa(subject, decisionPath, bearerToken, {})
    if (status === 401 || status === 403) {
      const mend = 'give EdgeMesh in OPA_BEARER_TOKEN what OPA has in EDGEMESH_OPA_TOKEN: deploy/opa'
      return failed({ what: `OPA at ${url} does not take our token (${status})`, why, mend })
    }
    const mend = 'load the policies of EdgeMesh into it: deploy/opa'
    return failed({ what: `OPA at ${url} gives no decision (${status})`, why, mend })
  } catch (error) {
    const { cause, message } = error as Error
    const reason = cause instanceof Error ? cause.message || (cause as { code?: string }).code : message
    const mend = 'start it (deploy/opa), or unset OPA_URL to have policy evaluated in process'
    return failed({ what: `OPA at ${url} does not answer: ${reason}`, why, mend })
  }
}

async function fastestAnswer(subject: Subject): Promise<number> {
  let bestMs = Number.POSITIVE_INFINITY
  for (let attempt = 0; attempt < opaTries; attempt++) {
    const startedAt = performance.now()
    await askOpa(subject, decisionPath, subject.settings().opa.bearerToken, {})
    bestMs = Math.min(bestMs, performance.now() - startedAt)
  }
  return bestMs
}

/** What the instance of this host decides by, where that is something else. */
async function others(subject: Subject, revision: string): Promise<Finding[]> {
  const instance = await subject.instance().catch(() => undefined)
  const decides = (instance?.samples ?? []).find(
    ({ name, value }) => name === 'edgemesh_policy_revision' && value === 1,
  )
  const running = decides?.labels.revision
  if (running === undefined || running === '' || running === revision) return []
  return [
    warning({
      what: `the instance decides by ${running}, and what is configured is ${revision}`,
      why: 'an instance that is started now decides otherwise',
      mend: 'edgemesh policy show says why a policy was not taken; else restart the instance with this configuration',
    }),
  ]
}

// ── The guard ──────────────────────────────────────────────────────────────────────────────────────────────────────

export const opaGuardCheck: Check<Subject> = {
  name: 'opa-guard',
  async look(subject) {
    const { url, bearerToken } = subject.settings().opa
    if (url === undefined) throw new CannotLook('OPA_URL is not set: policy is evaluated in the process')
    const isLetIn = async (path: string, token?: string, input?: unknown) => {
      const answer = await askOpa(subject, path, token, input).catch(() => {
        throw new CannotLook('OPA does not answer: see the check policy')
      })
      return answer.ok
    }
    const guard = 'start OPA with --authentication=token --authorization=basic, as deploy/opa/start does'
    const [decides, lists] = [await isLetIn(decisionPath, undefined, {}), await isLetIn('v1/policies')]
    if (decides || lists) {
      const why = 'whoever reaches it can replace the policy by one that allows everything'
      const what = `OPA at ${url} answers to anybody, without a token`
      return [failed({ what, why, mend: `${guard}, and give EdgeMesh the token in OPA_BEARER_TOKEN` })]
    }
    const troubles: Finding[] = []
    if (await isLetIn('v1/data', bearerToken)) {
      troubles.push(
        warning({
          what: 'the token that EdgeMesh shows may ask OPA for everything, not for decisions alone',
          why: 'whoever learns it may be able to change the policy',
          mend: 'load policies/opa-system.rego with the bundle: deploy/opa',
        }),
      )
    }
    const { protocol, hostname } = new URL(url)
    if (protocol === 'http:' && !isNear(hostname)) {
      troubles.push(
        warning({
          what: `the token goes to ${hostname} in plain text`,
          why: 'whoever is on the way has it, and can answer in the place of OPA',
          mend: 'an OPA on the same host, or https:// in OPA_URL',
        }),
      )
    }
    return orOk(troubles, 'OPA refuses who has no token, and lets ours ask for decisions alone')
  },
}

const isNear = (hostname: string) => hostname === 'localhost' || isLoopback(hostname.replace(/^\[(.*)\]$/, '$1'))
