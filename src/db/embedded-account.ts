/**
 * As whom the programs of the embedded PostgreSQL run.
 *
 * PostgreSQL refuses root, and containers and CI jobs run as root. Then the programs run as `nobody`, or as whoever owns
 * the data already. `nobody` may be unable to reach them: a clone under /root and a folder of `mktemp -d` are closed to
 * others. In that case `setpriv` hands the programs one capability, to pass folders that are closed to their user, and
 * takes every other away. The server still isn't root: its user owns its files and nothing else.
 */
import { existsSync } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { EmbeddedPostgresError } from './embedded-error.ts'

export type Account = {
  /** The user who must own the data; undefined when it is the one that this process runs as. */
  owner: { uid: number; gid: number } | undefined
  /** How to spawn a program as that user. */
  command(program: string, args: string[]): { file: string; args: string[]; options: { uid?: number; gid?: number } }
}

/**
 * @param data the data folder; it need not exist yet
 * @param paths files and folders that the programs have to reach
 */
export async function chooseAccount(data: string, paths: string[]): Promise<Account> {
  if (process.getuid?.() !== 0) return { owner: undefined, command: (file, args) => ({ file, args, options: {} }) }

  const owner = (await ownerOf(data)) ?? (await nobody())
  const closed = await firstClosed(paths, owner)
  if (closed === undefined) return { owner, command: (file, args) => ({ file, args, options: owner }) }

  const setpriv = findSetpriv()
  const capability = await passingCapability()
  if (setpriv === undefined || capability === undefined) {
    throw new EmbeddedPostgresError(
      'UNREACHABLE',
      `PostgreSQL does not run as root, and its user (uid ${owner.uid}) cannot reach ${closed}`,
      'set DATA_DIR to a folder that others may enter, such as /var/lib/edgemesh; run as a normal user; ' +
        'or install setpriv (util-linux) and keep the capabilities of root',
    )
  }
  const words = [
    `--reuid=${owner.uid}`,
    `--regid=${owner.gid}`,
    '--clear-groups',
    `--inh-caps=-all,+${capability}`,
    `--ambient-caps=-all,+${capability}`,
    `--bounding-set=-all,+${capability}`,
    // Without this the kernel ignores capabilities in access(2), by which PostgreSQL looks for its own program.
    '--securebits=+no_setuid_fixup',
    '--no-new-privs',
    '--',
  ]
  return { owner, command: (file, args) => ({ file: setpriv, args: [...words, file, ...args], options: {} }) }
}

async function ownerOf(data: string): Promise<{ uid: number; gid: number } | undefined> {
  const stats = await stat(data).catch(() => undefined)
  return stats === undefined || stats.uid === 0 ? undefined : { uid: stats.uid, gid: stats.gid }
}

/** 65534 is what Linux calls nobody where /etc/passwd doesn't, as in images without a distribution. */
async function nobody(): Promise<{ uid: number; gid: number }> {
  const passwd = await readFile('/etc/passwd', 'utf8').catch(() => '')
  const match = /^nobody:[^:]*:(\d+):(\d+):/m.exec(passwd)
  return match ? { uid: Number(match[1]), gid: Number(match[2]) } : { uid: 65_534, gid: 65_534 }
}

/** The first folder on the way to `paths`, or the first of them, that the user may not enter or read. */
async function firstClosed(paths: string[], user: { uid: number; gid: number }): Promise<string | undefined> {
  for (const path of paths) {
    const way = [path]
    while (dirname(way[0]!) !== way[0]) way.unshift(dirname(way[0]!))
    for (const step of way) {
      const { mode, uid, gid } = await stat(step)
      const shift = uid === user.uid ? 6 : gid === user.gid ? 3 : 0
      const needed = step === path ? 0o5 : 0o1
      if (((mode >> shift) & needed) !== needed) return step
    }
  }
  return undefined
}

function findSetpriv(): string | undefined {
  return ['/usr/bin', '/bin', '/usr/local/bin', '/sbin'].map(folder => join(folder, 'setpriv')).find(existsSync)
}

/** The weaker one where there is a choice; Docker gives root only `dac_override`. */
async function passingCapability(): Promise<'dac_read_search' | 'dac_override' | undefined> {
  const status = await readFile('/proc/self/status', 'utf8').catch(() => '')
  const held = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`)
  if (held & (1n << 2n)) return 'dac_read_search'
  if (held & (1n << 1n)) return 'dac_override'
  return undefined
}
