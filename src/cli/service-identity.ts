/** `edgemesh service-identity`: certificates for programs that ask about devices, such as proxies. */
import { Command } from 'commander'
import { certifyOffline, daysMax } from './offline-certificate.ts'
import { wholeNumber } from './option-values.ts'

/** A proxy is not renewed over the wire: a quarter leaves time to make another. */
const daysDefault = 90

export function serviceIdentityCommand(): Command {
  return new Command('service-identity')
    .description('identities of programs that ask about devices, such as proxies')
    .addCommand(createCommand())
    .addHelpText(
      'after',
      `
Examples:
  edgemesh service-identity create edge-proxy --out ./edge-proxy
`,
    )
}

type CreateOptions = { out: string; days: number; json?: true }

function createCommand(): Command {
  return new Command('create')
    .description('make an identity: a key, and a certificate for it; runs beside the database, with its secrets')
    .argument('<name>', 'letters, digits, ".", "_" and "-"')
    .requiredOption('--out <folder>', 'where service.key, service.crt and ca.crt go')
    .option('--days <n>', 'how long the certificate is valid', wholeNumber(1, daysMax), daysDefault)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Whoever holds it may ask whether any device may connect, and is believed about which device that is: give it to proxies
that verify the certificates of devices themselves, such as Envoy (docs/envoy.md). It takes the settings of the server:
DATABASE_URL, CA_KEY_PASSPHRASE, ENROLLMENT_TOKEN_SECRET. Run it again before the certificate expires; the one before
stays good until then.

Examples:
  edgemesh service-identity create edge-proxy --out ./edge-proxy
  edgemesh service-identity create edge-proxy --days 30 --out ./edge-proxy --json | jq -r .notAfter
`,
    )
    .action(create)
}

async function create(name: string, { out, days, json }: CreateOptions): Promise<void> {
  const notAfter = await certifyOffline(out, 'service', days, (offline, request) =>
    offline.issueServiceIdentity({ name, ...request }),
  )
  if (json) console.log(JSON.stringify({ name, folder: out, notAfter: notAfter.toISOString() }))
  else console.log(`the identity of service ${name} is in ${out}, valid until ${notAfter.toISOString()}`)
}
