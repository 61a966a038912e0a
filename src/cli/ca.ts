/** `edgemesh ca`: the certificate authority, and the change from one to the next. */
import { Command, Option } from 'commander'
import { destination } from 'pino'
import {
  AuthorityRole,
  AuthorityRotationStage,
  GetAuthorityResponse,
  HolderProgress,
  RotateAuthorityResponse,
  type RotationProgress,
} from '../gen/edgemesh/v1/admin.ts'
import { encodePem } from '../identity/pem.ts'
import { readSettings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { everyoneReads, writeWhole } from '../whole-file.ts'
import { type ConnectionOptions, connecting, withAdmin } from './admin-client.ts'
import { valueFor, wordFor, wordsOf } from './enum-words.ts'
import { CommandFailure } from './failure.ts'
import { type ListOptions, listing, printList } from './listing.ts'
import { withSecretsIfKept } from './local-secrets.ts'
import { renderFacts, renderTable } from './table.ts'

export function caCommand(): Command {
  return new Command('ca')
    .description('the certificate authority: look at it, change to another one, its revocation list')
    .addCommand(initCommand())
    .addCommand(showCommand())
    .addCommand(rotateCommand())
    .addCommand(progressCommand())
    .addCommand(crlCommand())
    .addHelpText(
      'after',
      `
The change from one authority to the next goes in stages, each of which shows who is not ready for the next, and all
but the last of which can be taken back:

  stable      one authority
  published   the next one is trusted by all who hear of it, and issues nothing
  issuing     the next one issues; certificates of the last one still count, and are renewed
  retiring    the last one is trusted no more
  stable      the last one is forgotten, and with it the way back

Examples:
  edgemesh ca show
  edgemesh ca rotate --to published
  edgemesh ca progress --behind
`,
    )
}

function initCommand(): Command {
  return new Command('init')
    .description('make the authority before the first start, or register the one of CA_CERT; runs beside the database')
    .option('--out <file>', 'write the root here, PEM')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
It takes the settings of the server: DATABASE_URL, CA_KEY_PASSPHRASE, and CA_CERT_FILE with CA_KEY_FILE where you
bring an authority of your own. A server does the same when it starts. Done again it changes nothing.

Examples:
  edgemesh ca init --out ./root.crt
  CA_CERT_FILE=./issuing-and-root.pem CA_KEY_FILE=./issuing.key edgemesh ca init
`,
    )
    .action(init)
}

async function init(options: { out?: string; json?: true }): Promise<void> {
  const env = await withSecretsIfKept(process.env, process.env.DATA_DIR || '.edgemesh')
  const settings = readSettings({ LOG_LEVEL: 'WARN', ...env })
  const { openOffline } = await import('../server.ts')
  const offline = await openOffline(settings, createLog({ level: settings.log.level, destination: destination(2) }))
  try {
    const { created, issuing } = await offline.authorities()
    const { rootKeySha256, rootNotAfter, rootPem } = issuing
    if (options.out) await writeWhole(options.out, rootPem, everyoneReads)
    const facts = { created, rootKeySha256, rootNotAfter }
    if (options.json) console.log(JSON.stringify(facts))
    else console.log(`the authority ${created ? 'is made' : 'was there'}; its root key is ${rootKeySha256}`)
  } finally {
    await offline.close()
  }
}

function showCommand(): Command {
  return connecting(new Command('show'))
    .description('who issues, until when, and how far a rotation is')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Examples:
  edgemesh ca show
  edgemesh ca show --json | jq -r '.trustBundle.rootsPem[]' > roots.pem
`,
    )
    .action((options: ConnectionOptions & { json?: true }) =>
      withAdmin(options, async admin => {
        const authority = await admin.call('getAuthority', {})
        console.log(options.json ? JSON.stringify(GetAuthorityResponse.toJSON(authority)) : describe(authority))
      }),
    )
}

function describe({ rotationStage, authorities, progress, trustBundle }: GetAuthorityResponse): string {
  const facts = renderFacts({
    'trust domain': trustBundle?.trustDomain,
    stage: wordFor(AuthorityRotationStage, rotationStage),
    'trust bundle': trustBundle?.id,
    ...(progress && describeProgress(progress)),
  })
  const table = renderTable(
    {
      generation: authority => authority.generation,
      role: authority => wordFor(AuthorityRole, authority.role),
      'issuer until': authority => authority.issuerNotAfter,
      'root until': authority => authority.rootNotAfter,
      'issuer key id': authority => authority.issuerKeyId,
      'root key sha-256': authority => authority.rootKeySha256,
      key: authority => (authority.keyInFile ? 'in CA_KEY_FILE' : 'in the database'),
    },
    authorities,
  )
  return `${facts}\n\n${table}`
}

