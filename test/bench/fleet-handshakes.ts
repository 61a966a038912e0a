/** tls.handshakes: full ones, beside `openssl s_server`. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { BareEcho } from './bare-echo-server.ts'
import { type FleetSides, fleetProcesses, seedDevices } from './fleet.ts'
import { processStat } from './process-stat.ts'
import { medianRate, type Rate, rate, showLoad, showRate } from './rates.ts'
import type { GroupOptions, Row } from './row.ts'
import type { Served } from './served.ts'

/** Odd, so that there is one in the middle. */
const rounds = 5
const handshakesOfRound = 600
const handshakesInFlight = 4
const shareOfOpenssl = 0.9
/** Beside the fleet. */
const handshakesDevice = 999_999

export async function measureHandshakes(sides: FleetSides, { progress }: GroupOptions): Promise<Row> {
  const { served, bare, clients } = sides
  const [identity] = await seedDevices(served, handshakesDevice, handshakesDevice + 1)
  const openssl = await startOpensslServer(bare.client)
  const ours = { address: served.address, identity: identity!, cpu: served.cpuSince, rates: [] as Rate[] }
  const echo = { address: bare.address, identity: bare.client, cpu: bare.cpuSince, rates: [] as Rate[] }
  const theirs = openssl && { ...echo, address: openssl.address, cpu: openssl.cpuSince, rates: [] as Rate[] }
  const all = [ours, echo, ...(theirs ? [theirs] : [])]
  const shake = async (side: typeof ours) => {
    const { address, identity } = side
    const count = handshakesOfRound / fleetProcesses
    const before = await side.cpu()
    const startedAt = performance.now()
    await clients.all({ ask: 'handshakes', address, identity, count, inFlight: handshakesInFlight })
    return rate(handshakesOfRound, await side.cpu(before), performance.now() - startedAt)
  }
  try {
    for (const side of all) await shake(side)
    for (let round = 1; round <= rounds; round++) {
      progress(`tls.handshakes: round ${round} of ${rounds}`)
      for (const side of all) side.rates.push(await shake(side))
    }
  } finally {
    await openssl?.stop()
  }
  const [value, echoed] = [medianRate(ours.rates), medianRate(echo.rates)]
  const floor = theirs && medianRate(theirs.rates)
  return {
    name: 'tls.handshakes',
    value: value.perCpuSecond,
    unit: 'handshakes/s',
    floor: floor?.perCpuSecond ?? null,
    ratio: floor ? value.perCpuSecond / floor.perCpuSecond : null,
    note:
      `full, mutual, with the HTTP/2 session after it: ${showRate(value)} for a second of the server's processor time, ` +
      `${Math.round(value.perWallSecond)}/s by the clock; bare grpc-js ${showRate(echoed)}; floor: ` +
      `${floor ? `openssl s_server ${showRate(floor)}` : 'no openssl command here, or no /proc'}; ${showLoad()}`,
    ...(floor && {
      bar: {
        demand: `at least ${shareOfOpenssl} of openssl s_server`,
        met: value.perCpuSecond >= shareOfOpenssl * floor.perCpuSecond,
      },
    }),
  }
}

type Timed = { address: string; cpuSince: Served['cpuSince']; stop(): Promise<void> }

/** With the same certificates; undefined where there is no openssl, or its processor time can't be read. */
async function startOpensslServer({
  rootsPem,
  serverCertificatePem,
  serverKeyPem,
}: BareEcho['client']): Promise<Timed | undefined> {
  try {
    execFileSync('openssl', ['version'], { stdio: 'ignore' })
    await readFile('/proc/self/stat')
  } catch {
    return undefined
  }
  const directory = await mkdtemp(join(tmpdir(), 'edgemesh-bench-'))
  const file = async (name: string, text: string) => {
    await writeFile(join(directory, name), text, { mode: 0o600 })
    return join(directory, name)
  }
  const certificate = await file('server.pem', serverCertificatePem)
  const key = await file('server-key.pem', serverKeyPem)
  const roots = await file('roots.pem', rootsPem)
  const child: ChildProcess = spawn(
    'openssl',
    // biome-ignore format: an option and its value on a line
    ['s_server', '-accept', '127.0.0.1:0', '-key', key, '-cert', certificate, '-cert_chain', certificate,
      '-CAfile', roots, '-Verify', '3', '-alpn', 'h2'],
    { stdio: ['pipe', 'pipe', 'ignore'] },
  )
  const port = await new Promise<number>((resolve, reject) => {
    let said = ''
    child.stdout?.setEncoding('utf8').on('data', text => {
      if (said.length < 1_000) said += text
      const [, found] = /^ACCEPT 127\.0\.0\.1:(\d+)/m.exec(said) ?? []
      if (found) resolve(Number(found))
    })
    child.on('error', reject).on('exit', () => reject(new Error(`openssl s_server has ended: ${said}`)))
  })
  return {
    address: `127.0.0.1:${port}`,
    async cpuSince(before = { user: 0, system: 0 }) {
      const { cpu } = await processStat(child.pid!)
      return { user: cpu.user - before.user, system: cpu.system - before.system }
    },
    async stop() {
      child.kill()
      await rm(directory, { recursive: true, force: true })
    },
  }
}
