/** A daemon of another team, run by the commands of docs/integrate.md against a real server: what all of them have to do. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { createInterface } from 'node:readline'
import type { ExecutionContext } from 'ava'
import { AuthorityRotationStage as Stage } from '../../src/gen/edgemesh/v1/admin.ts'
import { type EdgeMesh, eventually, startEdgeMesh, unary } from '../support/edgemesh.ts'
import { type Link, link } from '../support/relay.ts'
import { repository } from './guide.ts'

export type Furnished = { mesh: EdgeMesh; way: Link; server: string }

/** A server with what the examples ask about, and a way to it that can break. */
export async function furnished(t: ExecutionContext): Promise<Furnished> {
  const mesh = await startEdgeMesh(t, { HEARTBEAT_INTERVAL_SECONDS: '1' })
  await unary(mesh.admin, 'createUser', { id: 'demo', email: 'demo@example.com', name: 'Demo', role: 'admin' })
  await unary(mesh.admin, 'createService', { id: 'demo-database', name: 'Demo', labels: {}, owner: '', roles: [] })
  const way = await link(t, mesh.server.apiPort)
  return { mesh, way, server: `localhost:${way.port}` }
}

/** The folder of an example, copied to where it can be written in, with the protos where it looks for them. */
export async function exampleFolder(t: ExecutionContext, language: string): Promise<string> {
  const root = await mkdtemp(join(tmpdir(), `edgemesh-${language}-`))
  t.teardown(() => rm(root, { recursive: true, force: true }))
  const folder = join(root, 'docs/examples', language)
  const made = /[/\\](gen|node_modules|edgemesh|__pycache__)$/
  await cp(join(repository, 'docs/examples', language), folder, { recursive: true, filter: path => !made.test(path) })
  await symlink(join(repository, 'proto'), join(root, 'proto'))
  return folder
}

export type Program = {
  lines: string[]
  ended: Promise<number | null>
  heard(line: RegExp, times?: number): Promise<string>
}

/** Runs a script as its reader would, and keeps what it says. Whatever it has started ends with the test. */
export function runScript(
  t: ExecutionContext,
  script: string,
  { folder, env }: { folder: string; env: NodeJS.ProcessEnv },
): Program {
  const path = [join(repository, '.tools/bin'), join(repository, 'node_modules/.bin'), process.env.PATH].join(delimiter)
  const child = spawn('bash', ['-euo', 'pipefail', '-c', script], {
    cwd: folder,
    env: { ...process.env, PATH: path, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  })
  const lines: string[] = []
  for (const stream of [child.stdout, child.stderr]) {
    createInterface({ input: stream }).on('line', line => lines.push(line))
  }
  const ended = once(child, 'close').then(([code]) => code as number | null)
  let over = false
  ended.finally(() => {
    over = true
  })
  t.teardown(async () => {
    if (!t.passed) t.log(lines.join('\n'))
    try {
      process.kill(-(child.pid as number), 'SIGKILL')
    } catch {
      // It has ended.
    }
    await ended
  })
  return {
    lines,
    ended,
    async heard(wanted, times = 1) {
      // To compile takes a while on a machine that does much else.
      for (let attempt = 0; ; attempt++) {
        try {
          return await eventually(`${times} × ${wanted} among\n${lines.join('\n')}`, () => {
            const found = lines.filter(line => wanted.test(line))
            if (found.length >= times) return found[times - 1]
            if (over) throw new Error(`it has ended without ${wanted}:\n${lines.join('\n')}`)
            return undefined
          })
        } catch (error) {
          if (over || attempt >= compileAttempts) throw error
        }
      }
    },
  }
}

const compileAttempts = 10

/**
 * The life of a daemon: it enrolls, reports, is allowed, loses its connection to the server and holds on to what it has, renews
 * when it is asked to, and lets go when that is taken back.
 */
export async function liveADaemonsLife(
  t: ExecutionContext,
  { mesh, way, server }: Furnished,
  script: string,
  { folder, env = {} }: { folder: string; env?: NodeJS.ProcessEnv },
): Promise<void> {
  await writeFile(join(folder, 'ca.crt'), mesh.anonymous.rootsPem)
  const token = await mesh.token()
  const program = runScript(t, script, { folder, env: { EDGEMESH_SERVER: server, EDGEMESH_TOKEN: token, ...env } })
  await program.heard(/^enrolled spiffe:\/\/edgemesh\.local\/device\/gateway-1$/)
  await program.heard(/^reported, failing: $/)
  const [, connectionId = ''] = (await program.heard(/^allowed /)).split(' ')
  const isHeld = async (count: number) => {
    const { rows } = await mesh.pool.query(
      "select 1 from connections where id = $1 and status = 'active' and resume_by is null",
      [connectionId],
    )
    return rows.length === count
  }
  await eventually('the connection is held', () => isHeld(1))

  // The way breaks: both streams are opened anew, and the connection is resumed.
  const tlsConnections = await connectionsBegun(mesh)
  way.cut()
  await eventually('both streams are there again', async () => (await connectionsBegun(mesh)) > tlsConnections)
  await eventually('the connection is held again', () => isHeld(1))

  // The authority is replaced, as soon as the device has said that it trusts the next one: it is asked to renew then.
  await unary(mesh.admin, 'rotateAuthority', { stage: Stage.PUBLISHED, force: false })
  await eventually('the device trusts the next authority', async () => {
    const { progress } = await unary(mesh.admin, 'getAuthority', {})
    return progress?.devices === 1 && progress.devicesTrusting === 1
  })
  await unary(mesh.admin, 'rotateAuthority', { stage: Stage.ISSUING, force: false })
  await eventually('the device has renewed', async () => {
    const { device } = await unary(mesh.admin, 'getDevice', { id: 'gateway-1' })
    return (device?.certificates.length ?? 0) > 1
  })
  await eventually('the connection is held still', () => isHeld(1))

  await unary(mesh.admin, 'quarantineDevice', { id: 'gateway-1', reason: 'under investigation' })
  t.is(await program.heard(/^revoked /), 'revoked DEVICE_QUARANTINED')
  t.is(await program.ended, 0)
  await eventually('the server was told that the connection is cut', async () =>
    (await scrape(mesh)).includes('edgemesh_revocation_acknowledged_seconds_count 1'),
  )
  t.false(program.lines.some(line => line.includes(token)))
}

async function scrape({ server }: EdgeMesh): Promise<string> {
  return (await fetch(`http://127.0.0.1:${server.metricsPort}/metrics`)).text()
}

async function connectionsBegun(mesh: EdgeMesh): Promise<number> {
  return Number(/^edgemesh_admitted_connections_total(?:{.*})? (\d+)/m.exec(await scrape(mesh))?.[1])
}
