/** The instance that runs on this host: whether it is ready, of which version it is, and how long it takes. */
import { version } from '../version.ts'
import { type Check, type Finding, failed, orOk, span, warning } from './finding.ts'
import { quantile, type Sample } from './instance-http.ts'
import type { Subject } from './subject.ts'

/** By the name of a check of /readyz. */
const mends: Readonly<Record<string, string>> = {
  database: 'see the check database',
  facts: 'docs/runbooks/access.md#edgemeshchangefeedbehind',
  authority: 'see the check authority',
  policy: 'see the checks policy and opa-guard',
  lifecycle: 'wait: it is stopping; its devices move to other instances',
  workers: 'docs/workers.md: its log says which one died, and why',
}

export const instanceCheck: Check<Subject> = {
  name: 'instance',
  async look(subject) {
    const { readiness, samples } = await subject.instance()
    const troubles: Finding[] = Object.entries(readiness.checks)
      .filter(([, { ok }]) => !ok)
      .map(([name, { detail }]) =>
        failed({
          what: `the instance is not ready: ${name}${detail ? `: ${detail}` : ''}`,
          why: 'a balancer sends nobody there',
          mend: mends[name] ?? 'its log says more: docs/runbooks/availability.md',
        }),
      )
    const running = new Set(samples.filter(isBuild).map(({ labels }) => labels.version ?? ''))
    if (running.size > 0 && !running.has(version)) {
      const what = `the instance is of version ${[...running].join(', ')}, and this program of ${version}`
      const why = 'what is found here may not hold for it'
      troubles.push(
        warning({ what, why, mend: 'finish the update, or run the doctor of its version: docs/upgrade.md' }),
      )
    }
    return orOk(troubles, `it is ready, version ${[...running].join(', ')}`)
  },
}

const isBuild = ({ name }: Sample) => name === 'edgemesh_build_info'

/** As their alerts have it. */
const decisionSecondsMax = 0.25
const commitSecondsMax = 0.5
const feedSecondsMax = 1

export const instanceLatencyCheck: Check<Subject> = {
  name: 'instance-latency',
  async look(subject) {
    const { samples } = await subject.instance()
    const [decision, commit] = ['edgemesh_authorization_latency_seconds', 'edgemesh_audit_commit_seconds'].map(name =>
      quantile(samples, name, 0.99),
    )
    const most = (name: string, label = '') =>
      Math.max(
        0,
        ...samples.filter(one => one.name === name && (!label || one.labels.state === label)).map(one => one.value),
      )
    const troubles: Finding[] = []
    if (decision !== undefined && decision > decisionSecondsMax) {
      const what = `one decision of a hundred takes ${atLeast(decision, decisionSecondsMax)}`
      const mend = 'docs/runbooks/access.md#edgemeshdecisionsslow'
      troubles.push(warning({ what, why: 'users wait for each connection that they open', mend }))
    }
    if (commit !== undefined && commit > commitSecondsMax) {
      const what = `one commit of a hundred of the audit log takes ${atLeast(commit, commitSecondsMax)}`
      const mend = 'docs/runbooks/audit.md#edgemeshauditslow'
      troubles.push(warning({ what, why: 'every answer waits until it is on record', mend }))
    }
    const behind = most('edgemesh_change_feed_lag_seconds')
    if (behind > feedSecondsMax) {
      const what = `the instance hears of changes ${span(behind * 1_000)} late`
      const mend = 'docs/runbooks/access.md#edgemeshchangefeedbehind'
      troubles.push(failed({ what, why: 'until it has caught up it decides nothing from memory', mend }))
    }
    const waiting = most('edgemesh_database_pool_connections', 'waiting')
    if (waiting > 0) {
      const what = `${waiting} calls wait for a database connection`
      const mend = 'docs/runbooks/database.md#edgemeshpoolexhausted'
      troubles.push(warning({ what, why: 'they are answered late, or UNAVAILABLE', mend }))
    }
    const seen =
      decision === undefined ? 'it has decided nothing yet' : `99 of 100 decisions within ${decision * 1_000} ms`
    return orOk(troubles, seen)
  },
}

function atLeast(bound: number, limit: number): string {
  return Number.isFinite(bound) ? `up to ${bound * 1_000} ms` : `more than ${limit * 1_000} ms`
}
