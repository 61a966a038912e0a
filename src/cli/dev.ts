/**
 * `edgemesh dev`, which is what `npm start` runs: a whole EdgeMesh in one process that proves itself.
 *
 * Everything is kept in one folder, each file of it whole or absent, so that whatever is killed at whatever moment can be
 * started again: `secrets.json`, `postgres/`, `operator/` (credentials for grpcurl and the other commands),
 * `demo-device/`.
 */
import { relative } from 'node:path'
import { Command } from 'commander'
import { destination } from 'pino'
import type { Credentials } from '../client/channel.ts'
import { createKey, signingRequestFor } from '../client/csr.ts'
import type { RunningServer, StartStep } from '../server.ts'
import { readSettings, type Settings } from '../settings.ts'
import { createLog } from '../telemetry/log.ts'
import { devEnvironment } from './dev-environment.ts'
import { describeFailure, printFailure } from './failure.ts'
import { type Narrator, narrateJson, narrateToPeople } from './narration.ts'
import { areGood, findCredentials, saveCredentials } from './operator-credentials.ts'
import { wholeNumber } from './option-values.ts'
import { demo, type Proven, prove } from './proof.ts'
import { asked, stopSignal } from './stop-signal.ts'
import { edgemeshTyped } from './typed.ts'

const dayMs = 86_400_000
const operatorValidityMs = 90 * dayMs
/** An operator's certificate with less left than this is replaced. */
const operatorRemainsMsMin = 30 * dayMs

const dataDirDefault = '.edgemesh'
const startSteps: readonly StartStep[] = ['database', 'authority', 'listen']

type DevOptions = { once?: true; json?: true; port?: number; data?: string }

export function devCommand(): Command {
  return new Command('dev')
    .description('try it: everything embedded, proven end to end with a simulated device; then keeps serving')
    .option('--once', 'stop after the proof: exit code 0 when it holds, 1 when not')
    .option('--json', 'one JSON document a line and step: {step, ok, ms, detail}; logs are on stderr')
    .option(
      '--port <n>',
      'gRPC port; 0 takes a free one (default: API_PORT, else 8000, else a free one)',
      wholeNumber(0, 65_535),
    )
    .option('--data <folder>', `where everything is kept (default: DATA_DIR, else ${dataDirDefault})`)
    .addHelpText(
      'after',
      `
Every setting of "edgemesh serve" works here too, as an environment variable.

Examples:
  edgemesh dev
  edgemesh dev --once --json | jq -r 'select(.ok | not)'
  LOG_LEVEL=DEBUG edgemesh dev --port 8443 --data /tmp/edgemesh
`,
    )
    .action(dev)
}

async function dev(options: DevOptions): Promise<void> {
  const startedAt = performance.now()
  const stopping = stopSignal()
  const narrator = options.json ? narrateJson : narrateToPeople()

  // Step 1: What the server runs with.
  const dataDir = options.data || process.env.DATA_DIR || dataDirDefault
  const { env, notes } = await devEnvironment(process.env, { dataDir, ...withPort(options.port) })
  const settings = readSettings(env)
  narrator.say(`EdgeMesh starts, with all that it needs in ${shown(settings.dataDir)}\n`)
  for (const note of notes) console.error(`note: ${note}`)

  // Step 2: The server.
  const server = await start(settings, narrator)
  if (!server) {
    process.exitCode = 1
    return
  }

  // Step 3: The proof, and what to do with what it has shown.
  try {
    const urls = addressesOf(server, settings)
    const proven = await proof(server, settings, urls, narrator, stopping)
    if (proven) {
      const ms = performance.now() - startedAt
      narrator.end({
        step: 'done',
        ok: true,
        ms,
        detail: { ...urls, dataDir: settings.dataDir },
        said: 'all of it holds',
      })
    } else process.exitCode = 1
    if (options.once || stopping.aborted) return
    narrator.say(howToGoOn(urls, settings, proven))
    await asked(stopping)
    narrator.say('\nstopping')
    // Whoever asks it to stop is content; only --once is about the proof.
    process.exitCode = 0
  } finally {
    await server.stop()
  }
}

type Addresses = { server: string; metrics: string }

function addressesOf(server: RunningServer, settings: Settings): Addresses {
  const { host } = settings.metrics
  const everywhere = host === '0.0.0.0' || host === '::'
  return {
    server: `localhost:${server.apiPort}`,
    metrics: `http://${everywhere ? '127.0.0.1' : host}:${server.metricsPort}/metrics`,
  }
}

/** @returns undefined when it could not start, which has been told then */
async function start(settings: Settings, narrator: Narrator): Promise<RunningServer | undefined> {
  const waiting = [...startSteps]
  let stepAt = performance.now()
  narrator.begin('database')
  try {
    const { startServer } = await import('../server.ts')
    return await startServer({
      settings,
      // stdout is for the account of what happens.
      log: createLog({ level: settings.log.level, destination: destination(2) }),
      onStep(step, ms, detail) {
        narrator.end({ step, ok: true, ms, detail, said: sayStarted(step, detail) })
        waiting.splice(waiting.indexOf(step), 1)
        stepAt = performance.now()
        if (waiting[0]) narrator.begin(waiting[0])
      },
    })
  } catch (error) {
    narrator.end(failed(waiting[0] ?? 'listen', performance.now() - stepAt, error))
    printFailure(error)
    return undefined
  }
}