function describeProgress(progress: RotationProgress): Record<string, string> {
  const { devices, devicesTrusting, devicesCertified, operators, operatorsCertified } = progress
  return {
    'devices that trust the new root': `${devicesTrusting} of ${devices}`,
    'devices with a new certificate': `${devicesCertified} of ${devices}`,
    'operators with a new certificate': `${operatorsCertified} of ${operators}`,
  }
}

function rotateCommand(): Command {
  return connecting(new Command('rotate'))
    .description('go one stage on, or one stage back')
    .addOption(
      new Option('--to <stage>', 'the stage to go to').choices(wordsOf(AuthorityRotationStage)).makeOptionMandatory(),
    )
    .option('--force', 'go on although devices or operators are left behind', false)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
The next authority is made; or it is the one that CA_CERT_FILE and CA_KEY_FILE of every instance hold beside the
old one. Every instance follows within a second, and tells the devices whose streams it holds. Operators renew by
themselves, with "edgemesh operator renew".

Examples:
  edgemesh ca rotate --to published     then wait until all devices trust the new root: edgemesh ca show
  edgemesh ca rotate --to issuing       then wait until all have a new certificate
  edgemesh ca rotate --to retiring      then see that all is well; back with --to issuing
  edgemesh ca rotate --to stable        for good
`,
    )
    .action((options: ConnectionOptions & { to: string; force: boolean; json?: true }) =>
      withAdmin(options, async admin => {
        const stage = valueFor(AuthorityRotationStage, options.to)
        const rotated = await admin.call('rotateAuthority', { stage, force: options.force })
        if (options.json) console.log(JSON.stringify(RotateAuthorityResponse.toJSON(rotated)))
        else console.log(`the authority is ${wordFor(AuthorityRotationStage, rotated.stage)}`)
      }),
    )
}

function progressCommand(): Command {
  return listing(connecting(new Command('progress')))
    .description('how far each device and operator is with a rotation')
    .option('--behind', 'only those whom the next stage would leave behind', false)
    .addHelpText(
      'after',
      `
Examples:
  edgemesh ca progress --behind
  edgemesh ca progress --json | jq -r 'select(.trusting | not).spiffeId'
`,
    )
    .action((options: ConnectionOptions & ListOptions & { behind: boolean }) =>
      withAdmin(options, admin =>
        printList(options, {
          name: options.behind ? 'devices or operators that are behind' : 'devices or operators',
          page: async at => {
            const asked = { ...at, behindOnly: options.behind }
            const { holders, nextPageToken } = await admin.call('listRotationProgress', asked)
            return { rows: holders, nextPageToken }
          },
          columns: {
            'spiffe id': holder => holder.spiffeId,
            'trusts the new root': holder => (holder.trusting ? 'yes' : 'no'),
            'new certificate': holder => (holder.certified ? 'yes' : 'no'),
            'last seen': holder => holder.lastSeenAt,
            'certified until': holder => holder.notAfter,
          },
          toJson: HolderProgress.toJSON,
        }),
      ),
    )
}

function crlCommand(): Command {
  return connecting(new Command('crl'))
    .description('the revocation lists, PEM; the one of the authority that issues first')
    .option('--out <file>', 'write them here, not to stdout')
    .addHelpText(
      'after',
      `
Anyone can have them without a certificate from the port of the metrics: /crl, DER.

Examples:
  edgemesh ca crl | openssl crl -noout -text
`,
    )
    .action((options: ConnectionOptions & { out?: string }) =>
      withAdmin(options, async admin => {
        const { trustBundle } = await admin.call('getAuthority', {})
        const lists = trustBundle ? [trustBundle.crlDer, ...trustBundle.crlsDer].filter(der => der.length > 0) : []
        if (lists.length === 0) throw new CommandFailure('the server has sent no revocation list')
        const pem = lists.map(der => encodePem('X509 CRL', der)).join('')
        if (options.out) await writeWhole(options.out, pem, everyoneReads)
        else process.stdout.write(pem)
      }),
    )
}
