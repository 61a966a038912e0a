/**
 * How the machine is that this runs on: what a real agent reports.
 *
 * Each fact is read where the kernel or the distribution tells it, without special rights where possible, and within a
 * bounded time. What can't be known is left absent, never guessed: policy then decides what an unknown is worth. Linux
 * tells all of it; on other systems only processor, memory and the root's disk are read.
 */
import { execFile } from 'node:child_process'
import { readdir, readFile, realpath, stat, statfs } from 'node:fs/promises'
import { cpus, freemem, totalmem } from 'node:os'
import { basename, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import type { Posture } from '../gen/edgemesh/v1/types.ts'

/** Between the two looks at the processor's counters that a first measurement needs. */
const firstSampleMs = 250

/** For each fact: a disk that hangs must not keep the heartbeat from being sent. */
const factTimeoutMs = 5_000

/** Packages are looked through at most this often: they change daily, and the look costs a second. */
const patchesReusedMs = 3_600_000

const mountsMax = 256
const processesMax = 65_536

/**
 * Makes the measurement. Keep it: the processor's share is that of the time since the measurement before.
 *
 *     const posture = hostPosture()
 *     await heartbeats.report(await posture())
 */
export function hostPosture(): () => Promise<Partial<Posture>> {
  const cpuPercent = createCpuMeter()
  const patchesCurrent = remembered(readPatchesCurrent, patchesReusedMs)
  const linux = process.platform === 'linux'
  const onLinux = <T>(read: () => Promise<T | undefined>) => (linux ? known(read) : Promise.resolve(undefined))

  return async () => {
    const measuredAt = new Date()
    const [cpu, memory, disk, patches, antivirus, encrypted, firewall] = await Promise.all([
      known(cpuPercent),
      known(readMemoryPercent),
      known(readDiskPercent),
      onLinux(patchesCurrent),
      onLinux(readAntivirusEnabled),
      onLinux(readDiskEncrypted),
      onLinux(readFirewallEnabled),
    ])
    return {
      cpuPercent: cpu,
      memoryPercent: memory,
      diskPercent: disk,
      patchesCurrent: patches,
      antivirusEnabled: antivirus,
      diskEncrypted: encrypted,
      firewallEnabled: firewall,
      measuredAt,
    }
  }
}

/** What `read` finds, or nothing when it fails or takes too long. */
async function known<T>(read: () => Promise<T | undefined>): Promise<T | undefined> {
  const givingUp = new AbortController()
  try {
    const timeout = sleep(factTimeoutMs, undefined, { signal: givingUp.signal, ref: false })
    timeout.catch(() => undefined)
    return await Promise.race([read(), timeout])
  } catch {
    return undefined
  } finally {
    givingUp.abort()
  }
}

function remembered<T>(read: () => Promise<T>, forMs: number): () => Promise<T> {
  let kept: { value: T; until: number } | undefined
  return async () => {
    if (!kept || kept.until <= Date.now()) kept = { value: await read(), until: Date.now() + forMs }
    return kept.value
  }
}

type CpuTimes = { busy: number; total: number }

function createCpuMeter(): () => Promise<number | undefined> {
  let before: CpuTimes | undefined
  return async () => {
    if (!before) {
      before = cpuTimes()
      await sleep(firstSampleMs)
    }
    const now = cpuTimes()
    const total = now.total - before.total
    const percent = total > 0 ? percentOf(now.busy - before.busy, total) : undefined
    before = now
    return percent
  }
}

/** Milliseconds since the start of the machine, of all processors together. */
function cpuTimes(): CpuTimes {
  let busy = 0
  let idle = 0
  for (const { times } of cpus()) {
    busy += times.user + times.nice + times.sys + times.irq
    idle += times.idle
  }
  return { busy, total: busy + idle }
}

async function readMemoryPercent(): Promise<number> {
  if (process.platform !== 'linux') return percentOf(totalmem() - freemem(), totalmem())
  // What caches hold is free for who needs it: the kernel's own estimate, not MemFree.
  const text = await readFile('/proc/meminfo', 'utf8')
  const kilobytes = (name: string) => Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(text)?.[1])
  const total = kilobytes('MemTotal')
  return percentOf(total - kilobytes('MemAvailable'), total)
}

/** The fullest of the local disks that can be written to. */
async function readDiskPercent(): Promise<number> {
  const mounts = process.platform === 'linux' ? await localMounts() : ['/']
  const shares = await Promise.all(mounts.map(usedShare))
  return Math.max(...shares)
}

/** Where block devices are mounted, each once; images that are always full (squashfs, ISO) are no disks. */
async function localMounts(): Promise<string[]> {
  const mounts = new Map<string, string>([['/', '/']])
  for (const { device, path, type, options } of await readMounts()) {
    const isDisk = device.startsWith('/dev/') && !device.startsWith('/dev/loop')
    if (!isDisk || type === 'squashfs' || type === 'iso9660' || options.includes('ro')) continue
    if (!mounts.has(device)) mounts.set(device, path)
  }
  return [...mounts.values()]
}

