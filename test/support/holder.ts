/** An agent that reports, and what it holds beside that. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import { type EndedConnection, keepAuthorizations } from '../../src/client/authorizations.ts'
import { loadState } from '../../src/client/state.ts'
import { eventually } from './edgemesh.ts'
import { healthy } from './healthy.ts'

export type Holder = {
  held: ReturnType<typeof keepAuthorizations>
  /** Connections that it has lost. */
  ended: EndedConnection[]
  /** What the agent has told so far. */
  events: AgentEvent[]
}

/** Resolves when it has enrolled and reported. */
export async function startHolder(t: ExecutionContext, server: string, token: string, id = 'alpha'): Promise<Holder> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-holder-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const stateDirectory = join(folder, 'state')
  const events: AgentEvent[] = []
  const ended: EndedConnection[] = []
  let held: ReturnType<typeof keepAuthorizations> | undefined
  const stopping = new AbortController()
  const done = runAgent({
    server,
    stateDirectory,
    token,
    device: { id },
    posture: async () => healthy,
    log: event => events.push(event),
    signal: stopping.signal,
    connected: async target => held?.moveTo(target),
  })
  done.catch(() => {})
  t.teardown(async () => {
    await held?.close()
    stopping.abort()
    await done.catch(() => {})
  })
  await eventually('the first report', () => events.some(({ event }) => event === 'reported'))
  const credentials = await loadState(stateDirectory)
  if (!credentials) throw new Error('it has enrolled')
  held = keepAuthorizations({ server, credentials, onEnded: end => void ended.push(end) })
  return { held, ended, events }
}
