/** An agent as tests run it: its events are kept, time is virtual, and it is stopped with the test. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { type AgentOptions, runAgent } from '../../src/agent/agent.ts'
import type { AgentEvent } from '../../src/agent/events.ts'
import type { DeviceCredentials } from '../../src/client/enroll.ts'
import { saveState } from '../../src/client/state.ts'
import { type VirtualTime, virtualTime } from './virtual-time.ts'

export type RunningAgent = VirtualTime & {
  events: AgentEvent[]
  /** The names of the events. */
  told(): string[]
  stateDirectory: string
  stop(): void
  /** Resolves when the agent has been stopped, rejects when it has failed. */
  done: Promise<void>
}

/** @param onEvent called with each event; `stop` in it makes that event the last that matters */
export async function startAgent(
  t: ExecutionContext,
  options: Partial<AgentOptions> & Pick<AgentOptions, 'server'>,
  kept: DeviceCredentials | undefined,
  onEvent: (event: AgentEvent, agent: RunningAgent) => void = () => {},
): Promise<RunningAgent> {
  const stateDirectory = await mkdtemp(join(tmpdir(), 'edgemesh-agent-'))
  if (kept) await saveState(stateDirectory, kept)
  const stopping = new AbortController()
  const time = virtualTime()
  const events: AgentEvent[] = []
  const agent: RunningAgent = {
    ...time,
    events,
    told: () => events.map(({ event }) => event),
    stateDirectory,
    stop: () => stopping.abort(),
    done: Promise.resolve(),
  }
  agent.done = runAgent({
    stateDirectory,
    device: {},
    posture: async () => ({ diskEncrypted: true }),
    log(event) {
      events.push(event)
      onEvent(event, agent)
    },
    signal: stopping.signal,
    random: () => 0.5,
    ...time,
    ...options,
  })
  t.teardown(async () => {
    stopping.abort()
    await agent.done.catch(() => undefined)
    await rm(stateDirectory, { recursive: true })
  })
  return agent
}
