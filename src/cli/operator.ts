/** `edgemesh operator`: certificates for those who administrate, made beside the database. */
import { Command, Option } from 'commander'
import { destination } from 'pino'
import { createKey, signingRequestFor } from '../agent/csr.ts'
import { readSettings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { withSecretsIfKept } from './local-secrets.ts'
import { saveCredentials } from './operator-credentials.ts'
import { wholeNumber } from './option-values.ts'

const roles = ['admin', 'operator', 'auditor']
const dayMs = 86_400_000
const daysMax = 825
const daysDefault = 365

export function operatorCommand(): Command {
  return new Command('operator')
    .description('operators: those who administrate')
    .addCommand(createCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh operator create ada --role admin --out ./ada
`,
    )
}

type CreateOptions = { role: string; out: string; days: number; json?: true }

function createCommand(): Command {
  return new Command('create')
    .description('make an operator: a key, and a certificate for it; runs beside the database, with its secrets')
    .argument('<name>', 'letters, digits, ".", "_" and "-"')
    .addOption(new Option('--role <role>', 'what the operator may do').choices(roles).makeOptionMandatory())
    .requiredOption('--out <folder>', 'where operator.key, operator.crt and ca.crt go')
    .option('--days <n>', 'how long the certificate is valid', wholeNumber(1, daysMax), daysDefault)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
It takes the settings of the server: DATABASE_URL, CA_KEY_PASSPHRASE, ENROLLMENT_TOKEN_SECRET. The embedded database
has one user at a time, so stop a server that uses it first.

Examples:
  edgemesh operator create ada --role admin --out ./ada
  edgemesh operator create watcher --role auditor --days 30 --out ./watcher
  edgemesh device list --server edgemesh.example.com:8000 --credentials ./ada
`,
    )
    .action(create)
}

async function create(name: string, options: CreateOptions): Promise<void> {
  const env = await withSecretsIfKept(process.env, process.env.DATA_DIR || '.edgemesh')
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...env })
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(settings, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    const keyPem = createKey()
    const csr = signingRequestFor(keyPem)
    const { role, out, days } = options
    const { certificatePem, rootsPem, notAfter } = await offline.issueOperator({
      name,
      role,
      csr,
      validityMs: days * dayMs,
    })
    await saveCredentials(out, { keyPem, certificatePem, rootsPem })
    if (options.json) console.log(JSON.stringify({ name, role, folder: out, notAfter: notAfter.toISOString() }))
    else console.log(`operator ${name} (${role}) is in ${out}, valid until ${notAfter.toISOString()}`)
  } finally {
    await offline.close()
  }
}
