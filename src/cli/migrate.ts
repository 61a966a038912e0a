/** `edgemesh migrate`: the schema of the database. */
import { Command } from 'commander'
import { destination } from 'pino'
import type { Database } from '../db/orm.ts'
import { readSettings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
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
Servers migrate when they start; these are for those who want to do it before, or to look.

Examples:
  DATABASE_URL=postgresql://edgemesh:PASSWORD@db:5432/edgemesh edgemesh migrate up
  edgemesh migrate status
`,
    )
}

function upCommand(): Command {
  return new Command('up')
    .description('bring the schema up to date; several may do so at once')
    .option('--json', 'one JSON document')
    .addHelpText('after', '\nExamples:\n  edgemesh migrate up\n')
    .action((options: { json?: true }) =>
      withDatabase(async db => {
        const applied = await db.migrate()
        if (options.json) console.log(JSON.stringify({ applied }))
        else console.log(applied.length > 0 ? `applied ${applied.join(', ')}` : 'the schema is up to date')
      }),
    )
}

function statusCommand(): Command {
  return new Command('status')
    .description('which migrations are applied, and which are not yet')
    .option('--json', 'one JSON document')
    .addHelpText('after', '\nExamples:\n  edgemesh migrate status\n  edgemesh migrate status --json | jq .pending\n')
    .action((options: { json?: true }) =>
      withDatabase(async db => {
        const { applied, pending } = await db.migrations()
        if (options.json) {
          console.log(JSON.stringify({ applied, pending }))
          return
        }
        const rows = [
          ...applied.map(name => ({ name, status: 'applied' })),
          ...pending.map(name => ({ name, status: 'pending' })),
        ]
        console.log(renderTable({ migration: row => row.name, status: row => row.status }, rows))
      }),
    )
}

function downCommand(): Command {
  return new Command('down')
    .description('take back the newest migration, with the data that it made room for')
    .option('--json', 'one JSON document')
    .addHelpText('after', '\nExamples:\n  edgemesh migrate down\n')
    .action((options: { json?: true }) =>
      withDatabase(async db => {
        const reverted = await db.migrateDown()
        if (options.json) console.log(JSON.stringify({ reverted }))
        else console.log(reverted.length > 0 ? `took back ${reverted.join(', ')}` : 'there is nothing to take back')
      }),
    )
}

async function withDatabase(work: (db: Database) => Promise<void>): Promise<void> {
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...withThrowawaySecrets(process.env) })
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(settings, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    await work(offline.db)
  } finally {
    await offline.close()
  }
}
