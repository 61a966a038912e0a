/** Rules, alerts and their routes, judged by the programs that read them, and seen at work on a real instance. */
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { parse } from 'yaml'
import { authorizations, heartbeats } from '../support/device.ts'
import { eventually, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'
import {
  alertmanager,
  amtool,
  copyOf,
  prometheus,
  promtool,
  query,
  run,
  startAlertmanager,
  startInbox,
  startPrometheus,
} from '../support/monitoring.ts'

const root = join(import.meta.dirname, '..', '..')
const shipped = (...path: string[]) => join(root, 'deploy', ...path)

type Rule = {
  alert?: string
  record?: string
  expr: string
  labels?: { severity: string }
  annotations?: { summary: string; description: string; runbook: string }
}

async function rulesIn(file: string): Promise<Rule[]> {
  const { groups } = parse(await readFile(shipped('prometheus', 'rules', file), 'utf8'))
  return groups.flatMap(({ rules }: { rules: Rule[] }) => rules)
}

/** A test that a program decides: skipped, and saying so, where that is missing. */
function judged(
  title: string,
  programs: Record<string, string | undefined>,
  body: (...found: string[]) => (t: ExecutionContext) => Promise<void>,
) {
  const missing = Object.keys(programs).filter(name => programs[name] === undefined)
  const found = Object.values(programs).map(program => program ?? '')
  if (missing.length > 0) test.skip(`${title} (${missing.join(' and ')} is missing)`, body(...found))
  else test(title, body(...found))
}

judged('promtool accepts the configuration and every rule', { promtool }, promtool => async t => {
  const folder = await copyOf(t, 'prometheus')
  await writeFile(join(folder, 'secrets', 'opa-token'), 'none')
  const { exitCode, said } = await run(promtool, ['check', 'config', join(folder, 'prometheus.yml')])
  t.is(exitCode, 0, said)
})

judged('every alert fires where it should, and not beside it', { promtool }, promtool => async t => {
  const { exitCode, said } = await run(promtool, ['test', 'rules', shipped('prometheus', 'tests', 'alerts.test.yml')])
  t.is(exitCode, 0, said)
  const { tests } = parse(await readFile(shipped('prometheus', 'tests', 'alerts.test.yml'), 'utf8'))
  const cases = tests.map(({ name }: { name: string }) => name).sort()
  const alerts = (await rulesIn('alerts.yml')).map(({ alert }) => alert)
  t.deepEqual(cases, alerts.flatMap(alert => [`${alert} fires`, `${alert} is quiet`]).sort())
})

test('every alert says how bad it is, and has a runbook', async t => {
  for (const { alert = '', labels, annotations } of await rulesIn('alerts.yml')) {
    t.regex(labels?.severity ?? '', /^(critical|warning)$/, alert)
    const [file = '', anchor] = annotations?.runbook.split('#') ?? []
    t.is(anchor, alert.toLowerCase())
    t.regex(await readFile(join(root, file), 'utf8'), new RegExp(`^## ${alert}$`, 'm'), file)
  }
})

test('what rules look at is what an instance shows', async t => {
  const mesh = await startEdgeMesh(t)
  const device = await mesh.enroll({ device: { id: 'alpha' } })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'payroll', name: '', labels: {}, owner: '', roles: [] })
  const heart = heartbeats(t, mesh, device)
  await heart.beat(healthy)
  const access = authorizations(t, mesh, device)
  const { connectionId } = await access.ask('ada', 'payroll')
  await heart.beat({ diskEncrypted: false })
  await access.revocationOf(connectionId)

  const text = await (await fetch(`http://127.0.0.1:${mesh.server.metricsPort}/metrics`)).text()
  const shown = new Set(text.split('\n').map(line => /^[a-z_]+/.exec(line)?.[0]))
  const rules = [...(await rulesIn('alerts.yml')), ...(await rulesIn('recording.yml'))]
  const named = new Set(rules.flatMap(({ expr }) => expr.match(/\b(?:edgemesh|process)_[a-z_]+/g) ?? []))
  // Left by the backup where node-exporter finds it.
  named.delete('edgemesh_backup_last_success_timestamp_seconds')
  t.deepEqual(
    [...named].filter(name => !shown.has(name)),
    [],
  )
  const recorded = new Set(rules.flatMap(({ record }) => record ?? []))
  const used = rules.flatMap(({ expr }) => expr.match(/\bedgemesh:[a-z0-9_:]+/g) ?? [])
  t.deepEqual(
    used.filter(name => !recorded.has(name)),
    [],
  )
})

judged(
  'amtool accepts the routes: who is critical wakes somebody, and all of it is in the chat',
  { amtool },
  amtool => async t => {
    const file = shipped('alertmanager', 'alertmanager.yml')
    const { exitCode, said } = await run(amtool, ['check-config', file])
    t.is(exitCode, 0, said)
    for (const [severity, receivers] of [
      ['critical', 'on-call,chat'],
      ['warning', 'chat'],
      ['none', 'mail'],
    ] as const) {
      const args = ['config', 'routes', 'test', `--config.file=${file}`, `--verify.receivers=${receivers}`]
      const routed = await run(amtool, [...args, `severity=${severity}`, 'alertname=EdgeMeshDown'])
      t.is(routed.exitCode, 0, routed.said)
    }
  },
)

judged(
  'an instance that goes is told by Prometheus and Alertmanager to who is on call, with its runbook',
  { prometheus, alertmanager },
  (prometheus, alertmanager) => async t => {
    const inbox = await startInbox(t)
    const mesh = await startEdgeMesh(t)
    const at = await startPrometheus(t, prometheus, {
      edgemesh: `127.0.0.1:${mesh.server.metricsPort}`,
      alertmanager: await startAlertmanager(t, alertmanager, inbox.url),
    })
    const up = async () => (await query(at, 'up{job="edgemesh"}'))[0]?.value
    await eventually('it is scraped', async () => (await up()) === 1)
    await eventually('rules are evaluated', async () => (await query(at, 'edgemesh:devices:count')).length > 0)
    t.deepEqual(await query(at, 'ALERTS{alertname="EdgeMeshDown", alertstate="firing"}'), [])

    await mesh.server.stop()
    const told = (path: string) =>
      eventually(`${path} is told`, () =>
        inbox.messages.find(one => one.path === path && /EdgeMeshDown/.test(one.body)),
      )
    const page = await told('/pagerduty')
    t.regex(page.body, /docs\/runbooks\/availability\.md#edgemeshdown/)
    t.regex((await told('/slack')).body, /No EdgeMesh instance answers/)
  },
)
