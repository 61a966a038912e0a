/** Where the programs are that tests need: `undefined` is what this machine has not got. */
import { accessSync, constants, existsSync, readdirSync } from 'node:fs'
import { delimiter, join } from 'node:path'

const root = join(import.meta.dirname, '..', '..')

/** Whether there is such a file that we may run. */
function isExecutable(file: string): boolean {
  try {
    accessSync(file, constants.X_OK)
    return true
  } catch {
    return false
  }
}

/**
 * .ci/tools puts them into .tools/bin; Debian has those of administrators where only root looks. Not the whole search path:
 * npm puts programs of other people there, of the same names.
 *
 * @param elsewhere folders where it may be, too
 */
export function findProgram(name: string, ...elsewhere: string[]): string | undefined {
  // Whoever has it somewhere else says so: ENVOY, GRPCURL, REGAL.
  const given = process.env[name.toUpperCase()]
  if (given && isExecutable(given)) return given
  const folders = [join(root, '.tools', 'bin'), ...elsewhere, ...(process.env.PATH ?? '').split(delimiter)]
  return [...folders, '/usr/bin', '/usr/sbin', '/bin', '/sbin']
    .filter(folder => folder !== '' && !folder.includes('node_modules'))
    .map(folder => join(folder, name))
    .find(isExecutable)
}

const debianPostgres = '/usr/lib/postgresql'
/** The oldest that EdgeMesh serves on. */
const postgresVersionMin = 15

/** The programs of Debian's newest PostgreSQL that has all of these. @returns their folder */
export function findPostgres(...programs: string[]): string | undefined {
  const versions = existsSync(debianPostgres) ? readdirSync(debianPostgres).map(Number) : []
  return versions
    .filter(version => version >= postgresVersionMin)
    .sort((one, other) => other - one)
    .map(version => join(debianPostgres, String(version), 'bin'))
    .find(bin => ['postgres', ...programs].every(program => isExecutable(join(bin, program))))
}
