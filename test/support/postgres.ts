/**
 * A real PostgreSQL for tests: a fresh, migrated database for each test, gone when the test is over.
 *
 * The server is the first that there is of: the one at DATABASE_URL; the one that the test run shares
 * (EDGEMESH_TEST_POSTGRES, a URL); a container, where a Docker engine answers; the embedded server. The last two are
 * started once for each process, which is once for each test file.
 */
import { randomBytes } from 'node:crypto'
import { request } from 'node:http'
import { type ExecutionContext, registerCompletionHandler } from 'ava'
import { accessEntities } from '../../src/access/entities.ts'
import { auditEntities } from '../../src/audit/entities.ts'
import { type Database, openDatabase } from '../../src/db/orm.ts'
import { fleetEntities } from '../../src/fleet/entities.ts'
import { identityEntities } from '../../src/identity/entities.ts'
import { administer, databaseUrl, givenServerUrl, type Server, startEmbedded } from './postgres-server.ts'

/** A server with a migrated database in it that is copied for each test. */
type Templates = { server: Server; template: string }

const entities = [...identityEntities, ...fleetEntities, ...accessEntities, ...auditEntities]
const poolMax = 10
const enginePingMs = 1_000
const postgresImage = 'postgres:17-alpine'

let templates: Promise<Templates> | undefined

/** A database of the test's own. */
export async function testDatabase(t: ExecutionContext<unknown>): Promise<Database & { url: string }> {
  templates ??= prepare()
  const { server, template } = await templates
  const name = `edgemesh_test_${randomBytes(8).toString('hex')}`
  // The template itself is read under a shared lock, so tests that run side by side do not wait for each other.
  await administer(server.url, `create database ${name} template ${template}`)
  const url = databaseUrl(server.url, name)
  const database = await openDatabase({ url, poolMax, entities })
  t.teardown(async () => {
    await database.close()
    await administer(server.url, `drop database ${name} with (force)`)
  })
  return { ...database, url }
}

async function prepare(): Promise<Templates> {
  const server = await findServer()
  const template = `edgemesh_template_${randomBytes(8).toString('hex')}`
  // AVA waits for what this leaves running before it ends the process.
  registerCompletionHandler(() => {
    administer(server.url, `drop database if exists ${template} with (force)`).finally(() => server.stop())
  })
  await administer(server.url, `create database ${template}`)
  const database = await openDatabase({ url: databaseUrl(server.url, template), poolMax: 1, entities })
  await database.migrate()
  await database.close()
  return { server, template }
}

async function findServer(): Promise<Server> {
  const given = givenServerUrl()
  if (given) return { url: given, stop: async () => {} }
  if (await dockerAnswers()) {
    const container = await startContainer().catch(() => undefined)
    if (container) return container
  }
  return startEmbedded('test', 'silent')
}

/** Whether there is an engine, not just its socket or its client. */
function dockerAnswers(): Promise<boolean> {
  const host = process.env.DOCKER_HOST ?? 'unix:///var/run/docker.sock'
  const target = host.startsWith('unix://')
    ? { socketPath: host.slice('unix://'.length) }
    : { hostname: new URL(host).hostname, port: new URL(host).port }
  return new Promise(resolve => {
    const ping = request({ ...target, path: '/_ping', timeout: enginePingMs }, response => {
      response.resume()
      resolve(response.statusCode === 200)
    })
    ping.on('timeout', () => ping.destroy(new Error('the engine does not answer')))
    ping.on('error', () => resolve(false))
    ping.end()
  })
}

async function startContainer(): Promise<Server> {
  const { GenericContainer, Wait } = await import('testcontainers')
  const container = await new GenericContainer(postgresImage)
    .withEnvironment({ POSTGRES_PASSWORD: 'edgemesh', POSTGRES_DB: 'edgemesh' })
    .withExposedPorts(5432)
    // The image starts the server once to set it up and once for good.
    .withWaitStrategy(Wait.forLogMessage('database system is ready to accept connections', 2))
    .start()
  return {
    url: `postgresql://postgres:edgemesh@${container.getHost()}:${container.getMappedPort(5432)}/edgemesh`,
    stop: async () => void (await container.stop()),
  }
}
