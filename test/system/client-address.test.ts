/** Whose address is on record, and counts, when connections come through a load balancer. */
import { once } from 'node:events'
import { connect } from 'node:net'
import { Writable } from 'node:stream'
import test, { type ExecutionContext } from 'ava'
import { createKey } from '../../src/client/csr.ts'
import { createLog } from '../../src/telemetry/log.ts'
import {
  clientsOf,
  type EdgeMesh,
  enrollOnce,
  eventually,
  refused,
  sharedEdgeMesh,
  startEdgeMesh,
  unary,
} from '../support/edgemesh.ts'
import { binaryHeader, binaryHeaderOf, line, value } from '../support/proxy-header.ts'
import { haproxy, hasHaproxy, relay } from '../support/relay.ts'

/** The only balancer; everybody else on this host comes from 127.0.0.1 or another address of 127.0.0.0/8. */
const balancer = '127.0.0.9'
const mesh = sharedEdgeMesh(test, { TRUSTED_PROXIES: `192.0.2.0/24, ${balancer}` })

/** Enrolls a device through a port that leads to the server. @returns the addresses that are on record for it */
async function enrollThrough(t: ExecutionContext, { token, anonymous, pool }: EdgeMesh, port: number) {
  const { enroll } = clientsOf(t, `127.0.0.1:${port}`, anonymous)
  const { deviceId } = await enrollOnce(enroll, await token(), createKey())
  const { rows: events } = await pool.query(
    "select source_address from audit_events where target = $1 and method like '%/Enroll'",
    [`device/${deviceId}`],
  )
  const { rows: redemptions } = await pool.query('select source_address from token_redemptions where device_id = $1', [
    deviceId,
  ])
  return [...events, ...redemptions].map(row => row.source_address)
}

/** What the server has counted of headers, by outcome. */
async function headersCounted({ server }: EdgeMesh): Promise<Record<string, number>> {
  const scraped = await (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
  const counts = scraped.matchAll(/^edgemesh_proxy_headers_total\{outcome="(\w+)"\} (\d+)/gm)
  return Object.fromEntries(Array.from(counts, ([, outcome, count]) => [outcome, Number(count)]))
}

function keptLog(level: 'debug' | 'info') {
  const lines: string[] = []
  const destination = new Writable({
    write(chunk, _encoding, done) {
      lines.push(String(chunk))
      done()
    },
  })
  return { log: createLog({ level, destination }), lines }
}

const ipv6 = Buffer.from('20010db8000000000000000000000007', 'hex')
const header = binaryHeaderOf('203.0.113.7', value(5, Buffer.from('a name of the connection')))

for (const [what, pieces, address] of [
  ['version 1 over IPv4', [line('PROXY TCP4 203.0.113.7 10.0.0.1 56324 443')], '203.0.113.7'],
  ['version 1 over IPv6', [line('PROXY TCP6 2001:DB8:0::7 ::1 56324 443')], '2001:db8::7'],
  ['version 2 over IPv4, with more than addresses', [header], '203.0.113.7'],
  [
    'version 2 over IPv6',
    [binaryHeader({ family: 0x21, addresses: Buffer.concat([ipv6, ipv6, Buffer.alloc(4, 1)]) })],
    '2001:db8::7',
  ],
  ['version 2, byte by byte', Array.from(header, byte => Buffer.from([byte])), '203.0.113.7'],
  ['version 1 that can not tell', [line('PROXY UNKNOWN')], balancer],
  ['version 2 that speaks for itself', [binaryHeader({ command: 0, family: 0 })], balancer],
  ['version 2 of a UNIX socket', [binaryHeader({ family: 0x31, addresses: Buffer.alloc(216, 'x') })], balancer],
] as const) {
  test(`behind a trusted proxy of ${what}, a device is on record with ${address}`, async t => {
    const port = await relay(t, mesh().server.apiPort, { from: balancer, pieces: [...pieces] })
    t.deepEqual(await enrollThrough(t, mesh(), port), [address, address])
  })
}

test('who comes from elsewhere is on record with the address of the connection', async t => {
  const port = await relay(t, mesh().server.apiPort, { from: '127.0.0.3' })
  t.deepEqual(await enrollThrough(t, mesh(), port), ['127.0.0.3', '127.0.0.3'])
})

test('nobody else is believed: a header from elsewhere breaks the connection', async t => {
  for (const pieces of [[line('PROXY TCP4 203.0.113.66 10.0.0.1 56324 443')], [binaryHeaderOf('203.0.113.66')]]) {
    const port = await relay(t, mesh().server.apiPort, { from: '127.0.0.3', pieces })
    const { enroll } = clientsOf(t, `127.0.0.1:${port}`, mesh().anonymous)
    t.is((await refused(unary(enroll, 'getTrustBundle', {}))).code, 'UNAVAILABLE')
  }
  const { rows } = await mesh().pool.query("select 1 from audit_events where source_address = '203.0.113.66'")
  t.deepEqual(rows, [])
})

test('where no proxy is trusted, no header is taken', async t => {
  const alone = await startEdgeMesh(t)
  const port = await relay(t, alone.server.apiPort, { from: balancer, pieces: [binaryHeaderOf('203.0.113.66')] })
  const { enroll } = clientsOf(t, `127.0.0.1:${port}`, alone.anonymous)
  t.is((await refused(unary(enroll, 'getTrustBundle', {}))).code, 'UNAVAILABLE')
  t.deepEqual(await headersCounted(alone), {})
})

test('a trusted proxy that sends no header is hung up on, and counted', async t => {
  const own = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer })
  const port = await relay(t, own.server.apiPort, { from: balancer })
  const { enroll } = clientsOf(t, `127.0.0.1:${port}`, own.anonymous)
  t.is((await refused(unary(enroll, 'getTrustBundle', {}))).code, 'UNAVAILABLE')
  const { malformed, read } = await headersCounted(own)
  t.true(malformed !== undefined && malformed > 0)
  t.is(read, undefined)
})

