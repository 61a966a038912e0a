/**
 * Writes the rules of deploy/prometheus as a resource of the Prometheus operator, after a change of theirs:
 * `node deploy/kubernetes/prometheus-rules.ts`. A test says when that was forgotten.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parse, stringify } from 'yaml'

const rules = join(import.meta.dirname, '..', 'prometheus', 'rules')
const target = join(import.meta.dirname, 'components', 'monitoring', 'prometheus-rules.yaml')

/** The text of the resource, from the files that Prometheus reads. */
export function prometheusRules(): string {
  const groups = ['recording.yml', 'alerts.yml'].flatMap(file => parse(readFileSync(join(rules, file), 'utf8')).groups)
  const resource = {
    apiVersion: 'monitoring.coreos.com/v1',
    kind: 'PrometheusRule',
    metadata: { name: 'edgemesh' },
    spec: { groups },
  }
  return `# Made by deploy/kubernetes/prometheus-rules.ts from deploy/prometheus/rules.\n${stringify(resource, { lineWidth: 0 })}`
}

if (import.meta.main) writeFileSync(target, prometheusRules())
