/** EdgeMesh in a process of its own, so that its processor time is its own. Started and asked by `served.ts`. */
import { Session } from 'node:inspector/promises'
import { startServer } from '../../src/server.ts'
import { readSettings } from '../../src/settings.ts'
import { createLog } from '../../src/telemetry/log.ts'
import type { Answer, Question } from './served.ts'

/** In microseconds. A call takes a few milliseconds; finer would cost more than it shows. */
const profileInterval = 250

const settings = readSettings(process.env)
const server = await startServer({ settings, log: createLog({ level: settings.log.level }) })
const inspector = new Session()

async function answer(question: Question): Promise<Answer> {
  switch (question.ask) {
    case 'operator': {
      const { certificatePem } = await server.issueOperator({
        name: 'bench',
        role: 'admin',
        csr: question.csr,
        validityMs: 3_600_000,
      })
      return { certificatePem }
    }
    case 'cpu':
      return { cpu: process.cpuUsage() }
    case 'memory':
      globalThis.gc?.()
      return { rssBytes: process.memoryUsage.rss() }
    case 'profile':
      inspector.connect()
      await inspector.post('Profiler.enable')
      await inspector.post('Profiler.setSamplingInterval', { interval: profileInterval })
      await inspector.post('Profiler.start')
      return {}
    case 'profiled': {
      const { profile } = await inspector.post('Profiler.stop')
      inspector.disconnect()
      return { profile }
    }
  }
}

process.on('message', async ({ id, ...question }: Question & { id: number }) => {
  try {
    process.send?.({ id, ...(await answer(question)) })
  } catch (error) {
    process.send?.({ id, error: String(error) })
  }
})
// Its parent ends it by closing the channel, also by dying.
process.on('disconnect', () => server.stop())
process.send?.({ id: 0, started: { port: server.apiPort, rootsPem: server.rootsPem } })
