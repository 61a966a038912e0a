/** A server to measure, on a real PostgreSQL: how it is started, asked and ended. */
import { fork } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import type { Profiler } from 'node:inspector'
import { join } from 'node:path'
import { administer, databaseUrl, givenServerUrl, type Server, startEmbedded } from '../support/postgres-server.ts'

export type Question =
  | { ask: 'operator'; csr: Uint8Array }
  | { ask: 'cpu' }
  | { ask: 'memory' }
  | { ask: 'profile' }
  | { ask: 'profiled' }

export type Answer = {
  certificatePem?: string
  cpu?: NodeJS.CpuUsage
  rssBytes?: number
  profile?: Profiler.Profile
}

export type Served = {
  address: string
  databaseUrl: string
  rootsPem: string
  secrets: { ENROLLMENT_TOKEN_SECRET: string; CA_KEY_PASSPHRASE: string }
  /** A certificate of an operator who may do everything. */
  operatorCertificate(csr: Uint8Array): Promise<string>
  /** The server's processor time since `before`, of all its threads. */
  cpuSince(before?: NodeJS.CpuUsage): Promise<NodeJS.CpuUsage>
  /** What of the machine's memory the process has, when its garbage is collected. */
  rssBytes(): Promise<number>
  /** What the server does while `work` is going on, and the processor time that it takes for it. */
  profile(work: () => Promise<void>): Promise<{ recorded: Profiler.Profile; cpu: NodeJS.CpuUsage }>
  /** With -9: it says no goodbye. */
  kill(): void
  stop(): Promise<void>
}

/** Nothing that is measured here is to be slowed down by a limit. */
const environment = {
  API_HOST: '127.0.0.1',
  API_PORT: '0',
  METRICS_HOST: '127.0.0.1',
  METRICS_PORT: '0',
  DRAIN_SECONDS: '1',
  RATE_LIMIT_ENROLLMENTS: '999999999/second',
  RATE_LIMIT_CONNECTIONS: '999999999/second',
  RATE_LIMIT_HEALTH: '999999999/second',
}

const signals = ['SIGINT', 'SIGTERM'] as const

/**
 * @param env settings beyond those, by their variables
 * @param beside an instance whose database this one shares; to be stopped after this one
 */
export async function startServed(env: Record<string, string> = {}, beside?: Served): Promise<Served> {
  const database = beside ? { url: beside.databaseUrl, stop: async () => {} } : await startDatabase()
  const secret = () => randomBytes(32).toString('hex')
  const secrets = beside?.secrets ?? { ENROLLMENT_TOKEN_SECRET: secret(), CA_KEY_PASSPHRASE: secret() }
  const child = fork(join(import.meta.dirname, 'server-process.ts'), {
    env: {
      PATH: process.env.PATH,
      ...environment,
      ...secrets,
      DATABASE_URL: database.url,
      ...env,
    },
    execArgv: ['--expose-gc'],
    serialization: 'advanced',
    // Its log goes where logs in production go, so that writing it is paid for.
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  })
  const exited = once(child, 'exit')
  let stopped: Promise<void> | undefined
  const stop = () => {
    stopped ??= (async () => {
      for (const signal of signals) process.off(signal, stop)
      if (child.connected) child.disconnect()
      await exited
      await database.stop()
    })()
    return stopped
  }
  // Whoever breaks off leaves nothing running: what is under way then fails.
  for (const signal of signals) process.once(signal, stop)

  type Started = { port: number; rootsPem: string }
  const waiting = new Map<number, { resolve: (answer: Answer) => void; reject: (error: Error) => void }>()
  const started = new Promise<Started>((resolve, reject) => {
    child.on('message', (message: Answer & { id: number; error?: string; started?: Started }) => {
      if (message.started) return resolve(message.started)
      const asked = waiting.get(message.id)
      waiting.delete(message.id)
      if (message.error === undefined) asked?.resolve(message)
      else asked?.reject(new Error(message.error))
    })
    exited.then(([code]) => {
      const gone = new Error(`the server has ended with code ${code}`)
      reject(gone)
      for (const asked of waiting.values()) asked.reject(gone)
    })
  })

  let questions = 0
  function ask(question: Question): Promise<Answer> {
    return new Promise((resolve, reject) => {
      const id = ++questions
      waiting.set(id, { resolve, reject })
      child.send({ id, ...question })
    })
  }

  async function cpuSince(before = { user: 0, system: 0 }): Promise<NodeJS.CpuUsage> {
    const { cpu = before } = await ask({ ask: 'cpu' })
    return { user: cpu.user - before.user, system: cpu.system - before.system }
  }

  try {
    const { port, rootsPem } = await started
    return {
      address: `127.0.0.1:${port}`,
      databaseUrl: database.url,
      rootsPem,
      secrets,
      async operatorCertificate(csr) {
        const { certificatePem = '' } = await ask({ ask: 'operator', csr })
        return certificatePem
      },
      cpuSince,
      async rssBytes() {
        const { rssBytes = 0 } = await ask({ ask: 'memory' })
        return rssBytes
      },
      kill: () => void child.kill('SIGKILL'),
      async profile(work) {
        await ask({ ask: 'profile' })
        const before = await cpuSince()
        await work()
        const cpu = await cpuSince(before)
        const { profile } = await ask({ ask: 'profiled' })
        if (!profile) throw new Error('the server has sent no profile')
        return { recorded: profile, cpu }
      },
      stop,
    }
  } catch (error) {
    await stop()
    throw error
  }
}

/** On the server at DATABASE_URL or EDGEMESH_TEST_POSTGRES a database of its own; else an embedded server. */
async function startDatabase(): Promise<Server> {
  const given = givenServerUrl()
  if (!given) return startEmbedded('bench', 'error')
  const name = `edgemesh_bench_${randomBytes(8).toString('hex')}`
  await administer(given, `create database ${name}`)
  return {
    url: databaseUrl(given, name),
    stop: () => administer(given, `drop database ${name} with (force)`),
  }
}
