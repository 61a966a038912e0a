/** Balancers in front of a real instance: those that are shipped, and such as end TLS, cut streams, or say nothing of their clients. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { shakeHands } from '../../src/doctor/tls-peer.ts'
import { heartbeats } from '../support/device.ts'
import { told } from '../support/doctor.ts'
import { type EdgeMesh, eventually, secrets, startEdgeMesh } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { healthy } from '../support/healthy.ts'
import { balancer, balancers, startBalancer } from '../support/load-balancers.ts'
import { opensslFolder } from '../support/openssl.ts'
import { relay } from '../support/relay.ts'

// One after the other: each asks for ports that are free, and then has a balancer take them.
const lookAt = (mesh: EdgeMesh, port: number, options: { host?: string; idleMs?: number } = {}) => {
  const { host = 'localhost', idleMs } = options
  const env = { ...secrets, DATABASE_URL: mesh.databaseUrl }
  const checks = idleMs === undefined ? ['public-address'] : ['idle']
  return told(env, checks, { publicAddress: { host, port }, idleMs })
}

for (const [name, shipped] of Object.entries(balancers)) {
  if (!shipped.program) {
    test.skip(`${name} is not here${name === 'nginx' ? ' with its stream module' : ''}: .ci/tools installs it`, t =>
      t.pass())
    continue
  }

  test.serial(`behind ${name} as it is shipped all is well, and a quiet stream stays`, async t => {
    const mesh = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer })
    const port = await startBalancer(t, shipped, [mesh.server])
    t.regex((await lookAt(mesh, port)).join(), /^ok: h2, TLS of an instance, which is serving: \d+\.\d ms$/)
    t.deepEqual(await lookAt(mesh, port, { idleMs: 2_000 }), ['ok: a stream that was quiet for 2 s is still there'])
  })

  test.serial(`behind ${name} with a short idle limit a quiet stream is cut, and that is told`, async t => {
    const mesh = await startEdgeMesh(t, { TRUSTED_PROXIES: balancer })
    const port = await startBalancer(t, shipped, [mesh.server], shipped.idle.only(1))
    t.regex((await lookAt(mesh, port, { idleMs: 60_000 })).join(), /^failed: a quiet stream was cut after \d+ m?s$/)
  })

  test.serial(
    `behind ${name} that TRUSTED_PROXIES does not name no handshake comes through, and that is told`,
    async t => {
      const mesh = await startEdgeMesh(t)
      const port = await startBalancer(t, shipped, [mesh.server])
      t.regex((await lookAt(mesh, port)).join(), /^failed: what answers at localhost:\d+ does not speak TLS/)
    },
  )
}

/** With a certificate of its own, and plain HTTP behind it, as one would set it up for a website. */
async function endingTls(t: ExecutionContext, program: string, protocol: '' | 'http2'): Promise<number> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-nginx-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const made = await opensslFolder(t)
  const words = 'req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 5 -subj /O=Proxy/CN=localhost'
  await made.openssl(...words.split(' '), '-keyout', 'key', '-out', 'cert')
  const port = await freePort()
  await writeFile(
    join(folder, 'nginx.conf'),
    `pid ${folder}/pid; daemon off; master_process off;
events { worker_connections 100; }
http {
  access_log off; client_body_temp_path ${folder}; proxy_temp_path ${folder}; fastcgi_temp_path ${folder};
  uwsgi_temp_path ${folder}; scgi_temp_path ${folder};
  server {
    listen 127.0.0.1:${port} ssl ${protocol};
    ssl_certificate ${made.path}/cert; ssl_certificate_key ${made.path}/key;
    location / { return 200; }
  }
}
`,
  )
  const args = ['-c', join(folder, 'nginx.conf'), '-p', folder, '-e', join(folder, 'error.log')]
  const nginx = spawn(program, args, { stdio: 'ignore' })
  t.teardown(async () => {
    const exited = once(nginx, 'exit')
    if (nginx.exitCode === null && nginx.kill('SIGKILL')) await exited
  })
  await eventually('nginx answers', async () => {
    if (nginx.exitCode !== null) throw new Error(`nginx has ended with ${nginx.exitCode}`)
    const peer = await shakeHands({ host: '127.0.0.1', port, roots: undefined }).catch(() => undefined)
    peer?.socket.destroy()
    return peer !== undefined
  })
  return port
}

const { program: nginx } = balancers.nginx
if (!nginx) test.skip('an nginx that ends TLS: nginx is missing, .ci/tools installs it', t => t.pass())
else {
  test.serial('a balancer that ends TLS itself is told, and whose certificate it shows', async t => {
    const mesh = await startEdgeMesh(t)
    const ended =
      'failed: TLS is ended on the way, by somebody else: the certificate of O=Proxy, CN=localhost, issued by O=Proxy, CN=localhost'
    t.deepEqual(await lookAt(mesh, await endingTls(t, nginx, 'http2')), [ended])
    const old = await endingTls(t, nginx, '')
    t.deepEqual(await lookAt(mesh, old), [ended, `failed: localhost:${old} does not speak HTTP/2: ALPN gave http/1.1`])
  })
}

test.serial('an address where nobody is, or no TLS is spoken, is told', async t => {
  const mesh = await startEdgeMesh(t)
  t.regex((await lookAt(mesh, await freePort())).join(), /^failed: localhost:\d+ does not answer: .*ECONNREFUSED/)
  const plain = createServer(socket => socket.on('error', () => {}).end('HTTP/1.1 400 Bad Request\r\n\r\n')).listen(
    0,
    '127.0.0.1',
  )
  await once(plain, 'listening')
  t.teardown(() => plain.close())
  const { port } = plain.address() as AddressInfo
  t.regex((await lookAt(mesh, port)).join(), /^failed: what answers at localhost:\d+ does not speak TLS/)
})

test.serial('a name that the certificate does not have, and instances of another database, are told', async t => {
  const mesh = await startEdgeMesh(t)
  const port = await relay(t, mesh.server.apiPort)
  t.regex((await lookAt(mesh, port)).join(), /^ok: /)
  // All of 127.0.0.0/8 is this host, and only 127.0.0.1 is in the certificate.
  const elsewhere = await relay(t, mesh.server.apiPort, { on: '127.0.0.2' })
  t.regex(
    (await lookAt(mesh, elsewhere, { host: '127.0.0.2' })).join(),
    /^failed: the certificate there is not valid for 127\.0\.0\.2: DNS:localhost/,
  )
  const other = await startEdgeMesh(t)
  t.regex((await lookAt(mesh, other.server.apiPort)).join(), /^failed: devices do not trust what is there \(\w+\): /)
})

test.serial('an instance that is about to stop is told as not serving', async t => {
  const mesh = await startEdgeMesh(t, { DRAIN_SECONDS: '20' })
  const stream = heartbeats(t, mesh, await mesh.enroll())
  await stream.beat(healthy)
  const stopped = mesh.server.stop()
  const found = await lookAt(mesh, mesh.server.apiPort)
  t.deepEqual(found, [`failed: the instance behind localhost:${mesh.server.apiPort} is not serving (NOT_SERVING)`])
  stream.end()
  await stopped
})
