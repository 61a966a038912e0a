/** What this host gives to a server: Node, memory, open files, and a clock that somebody keeps right. */
import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { promisify } from 'node:util'
import { isTooLittle, machine, shareOf, workersFor } from '../workers/shares.ts'
import { CannotLook, type Check, type Finding, failed, ok, orOk, warning } from './finding.ts'
import type { Subject } from './subject.ts'

const { engines } = createRequire(import.meta.url)('../../package.json') as { engines: { node: string } }
const nodeMajorMin = Number(/\d+/.exec(engines.node)?.[0])

export const nodeCheck: Check<Subject> = {
  name: 'node',
  look({ nodeVersion }) {
    if (Number(nodeVersion.split('.')[0]) >= nodeMajorMin) return [ok(`Node ${nodeVersion}`)]
    const why = 'older ones do not run TypeScript as it is, and get no security updates'
    const what = `Node is ${nodeVersion}, and EdgeMesh needs ${engines.node}`
    return [failed({ what, why, mend: `install Node ${nodeMajorMin}` })]
  },
}

// ── Memory ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const MiB = 2 ** 20
/** One process that is idle, and room for a thousand connections. */
const aloneBytesMin = 384 * MiB
const fullShare = 0.9
/** Of a process, as in `rpc/port.ts`. */
const connectionsMax = 20_000

export const memoryCheck: Check<Subject> = {
  name: 'memory',
  async look(subject) {
    const there = machine(subject.env)
    const workers = subject.workers === 'auto' ? workersFor(there) : subject.workers
    const given = `${Math.floor(there.memoryBytes / MiB)} MiB, ${there.parallelism} cores`
    const troubles: Finding[] = []
    const isShort = workers > 1 ? isTooLittle(there, workers) : there.memoryBytes < aloneBytesMin
    if (isShort) {
      troubles.push(
        failed({
          what: `${given} are too little for ${workers === 1 ? 'one process' : `${workers} workers`}`,
          why: 'the system ends a process that needs more than there is, and its devices all come back at once',
          mend:
            workers > 1
              ? 'serve --workers auto, or give it more memory'
              : `give it ${aloneBytesMin / MiB} MiB at least`,
        }),
      )
    }
    if (workers > there.parallelism) {
      const why = 'more workers than cores bear no more, and each takes memory'
      const mend = 'serve --workers auto'
      troubles.push(warning({ what: `${workers} workers are more than ${there.parallelism} cores`, why, mend }))
    }
    const instance = await subject.instance().catch(() => undefined)
    const used = instance?.samples.filter(({ name }) => name === 'process_resident_memory_bytes') ?? []
    const usedBytes = used.reduce((sum, { value }) => sum + value, 0)
    if (usedBytes > there.memoryBytes * fullShare) {
      const what = `the instance uses ${Math.floor(usedBytes / MiB)} of ${Math.floor(there.memoryBytes / MiB)} MiB`
      const why = 'the system ends it when there is no more'
      troubles.push(warning({ what, why, mend: 'more memory, or another instance: docs/scale.md has the sums' }))
    }
    const { databaseConnections, connectionsMost } = shareOf(there, poolOf(subject), workers)
    const share = workers > 1 ? `; ${workers} workers with ${databaseConnections} database connections each` : ''
    return orOk(
      troubles,
      `${given}: room for ${Math.min(connectionsMost, connectionsMax) * workers} connections${share}`,
    )
  },
}

function poolOf(subject: Subject): number {
  try {
    return subject.settings().database.poolMax
  } catch {
    return 1
  }
}

// ── Open files ─────────────────────────────────────────────────────────────────────────────────────────────────────

/** Beside connections: those to the database and OPA, files, the event loop's own. */
const otherFiles = 200
/** Below this a server is short of them with its first thousand devices. */
const filesMin = 1_024 + otherFiles

export const openFilesCheck: Check<Subject> = {
  name: 'open-files',
  async look({ env, workers }) {
    const limits = await readFile('/proc/self/limits', 'utf8').catch(() => {
      throw new CannotLook('this system does not tell its limits in /proc/self/limits')
    })
    const [, , hard = ''] = /^Max open files\s+(\S+)\s+(\S+)/m.exec(limits) ?? []
    // Node raises its own limit up to the hard one when it starts.
    const files = hard === 'unlimited' ? Number.POSITIVE_INFINITY : Number(hard)
    const there = machine(env)
    const count = workers === 'auto' ? workersFor(there) : workers
    const places = Math.min(shareOf(there, 1, count).connectionsMost, connectionsMax)
    if (files >= places + otherFiles) return [ok(`${hard} open files, for ${places} connections a process`)]
    const trouble = {
      what: `a process may have ${hard} files open, and has places for ${places} connections`,
      why: 'each connection is a file: those that come when there is none left are lost without a word',
      mend: `LimitNOFILE=${places + otherFiles} in its systemd unit, or ulimit -n ${places + otherFiles} before it starts`,
    }
    return [files < filesMin ? failed(trouble) : warning(trouble)]
  },
}

// ── Clock ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const run = promisify(execFile)
const toolMs = 3_000

export const clockCheck: Check<Subject> = {
  name: 'clock',
  async look({ env }) {
    const told = (await bySystemd(env)) ?? (await byChrony(env))
    if (told === undefined)
      throw new CannotLook('neither timedatectl nor chronyc can tell whether the clock is kept right')
    if (told.isRight) return [ok(`${told.by} keeps the clock right`)]
    return [
      warning({
        what: `${told.by} says that the clock of this host is not synchronised`,
        why: 'certificates, tokens and decisions hold until a moment; a clock that is wrong ends them early or late',
        mend: 'start an NTP client: systemctl enable --now systemd-timesyncd, or chrony',
      }),
    ]
  },
}

type Told = { by: string; isRight: boolean } | undefined

async function bySystemd({ PATH }: Subject['env']): Promise<Told> {
  const said = await run('timedatectl', ['show', '--property=NTPSynchronized', '--value'], {
    env: { PATH },
    timeout: toolMs,
  }).catch(() => undefined)
  const word = said?.stdout.trim()
  return word === 'yes' || word === 'no' ? { by: 'timedatectl', isRight: word === 'yes' } : undefined
}

async function byChrony({ PATH }: Subject['env']): Promise<Told> {
  const said = await run('chronyc', ['-c', 'tracking'], { env: { PATH }, timeout: toolMs }).catch(() => undefined)
  const leap = said?.stdout.trim().split(',').at(-1)
  return leap === undefined || leap === '' ? undefined : { by: 'chronyc', isRight: leap !== 'Not synchronised' }
}
