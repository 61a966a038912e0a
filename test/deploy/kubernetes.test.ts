/** The files of Kubernetes: built by kustomize, judged by kubeconform with the schemas of Kubernetes and of both operators. */
import { existsSync } from 'node:fs'
import { cp, mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { parse, parseAllDocuments } from 'yaml'
import { prometheusRules } from '../../deploy/kubernetes/prometheus-rules.ts'
import { readSettings } from '../../src/settings.ts'
import { findProgram } from '../support/find-program.ts'
import { openSecrets, unknownSettings } from '../support/known-settings.ts'
import { deploy, judged, root, say } from '../support/programs.ts'
import { makeSecrets, openFolder } from '../support/shipped-postgres.ts'

const kustomize = findProgram('kustomize')
const kubeconform = findProgram('kubeconform')
const schemas = thereIs(join(root, '.tools', 'kubernetes-schemas'))
const definitions = thereIs(join(root, '.tools', 'definitions'))

function thereIs(folder: string): string | undefined {
  return existsSync(folder) ? folder : undefined
}

const folder = join(deploy, 'kubernetes')

type Container = {
  name: string
  image: string
  args?: string[]
  env?: { name: string; value?: string }[]
  resources?: { limits?: Record<string, string>; requests?: Record<string, string> }
  securityContext?: Record<string, unknown>
  volumeMounts?: { name: string; mountPath: string; readOnly?: boolean }[]
  livenessProbe?: unknown
  readinessProbe?: unknown
  lifecycle?: { preStop: { sleep: { seconds: number } } }
}
type Pod = {
  automountServiceAccountToken?: boolean
  enableServiceLinks?: boolean
  terminationGracePeriodSeconds?: number
  securityContext?: Record<string, unknown>
  containers: Container[]
  initContainers?: Container[]
  volumes?: { name: string; secret?: { secretName: string; items?: { key: string; path: string }[] } }[]
}
/** What of all kinds is looked at; that the rest is right, their schemas say. */
type Spec = {
  template: { spec: Pod }
  strategy: { rollingUpdate: { maxSurge: number } }
  maxReplicas: number
  postgresql: { parameters: Record<string, string> }
  podSelector: { matchLabels: Record<string, string>; matchExpressions: { values: string[] }[] }
  ingress: { from: { podSelector: Spec['podSelector'] }[] }[]
}
type Resource = {
  kind: string
  metadata: { name: string; namespace?: string }
  spec: Spec
  data: Record<string, string>
}

async function build(t: ExecutionContext, kustomize: string, path: string): Promise<Resource[]> {
  const { exitCode, said, stdout } = await say(kustomize, ['build', path])
  if (exitCode !== 0) throw new Error(said)
  t.is(said, stdout, 'it warns of something')
  return parseAllDocuments(stdout).map(document => document.toJS())
}

const named = (resources: Resource[], kind: string, name: string): Resource => {
  const found = resources.find(
    one => one.kind === kind && (one.metadata.name === name || one.metadata.name.startsWith(`${name}-`)),
  )
  if (!found) throw new Error(`no ${kind} ${name}`)
  return found
}

const pods = (resources: Resource[]) =>
  resources
    .filter(({ kind }) => /^(Deployment|Job)$/.test(kind))
    .map(({ metadata, spec }) => ({ name: metadata.name, pod: spec.template.spec }))

const containersOf = ({ initContainers = [], containers }: Pod) => [...initContainers, ...containers]

/**
 * The schemas of Kubernetes and what definitions of resources say, as kubeconform reads them, in one folder.
 *
 * @param schemas of Kubernetes, which refer to each other by a path of whoever made them
 */
async function schemasOf(t: ExecutionContext, schemas: string, definitions: string): Promise<string> {
  const out = await openFolder(t, 'schemas')
  for (const file of await readdir(schemas)) {
    const text = await readFile(join(schemas, file), 'utf8')
    await writeFile(join(out, file), text.replaceAll('"/api/_definitions.json#', `"file://${out}/_definitions.json#`))
  }
  for (const operator of await readdir(definitions)) {
    for (const file of await readdir(join(definitions, operator))) {
      const { spec } = parse(await readFile(join(definitions, operator, file), 'utf8'))
      for (const { name, schema } of spec.versions) {
        const [group] = spec.group.split('.')
        const path = join(out, `${spec.names.kind.toLowerCase()}-${group}-${name}.json`)
        await writeFile(path, JSON.stringify(strict(schema.openAPIV3Schema, true)))
      }
    }
  }
  return out
}

function strict(schema: unknown, isRoot = false): unknown {
  if (Array.isArray(schema)) return schema.map(part => strict(part))
  if (typeof schema !== 'object' || schema === null) return schema
  const entries = Object.entries(schema).map(([key, value]) => [
    key,
    key === 'default' || key === 'enum' ? value : strict(value),
  ])
  const made = Object.fromEntries(entries)
  const isObject = typeof made.properties === 'object' && made.type === 'object'
  if (isObject && !isRoot && made.additionalProperties === undefined && !made['x-kubernetes-preserve-unknown-fields']) {
    made.additionalProperties = false
  }
  return made
}

for (const overlay of ['overlays/production', 'base', 'secrets'] as const) {
  judged(
    `kubernetes/${overlay}: kustomize builds it, and kubeconform finds nothing wrong by the schemas of what it asks for`,
    { kustomize, kubeconform, 'kubernetes-schemas': schemas, definitions },
    async (t, { kustomize, kubeconform, 'kubernetes-schemas': schemas, definitions }) => {
      const copy = await openFolder(t, 'kubernetes')
      await cp(folder, copy, { recursive: true })
      await makeSecrets(join(copy, 'secrets', 'files'))
      const built = await say(kustomize, ['build', join(copy, overlay)])
      t.is(built.exitCode, 0, built.said)
      const file = join(copy, 'built.yaml')
      await writeFile(file, built.stdout)
      const location = `${await schemasOf(t, schemas, definitions)}/{{.ResourceKind}}{{.KindSuffix}}.json`
      const locations = ['-schema-location', location]
      const judgement = await say(kubeconform, ['-strict', '-summary', ...locations, file])
      t.is(judgement.exitCode, 0, judgement.said)
      t.regex(judgement.said, /Invalid: 0, Errors: 0, Skipped: 0/)

      // It would see a field that does not exist, in resources of Kubernetes and of operators alike.
      if (overlay !== 'overlays/production') return
      const wrong = built.stdout
        .replace('maxSurge: 1', 'maxSurges: 1')
        .replace('podAntiAffinityType:', 'podAntiAffinityTypo:')
      await writeFile(file, wrong)
      t.regex((await say(kubeconform, ['-strict', '-summary', ...locations, file])).said, /Invalid: 2,/)
    },
  )
}

judged(
  'no pod has a privilege, a token of Kubernetes or a place to write, and each has limits',
  { kustomize },
  async (t, { kustomize }) => {
    const resources = await build(t, kustomize, join(folder, 'overlays', 'production'))
    t.is(pods(resources).length, 3)
    for (const { name, pod } of pods(resources)) {
      t.is(pod.automountServiceAccountToken, false, name)
      t.is(pod.enableServiceLinks, false, name)
      t.like(pod.securityContext, { runAsNonRoot: true, seccompProfile: { type: 'RuntimeDefault' } }, name)
      t.true(Number(pod.securityContext?.runAsUser) > 0, name)
      for (const container of containersOf(pod)) {
        t.deepEqual(container.securityContext, {
          allowPrivilegeEscalation: false,
          readOnlyRootFilesystem: true,
          capabilities: { drop: ['ALL'] },
        })
        for (const which of ['limits', 'requests'] as const) {
          t.deepEqual(
            Object.keys(container.resources?.[which] ?? {}).sort(),
            ['cpu', 'memory'],
            `${name}/${container.name}`,
          )
        }
        t.regex(container.image, /^[\w./-]+:v?\d+\.\d+\.\d+$/)
        if (name !== 'edgemesh-migrate') t.truthy(container.livenessProbe, `${name}/${container.name}`)
        for (const { mountPath, readOnly } of container.volumeMounts ?? [])
          t.true(readOnly === true || mountPath === '/tmp')
      }
    }
    for (const { kind, metadata } of resources) {
      if (kind !== 'Namespace') t.is(metadata.namespace, 'edgemesh', `${kind} ${metadata.name}`)
    }
  },
)

judged(
  'settings are those of EdgeMesh, their secrets are made and mounted, and pods end only when they have drained',
  { kustomize },
  async (t, { kustomize }) => {
    const copy = await openFolder(t, 'kubernetes')
    await cp(folder, copy, { recursive: true })
    const hosts = {
      DATABASE_HOST: 'edgemesh-db-rw',
      REPLICA_HOST: 'edgemesh-db-ro',
      DATABASE_CA_FILE: '/run/secrets/database-ca/ca.crt',
    }
    await makeSecrets(join(copy, 'secrets', 'files'), hosts)
    const resources = await build(t, kustomize, join(copy, 'overlays', 'production'))
    const secrets = (await build(t, kustomize, join(copy, 'secrets'))).filter(({ kind }) => kind === 'Secret')
    const common = named(resources, 'ConfigMap', 'edgemesh-settings').data
    const outside = join(copy, 'mounted')
    await mkdir(outside)
    for (const { name, pod } of pods(resources).filter(({ name }) => name !== 'edgemesh-postgres-exporter')) {
      const container = pod.containers[0] as Container
      const own = Object.fromEntries((container.env ?? []).map(({ name, value }) => [name, value ?? 'from-the-field']))
      const environment: Record<string, string> = { ...common, ...own }
      t.deepEqual(unknownSettings(Object.keys(environment)), [], name)
      t.deepEqual(openSecrets(environment), [], name)
      for (const [variable, path] of Object.entries(environment).filter(([name]) => name.endsWith('_FILE'))) {
        const mount = container.volumeMounts?.find(({ mountPath }) => path.startsWith(`${mountPath}/`))
        const secret = pod.volumes?.find(({ name }) => name === mount?.name)?.secret
        const key = path.slice((mount?.mountPath.length ?? 0) + 1)
        const text = named(secrets, 'Secret', secret?.secretName ?? '').data[key]
        t.truthy(text, `${name}: ${variable}: ${secret?.secretName} has no ${key}`)
        environment[variable] = join(outside, `${name}-${key}`)
        await writeFile(environment[variable], Buffer.from(text ?? '', 'base64'))
      }
      const settings = readSettings(environment)
      t.regex(settings.database.url ?? '', /@edgemesh-db-rw:5432\/.*sslmode=verify-full/)
      t.regex(settings.database.replicaUrls[0] ?? '', /@edgemesh-db-ro:5432\//)
      t.is(settings.database.migrationUrl !== undefined, name === 'edgemesh-migrate')
      if (name !== 'edgemesh') continue
      const before = container.lifecycle?.preStop.sleep.seconds ?? 0
      t.true(Number(pod.terminationGracePeriodSeconds) >= before + settings.drainMs / 1_000 + 10)

      // All together they never want more connections than the database has.
      const { maxReplicas } = named(resources, 'HorizontalPodAutoscaler', 'edgemesh').spec
      const { maxSurge } = named(resources, 'Deployment', 'edgemesh').spec.strategy.rollingUpdate
      const workers = Number(container.resources?.limits?.cpu)
      const { parameters } = named(resources, 'Cluster', 'edgemesh-db').spec.postgresql
      const most = (maxReplicas + maxSurge) * (settings.database.poolMax + workers) + 5
      t.true(
        most <= Number(parameters.max_connections) - Number(parameters.superuser_reserved_connections),
        `${most} connections`,
      )
    }
    // What the database is given is what servers come with.
    const password = (name: string) =>
      Buffer.from(named(secrets, 'Secret', name).data.password ?? '', 'base64').toString()
    const url = Buffer.from(named(secrets, 'Secret', 'edgemesh').data['database-url'] ?? '', 'base64').toString()
    t.is(new URL(url).password, password('edgemesh-db-service'))
  },
)

judged(
  'who may speak to whom is said of every pod, and all else is refused',
  { kustomize },
  async (t, { kustomize }) => {
    const resources = await build(t, kustomize, join(folder, 'overlays', 'production'))
    const policies = resources.filter(({ kind }) => kind === 'NetworkPolicy')
    t.deepEqual(named(policies, 'NetworkPolicy', 'default-deny').spec, {
      podSelector: {},
      policyTypes: ['Ingress', 'Egress'],
    })
    const labels = pods(resources).map(({ name }) => name)
    for (const name of labels) {
      const { podSelector } = policies.find(({ metadata }) => metadata.name === name)?.spec ?? {}
      t.is(podSelector?.matchLabels['app.kubernetes.io/name'], name)
    }
    const database = named(policies, 'NetworkPolicy', 'edgemesh-db').spec.ingress[0]?.from[0]?.podSelector
    t.deepEqual([...(database?.matchExpressions[0]?.values ?? [])].sort(), labels.sort())
  },
)

test('the database of Kubernetes is tuned as the file of PostgreSQL has it', async t => {
  const { spec } = parse(await readFile(join(folder, 'components', 'database', 'cluster.yaml'), 'utf8'))
  const conf = await readFile(join(deploy, 'postgres', 'postgresql.conf'), 'utf8')
  for (const [name, value] of Object.entries(spec.postgresql.parameters).filter(([name]) => !name.includes('.'))) {
    t.is(new RegExp(`^${name} = '?([^'\\n#]+?)'? *(#.*)?$`, 'm').exec(conf)?.[1], value as string, name)
  }
})

test('the rules that the Prometheus operator is given are those of deploy/prometheus', async t => {
  const file = join(folder, 'components', 'monitoring', 'prometheus-rules.yaml')
  t.is(await readFile(file, 'utf8'), prometheusRules(), 'run node deploy/kubernetes/prometheus-rules.ts')
})
