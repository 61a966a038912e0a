/** Prometheus and Alertmanager, started from the files that are shipped: `deploy/prometheus`, `deploy/alertmanager`. */
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import type { ExecutionContext } from 'ava'
import { eventually } from './edgemesh.ts'
import { findProgram } from './find-program.ts'
import { freePort } from './free-port.ts'

const deploy = join(import.meta.dirname, '..', '..', 'deploy')

export const promtool = findProgram('promtool')
export const amtool = findProgram('amtool')
export const prometheus = findProgram('prometheus')
/** As Debian calls it, and as its makers do. */
export const alertmanager = findProgram('prometheus-alertmanager') ?? findProgram('alertmanager')

/** What a program says, and how it ends. */
export function run(program: string, args: string[]): Promise<{ exitCode: number; said: string }> {
  return new Promise(resolve => {
    execFile(program, args, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, said: stdout + stderr })
    })
  })
}

/** A copy of a folder of `deploy`, which the test may change. */
export async function copyOf(t: ExecutionContext, folder: 'prometheus' | 'alertmanager'): Promise<string> {
  const copy = await mkdtemp(join(tmpdir(), `edgemesh-${folder}-`))
  t.teardown(() => rm(copy, { recursive: true, force: true }))
  await cp(join(deploy, folder), copy, { recursive: true })
  await mkdir(join(copy, 'secrets'))
  return copy
}

/** Where Alertmanager's messages go in a test. */
export async function startInbox(t: ExecutionContext) {
  const messages: { path: string; body: string }[] = []
  const server = createServer(async (request, response) => {
    messages.push({ path: request.url ?? '', body: await text(request) })
    // What PagerDuty's API answers.
    response.writeHead(202, { 'content-type': 'application/json' }).end('{"status":"success"}')
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const address = server.address()
  if (address === null || typeof address === 'string') throw new Error('the inbox has no port')
  return { messages, url: `http://127.0.0.1:${address.port}` }
}

/** @param inbox what stands in for Slack and PagerDuty */
export async function startAlertmanager(t: ExecutionContext, program: string, inbox: string): Promise<string> {
  const folder = await copyOf(t, 'alertmanager')
  await writeFile(join(folder, 'secrets', 'slack-url'), `${inbox}/slack`)
  await writeFile(join(folder, 'secrets', 'pagerduty-key'), 'key')
  const file = join(folder, 'alertmanager.yml')
  const shipped = await readFile(file, 'utf8')
  const quick = shipped
    .replaceAll(/group_wait: \d+s/g, 'group_wait: 1s')
    .replaceAll('/etc/alertmanager/', `${folder}/`)
    .replace('global:', `global:\n  pagerduty_url: ${inbox}/pagerduty`)
  await writeFile(file, quick)
  const address = `127.0.0.1:${await freePort()}`
  const args = [`--config.file=${file}`, `--storage.path=${folder}/data`, `--web.listen-address=${address}`]
  await start(t, program, [...args, '--cluster.listen-address='], `http://${address}/-/ready`)
  return address
}

type PrometheusOptions = {
  edgemesh: string | string[]
  alertmanager: string
  opa?: string
  /** At the end of the configuration. */
  more?: string
  /** Files that the configuration names, in the folder `secrets`. */
  secrets?: Record<string, string>
}

/** Looking every two seconds, and waiting eight with every alert. */
export async function startPrometheus(
  t: ExecutionContext,
  program: string,
  targets: PrometheusOptions,
): Promise<string> {
  const folder = await copyOf(t, 'prometheus')
  for (const [name, secret] of Object.entries({ 'opa-token': 'none', ...targets.secrets })) {
    await writeFile(join(folder, 'secrets', name), secret)
  }
  const scraped = { edgemesh: targets.edgemesh, opa: targets.opa ?? [], postgres: [], node: [] }
  for (const [name, addresses] of Object.entries(scraped)) {
    await writeFile(join(folder, 'targets', `${name}.yml`), JSON.stringify([{ targets: [addresses].flat() }]))
  }
  const address = `127.0.0.1:${await freePort()}`
  const file = join(folder, 'prometheus.yml')
  const quick = (await readFile(file, 'utf8'))
    .replaceAll('interval: 15s', 'interval: 2s')
    .replaceAll('alertmanager:9093', targets.alertmanager)
    .replaceAll('localhost:9090', address)
  await writeFile(file, `${quick}\n${targets.more ?? ''}`)
  for (const name of await readdir(join(folder, 'rules'))) {
    const rules = join(folder, 'rules', name)
    await writeFile(rules, (await readFile(rules, 'utf8')).replaceAll(/for: .*/g, 'for: 8s'))
  }
  const args = [`--config.file=${file}`, `--storage.tsdb.path=${folder}/data`, `--web.listen-address=${address}`]
  await start(t, program, args, `http://${address}/-/ready`)
  return address
}

async function start(t: ExecutionContext, program: string, args: string[], ready: string): Promise<void> {
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  child.stderr.on('data', (chunk: Buffer) => {
    said = (said + chunk).slice(-4_000)
  })
  t.teardown(async () => {
    if (child.exitCode !== null) return
    child.kill('SIGKILL')
    await once(child, 'exit')
  })
  await eventually(`${program} is ready`, async () => {
    if (child.exitCode !== null) throw new Error(`${program} has ended: ${said}`)
    return fetch(ready).then(
      ({ ok }) => ok,
      () => false,
    )
  })
}

/** What a query answers now, by label sets. */
export async function query(
  address: string,
  expression: string,
): Promise<{ metric: Record<string, string>; value: number }[]> {
  const response = await fetch(`http://${address}/api/v1/query?${new URLSearchParams({ query: expression })}`)
  const { data, error } = (await response.json()) as {
    data?: { result: { metric: Record<string, string>; value: [number, string] }[] }
    error?: string
  }
  if (!data) throw new Error(`${expression}: ${error}`)
  return data.result.map(({ metric, value }) => ({ metric, value: Number(value[1]) }))
}