function sayStarted(step: StartStep, detail: Record<string, unknown>): string {
  switch (step) {
    case 'database':
      return detail.embedded ? 'PostgreSQL, embedded' : 'PostgreSQL, at DATABASE_URL'
    case 'authority':
      return `certificate authority of ${detail.trustDomain}${detail.created ? ', made just now' : ''}`
    case 'listen':
      return `gRPC on port ${detail.port}, metrics on port ${detail.metricsPort}`
  }
}

/** @returns whether every step has succeeded; those that have not have been told */
async function proof(
  server: RunningServer,
  settings: Settings,
  urls: Addresses,
  narrator: Narrator,
  stopping: AbortSignal,
): Promise<boolean> {
  let failure: unknown
  async function step<T>(name: string, work: () => Promise<Proven<T>>): Promise<T> {
    const startedAt = performance.now()
    narrator.begin(name)
    try {
      const { value, detail, said } = await orStop(work(), stopping)
      narrator.end({ step: name, ok: true, ms: performance.now() - startedAt, detail, said })
      return value
    } catch (error) {
      failure = error
      narrator.end(failed(name, performance.now() - startedAt, error))
      throw error
    }
  }

  try {
    const operator = await operatorOf(server, settings, urls.server)
    await prove({ server: urls.server, metricsUrl: urls.metrics, operator, dataDir: settings.dataDir }, step)
    return true
  } catch (error) {
    // What fails between the steps belongs to the one that could not begin.
    if (failure === undefined) narrator.end(failed('token', 0, error))
    printFailure(error)
    return false
  }
}

function failed(step: string, ms: number, error: unknown) {
  const said = describeFailure(error)
    .map(({ message }) => message)
    .join('; ')
  return { step, ok: false, ms, detail: { error: said }, said }
}

async function orStop<T>(work: Promise<T>, stopping: AbortSignal): Promise<T> {
  const stopped = asked(stopping).then(() => {
    throw new Error('stopped before it was done')
  })
  stopped.catch(() => {})
  return Promise.race([work, stopped])
}

/** The operator that the other commands use: kept as long as it is good for this server, else made anew. */
async function operatorOf(server: RunningServer, settings: Settings, address: string): Promise<Credentials> {
  const folder = operatorFolder(settings)
  const until = new Date(Date.now() + operatorRemainsMsMin)
  const kept = await findCredentials(folder)
  const { keyPem, certificatePem, rootsPem } =
    kept && areGood(kept, server.rootsPem, until) ? kept : await newOperator(server)
  await saveCredentials(folder, { keyPem, certificatePem, rootsPem, server: address })
  return { keyPem, certificateChainPem: certificatePem, rootsPem }
}

async function newOperator(server: RunningServer) {
  const keyPem = createKey()
  const csr = signingRequestFor(keyPem)
  const request = { name: 'admin', role: 'admin', csr, validityMs: operatorValidityMs }
  return { keyPem, ...(await server.issueOperator(request)) }
}

function operatorFolder(settings: Settings): string {
  return `${settings.dataDir}/operator`
}

function howToGoOn({ server, metrics }: Addresses, settings: Settings, proven: boolean): string {
  const folder = shown(operatorFolder(settings))
  const grpcurl = `grpcurl -cacert ${folder}/ca.crt -cert ${folder}/operator.crt -key ${folder}/operator.key -authority localhost`
  const elsewhere = folder === `${dataDirDefault}/operator` ? '' : ` --credentials ${folder}`
  const state = `${shown(settings.dataDir)}/my-laptop`
  return `
${proven ? 'It runs' : 'The proof has failed, but the server runs for you to look into it'}: gRPC on ${server}, metrics on ${metrics}. Ctrl-C stops it.

Why was the demo denied?
  ${edgemeshTyped} check${elsewhere} --user ${demo.user} --service ${demo.service} --device ${demo.device}

Make a token, and enroll this machine with it:
  EDGEMESH_TOKEN=$(${edgemeshTyped} token create${elsewhere}) ${edgemeshTyped} agent --server ${server} --state ${state} --id my-laptop

Look around:
  ${edgemeshTyped} device list${elsewhere}
  ${edgemeshTyped} audit search${elsewhere} --limit 20
  curl -s ${metrics}

With grpcurl:
  ${grpcurl} ${server} list
  ${grpcurl} ${server} edgemesh.v1.AdminService/ListDevices
  ${grpcurl} \\
    -d '{"question": {"user": "${demo.user}", "service": "${demo.service}"}, "device_id": "${demo.device}"}' \\
    ${server} edgemesh.v1.AuthorizeService/Check
`
}

/** As one would type it from here. */
function shown(path: string): string {
  const fromHere = relative(process.cwd(), path)
  return fromHere === '' || fromHere.startsWith('..') ? path : fromHere
}

function withPort(port: number | undefined): { port?: number } {
  return port === undefined ? {} : { port }
}
