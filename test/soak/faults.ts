/** What goes wrong: one thing after another, in an order that the seed gives, with time to recover in between. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Findings } from './findings.ts'
import type { Gate } from './gate.ts'
import type { Instance } from './instance.ts'
import type { Random } from './random.ts'

export type FaultsDeps = {
  /** The first is never killed or drained: what grows shows over a whole run. */
  instances: readonly Instance[]
  front: Gate
  /** Kills the database with -9; it comes back by itself. Absent where it is not ours. */
  crashDatabase: (() => void) | undefined
  putPolicy: (revision: string) => Promise<void>
  findings: Findings
  random: Random
  /** Between two faults. */
  quietMs: { least: number; most: number }
  /** How long an instance is kept from its database. */
  awayMs: { least: number; most: number }
  drainMs: number
  onFault: (name: string) => void
}

const recoveryMsMax = 60_000
/** Beyond DRAIN_SECONDS: the process has to end by itself. */
const drainMarginMs = 20_000

export async function injectFaults(deps: FaultsDeps, signal: AbortSignal): Promise<void> {
  const { instances, front, random, findings, awayMs } = deps
  const others = instances.slice(1)
  let policies = 0

  /** Nothing is expected of them until they are ready again. */
  async function disturbing(disturbed: readonly Instance[], act: () => Promise<void>): Promise<void> {
    const ends = disturbed.map(instance => instance.disturb())
    await act()
    for (const instance of disturbed) {
      const until = Date.now() + recoveryMsMax
      while (!(await instance.ready())) {
        if (Date.now() > until) {
          findings.broken('an instance recovers by itself', `${instance.name} is not ready after a minute`)
          break
        }
        await sleep(50)
      }
    }
    for (const end of ends) end()
  }

  const away = () => sleep(random.between(awayMs.least, awayMs.most))

  const kinds: Record<string, () => Promise<void>> = {
    'an instance is killed': async () => {
      const victim = random.one(others)
      await disturbing([victim], async () => {
        await victim.kill()
        await away()
        await victim.start()
      })
    },
    'an instance is drained': async () => {
      const victim = random.one(others)
      await disturbing([victim], async () => {
        const code = await victim.drain(deps.drainMs + drainMarginMs)
        if (code !== 0) findings.broken('an instance that is told to stop ends in order', `${victim.name}: ${code}`)
        await victim.start()
      })
    },
    'database connections of an instance are cut': async () => {
      const victim = random.one(instances)
      await disturbing([victim], async () => victim.gate.cut())
    },
    'an instance can not reach the database': async () => {
      const victim = random.one(instances)
      await disturbing([victim], async () => {
        victim.gate.shut()
        await away()
        victim.gate.open()
      })
    },
    'an instance hears nothing of the database': async () => {
      const victim = random.one(instances)
      await disturbing([victim], async () => {
        victim.gate.stall()
        await away()
        victim.gate.open()
      })
    },
    'all database connections are cut': async () => {
      await disturbing(instances, async () => {
        for (const { gate } of instances) gate.cut()
      })
    },
    'connections of the fleet are cut': async () => front.cut(),
    'another policy is put into the folder': async () => {
      await deps.putPolicy(`soak-${++policies}`)
    },
    ...(deps.crashDatabase && {
      'the database is killed': async () => {
        await disturbing(instances, async () => {
          deps.crashDatabase?.()
          await sleep(500)
        })
      },
    }),
  }

  let deck: string[] = []
  while (!signal.aborted) {
    await sleep(random.between(deps.quietMs.least, deps.quietMs.most), undefined, { signal }).catch(() => {})
    if (signal.aborted) return
    if (deck.length === 0) deck = random.shuffled(Object.keys(kinds))
    const name = deck.pop()!
    deps.onFault(name)
    await kinds[name]!()
  }
}
