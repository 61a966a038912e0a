/** Many answers as one, as Prometheus and a load balancer read them. */
import type { ServerResponse } from 'node:http'
import test from 'ava'
import fc from 'fast-check'
import type { Readiness } from '../../src/telemetry/http.ts'
import { startMetrics, startParentMetrics } from '../../src/telemetry/metrics.ts'
import { mergeReadiness, mergeScrapes } from '../../src/workers/answers.ts'

/** What Prometheus takes from a page: a type for each family, a value for each series. @throws where it would refuse it */
function parse(page: string) {
  const types = new Map<string, string>()
  const series = new Map<string, number>()
  let family = ''
  for (const line of page.split('\n').slice(0, -1)) {
    const type = /^# TYPE (\S+) (counter|gauge|histogram)$/.exec(line)
    if (type) {
      family = type[1] as string
      if (types.has(family)) throw new Error(`${family} stands twice`)
      types.set(family, type[2] as string)
    } else if (!line.startsWith('# HELP ')) {
      const sample = /^(\w+)(\{(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)+\}) (\S+)$/.exec(line)
      if (!sample?.[1]?.startsWith(family)) throw new Error(`not a sample of ${family}: ${line}`)
      const name = `${sample[1]}${sample[2]}`
      if (series.has(name)) throw new Error(`${name} stands twice`)
      series.set(name, Number(sample[3]))
    }
  }
  return { types, series }
}

async function scrapeOf(act: (metrics: ReturnType<typeof startMetrics>) => void) {
  const metrics = startMetrics({ instanceId: 'a', version: '1' })
  act(metrics)
  const text = await metrics.scrape()
  await metrics.stop()
  return text
}

test('the page of a worker is the one that a single process shows', async t => {
  const metrics = startMetrics({ instanceId: 'a', version: '1' })
  metrics.decisions(1, 0, 0.5)
  const shown = await new Promise<string>(resolve => {
    const response = { setHeader: () => response, end: resolve }
    metrics.handler({} as never, response as unknown as ServerResponse)
  })
  const withoutValues = (text: string) => text.replace(/ \S+$/gm, '')
  t.is(withoutValues(await metrics.scrape()), withoutValues(shown))
  await metrics.stop()
})

test('counters, gauges and histograms of all stand in one page, each family once, each series with its worker', async t => {
  const one = await scrapeOf(metrics => {
    metrics.decisions(2, 1, 0.0002)
    metrics.observe({ unhealthyDevices: () => 7 })
  })
  const other = await scrapeOf(metrics => {
    metrics.decisions(5, 0, 0.2)
    metrics.call('/x', 'OK')
    metrics.observe({ unhealthyDevices: () => 7 })
  })
  const parentMetrics = startParentMetrics(() => new Map([['serving', 2]]))
  parentMetrics.workerEnded('crashed')
  const parent = await parentMetrics.scrape()
  await parentMetrics.stop()
  const { types, series } = parse(
    mergeScrapes([
      { worker: 'parent', answer: parent },
      { worker: '1', answer: one },
      { worker: '2', answer: other },
      { worker: '3', answer: undefined },
    ]),
  )
  t.is(types.get('edgemesh_authorization_decisions_total'), 'counter')
  t.is(types.get('edgemesh_authorization_latency_seconds'), 'histogram')
  t.is(series.get('edgemesh_authorization_decisions_total{worker="1",decision="allow"}'), 2)
  t.is(series.get('edgemesh_authorization_decisions_total{worker="2",decision="allow"}'), 5)
  t.is(series.get('edgemesh_authorization_latency_seconds_bucket{worker="1",le="0.00025"}'), 1)
  t.is(series.get('edgemesh_authorization_latency_seconds_bucket{worker="2",le="0.00025"}'), 0)
  t.is(series.get('edgemesh_authorization_latency_seconds_count{worker="2"}'), 1)
  t.is(series.get('edgemesh_unhealthy_devices{worker="2"}'), 7)
  t.is(series.get('edgemesh_workers{worker="parent",state="serving"}'), 2)
  t.is(series.get('edgemesh_worker_exits_total{worker="parent",how="crashed"}'), 1)
  for (const worker of ['parent', '1', '2'])
    t.true((series.get(`process_cpu_seconds_total{worker="${worker}"}`) ?? 0) > 0)
  t.is(series.get('edgemesh_refused_connections_total{worker="parent",why="no_worker"}'), 0)
  t.is(series.get('edgemesh_refused_connections_total{worker="1",why="not_http2"}'), 0)
  t.false([...series.keys()].some(name => name.includes('worker="3"')))
})

test('whatever callers have written into labels, the page of all can be read', async t => {
  const word = fc.string({ unit: fc.constantFrom('{', '}', '"', '\\', '\n', '#', ' ', ',', '=', 'a', 'HELP') })
  await fc.assert(
    fc.asyncProperty(fc.array(fc.tuple(word, word), { minLength: 1, maxLength: 5 }), async names => {
      const text = await scrapeOf(metrics => {
        for (const [service, status] of names) metrics.connection(service, status)
      })
      const { series } = parse(mergeScrapes([1, 2].map(worker => ({ worker: String(worker), answer: text }))))
      const own = [...series].filter(([name]) => name.startsWith('edgemesh_connections_total{'))
      const sum = own.reduce((total, [, value]) => total + value, 0)
      if (sum !== 2 * names.length) throw new Error(`${sum} of ${2 * names.length}`)
    }),
    { numRuns: 200 },
  )
  t.pass()
})

const ready: Readiness = { ready: true, checks: { database: { ok: true }, policy: { ok: true, detail: 'r1' } } }
const unready: Readiness = {
  ready: false,
  checks: { database: { ok: false, detail: 'refused' }, policy: { ok: true, detail: 'r1' } },
}
const answers = (...all: (Readiness | undefined)[]) =>
  mergeReadiness(all.map((answer, at) => ({ worker: String(at + 1), answer })))

test('it is ready while half of the workers are, and says which one is not, and why', t => {
  t.deepEqual(answers(ready, ready), {
    ready: true,
    checks: {
      workers: { ok: true, detail: '2 of 2 are ready' },
      database: { ok: true },
      policy: { ok: true, detail: 'r1' },
    },
  })
  t.deepEqual(answers(ready, unready), {
    ready: true,
    checks: {
      workers: { ok: true, detail: '1 of 2 are ready' },
      database: { ok: true, detail: 'worker 2: refused' },
      policy: { ok: true, detail: 'r1' },
    },
  })
  t.like(answers(ready, unready, undefined), {
    ready: false,
    checks: {
      workers: { ok: false, detail: '1 of 3 are ready' },
      database: { ok: false, detail: 'worker 2: refused' },
    },
  })
  t.like(answers(undefined, undefined), {
    ready: false,
    checks: { workers: { ok: false, detail: '0 of 2 are ready' } },
  })
})
