/**
 * What must be, worked out from what operators and devices were told, and from nothing that the service says of itself.
 *
 * Each fact that a permission rests on (the user is enabled, the device's health is fresh, …) is a line of time on which it
 * is `true`, `false` or, between a call and its answer, `either`. A call whose answer was lost leaves `either` behind.
 * A permission may stand at an instant at which all of its facts can be true, and has to at one at which all are.
 */

export type Can = 'true' | 'false' | 'either'

export type Fact = {
  name: string
  /** About to be changed: from now on it may be so or so. @returns to be called when the change was acknowledged */
  change(to: boolean): () => void
  /** From that instant on, whatever was planned for later. */
  plan(...then: { fromMs: number; can: Can }[]): void
  at(ms: number): Can
  /** The instants within a time at which it changes. */
  turns(fromMs: number, untilMs: number): number[]
}

/** What is older is not asked for: the longest that anything may take, and some more. */
const rememberedMs = 120_000

/** @param clock milliseconds since the epoch: planned ends go by it */
export function createFact(name: string, initially: Can, clock: () => number): Fact {
  const line: { fromMs: number; can: Can }[] = [{ fromMs: Number.NEGATIVE_INFINITY, can: initially }]

  function plan(...then: { fromMs: number; can: Can }[]): void {
    for (const { fromMs, can } of then) {
      while ((line.at(-1)?.fromMs ?? Number.NEGATIVE_INFINITY) >= fromMs && line.length > 1) line.pop()
      line.push({ fromMs, can })
    }
    const horizonMs = clock() - rememberedMs
    while (line.length > 1 && line[1]!.fromMs < horizonMs) line.shift()
  }

  return {
    name,
    change(to) {
      plan({ fromMs: clock(), can: 'either' })
      return () => plan({ fromMs: clock(), can: to ? 'true' : 'false' })
    },
    plan,
    at: ms => line.findLast(({ fromMs }) => fromMs <= ms)?.can ?? initially,
    turns: (fromMs, untilMs) => line.map(({ fromMs: at }) => at).filter(at => at > fromMs && at <= untilMs),
  }
}

/** Instants that stand for all of a time: its begin, and each change in it. */
function instants(facts: readonly Fact[], fromMs: number, untilMs: number): number[] {
  return [fromMs, ...facts.flatMap(fact => fact.turns(fromMs, untilMs))].sort((a, b) => a - b)
}

/** Whether a permission could stand at some instant of the time. */
export function mayStand(facts: readonly Fact[], fromMs: number, untilMs: number): boolean {
  return instants(facts, fromMs, untilMs).some(ms => facts.every(fact => fact.at(ms) !== 'false'))
}

/** Whether it has to stand all the time. */
export function mustStand(facts: readonly Fact[], fromMs: number, untilMs: number): boolean {
  return instants(facts, fromMs, untilMs).every(ms => facts.every(fact => fact.at(ms) === 'true'))
}

/** Since when it certainly does not stand; `undefined` while it may. */
export function fallenSince(facts: readonly Fact[], fromMs: number, nowMs: number): number | undefined {
  const times = instants(facts, fromMs, nowMs)
  let since: number | undefined
  for (const ms of times) {
    if (facts.every(fact => fact.at(ms) !== 'false')) since = undefined
    else since ??= ms
  }
  return since
}

/** Which of the facts are why, for people. */
export function describeFacts(facts: readonly Fact[], ms: number): string {
  return facts.map(fact => `${fact.name}=${fact.at(ms)}`).join(' ')
}
