/** `edgemesh audit`: who did what. */
import { Command } from 'commander'
import { destination } from 'pino'
import { sealKeyFrom } from '../audit/seals.ts'
import { type Progress, type Verification, verifyAudit } from '../audit/verify.ts'
import { AuditEvent } from '../gen/edgemesh/v1/admin.ts'
import { readSettings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { exportCommand, filtering, tailCommand } from './audit-streams.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { isGiven, withSecretsIfKept, withThrowawaySecrets } from './local-secrets.ts'
import { moment } from './option-values.ts'
import { renderTable } from './table.ts'

export function auditCommand(): Command {
  return new Command('audit')
    .description('the audit log: every call, denied ones too')
    .addCommand(tailCommand())
    .addCommand(searchCommand())
    .addCommand(exportCommand())
    .addCommand(verifyCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh audit tail
  edgemesh audit search --target device/laptop-7
  edgemesh audit export --since 2026-01-31 > audit.ndjson
  edgemesh audit verify --since 2026-01-31
`,
    )
}

type Filters = { actor?: string; method?: string; target?: string; code?: string; after?: Date; before?: Date }

function searchCommand(): Command {
  return filtering(listing(connecting(new Command('search'))))
    .description('events that match all of the filters')
    .option('--after <moment>', 'not before this, such as 2026-01-31 or 2026-01-31T08:00:00Z', moment)
    .option('--before <moment>', 'before this', moment)
    .addHelpText(
      'after',
      `
Examples:
  edgemesh audit search --target device/laptop-7
  edgemesh audit search --code PERMISSION_DENIED --after 2026-01-31
  edgemesh audit search --json --limit 100000 > audit.ndjson
`,
    )
    .action((options: ConnectionOptions & ListOptions & Filters) =>
      withAdmin(options, admin =>
        printList(options, {
          name: 'events',
          page: async at => {
            const { actor = '', method = '', target = '', code = '', after, before } = options
            const filter = { actor, method, target, code, after, before }
            const { events, nextPageToken } = await admin.call('searchAuditEvents', { ...at, ...filter })
            return { rows: events, nextPageToken }
          },
          columns: {
            at: event => event.at,
            actor: event => event.actor,
            method: event => event.method,
            target: event => event.target,
            code: event => event.code,
            reason: event => event.reason,
            from: event => event.sourceAddress,
          },
          toJson: AuditEvent.toJSON,
        }),
      ),
    )
}

type VerifyOptions = { since?: Date; json?: true }

function verifyCommand(): Command {
  return new Command('verify')
    .description('prove that nothing on record was changed, removed or inserted; runs beside the database')
    .option('--since <moment>', 'not what is older, such as 2026-01-31 or 2026-01-31T08:00:00Z', moment)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
It reads the database itself and asks no server, so it takes the settings of one: DATABASE_URL, ENROLLMENT_TOKEN_SECRET,
AUDIT_RETENTION_DAYS. The embedded database has one user at a time, so stop a server that uses it first.

Exit code 0: every row is as it was written, and none is missing or too many. 1: it is not so, and where.
Who can write to the database and holds the secret too could make it all anew: keep "heads" of --json elsewhere.

Examples:
  edgemesh audit verify
  edgemesh audit verify --since 2026-01-31
  edgemesh audit verify --json | jq .heads
`,
    )
    .action(verify)
}

async function verify({ since, json }: VerifyOptions): Promise<void> {
  const kept = await withSecretsIfKept(process.env, process.env.DATA_DIR || '.edgemesh')
  // Of the secrets only this one is needed; where it is missing, the settings say so.
  const env = isGiven(kept, 'ENROLLMENT_TOKEN_SECRET') ? withThrowawaySecrets(kept) : kept
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...env })
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(settings, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    const { pending } = await offline.db.migrations()
    if (pending.length > 0) throw new CommandFailure('the schema is not up to date', 'run: edgemesh migrate up')
    const verification = await verifyAudit({
      pool: offline.db.pool,
      key: sealKeyFrom(settings.identity.enrollmentTokenSecret),
      retentionDays: settings.audit.retentionDays,
      nowMs: Date.now(),
      sinceMs: since?.getTime(),
      onProgress: process.stderr.isTTY ? showProgress : undefined,
    })
    if (json) console.log(JSON.stringify(verification))
    else print(verification)
    if (!verification.ok) throw notWhole(verification)
  } finally {
    await offline.close()
  }
}

const showProgress: Progress = ({ seals, rows, at }) =>
  void process.stderr.write(`\r\x1b[K  ${rows} rows under ${seals} seals, at ${at}`)

function print(verification: Verification): void {
  if (process.stderr.isTTY) process.stderr.write('\r\x1b[K')
  const { since, seals, rows, rowsNotChained, rowsBeforeSeals, open, findings, furtherFindings } = verification
  if (findings.length > 0) {
    const columns = {
      at: (finding: Finding) => finding.at,
      what: (finding: Finding) => finding.kind,
      table: (finding: Finding) => finding.table,
      id: (finding: Finding) => finding.id,
      why: (finding: Finding) => finding.message,
    }
    console.log(renderTable(columns, findings))
  }
  if (furtherFindings > 0) console.log(`and ${furtherFindings} more`)
  console.log(`${rows} rows under ${seals} seals, since ${since}`)
  if (open > 0) console.log(`${open} writers have not ended their chains: they still run, or were killed`)
  if (rowsNotChained > 0) console.log(`${rowsNotChained} rows are genuine, but not in a chain (yet)`)
  if (rowsBeforeSeals > 0) console.log(`${rowsBeforeSeals} rows are older than the first seal: nothing speaks for them`)
}

type Finding = Verification['findings'][number]

function notWhole({ findings, furtherFindings }: Verification): CommandFailure {
  const count = findings.length + furtherFindings
  const message = `the audit log is not as it was written: ${count} finding${count === 1 ? '' : 's'}`
  if (findings.every(({ kind }) => kind === 'other-secret' || kind === 'row-inserted')) {
    if (findings.some(({ kind }) => kind === 'other-secret')) {
      return new CommandFailure(
        message,
        'see that ENROLLMENT_TOKEN_SECRET is that of the servers; if it was replaced, verify --since that time',
      )
    }
  }
  return new CommandFailure(
    message,
    'keep a copy of the database as it is before anything else; rows of servers from before an update have no seals: ' +
      'verify --since the update',
  )
}
