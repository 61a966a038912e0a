import { once } from 'node:events'
import { connect } from 'node:net'
import test from 'ava'
import { type Readiness, startTelemetryHttp } from '../../src/telemetry/http.ts'
import { createLog } from '../../src/telemetry/log.ts'

async function start(ready: () => Promise<Readiness>) {
  const http = await startTelemetryHttp({
    host: '127.0.0.1',
    port: 0,
    metrics: (_request, response) => response.end('up 1\n'),
    ready,
    revocationList: async keyId => (keyId === undefined || keyId === 'ab12' ? Buffer.from('a list') : undefined),
    log: createLog({ level: 'silent' }),
  })
  return { ...http, url: `http://127.0.0.1:${http.port}` }
}

const READY: Readiness = { ready: true, checks: { database: { ok: true } } }
const NOT_READY: Readiness = { ready: false, checks: { database: { ok: false, detail: 'no answer' } } }

test('/healthz says ok while the process lives, ready or not', async t => {
  const http = await start(async () => NOT_READY)
  const response = await fetch(`${http.url}/healthz`)
  t.is(response.status, 200)
  t.is(await response.text(), 'ok\n')
  await http.stop()
})

test('/crl is the list of the authority that issues, /crl/<key id>.crl that of the one named', async t => {
  const http = await start(async () => NOT_READY)
  for (const path of ['/crl', '/crl/ab12.crl']) {
    const response = await fetch(`${http.url}${path}`)
    t.is(response.status, 200)
    t.is(response.headers.get('content-type'), 'application/pkix-crl')
    t.is(await response.text(), 'a list')
  }
  for (const path of ['/crl/cd34.crl', '/crl/%2e%2e%2fmetrics', '/crl/AB12.crl', '/crl/', '/crl/ab12']) {
    t.is((await fetch(`${http.url}${path}`)).status, 404, path)
  }
  await http.stop()
})

test('/readyz is 200 when all checks pass, and 503 naming the one that failed', async t => {
  let readiness = READY
  const http = await start(async () => readiness)
  t.is((await fetch(`${http.url}/readyz`)).status, 200)
  readiness = NOT_READY
  const response = await fetch(`${http.url}/readyz`)
  t.is(response.status, 503)
  t.deepEqual(await response.json(), NOT_READY)
  await http.stop()
})

test('/readyz is 503 when the check itself fails', async t => {
  const http = await start(async () => {
    throw new Error('broken')
  })
  t.is((await fetch(`${http.url}/readyz`)).status, 503)
  await http.stop()
})

test('/metrics answers GET and HEAD; other methods are 405, other paths 404', async t => {
  const http = await start(async () => READY)
  t.is(await (await fetch(`${http.url}/metrics`)).text(), 'up 1\n')
  const head = await fetch(`${http.url}/metrics`, { method: 'HEAD' })
  t.is(await head.text(), '')
  const post = await fetch(`${http.url}/metrics`, { method: 'POST', body: 'x' })
  t.is(post.status, 405)
  t.is(post.headers.get('allow'), 'GET, HEAD')
  t.is((await fetch(`${http.url}/admin`)).status, 404)
  await http.stop()
})

test('stop closes connections that are open, silent ones too', async t => {
  const http = await start(async () => READY)
  const silent = connect(http.port, '127.0.0.1')
  await once(silent, 'connect')
  const closed = once(silent.resume(), 'close')
  await http.stop()
  await closed
  t.pass()
})
