/** Dashboards: each is one that Grafana takes, and each of their queries is answered by a Prometheus that has watched a real run. */
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { parse } from 'yaml'
import { authorizations, heartbeats } from '../support/device.ts'
import {
  clientsOf,
  type EdgeMesh,
  eventually,
  refused,
  startEdgeMesh,
  testEnvironment,
  unary,
} from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import { prometheus, query, startPrometheus } from '../support/monitoring.ts'
import { findOpa, startOpa } from '../support/opa.ts'
import { serve } from '../support/serve.ts'

const root = join(import.meta.dirname, '..', '..')
const shipped = (...path: string[]) => join(root, 'deploy', 'grafana', ...path)

type DataSource = { type: string; uid: string }
type Panel = {
  id: number
  type: string
  title: string
  gridPos: { x: number; y: number; w: number; h: number }
  datasource?: DataSource
  links?: { title: string; url: string }[]
  targets?: { refId: string; expr: string; datasource: DataSource; instant?: boolean }[]
}
type Dashboard = {
  uid: string
  title: string
  id: null
  schemaVersion: number
  tags: string[]
  panels: Panel[]
  links: { url: string }[]
  annotations: { list: { name: string; expr?: string }[] }
  templating: { list: { name: string; type: string; query: unknown; current: { value: string } }[] }
}

const files = (await readdir(shipped('dashboards'))).sort()
const dashboards = new Map<string, Dashboard>()
for (const file of files) dashboards.set(file, JSON.parse(await readFile(shipped('dashboards', file), 'utf8')))

/** What has data only in trouble, or where something is there that a test does without. Keep it short. */
const mayBeEmpty: Readonly<Record<string, string>> = {
  'Failures by kind': 'the database has done all that it was asked',
  'Replica lag': 'there are no replicas',
}

/** What Grafana would ask for, with all of its variables chosen. */
const asked = (expression: string) =>
  expression.replaceAll('$__rate_interval', '1m').replaceAll('$instance', '.*').replaceAll('$__range', '10m')

const panelsOf = ({ panels }: Dashboard) => panels.filter(({ type }) => type !== 'row')

test('every dashboard has the shape that Grafana loads, and a name of its own', t => {
  t.deepEqual(files, ['access.json', 'fleet.json', 'identity.json', 'runtime.json'])
  const uids = [...dashboards.values()].map(({ uid }) => uid)
  t.is(new Set(uids).size, uids.length)
  for (const [file, dashboard] of dashboards) {
    t.is(dashboard.uid, `edgemesh-${file.replace('.json', '')}`)
    t.is(dashboard.schemaVersion, 39, file)
    // Grafana gives it one when it loads the file.
    t.is(dashboard.id, null, file)
    t.true(dashboard.tags.includes('edgemesh'), file)
    const ids = dashboard.panels.map(({ id }) => id)
    t.is(new Set(ids).size, ids.length, `${file}: panels have ids of their own`)
    for (const panel of panelsOf(dashboard)) {
      const where = `${file}: ${panel.title}`
      t.true(['stat', 'timeseries', 'heatmap', 'table'].includes(panel.type), where)
      t.deepEqual(panel.datasource, { type: 'prometheus', uid: '$' + '{datasource}' }, where)
      t.true((panel.targets?.length ?? 0) > 0, where)
      const refIds = panel.targets?.map(({ refId }) => refId) ?? []
      t.is(new Set(refIds).size, refIds.length, where)
      for (const { datasource } of panel.targets ?? []) t.deepEqual(datasource, panel.datasource, where)
    }
  }
})

test('panels keep to the grid, and none lies upon another', t => {
  for (const [file, { panels }] of dashboards) {
    const taken = new Map<string, string>()
    for (const { title, gridPos } of panels) {
      t.true(gridPos.x >= 0 && gridPos.x + gridPos.w <= 24 && gridPos.h > 0, `${file}: ${title}`)
      for (let x = gridPos.x; x < gridPos.x + gridPos.w; x++) {
        for (let y = gridPos.y; y < gridPos.y + gridPos.h; y++) {
          t.is(taken.get(`${x},${y}`), undefined, `${file}: ${title}`)
          taken.set(`${x},${y}`, title)
        }
      }
    }
  }
})