type Mount = { device: string; path: string; type: string; options: string[] }

async function readMounts(): Promise<Mount[]> {
  const lines = (await readFile('/proc/self/mounts', 'utf8')).split('\n').filter(line => line !== '')
  return lines.slice(0, mountsMax).map(line => {
    const [device = '', path = '', type = '', options = ''] = line.split(' ').map(unescaped)
    return { device, path, type, options: options.split(',') }
  })
}

/** Blanks and backslashes are written as octal numbers in the table of mounts. */
function unescaped(field: string): string {
  return field.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)))
}

async function usedShare(path: string): Promise<number> {
  const { blocks, bfree, bavail } = await statfs(path)
  // As `df` counts: what is kept back for root is neither used nor to be had.
  return percentOf(blocks - bfree, blocks - bfree + bavail)
}

/** Debian and its children: whether the next upgrade would install anything from a security archive. */
async function readPatchesCurrent(): Promise<boolean | undefined> {
  // Without lists that are fresh, apt knows of no patch because it knows of nothing.
  const listsMaxAgeMs = 7 * 24 * 3_600_000
  const lists = await stat('/var/lib/apt/lists')
  const names = await readdir('/var/lib/apt/lists')
  if (!names.some(name => name.endsWith('_Packages') || name.includes('_Packages.'))) return undefined
  if (Date.now() - lists.mtimeMs > listsMaxAgeMs) return undefined
  const { stdout } = await run('apt-get', ['--simulate', '--quiet', 'upgrade'])
  return !stdout.split('\n').some(line => line.startsWith('Inst ') && /security/i.test(line))
}

const antivirusProcesses: ReadonlySet<string> = new Set(['clamd', 'wdavdaemon', 'falcon-sensor'])

async function readAntivirusEnabled(): Promise<boolean | undefined> {
  const ids = (await readdir('/proc')).filter(name => /^\d+$/.test(name))
  // A namespace of its own shows only its own processes, and says nothing of the host's.
  if (ids.length > processesMax || !(await seesHostProcesses())) return undefined
  for (const id of ids) {
    const name = await readFile(join('/proc', id, 'comm'), 'utf8').catch(() => '')
    if (antivirusProcesses.has(name.trim())) return true
  }
  return false
}

/** Thread 2 is the kernel's, and shows in the host's table of processes alone. */
async function seesHostProcesses(): Promise<boolean> {
  return (await readFile('/proc/2/comm', 'utf8').catch(() => '')).trim() === 'kthreadd'
}

/** Whether the root lies on dm-crypt, directly or below LVM. */
async function readDiskEncrypted(): Promise<boolean | undefined> {
  const root = (await readMounts()).findLast(({ path }) => path === '/')
  // An overlay is a container's, whose disk is not to be seen from within.
  if (!root?.device.startsWith('/dev/')) return undefined
  return liesOnCrypt(basename(await realpath(root.device)))
}

/** Block devices that rest on several are encrypted when all of these are. */
async function liesOnCrypt(device: string, depthLeft = 8): Promise<boolean> {
  const folder = join('/sys/class/block', device)
  const uuid = await readFile(join(folder, 'dm', 'uuid'), 'utf8').catch(() => '')
  if (uuid.startsWith('CRYPT-')) return true
  const below = depthLeft > 0 ? await readdir(join(folder, 'slaves')).catch(() => []) : []
  const encrypted = await Promise.all(below.map(each => liesOnCrypt(each, depthLeft - 1)))
  return encrypted.length > 0 && encrypted.every(each => each)
}

/** Whether any rule filters what comes in. Root may see the rules; others learn it from ufw's settings, if there are. */
async function readFirewallEnabled(): Promise<boolean | undefined> {
  const ufw = await readFile('/etc/ufw/ufw.conf', 'utf8').catch(() => '')
  if (/^ENABLED=yes$/im.test(ufw)) return true
  const rules = await run('nft', ['list', 'ruleset']).catch(() => undefined)
  if (rules) return filtersInput(rules.stdout)
  const saved = await run('iptables-save', []).catch(() => undefined)
  return saved ? /^:INPUT DROP|^-A INPUT .*-j (?:DROP|REJECT)/m.test(saved.stdout) : undefined
}

function filtersInput(ruleset: string): boolean {
  return /hook input/.test(ruleset) && /policy drop|\b(?:drop|reject)\b/.test(ruleset)
}

const execute = promisify(execFile)

/** A program of the system with fixed arguments; no shell, no input, bounded in time and output. */
function run(program: string, parameters: string[]): Promise<{ stdout: string }> {
  const env = { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' }
  return execute(program, parameters, {
    env,
    timeout: factTimeoutMs,
    killSignal: 'SIGKILL',
    maxBuffer: 8 * 1024 * 1024,
  })
}

function percentOf(part: number, whole: number): number {
  return Math.min(100, Math.max(0, (100 * part) / whole))
}
