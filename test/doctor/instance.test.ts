/** Instances that are not ready, late, or not there. */
import test from 'ava'
import { told } from '../support/doctor.ts'
import { eventually, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { freePort } from '../support/free-port.ts'
import { testDatabase } from '../support/postgres.ts'
import { link } from '../support/relay.ts'

const checks = ['instance', 'instance-latency'] as const

test('an instance that is ready is found well', async t => {
  const mesh = await startEdgeMesh(t)
  const found = await told({ METRICS_PORT: String(mesh.server.metricsPort) }, checks)
  t.regex(found[0] ?? '', /^ok: it is ready, version \d+\.\d+\.\d+$/)
  // How long things take is the machine's, which others use as well.
  t.notRegex(found[1] ?? '', /^(failed|skipped): /)
})

test('where no instance is, or somebody else, that is said', async t => {
  const METRICS_PORT = String(await freePort())
  t.deepEqual(
    await told({ METRICS_PORT }, checks),
    Array(2).fill(`skipped: no instance answers at 127.0.0.1:${METRICS_PORT}`),
  )
})

test('an instance whose policy can not be asked, and one that hears of changes late, are told', async t => {
  const mesh = await startEdgeMesh(t, { OPA_URL: `http://127.0.0.1:${await freePort()}` })
  t.deepEqual(await told({ METRICS_PORT: String(mesh.server.metricsPort) }, 'instance'), [
    'failed: the instance is not ready: policy: the policy can not be evaluated',
  ])

  const { url } = await testDatabase(t)
  const way = await link(t, Number(new URL(url).port))
  const away = new URL(url)
  away.host = `127.0.0.1:${way.port}`
  const { server } = await startEdgeMesh(t, { DATABASE_URL: away.href })
  t.teardown(() => way.letGo())
  way.hold()
  const env = { METRICS_PORT: String(server.metricsPort) }
  await eventually('the feed is behind', async () =>
    (await told(env, 'instance-latency')).some(what => /^failed: the instance hears of changes \d+ s late$/.test(what)),
  )
  way.letGo()
})

test('an instance whose commits take long is told', async t => {
  const { url } = await testDatabase(t)
  const way = await link(t, Number(new URL(url).port))
  const slow = new URL(url)
  slow.host = `127.0.0.1:${way.port}`
  const mesh = await startEdgeMesh(t, { DATABASE_URL: slow.href })
  t.teardown(() => way.letGo())
  const { authorize } = mesh.clients(await mesh.enroll())
  const env = { METRICS_PORT: String(mesh.server.metricsPort) }
  const question = { id: 'q', user: 'nobody', service: 'nothing', action: '' }
  await eventually('a slow commit is told', async () => {
    const asked = unary(authorize, 'check', { question, deviceId: '' }).catch(() => {})
    way.hold()
    await new Promise(resolve => setTimeout(resolve, 700))
    way.letGo()
    await asked
    const found = await told(env, 'instance-latency')
    return found.some(what => /^warning: one commit of a hundred of the audit log takes /.test(what))
  })
  t.pass()
})