test('what is provisioned fits together: the data source, the folder, the variables', async t => {
  const { datasources } = parse(await readFile(shipped('provisioning', 'datasources', 'prometheus.yaml'), 'utf8'))
  const { providers } = parse(await readFile(shipped('provisioning', 'dashboards', 'edgemesh.yaml'), 'utf8'))
  t.like(providers[0], { type: 'file', allowUiUpdates: false })
  for (const [file, { templating }] of dashboards) {
    const variables = new Map(templating.list.map(variable => [variable.name, variable]))
    t.is(variables.get('datasource')?.current.value, datasources[0].uid, file)
    const text = await readFile(shipped('dashboards', file), 'utf8')
    const used = new Set([...text.matchAll(/\$\{?([a-z_]+)/g)].map(([, name = '']) => name))
    t.deepEqual(
      [...used].filter(name => !variables.has(name) && !/^__(rate_interval|range|all)$/.test(name)),
      [],
      file,
    )
  }
})

test('Grafana is set up as for production: no anonymous access, no secret in its environment', async t => {
  const lines = (await readFile(shipped('grafana.env'), 'utf8')).split('\n').filter(line => /^[^#]/.test(line))
  const settings = new Map(lines.map(line => [line.split('=')[0] ?? '', line.slice(line.indexOf('=') + 1)]))
  t.is(settings.get('GF_AUTH_ANONYMOUS_ENABLED'), 'false')
  t.is(settings.get('GF_SECURITY_COOKIE_SECURE'), 'true')
  t.is(settings.get('GF_SECURITY_STRICT_TRANSPORT_SECURITY'), 'true')
  t.is(settings.get('GF_SERVER_PROTOCOL'), 'https')
  for (const [name, value] of settings) {
    if (!/PASSWORD|SECRET|CLIENT_ID/.test(name)) continue
    t.regex(name, /__FILE$/)
    t.regex(value, /^\/run\/secrets\//)
  }
})

test('every link to a runbook leads to a section that is there', async t => {
  for (const [file, dashboard] of dashboards) {
    const urls = [...dashboard.links, ...dashboard.panels.flatMap(({ links = [] }) => links)].map(({ url }) => url)
    t.true(urls.length > 5, file)
    for (const url of urls.filter(url => url !== '')) {
      const [, path = '', anchor] = /^\$\{docs\}\/([^#]+)(?:#(.+))?$/.exec(url) ?? []
      t.not(path, '', url)
      const text = await readFile(join(root, path), 'utf8')
      const anchors = [...text.matchAll(/^## (.+)$/gm)].map(([, heading = '']) => heading.toLowerCase())
      if (anchor) t.true(anchors.includes(anchor), url)
    }
  }
})

const missing = [prometheus ? '' : 'prometheus', findOpa() ? '' : 'opa'].filter(name => name !== '')
const judged = missing.length > 0 ? test.skip : test

judged(
  `every panel shows what a real run has left${missing.length ? ` (${missing.join(' and ')} is missing)` : ''}`,
  async t => {
    t.timeout(240_000)
    const opa = await startOpa(t)
    const mesh = await startEdgeMesh(t, { OPA_URL: opa.url })
    // Beside it one with workers, whose series have another label.
    const together = await serve(
      t,
      { ...testEnvironment, DATABASE_URL: mesh.databaseUrl },
      { args: ['--workers', '2'] },
    )
    const at = await startPrometheus(t, prometheus ?? '', {
      edgemesh: [`127.0.0.1:${mesh.server.metricsPort}`, `127.0.0.1:${together.metricsPort}`],
      opa: new URL(opa.url).host,
      alertmanager: '127.0.0.1:9',
    })
    const scrapes = async () => (await query(at, 'min(count_over_time(up{job=~"edgemesh|opa"}[10m]))'))[0]?.value ?? 0
    // A rate counts what comes between two scrapes.
    await eventually('it has been scraped before anything happens', async () => (await scrapes()) >= 2)

    await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
    await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
    // A rate counts what comes between two scrapes: the first time only makes the series.
    for (const id of ['alpha', 'beta']) {
      await eventsOf(t, mesh, id)
      await heartbeats(t, { clients: who => clientsOf(t, together.address, who) }, await mesh.enroll()).beat(healthy)
      const before = await scrapes()
      await eventually('it has been scraped again', async () => (await scrapes()) >= before + 2)
    }

    let unanswered: string[] = []
    const look = async () => {
      unanswered = []
      for (const [file, dashboard] of dashboards) {
        for (const { title, targets = [] } of panelsOf(dashboard)) {
          for (const { expr } of targets) {
            const answer = await query(at, asked(expr))
            const hasData = answer.some(({ value }) => Number.isFinite(value))
            if (!hasData && !(title in mayBeEmpty)) unanswered.push(`${file}: ${title}: ${expr}`)
          }
        }
      }
      return unanswered.length === 0
    }
    // Alerts take their time to fire.
    for (let tries = 0; tries < 3 && !(await look()); tries++) await eventually('data', look).catch(() => {})
    t.deepEqual(unanswered, [])
    for (const { annotations } of dashboards.values()) {
      for (const { expr } of annotations.list) if (expr) await t.notThrowsAsync(query(at, asked(expr)))
    }
  },
)

/** What a panel may look at: enrolled and refused, healthy and not, allowed, denied and revoked. */
async function eventsOf(t: ExecutionContext, mesh: EdgeMesh, id: string): Promise<void> {
  const device = await mesh.enroll({ device: { id } })
  await refused(mesh.enroll({ token: `${await mesh.token()}x` }))
  await refused(unary(mesh.clients(mesh.anonymous).admin, 'getDevice', { id }))
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  t.false((await access.ask('nobody', 'payroll')).allowed)
  const { allowed, connectionId } = await access.ask('ada', 'payroll')
  t.true(allowed)
  await heart.beat({ diskEncrypted: false })
  await access.revocationOf(connectionId)
  access.send({ $case: 'acknowledge', value: { connectionIds: [connectionId] } })
  await heart.beat({ diskEncrypted: true })
  t.true((await access.ask('ada', 'payroll')).allowed, 'a connection stays open')
}

test('panels that may be empty ask for metrics and labels that there are', async t => {
  const reference = await readFile(join(root, 'docs', 'metrics.md'), 'utf8')
  for (const title of Object.keys(mayBeEmpty)) {
    const panels = [...dashboards.values()].flatMap(panelsOf).filter(panel => panel.title === title)
    t.is(panels.length, 1, title)
    for (const { expr } of panels[0]?.targets ?? []) {
      const [metric = ''] = /edgemesh_[a-z_]+/.exec(expr) ?? []
      const line = reference.split('\n').find(text => text.includes(`\`${metric}\``)) ?? ''
      t.not(line, '', expr)
      const [, labels = ''] = /by \(([^)]*)\)/.exec(expr) ?? []
      for (const label of labels.split(', ')) t.true(line.includes(`\`${label}\``), `${metric} has ${label}`)
    }
  }
})
