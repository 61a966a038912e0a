/** What files under `deploy/` may set: the variables of `src/settings.ts`, each also as a file, and those of Node and tracing. */
import { SETTINGS_REFERENCE } from '../../src/settings.ts'

const names = new Set(SETTINGS_REFERENCE.flatMap(({ name }) => [name, `${name}_FILE`]))
const secrets = new Set(SETTINGS_REFERENCE.filter(({ secret }) => secret).map(({ name }) => name))

/** Those that no EdgeMesh reads. */
export function unknownSettings(variables: Iterable<string>): string[] {
  return [...variables].filter(name => !names.has(name) && !/^(NODE_|OTEL_)/.test(name))
}

/** Those whose value stands where it can be read, instead of in a file. */
export function openSecrets(environment: Record<string, unknown>): string[] {
  return Object.keys(environment).filter(name => secrets.has(name) && environment[name] !== '')
}
