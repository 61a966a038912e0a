/** `edgemesh operator`: certificates for those who administrate, made beside the database and renewed from anywhere. */
import { X509Certificate } from 'node:crypto'
import { Command, Option } from 'commander'
import { renewCredentials } from '../client/enroll.ts'
import { comparingClocks } from '../client/server-clock.ts'
import { parseSpiffeId } from '../identity/spiffe-id.ts'
import { type ConnectionOptions, connecting, findServer, withAdmin } from './admin-client.ts'
import { CommandFailure } from './failure.ts'
import { certifyOffline, daysMax } from './offline-certificate.ts'
import { saveCredentials } from './operator-credentials.ts'
import { wholeNumber } from './option-values.ts'

const roles = ['admin', 'operator', 'auditor']
const daysDefault = 365

export function operatorCommand(): Command {
  return new Command('operator')
    .description('operators: those who administrate')
    .addCommand(createCommand())
    .addCommand(renewCommand())
    .addCommand(revokeCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh operator create ada --role admin --out ./ada
  edgemesh operator renew --credentials ./ada
  edgemesh operator revoke grace --reason 'has left the company'
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

async function create(name: string, { role, out, days, json }: CreateOptions): Promise<void> {
  const notAfter = await certifyOffline(out, 'operator', days, (offline, request) =>
    offline.issueOperator({ name, role, ...request }),
  )
  if (json) console.log(JSON.stringify({ name, role, folder: out, notAfter: notAfter.toISOString() }))
  else console.log(`operator ${name} (${role}) is in ${out}, valid until ${notAfter.toISOString()}`)
}

function renewCommand(): Command {
  return connecting(new Command('renew'))
    .description('replace the key and the certificate in a folder by new ones for the same operator')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
The server asks for nothing but the certificate that is there, so renew before it expires; one that has expired is made
anew with "edgemesh operator create", beside the database. The new one is valid for as long as the old one was. ca.crt
gets the roots that the server trusts now. The folder changes as a whole or not at all, and the old certificate stays
good until it expires, so nothing that runs with it has to stop.

Examples:
  edgemesh operator renew
  edgemesh operator renew --credentials ./ada --server edgemesh.example.com:8000
  edgemesh operator renew --credentials ./ada --json | jq -r .notAfter
`,
    )
    .action(renew)
}

async function renew(options: ConnectionOptions & { json?: true }): Promise<void> {
  const { server, credentials, folder } = await findServer(options)
  const { name, spiffeId } = operatorIn(credentials.certificateChainPem, folder)
  const renewed = await comparingClocks(server, renewCredentials(server, { ...credentials, spiffeId }))
  const { keyPem, certificateChainPem, rootsPem, notAfter, trustBundleId } = renewed
  await saveCredentials(folder, { keyPem, certificatePem: certificateChainPem, rootsPem })
  if (options.json) console.log(JSON.stringify({ name, folder, notAfter: notAfter.toISOString(), trustBundleId }))
  else console.log(`operator ${name} is renewed in ${folder}, valid until ${notAfter.toISOString()}`)
}

function revokeCommand(): Command {
  return connecting(new Command('revoke'))
    .description('take all certificates of an operator back, at once; for administrators')
    .argument('<name>')
    .requiredOption('--reason <text>', 'why, for people; kept in the audit log')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
All that the operator has open is cut within a second, at every instance. To let one of that name in again, make it
anew with "edgemesh operator create", beside the database. Nobody revokes the operator as whom they call.

Examples:
  edgemesh operator revoke grace --reason 'has left the company'
`,
    )
    .action((name: string, options: ConnectionOptions & { reason: string; json?: true }) =>
      withAdmin(options, async admin => {
        const { certificatesRevoked } = await admin.call('revokeOperator', { name, reason: options.reason })
        if (options.json) console.log(JSON.stringify({ name, certificatesRevoked }))
        else console.log(`operator ${name} is revoked (${certificatesRevoked} certificates)`)
      }),
    )
}

/** Whom the certificate names. */
function operatorIn(certificatePem: string, folder: string): { name: string; spiffeId: string } {
  const { subjectAltName = '' } = new X509Certificate(certificatePem)
  const spiffeId = subjectAltName.replace(/^URI:/, '')
  const named = parseSpiffeId(spiffeId)
  if (named?.kind === 'operator') return { name: named.id, spiffeId }
  throw new CommandFailure(
    `operator.crt in ${folder} is not the certificate of an operator`,
    'name the folder of one with --credentials, or make one: edgemesh operator create --help',
  )
}
