/** Starts `bare-echo.ts`, the floor of what a message costs, and asks it for its processor time. */
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import type { Answer } from '../../src/gen/edgemesh/v1/authorize.ts'
import type { EchoStarted } from './bare-echo.ts'
import type { Identity } from './enrolled-device.ts'

export type BareEcho = {
  address: string
  /** Whether messages on streams are on disk before they are answered. */
  commits: boolean
  /** Of a client; and the server's own. */
  client: Identity & { serverCertificatePem: string; serverKeyPem: string }
  /** What every question is answered with from now on. */
  answer(answer: Answer): Promise<void>
  cpuSince(before?: NodeJS.CpuUsage): Promise<NodeJS.CpuUsage>
  /** What of the machine's memory the process has, when its garbage is collected. */
  rssBytes(): Promise<number>
  stop(): Promise<void>
}

/** @param commitTo the URL of a database of EdgeMesh's, where messages on streams are on disk before they are answered */
export async function startBareEcho(commitTo = ''): Promise<BareEcho> {
  const child = fork(join(import.meta.dirname, 'bare-echo.ts'), {
    env: { ...process.env, BENCH_COMMIT_TO: commitTo },
    execArgv: ['--expose-gc'],
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  })
  const exited = once(child, 'exit')
  type Message = { started: EchoStarted; cpu: NodeJS.CpuUsage; rssBytes: number }
  const next = () =>
    new Promise<Message>((resolve, reject) => {
      child.once('message', message => resolve(message as Message))
      exited.then(([code]) => reject(new Error(`the bare server has ended with code ${code}`)))
    })
  const ask = (question: { ask: 'cpu' } | { ask: 'memory' } | { ask: 'answer'; answer: Answer }) => {
    const answered = next()
    child.send(question)
    return answered
  }
  const { started } = await next()
  const { port, ...client } = started
  return {
    address: `127.0.0.1:${port}`,
    client,
    commits: commitTo !== '',
    answer: async answer => void (await ask({ ask: 'answer', answer })),
    async cpuSince(before = { user: 0, system: 0 }) {
      const { cpu } = await ask({ ask: 'cpu' })
      return { user: cpu.user - before.user, system: cpu.system - before.system }
    },
    rssBytes: async () => (await ask({ ask: 'memory' })).rssBytes,
    async stop() {
      if (child.connected) child.disconnect()
      await exited
    },
  }
}
