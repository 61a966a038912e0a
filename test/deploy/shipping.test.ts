/** What takes logs and metrics elsewhere: the files that are shipped, beside what an instance really writes. */
import { once } from 'node:events'
import { appendFile, readFile, writeFile } from 'node:fs/promises'
import { createServer, type IncomingHttpHeaders } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import test from 'ava'
import { parse } from 'yaml'
import { createLog } from '../../src/telemetry/log.ts'
import { eventually, startEdgeMesh } from '../support/edgemesh.ts'
import { copyOf, prometheus, promtool, run, startPrometheus } from '../support/monitoring.ts'

const root = join(import.meta.dirname, '..', '..')
const shipped = (...path: string[]) => readFile(join(root, 'deploy', ...path), 'utf8')

/** A line with all that a line can have beyond its own fields. */
function lineOfLog(): Record<string, unknown> {
  let line = ''
  const log = createLog({ level: 'info', destination: { write: text => (line = text) } })
  log.error({ err: new TypeError('broken'), address: '203.0.113.7' }, 'a call failed')
  return JSON.parse(line)
}

/** Only while a call is traced. */
const ofTraces = ['trace_id', 'span_id']

test('Filebeat looks for fields that lines of the log have', async t => {
  const {
    processors,
    'filebeat.inputs': inputs,
    'output.elasticsearch': output,
  } = parse(await shipped('filebeat', 'filebeat.yml'))
  t.is(inputs[0].parsers[1].ndjson.target, 'edgemesh')
  t.regex(output.api_key, /^\$\{[A-Z_]+\}$/, 'the key is not in the file')
  const renamed = processors.flatMap(({ rename }: { rename?: { fields: { from: string }[] } }) => rename?.fields ?? [])
  const line = lineOfLog()
  const names = ['edgemesh.time', ...renamed.map(({ from }: { from: string }) => from)]
  t.true(names.length > 5)
  for (const name of names) {
    const path: string[] = name.split('.').slice(1)
    const value = path.reduce<unknown>((at, part) => (at as Record<string, unknown>)?.[part], line)
    t.true(value !== undefined || ofTraces.includes(path.join('.')), name)
  }
  const { timestamp } = processors.find((processor: object) => 'timestamp' in processor)
  t.is(String(line.time).replace(/\d/g, '0'), timestamp.test[0].replace(/\d/g, '0'), 'times look like that')
})

test('Vector leads each step to the next, looks for fields that lines have, and names no secret', async t => {
  const { sources, transforms, sinks } = parse(await shipped('vector', 'vector.yaml'))
  const steps = { ...sources, ...transforms, ...sinks }
  for (const { inputs = [] } of Object.values<{ inputs?: string[] }>(steps)) {
    for (const input of inputs) t.true(input in steps, input)
  }
  const line = lineOfLog()
  for (const [, name = ''] of transforms.edgemesh_fields.source.matchAll(/\(\.(time|msg)\)/g))
    t.true(name in line, name)
  t.true('level' in line)
  t.regex(sinks.loki.auth.password, /^\$\{[A-Z_]+\}$/)
})

const withPromtool = promtool === undefined ? test.skip : test
const withPrometheus = prometheus === undefined ? test.skip : test

withPromtool('promtool accepts remote_write at the end of the configuration (needs promtool)', async t => {
  const folder = await copyOf(t, 'prometheus')
  for (const name of ['opa-token', 'remote-write-password']) await writeFile(join(folder, 'secrets', name), 'none')
  const file = join(folder, 'prometheus.yml')
  await appendFile(file, await shipped('prometheus', 'remote-write.yml'))
  const { exitCode, said } = await run(promtool as string, ['check', 'config', file])
  t.is(exitCode, 0, said)
})

withPrometheus('Prometheus writes to another storage as it is told to (needs prometheus)', async t => {
  const received: IncomingHttpHeaders[] = []
  const storage = createServer((request, response) => {
    received.push(request.headers)
    request.resume().on('end', () => response.writeHead(204).end())
  })
  storage.listen(0, '127.0.0.1')
  await once(storage, 'listening')
  t.teardown(() => storage.close())
  const url = `http://127.0.0.1:${(storage.address() as AddressInfo).port}/api/v1/write`
  const mesh = await startEdgeMesh(t)
  await startPrometheus(t, prometheus as string, {
    edgemesh: `127.0.0.1:${mesh.server.metricsPort}`,
    alertmanager: '127.0.0.1:9',
    more: (await shipped('prometheus', 'remote-write.yml')).replace(/https:\S+/, url),
    secrets: { 'remote-write-password': 'their password' },
  })
  const headers = await eventually('something is written', () => received[0])
  t.is(headers['x-prometheus-remote-write-version'], '0.1.0')
  t.is(headers.authorization, `Basic ${Buffer.from('edgemesh:their password').toString('base64')}`)
})
