/** `edgemesh migrate`: the schema of the database. */
import { Command } from 'commander'
import { destination } from 'pino'
import type { Database } from '../db/orm.ts'
import { grantServiceRole } from '../db/service-role.ts'
import { readSettings, type Settings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { version } from '../version.ts'
import { withThrowawaySecrets } from './local-secrets.ts'
import { renderTable } from './table.ts'

export function migrateCommand(): Command {
  return new Command('migrate')
    .description('the schema of the database at DATABASE_URL, or of the embedded one in DATA_DIR')
    .addCommand(upCommand())
    .addCommand(statusCommand())
    .addCommand(downCommand())
    .addHelpText(
      'after',
      `
Servers migrate when they start, if their role owns the tables; these are for all others, and to look.

Examples:
  DATABASE_URL=postgresql://edgemesh:PASSWORD@db:5432/edgemesh edgemesh migrate up
  edgemesh migrate status
`,
    )
}

type UpOptions = { json?: true; serviceRole?: string }

function upCommand(): Command {
  return new Command('up')
    .description('bring the schema up to date; several may do so at once')
    .option(
      '--service-role <name>',
      'who servers connect as, where it is not the owner of the tables (default: with DATABASE_MIGRATION_URL, the user of DATABASE_URL)',
    )
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
With DATABASE_MIGRATION_URL it connects as the owner of the tables, and gives the role of the servers what they need:
of what is on record they can add and read rows, no more, and drop nothing that is younger than AUDIT_RETENTION_DAYS.

Examples:
  edgemesh migrate up
  DATABASE_MIGRATION_URL=postgresql://edgemesh_owner:PASSWORD@db:5432/edgemesh edgemesh migrate up
  edgemesh migrate up --service-role edgemesh_service
`,
    )
    .action((options: UpOptions) =>
      withDatabase(async (db, settings) => {
        const applied = await db.migrate()
        const { url, migrationUrl } = settings.database
        const role = options.serviceRole ?? (migrationUrl && url ? userOf(url) : undefined)
        const { retentionDays } = settings.audit
        if (role) await grantServiceRole(db.pool, role, retentionDays)
        if (options.json) {
          console.log(JSON.stringify({ applied, ...(role && { serviceRole: role, retentionDaysMin: retentionDays }) }))
          return
        }
        console.log(applied.length > 0 ? `applied ${applied.join(', ')}` : 'the schema is up to date')
        if (role) console.log(`${role} has what a server needs, and drops nothing younger than ${retentionDays} days`)
      }),
    )
}

function userOf(url: string): string | undefined {
  const { username, searchParams } = new URL(url)
  return decodeURIComponent(username) || searchParams.get('user') || undefined
}

function statusCommand(): Command {
  return new Command('status')
    .description('which migrations are applied, which are not yet, and whether this version may serve')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Exit codes: 0 this version may serve on the schema as it is, 1 it is behind, or
could not be read, 2 not understood.

Examples:
  edgemesh migrate status
  edgemesh migrate status --json | jq .pending
`,
    )
    .action((options: { json?: true }) =>
      withDatabase(async db => {
        const { applied, pending, newer } = await db.migrations()
        const mayServe = pending.length === 0
        if (!mayServe) process.exitCode = 1
        if (options.json) {
          console.log(JSON.stringify({ version, mayServe, applied, pending, newer }))
          return
        }
        const rows = [
          ...applied.map(name => ({ name, status: newer.includes(name) ? 'applied by a newer version' : 'applied' })),
          ...pending.map(name => ({ name, status: 'pending' })),
        ]
        console.log(renderTable({ migration: row => row.name, status: row => row.status }, rows))
        console.log(`\n${verdict(pending, newer)}`)
      }),
    )
}

function verdict(pending: readonly string[], newer: readonly string[]): string {
  if (pending.length > 0) return `version ${version} may serve after: edgemesh migrate up`
  if (newer.length > 0) return `version ${version} may serve; the schema is of a newer version, and stays as it is`
  return `version ${version} may serve`
}

function downCommand(): Command {
  return new Command('down')
    .description('take back the newest migration, with the data that it made room for')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Going back to the version before does not take this: it serves on the schema of today.
When it is needed all the same is told in docs/upgrade.md.

Examples:
  edgemesh migrate down
`,
    )
    .action((options: { json?: true }) =>
      withDatabase(async db => {
        const reverted = await db.migrateDown()
        if (options.json) console.log(JSON.stringify({ reverted }))
        else console.log(reverted.length > 0 ? `took back ${reverted.join(', ')}` : 'there is nothing to take back')
      }),
    )
}

/** As the owner of the tables, where that is another role than the servers'. */
async function withDatabase(work: (db: Database, settings: Settings) => Promise<void>): Promise<void> {
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...withThrowawaySecrets(process.env) })
  const { url, migrationUrl } = settings.database
  const asOwner = { ...settings, database: { ...settings.database, url: migrationUrl ?? url } }
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(asOwner, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    await work(offline.db, settings)
  } finally {
    await offline.close()
  }
}
