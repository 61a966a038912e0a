/** What `edgemesh dev` assumes where the environment says nothing: this machine only, and nothing to set up. */
import { createServer } from 'node:net'
import { type Environment, isGiven, withKeptSecrets } from './local-secrets.ts'

const devDefaults = {
  API_HOST: '127.0.0.1',
  METRICS_HOST: '127.0.0.1',
  LOG_LEVEL: 'WARN',
  // Whoever tries things out enrolls more often than a device does.
  RATE_LIMIT_ENROLLMENTS: '100/minute',
}

const portDefaults = { API_PORT: 8000, METRICS_PORT: 9090 } as const
const hostOf = { API_PORT: 'API_HOST', METRICS_PORT: 'METRICS_HOST' } as const

/** @returns the whole environment, and a line for each thing that is not as one would expect */
export async function devEnvironment(
  given: Environment,
  options: { dataDir: string; port?: number },
): Promise<{ env: Environment; notes: string[] }> {
  const chosen = { DATA_DIR: options.dataDir, ...(options.port !== undefined && { API_PORT: String(options.port) }) }
  const defaults = Object.entries(devDefaults).filter(([name]) => !isGiven(given, name))
  let env: Environment = { ...given, ...Object.fromEntries(defaults), ...chosen }

  // The demo reaches the server as localhost, so its certificate has to have that name.
  if (env.SERVER_NAMES && !env.SERVER_NAMES.split(',').some(name => name.trim() === 'localhost')) {
    env = { ...env, SERVER_NAMES: `${env.SERVER_NAMES},localhost` }
  }

  const notes: string[] = []
  for (const name of ['API_PORT', 'METRICS_PORT'] as const) {
    if (isGiven(env, name) || (await isFree(portDefaults[name], env[hostOf[name]] ?? '127.0.0.1'))) continue
    env = { ...env, [name]: '0' }
    notes.push(`port ${portDefaults[name]} is taken, so a free one is used; ${name} chooses another`)
  }
  return { env: await withKeptSecrets(env, options.dataDir), notes }
}

function isFree(port: number, host: string): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>()
  const probe = createServer()
  // Anything but a port in use is for the server itself to say.
  probe.once('error', error => resolve((error as NodeJS.ErrnoException).code !== 'EADDRINUSE'))
  probe.listen(port, host, () => probe.close(() => resolve(true)))
  return promise
}