test('probes that say nothing, or that they are probes, make no noise', async t => {
  const { log, lines } = keptLog('info')
  const own = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer }, log)
  const before = lines.length
  for (const said of [Buffer.alloc(0), Buffer.alloc(0), binaryHeader({ command: 0, family: 0 })]) {
    const probe = connect({ port: own.server.apiPort, host: '127.0.0.1', localAddress: balancer })
    await once(probe, 'connect')
    probe.end(said).resume()
    await once(probe, 'close')
  }
  t.deepEqual(await headersCounted(own), { read: 1 })
  t.deepEqual(lines.slice(before), [])
})

test('an instance that stops hangs up on a proxy in the middle of its header', async t => {
  const { log, lines } = keptLog('debug')
  const own = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer }, log)
  const halfway = connect({ port: own.server.apiPort, host: '127.0.0.1', localAddress: balancer })
  await once(halfway, 'connect')
  const hungUp = once(halfway.on('error', () => {}).resume(), 'close')
  halfway.write('PROXY TCP4 ')
  // One that connects later and is served shows that the first has been accepted.
  const port = await relay(t, own.server.apiPort, { from: balancer, pieces: [header] })
  await enrollThrough(t, own, port)
  await own.server.stop()
  await hungUp
  const ends = lines.filter(line => line.includes('sent no PROXY protocol header'))
  t.is(ends.length, 1)
  t.regex(ends[0] ?? '', /closed within its header/, 'not because it took too long')
})

const judging = hasHaproxy() ? test : test.skip
if (!hasHaproxy()) test.skip('haproxy is not on the path: install it with apt-get install haproxy', t => t.pass())

for (const [version, send] of [
  ['version 1', 'send-proxy'],
  ['version 2', 'send-proxy-v2'],
  ['version 2 with all that it can tell', 'send-proxy-v2 proxy-v2-options crc32c,unique-id,authority'],
] as const) {
  judging(`behind HAProxy with ${version}, a device is on record with its own address, and probes succeed`, async t => {
    const own = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer })
    const balanced = await haproxy(t, own.server.apiPort, balancer, send)
    await eventually('five probes', async () => ((await headersCounted(own)).read ?? 0) >= 5)
    const port = await relay(t, balanced, { from: '127.0.0.2' })
    t.deepEqual(await enrollThrough(t, own, port), ['127.0.0.2', '127.0.0.2'])
    t.deepEqual(Object.keys(await headersCounted(own)), ['read'])
  })
}
