/** A database with two roles: one that owns the tables, and the lesser one that servers connect as. */
import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import type pg from 'pg'
import { testDatabase } from './postgres.ts'

export type TwoRoles = {
  /** Connected as neither of them, but as a superuser. */
  pool: pg.Pool
  owner: { name: string; url: string }
  service: { name: string; url: string }
  /** `edgemesh migrate up`, with the settings of these roles or with others. */
  migrateUp(
    env?: Record<string, string>,
    ...args: string[]
  ): Promise<{ exitCode: number; stdout: string; stderr: string }>
}

/** The schema is empty at first. */
export async function twoRoles(t: ExecutionContext<unknown>): Promise<TwoRoles> {
  const { pool, url } = await testDatabase(t)
  const suffix = randomBytes(6).toString('hex')
  const [owner, service] = ['owner', 'service'].map(kind => {
    const as = new URL(url)
    as.username = `edgemesh_${kind}_${suffix}`
    as.password = 'secret'
    return { name: as.username, url: as.href }
  }) as [TwoRoles['owner'], TwoRoles['service']]
  for (const { name } of [owner, service]) await pool.query(`create role ${name} login password 'secret'`)
  t.teardown(async () => {
    await pool.query(`drop owned by ${owner.name}, ${service.name} cascade`)
    for (const { name } of [owner, service]) await pool.query(`drop role ${name}`)
  })
  await pool.query('drop schema public cascade')
  await pool.query(`create schema public authorization ${owner.name}`)
  return {
    pool,
    owner,
    service,
    migrateUp: (env = { DATABASE_MIGRATION_URL: owner.url, DATABASE_URL: service.url }, ...args) =>
      new Promise(resolve => {
        const options = { env: { PATH: process.env.PATH, ...env } }
        const main = join(import.meta.dirname, '../../src/main.ts')
        execFile(process.execPath, [main, 'migrate', 'up', ...args], options, (error, stdout, stderr) => {
          resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
        })
      }),
  }
}
