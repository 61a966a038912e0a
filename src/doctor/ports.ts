/** The two ports of this host: whether a server can have them, and who can reach the one that is for watchers. */
import { once } from 'node:events'
import { connect, createServer, isIPv6 } from 'node:net'
import { isLoopback, networkList } from '../network.ts'
import { type Check, type Finding, failed, orOk, warning } from './finding.ts'
import { get, isEdgeMesh, nearHost } from './instance-http.ts'
import type { Subject } from './subject.ts'
import { shakeHands } from './tls-peer.ts'

const connectMs = 3_000

export const portsCheck: Check<Subject> = {
  name: 'ports',
  async look(subject) {
    const { api, metrics, identity } = subject.settings()
    const isInstance = subject.instance().then(
      () => true,
      () => false,
    )
    const found = [
      await lookAtPort('API_PORT', api.host, api.port, () => isServer(api, identity.trustDomain)),
      await lookAtPort('METRICS_PORT', metrics.host, metrics.port, () => isInstance),
    ]
    const seen = found.map(({ seen }) => seen).join('; ')
    return orOk(
      found.flatMap(({ troubles }) => troubles),
      seen,
    )
  },
}

type PortFound = { troubles: Finding[]; seen: string }

async function lookAtPort(
  name: string,
  host: string,
  port: number,
  isOurs: () => Promise<boolean>,
): Promise<PortFound> {
  if (port === 0) return { troubles: [], seen: `${name} is whichever is free` }
  if (await accepts(nearHost(host), port)) {
    if (await isOurs()) return { troubles: [], seen: `an instance has ${name} ${port}` }
    const why = 'a server that starts here ends with EADDRINUSE'
    const mend = `ss -ltnp 'sport = :${port}' says who has it; end that, or set ${name}`
    return { troubles: [failed({ what: `${name} ${port} is taken by another program`, why, mend })], seen: '' }
  }
  const code = await bindProblem(host, port)
  if (code === undefined) return { troubles: [], seen: `${name} ${port} is free` }
  const mends: Record<string, string> = {
    EACCES: `a port below 1024 needs CAP_NET_BIND_SERVICE (systemd: AmbientCapabilities=); or set ${name}`,
    EADDRNOTAVAIL: `${name.replace('PORT', 'HOST')} has to be an address of this host, or 0.0.0.0`,
    EADDRINUSE: `ss -ltnp 'sport = :${port}' says who has it; end that, or set ${name}`,
  }
  const what = `${name} ${port} can not be had on ${host} (${code})`
  const mend = mends[code] ?? `see ${name} and ${name.replace('PORT', 'HOST')}`
  return { troubles: [failed({ what, why: 'a server that starts here ends with this error', mend })], seen: '' }
}

function accepts(host: string, port: number): Promise<boolean> {
  return new Promise(resolve => {
    const probe = connect({ host, port, timeout: connectMs })
    const say = (answer: boolean) => {
      probe.destroy()
      resolve(answer)
    }
    probe.on('connect', () => say(true)).on('error', () => say(false))
    probe.on('timeout', () => say(false))
  })
}

/** Held for no longer than it takes to know: a server that starts meanwhile would be told that it is taken. */
async function bindProblem(host: string, port: number): Promise<string | undefined> {
  const probe = createServer()
  try {
    probe.listen(port, host)
    await once(probe, 'listening')
    return undefined
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? 'unknown'
  } finally {
    probe.close()
  }
}

async function isServer(
  { host, port, trustedProxies }: { host: string; port: number; trustedProxies: readonly string[] },
  trustDomain: string,
): Promise<boolean> {
  const peer = await shakeHands({ host: nearHost(host), port, roots: undefined, trustedProxies }).catch(() => undefined)
  peer?.socket.destroy()
  return peer?.certificate.subjectAltName?.includes(`URI:spiffe://${trustDomain}/`) ?? false
}

// ── Who reaches METRICS_PORT ───────────────────────────────────────────────────────────────────────────────────────

/** Those that the internet does not carry, and those that are this host. */
const isPrivate = networkList(
  '10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 ::1/128 fc00::/7 fe80::/10'.split(
    ' ',
  ),
)

export const metricsExposureCheck: Check<Subject> = {
  name: 'metrics-exposure',
  async look(subject) {
    const { host, port } = subject.settings().metrics
    const troubles: Finding[] = []
    const why = 'it tells names of services, versions and load, and how to keep an instance busy'
    const mend =
      'METRICS_HOST has to be an address that Prometheus and the balancer reach, and nobody else; or a firewall'
    const { publicAddress } = subject
    if (publicAddress && port !== 0 && !isLoopback(publicAddress.host) && publicAddress.host !== 'localhost') {
      const scrape = await get(publicAddress.host, port, '/metrics').catch(() => '')
      if (isEdgeMesh(scrape)) {
        const what = `metrics can be read where devices connect: http://${hostInUrl(publicAddress.host)}:${port}/metrics`
        troubles.push(failed({ what, why, mend }))
      }
    }
    const open = host === '0.0.0.0' || host === '::'
    const own = open ? subject.addresses().filter(address => host === '::' || !isIPv6(address)) : [host]
    const exposed = own.filter(address => !isPrivate(address) && address !== 'localhost')
    if (exposed.length > 0 && troubles.length === 0) {
      const what = `METRICS_PORT listens on ${exposed.join(', ')}, which the internet may reach`
      troubles.push(warning({ what, why, mend }))
    }
    return orOk(troubles, open ? 'on all addresses of this host, none of which is public' : `on ${host} alone`)
  },
}

const hostInUrl = (host: string) => (isIPv6(host) ? `[${host}]` : host)
