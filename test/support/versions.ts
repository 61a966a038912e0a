/**
 * Other versions of the service, to run beside this one: the one before, out of the history, and one of tomorrow, which is
 * this one with a migration more.
 */
import { type ExecFileSyncOptionsWithStringEncoding, execFile, execFileSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { cp, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { ExecutionContext } from 'ava'

const run = promisify(execFile)
const root = join(import.meta.dirname, '../..')
const migrations = 'src/db/migrations'

export type Version = {
  /** Its `src/main.ts`. */
  program: string
  /** A command of its own, which has to succeed. @returns what it has printed */
  command(env: Record<string, string>, ...args: string[]): Promise<string>
}

export function versionIn(folder: string): Version {
  const program = join(folder, 'src/main.ts')
  return {
    program,
    command: async (env, ...args) =>
      (await run(process.execPath, [program, ...args], { env: { PATH: process.env.PATH, ...env } })).stdout,
  }
}

export const thisVersion = versionIn(root)

/** @returns where it is in the history, or why it can not be had */
export function commitBefore(): { commit: string } | { missing: string } {
  const newest = readdirSync(join(root, migrations)).sort().at(-1)
  try {
    // When the newest migration came to where we are, by merge or by commit. One that is not committed yet: now.
    const path = `${migrations}/${newest}`
    const added = git('log', '--first-parent', '-m', '--diff-filter=A', '--format=%H', '-1', '--', path)
    const commit = git('rev-parse', '--verify', '--quiet', added ? `${added}^1` : 'HEAD')
    const manifest = JSON.parse(git('show', `${commit}:package.json`)) as { dependencies: Record<string, string> }
    const gone = Object.keys(manifest.dependencies).filter(name => !existsSync(join(root, 'node_modules', name)))
    if (gone.length > 0) return { missing: `it needs packages that are not installed: ${gone.join(', ')}` }
    return { commit }
  } catch {
    return { missing: 'the history does not go back to it' }
  }
}

/** The version of that commit, gone with the test. It shares our packages. */
export async function versionAt(t: ExecutionContext, commit: string): Promise<Version> {
  const folder = await folderFor(t)
  const archive = join(folder, 'archive.tar')
  git('archive', '--format=tar', '-o', archive, commit, 'src', 'policies', 'package.json')
  await run('tar', ['-xf', archive, '-C', folder])
  return versionIn(folder)
}

/** This version with a migration that does what migrations do: columns, an index and a table beside the load. */
export async function versionOfTomorrow(t: ExecutionContext): Promise<Version> {
  const folder = await folderFor(t)
  for (const name of ['src', 'policies', 'package.json'])
    await cp(join(root, name), join(folder, name), { recursive: true })
  await writeFile(
    join(folder, migrations, '9999-tomorrow.ts'),
    `import { Migration } from '@mikro-orm/migrations'

export class Tomorrow extends Migration {
  override async up(): Promise<void> {
    for (const table of tables) this.addSql(\`alter table \${table} add column of_tomorrow text not null default 'new'\`)
    this.addSql('create index devices_of_tomorrow on devices (of_tomorrow)')
    this.addSql('create table of_tomorrow (device_id text primary key references devices (id) on delete cascade)')
  }

  override async down(): Promise<void> {
    this.addSql('drop table of_tomorrow')
    for (const table of tables) this.addSql(\`alter table \${table} drop column of_tomorrow\`)
  }
}

const tables = ['devices', 'device_postures', 'health_reports', 'certificates', 'enrollment_tokens', 'token_redemptions',
  'connections', 'decisions', 'audit_events', 'users', 'services', 'instances']
`,
  )
  const orm = join(folder, 'src/db/orm.ts')
  const source = await readFile(orm, 'utf8')
  const changed = source.replace(
    /(\nconst migrationsList = \[[^\]]*)\]/,
    `\nimport { Tomorrow } from './migrations/9999-tomorrow.ts'\n$1  { name: '9999-tomorrow', class: Tomorrow },\n]`,
  )
  if (changed === source) throw new Error('the list of migrations is not where it was')
  await writeFile(orm, changed)
  return versionIn(folder)
}

async function folderFor(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-version-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  await symlink(join(root, 'node_modules'), join(folder, 'node_modules'))
  return folder
}

/** Also where the checkout belongs to another user than us, as in containers. */
function git(...args: string[]): string {
  const options: ExecFileSyncOptionsWithStringEncoding = { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }
  return execFileSync('git', ['-C', root, '-c', 'safe.directory=*', ...args], options).trim()
}
