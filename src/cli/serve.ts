/** `edgemesh serve`: production. Settings from the environment, logs to stdout, one process. */
import { Command } from 'commander'
import { readSettings } from '../settings.ts'
import { asked, stopSignal } from './stop-signal.ts'

export function serveCommand(): Command {
  return new Command('serve')
    .description('serve, with settings from the environment; logs are JSON on stdout')
    .addHelpText(
      'after',
      `
SIGTERM and Ctrl-C ask devices to reconnect elsewhere, finish calls under way, and exit with 0.

Calls are traced over OTLP when OTEL_EXPORTER_OTLP_ENDPOINT is set.

Examples:
  DATABASE_URL=postgresql://edgemesh:PASSWORD@db:5432/edgemesh?ssl=require \\
  ENROLLMENT_TOKEN_SECRET_FILE=/run/secrets/enrollment CA_KEY_PASSPHRASE_FILE=/run/secrets/ca edgemesh serve
`,
    )
    .action(serve)
}

async function serve(): Promise<void> {
  const settings = readSettings(process.env)
  // Wrong settings are told without waiting for the server's code to load.
  const [{ startServer }, { createLog }, { startTracing }] = await Promise.all([
    import('../server.ts'),
    import('../telemetry/log.ts'),
    import('../telemetry/metrics.ts'),
  ])
  const tracing = await startTracing(process.env)
  const stopping = stopSignal()
  const server = await startServer({ settings, log: createLog({ level: settings.log.level }) })
  await asked(stopping)
  await server.stop()
  await tracing?.stop()
}
