import type { ServerResponse } from 'node:http'
import test from 'ava'
import { type Metrics, startMetrics } from '../../src/telemetry/metrics.ts'

/** What a scrape would read. */
function scrape(metrics: Metrics): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<string>()
  const response = { setHeader: () => response, end: resolve }
  metrics.handler({} as never, response as unknown as ServerResponse)
  return promise
}

function start(): Metrics {
  return startMetrics({ instanceId: 'a', version: '1.2.3' })
}

test('counts show under their exact names and labels', async t => {
  const metrics = start()
  metrics.decisions(1, 0, 0.0002)
  metrics.denied([{ code: 'HEALTH_STALE' }, { code: 'DISK_NOT_ENCRYPTED' }])
  metrics.denied([{ code: 'HEALTH_STALE' }])
  metrics.enrollment('enrolled')
  metrics.heartbeat(3)
  metrics.connection('db', 'open')
  metrics.call('/edgemesh.v1.EnrollService/Enroll', 'OK')
  metrics.auditCommit(5, 0.002)
  const lines = (await scrape(metrics)).split('\n')
  for (const line of [
    '# TYPE edgemesh_authorization_decisions_total counter',
    'edgemesh_authorization_decisions_total{decision="allow"} 1',
    'edgemesh_authorization_decisions_total{decision="deny"} 0',
    'edgemesh_authorization_denials_total{reason="HEALTH_STALE"} 2',
    'edgemesh_authorization_denials_total{reason="DISK_NOT_ENCRYPTED"} 1',
    'edgemesh_authorization_latency_seconds_bucket{le="0.0001"} 0',
    'edgemesh_authorization_latency_seconds_bucket{le="0.00025"} 1',
    'edgemesh_authorization_latency_seconds_bucket{le="10"} 1',
    'edgemesh_device_enrollments_total{outcome="enrolled"} 1',
    'edgemesh_health_checks_total 3',
    'edgemesh_connections_total{service="db",status="open"} 1',
    'edgemesh_calls_total{method="/edgemesh.v1.EnrollService/Enroll",code="OK"} 1',
    'edgemesh_audit_rows_total 5',
    'edgemesh_audit_commit_seconds_count 1',
    'edgemesh_build_info{version="1.2.3",instance_id="a"} 1',
  ]) {
    t.true(lines.includes(line), line)
  }
  t.true(lines.some(line => line.startsWith('process_resident_memory_bytes ')))
  t.true(lines.some(line => line.startsWith('edgemesh_event_loop_delay_seconds{quantile="0.99"} ')))
  await metrics.stop()
})

test('sources are read at each scrape; without a source there is no series', async t => {
  const metrics = start()
  t.false((await scrape(metrics)).includes('edgemesh_devices_total'))
  let active = 2
  metrics.observe({
    devicesByStatus: () => new Map([['active', active]]),
    pool: () => ({ total: 3, idle: 1, waiting: 0 }),
    databaseFailures: () => new Map([['deadlock', 8]]),
    decisionCache: () => ({ entries: 4, hits: 5, misses: 6, invalidations: new Map([['device', 7]]) }),
  })
  t.true((await scrape(metrics)).includes('edgemesh_devices_total{status="active"} 2\n'))
  active = 3
  const text = await scrape(metrics)
  t.true(text.includes('# TYPE edgemesh_devices_total gauge\n'))
  t.true(text.includes('edgemesh_devices_total{status="active"} 3\n'))
  t.true(text.includes('edgemesh_database_pool_connections{state="idle"} 1\n'))
  t.true(text.includes('edgemesh_database_failures_total{kind="deadlock"} 8\n'))
  t.true(text.includes('edgemesh_decision_cache_hits_total 5\n'))
  t.true(text.includes('# TYPE edgemesh_decision_cache_invalidations_total counter\n'))
  t.true(text.includes('edgemesh_decision_cache_invalidations_total{cause="device"} 7\n'))
  await metrics.stop()
})

test('two servers in one process count apart', async t => {
  const [one, other] = [start(), start()]
  one.heartbeat()
  t.true((await scrape(one)).includes('edgemesh_health_checks_total 1\n'))
  t.true((await scrape(other)).includes('edgemesh_health_checks_total 0\n'))
  await Promise.all([one.stop(), other.stop()])
})

test('label values without end are counted under other', async t => {
  const metrics = start()
  for (let i = 0; i < 2_000; i++) metrics.connection(`service-${i}`, 'open')
  const text = await scrape(metrics)
  const series = text.split('\n').filter(line => line.startsWith('edgemesh_connections_total{'))
  t.is(series.length, 1_000)
  t.true(text.includes('edgemesh_connections_total{service="other",status="other"} 1001\n'))
  await metrics.stop()
})
