/** `edgemesh serve`: production. Settings from the environment, logs to stdout, one process or several. */
import { Command } from 'commander'
import { readSettings, type Settings, SettingsError } from '../settings.ts'
import { version } from '../version.ts'
import { machine, workersFor, workersMax } from '../workers/shares.ts'
import { workerCount } from './option-values.ts'
import { asked, stopSignal } from './stop-signal.ts'

export function serveCommand(): Command {
  return new Command('serve')
    .description('serve, with settings from the environment; logs are JSON on stdout')
    .option(
      '--workers <number>',
      `processes that share the port, 1 to ${workersMax}; auto: one for each core`,
      workerCount,
      1,
    )
    .addHelpText(
      'after',
      `
SIGTERM and Ctrl-C ask devices to reconnect elsewhere, finish calls under way, and exit with 0.

A database that is away at the start is waited for, for a minute.

Workers share what one process would have: DATABASE_POOL_SIZE, the memory. One
that dies is replaced. See docs/workers.md.

Calls are traced over OTLP when OTEL_EXPORTER_OTLP_ENDPOINT is set: see
docs/tracing.md.

Examples:
  DATABASE_URL=postgresql://edgemesh:PASSWORD@db:5432/edgemesh?ssl=require \\
  ENROLLMENT_TOKEN_SECRET_FILE=/run/secrets/enrollment CA_KEY_PASSPHRASE_FILE=/run/secrets/ca edgemesh serve
  edgemesh serve --workers auto
`,
    )
    .action(serve)
}

async function serve({ workers }: { workers: number | 'auto' }): Promise<void> {
  const settings = readSettings(process.env)
  if (workers === 1) return serveAlone(settings)
  if (workers !== 'auto') demandDatabase(settings)
  const count =
    settings.database.url === undefined ? 1 : workers === 'auto' ? workersFor(machine(process.env)) : workers
  if (count > 1) return serveTogether(settings, count)
  const cause = settings.database.url === undefined ? 'the embedded database' : 'the cores or the memory'
  return serveAlone(settings, cause)
}

/** The embedded database serves the process that has started it. With `auto` that is one. */
function demandDatabase({ database }: Settings): void {
  if (database.url !== undefined) return
  throw new SettingsError([
    {
      variable: 'DATABASE_URL',
      problem: 'is missing: the embedded database is for one process, and workers are several',
      hint: 'set it, or leave --workers away',
    },
  ])
}

/** @param cause why it is one process, where that had to be found out */
async function serveAlone(settings: Settings, cause?: string): Promise<void> {
  // Wrong settings are told without waiting for the server's code to load.
  const [{ startServer }, { awaitDatabase }, { createLog }, { startTracing }] = await Promise.all([
    import('../server.ts'),
    import('../db/await-database.ts'),
    import('../telemetry/log.ts'),
    import('../telemetry/tracing.ts'),
  ])
  const log = createLog({ level: settings.log.level })
  const tracing = await startTracing(process.env, { instanceId: settings.instanceId, version, log })
  const stopping = stopSignal()
  if (cause !== undefined) log.info({ cause }, 'there is one process')
  const { url } = settings.database
  if (url !== undefined) await awaitDatabase(url, { log, stopping })
  if (stopping.aborted) return
  const server = await startServer({ settings, log })
  await asked(stopping)
  await server.stop()
  await tracing?.stop()
}

async function serveTogether(settings: Settings, count: number): Promise<void> {
  const [{ startWorkers }, { awaitDatabase }, { createLog }, { isTracingWanted }] = await Promise.all([
    import('../workers/parent.ts'),
    import('../db/await-database.ts'),
    import('../telemetry/log.ts'),
    import('../telemetry/tracing.ts'),
  ])
  // Each worker traces by itself. What is wrong is told once, before there are any.
  isTracingWanted(process.env)
  const stopping = stopSignal()
  const log = createLog({ level: settings.log.level })
  const env = process.env
  const { url } = settings.database
  if (url !== undefined) await awaitDatabase(url, { log, stopping })
  if (stopping.aborted) return
  const starting = startWorkers({ settings, count, machine: machine(env), env, log, stopping })
  // Ctrl-C reaches workers too, and may have been what kept them from it.
  const workers = await starting.catch(error => {
    if (!stopping.aborted) throw error
  })
  await asked(stopping)
  const { killed } = (await workers?.stop()) ?? { killed: 0 }
  if (killed > 0) process.exitCode = 1
}
