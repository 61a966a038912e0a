/** Authorities that are about to end, or do not open, and what is shown in place of a server's certificate. */
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:tls'
import test, { type ExecutionContext } from 'ava'
import { openAuthorities } from '../../src/identity/authorities.ts'
import { createAuthority } from '../../src/identity/certificate-authority.ts'
import { specialLeaves } from '../support/authority.ts'
import { goodSettings, look, told } from '../support/doctor.ts'
import { secrets, startEdgeMesh } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { opensslFolder } from '../support/openssl.ts'
import { testDatabase } from '../support/postgres.ts'

const dayMs = 86_400_000

test('an authority with years to go has no finding, and none yet is told as such', async t => {
  const { url } = await testDatabase(t)
  t.regex((await told({ DATABASE_URL: url }, 'authority')).join(), /^ok: there is none yet/)
  const mesh = await startEdgeMesh(t, { DATABASE_URL: url })
  const found = await told({ ...secrets, DATABASE_URL: mesh.databaseUrl }, 'authority')
  t.regex(found.join(), /^ok: root until \d{4}-\d\d-\d\d, issuer until \d{4}-\d\d-\d\d, stable$/)
})

test('an authority whose end is near, or over, is told, with what mends it', async t => {
  const db = await testDatabase(t)
  const passphrase = goodSettings.CA_KEY_PASSPHRASE
  const options = { db, trustDomain: 'edgemesh.local', passphrase, files: undefined, clock: Date.now }
  await openAuthorities({ ...options, validityDays: 100 })
  const at = (days: number) =>
    look({ DATABASE_URL: db.url }, 'authority', { clock: () => Date.now() + days * dayMs }).then(found =>
      found.map(({ severity, what }) => `${severity}: ${what}`),
    )
  t.deepEqual(await at(0.5), ['warning: the root of the authority expires in 99 d'])
  t.deepEqual(await at(80.5), [
    'failed: the root of the authority expires in 19 d',
    'warning: the issuer of the authority expires in 19 d',
  ])
  t.deepEqual(await at(103.5), [
    'failed: the root of the authority has expired 3 d ago',
    'failed: the issuer of the authority has expired 3 d ago',
  ])
  const [finding] = await look({ DATABASE_URL: db.url }, 'authority', { clock: () => Date.now() + dayMs })
  t.regex(finding?.mend ?? '', /^edgemesh ca rotate/)
})

test('a passphrase and a trust domain that are not those of the database are told', async t => {
  const { databaseUrl } = await startEdgeMesh(t)
  const env = { ...secrets, DATABASE_URL: databaseUrl }
  t.deepEqual(await told({ ...env, CA_KEY_PASSPHRASE: goodSettings.CA_KEY_PASSPHRASE }, 'authority'), [
    'failed: CA_KEY_PASSPHRASE does not open the CA key: it is not the one that the key was sealed with',
  ])
  t.regex(
    (await told({ ...env, TRUST_DOMAIN: 'elsewhere' }, 'authority')).join(),
    /^failed: TRUST_DOMAIN is elsewhere, but /,
  )
})

test('an authority whose key is in a file that is not given is told, and with the file all is well', async t => {
  const db = await testDatabase(t)
  const passphrase = goodSettings.CA_KEY_PASSPHRASE
  const made = await createAuthority({
    trustDomain: 'edgemesh.local',
    validityDays: 3_650,
    now: new Date(),
    passphrase,
  })
  const files = { certPem: made.intermediatePem + made.rootPem, keyPem: made.intermediateKeyPem }
  const options = { db, trustDomain: 'edgemesh.local', passphrase, validityDays: 3_650, clock: Date.now }
  await openAuthorities({ ...options, files })
  const env = { DATABASE_URL: db.url }
  t.deepEqual(await told(env, 'authority'), ['failed: the key of authority 1 is not here'])
  t.regex(
    (await told({ ...env, CA_CERT: files.certPem, CA_KEY: files.keyPem }, 'authority')).join(),
    /^ok: root until /,
  )
})

// ── The server's ───────────────────────────────────────────────────────────────────────────────────────────────────

async function tlsServer(t: ExecutionContext, key: string, cert: string): Promise<string> {
  const server = createServer({ key, cert, ALPNProtocols: ['h2'] })
  server.on('tlsClientError', () => {})
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  return String((server.address() as AddressInfo).port)
}

test('the certificate of an instance is found well, also where its connections begin with a header', async t => {
  for (const TRUSTED_PROXIES of ['', '127.0.0.0/8']) {
    const mesh = await startEdgeMesh(t)
    const behind = await startEdgeMesh(t, { DATABASE_URL: mesh.databaseUrl, TRUSTED_PROXIES })
    const env = { ...secrets, DATABASE_URL: mesh.databaseUrl, TRUSTED_PROXIES, API_PORT: String(behind.server.apiPort) }
    t.regex((await told(env, 'server-certificate')).join(), /^ok: valid for [67] d, .*DNS:localhost/)
  }
})

test('a certificate that has expired, one late in its life, and that of somebody else are told', async t => {
  const mesh = await startEdgeMesh(t)
  const env = { ...secrets, DATABASE_URL: mesh.databaseUrl }
  const issue = await specialLeaves(mesh)
  const spiffeId = 'spiffe://edgemesh.local/service/edgemesh'
  const look = async (validFromMs: number, validForMs: number) => {
    const { keyPem, certificatePem } = await issue({ spiffeId, purpose: 'server', validFromMs, validForMs })
    return told({ ...env, API_PORT: await tlsServer(t, keyPem, certificatePem) }, 'server-certificate')
  }
  t.deepEqual(await look(-40 * 60_000, -30 * 60_000), [
    'failed: the certificate of the instance has expired 30 min ago',
  ])
  t.deepEqual(await look(-40 * 60_000, 3.5 * 3_600_000), [
    'warning: the certificate of the instance expires in 3 h, and should have been renewed',
  ])

  const folder = await opensslFolder(t)
  const words = 'req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 5 -subj /CN=stranger'
  await folder.openssl(...words.split(' '), '-keyout', 'key', '-out', 'cert')
  const API_PORT = await tlsServer(t, await folder.read('key'), await folder.read('cert'))
  t.regex(
    (await told({ ...env, API_PORT }, 'server-certificate')).join(),
    /^failed: what listens on 127\.0\.0\.1:\d+ is not trusted by devices \(\w+\): the certificate of CN=stranger, issued by CN=stranger$/,
  )
  const nobody = { ...env, API_PORT: String(await freePort()) }
  t.regex((await told(nobody, 'server-certificate')).join(), /^skipped: no TLS server answers at 127\.0\.0\.1:/)
})
