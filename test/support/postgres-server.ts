/** PostgreSQL as tests and measurements find or start it, before there is a database of their own in it. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import { createLog } from '../../src/telemetry/log.ts'

export type Server = { url: string; stop(): Promise<void> }

/** The URL of the server that whoever runs this has named, if any. */
export function givenServerUrl(): string | undefined {
  const given = process.env.DATABASE_URL ?? process.env.EDGEMESH_TEST_POSTGRES
  return given?.replace(/^postgresql\+asyncpg:/, 'postgresql:')
}

/** @param purpose names the folder of its data, which is gone when it has stopped */
export async function startEmbedded(purpose: string, level: 'silent' | 'error'): Promise<Server> {
  // Loaded only where it is started: most test files are given a server.
  const { startEmbeddedPostgres } = await import('../../src/db/embedded.ts')
  const directory = await mkdtemp(join(tmpdir(), `edgemesh-${purpose}-`))
  const embedded = await startEmbeddedPostgres({ directory, log: createLog({ level }) })
  return {
    url: embedded.url,
    async stop() {
      await embedded.stop()
      await rm(directory, { recursive: true, force: true })
    },
  }
}

/** Databases are made and dropped from outside of them. */
export async function administer(url: string, statement: string): Promise<void> {
  const client = new pg.Client({ connectionString: url })
  await client.connect()
  try {
    await client.query(statement)
  } finally {
    await client.end()
  }
}

export function databaseUrl(serverUrl: string, database: string): string {
  const url = new URL(serverUrl)
  url.pathname = `/${database}`
  return url.href
}
