/** PostgreSQL as `deploy/postgres` has it: its files, its roles, its certificate, with secrets that `make-secrets` has made. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, chown, cp, mkdir, mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { eventually } from './edgemesh.ts'
import { freePort } from './free-port.ts'
import { deploy, say } from './programs.ts'

/** As whom servers run where tests run as root, which PostgreSQL refuses. */
export const account = process.getuid?.() === 0 ? { uid: 65_534, gid: 65_534 } : {}

export type ShippedPostgres = {
  port: number
  /** Where its sockets are. */
  folder: string
  /** What `make-secrets` made. */
  secrets: string
  log(): Promise<string>
  password(role: 'owner' | 'service' | 'monitor' | 'replication' | 'superuser'): Promise<string>
  /** With TLS, for one of its names. */
  url(role: string, password: string, more?: string): string
}

/** Files that its user may read and write: those of root go to it. */
export async function handOver(path: string): Promise<void> {
  if (account.uid === undefined) return
  await chown(path, account.uid, account.gid)
  for (const entry of await readdir(path, { withFileTypes: true })) {
    const inside = join(path, entry.name)
    if (entry.isDirectory()) await handOver(inside)
    else await chown(inside, account.uid, account.gid)
  }
}

/** Whoever runs the test can be kept out of folders of others: this one everybody may enter. */
export async function openFolder(t: ExecutionContext, name: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), `edgemesh-${name}-`))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  await chmod(folder, 0o755)
  return folder
}

export async function makeSecrets(folder: string, env: Record<string, string> = {}): Promise<void> {
  const { exitCode, said } = await say(join(deploy, 'compose', 'make-secrets'), [folder], {
    env: { PATH: process.env.PATH, ...env },
  })
  if (exitCode !== 0) throw new Error(said)
}

/** @param bin the folder of `postgres` and `initdb` */
export async function shippedPostgres(t: ExecutionContext, bin: string): Promise<ShippedPostgres> {
  const folder = await openFolder(t, 'shipped-postgres')
  const secrets = join(folder, 'secrets')
  await makeSecrets(secrets, { DATABASE_HOST: 'localhost', DATABASE_CA_FILE: join(folder, 'ca.crt') })
  await cp(join(secrets, 'authority', 'ca.crt'), join(folder, 'ca.crt'))
  await chmod(join(folder, 'ca.crt'), 0o644)
  const files = join(folder, 'files')
  await mkdir(files)
  for (const name of ['postgresql.conf', 'pg_hba.conf', 'start-replica']) {
    await cp(join(deploy, 'postgres', name), join(files, name))
  }
  // `peer` asks the system who somebody is, and who runs tests is not its user postgres.
  const hba = join(files, 'pg_hba.conf')
  const shipped = await readFile(hba, 'utf8')
  if (!/^local +all +postgres +peer$/m.test(shipped)) throw new Error('the superuser is to come by peer')
  await writeFile(hba, shipped.replace(/^(local +all +postgres +)peer$/m, '$1scram-sha-256'))
  // The memory of a machine that runs tests beside.
  await writeFile(join(files, 'local.conf'), "shared_buffers = '16MB'\nmin_wal_size = '80MB'\n")
  await handOver(folder)
  await chmod(folder, 0o755)
  const data = join(folder, 'data')
  const password = join(secrets, 'postgres', 'superuser-password')
  const env = { PATH: process.env.PATH, LC_ALL: 'C' }
  const made = await say(
    join(bin, 'initdb'),
    ['-D', data, '--username=postgres', `--pwfile=${password}`, '--data-checksums', '--encoding=UTF8'],
    { ...account, env, cwd: '/' },
  )
  if (made.exitCode !== 0) throw new Error(made.said)
  const port = await freePort()
  const log = join(folder, 'log')
  const server = await startServer(t, join(bin, 'postgres'), ['-D', data, ...commandLine(folder, port)], log)
  await eventually('PostgreSQL is ready', async () => {
    const said = await readFile(log, 'utf8')
    if (server.exitCode !== null) throw new Error(said)
    return /ready to accept connections/.test(said)
  })
  return {
    port,
    folder,
    secrets,
    log: () => readFile(log, 'utf8'),
    password: async role => (await readFile(join(secrets, 'postgres', `${role}-password`), 'utf8')).trim(),
    url: (role, password, more = `&sslrootcert=${join(folder, 'ca.crt')}`) =>
      `postgresql://${role}:${password}@localhost:${port}/edgemesh?sslmode=verify-full&uselibpqcompat=true${more}`,
  }
}

/** The very files, at the places and the port that a test has. */
export function commandLine(folder: string, port: number): string[] {
  const settings = {
    config_file: join(folder, 'files', 'postgresql.conf'),
    hba_file: join(folder, 'files', 'pg_hba.conf'),
    ssl_cert_file: join(folder, 'secrets', 'postgres', 'server.crt'),
    ssl_key_file: join(folder, 'secrets', 'postgres', 'server.key'),
    unix_socket_directories: folder,
    listen_addresses: 'localhost',
    port: String(port),
  }
  return Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`])
}

/** Ends with the test. */
export async function startServer(
  t: ExecutionContext,
  program: string,
  args: string[],
  log: string,
  env: Record<string, string> = {},
): Promise<ChildProcess> {
  const output = await open(log, 'a')
  const server = spawn(program, args, {
    ...account,
    cwd: '/',
    env: { PATH: process.env.PATH, LC_ALL: 'C', ...env },
    stdio: ['ignore', output.fd, output.fd],
  })
  await output.close()
  t.teardown(async () => {
    if (server.exitCode !== null || server.signalCode !== null) return
    const exited = once(server, 'exit')
    server.kill('SIGQUIT')
    await exited
  })
  return server
}
