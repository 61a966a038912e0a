/**
 * Looks for bytes that break what must hold: `npm run fuzz -- [TARGET…] [--seconds 60] [--seed N]`.
 *
 * The time is shared equally among the targets. A finding is printed with the seed that leads to it and with its bytes in
 * base64; `npm run fuzz -- TARGET --replay BASE64` looks at these alone. What is spoiled comes from files, so that a seed
 * gives the same again; what is signed here is signed by new keys each time. Exit code 1 with a finding, 2 when the
 * command was not understood.
 */
import { randomInt } from 'node:crypto'
import { parseArgs } from 'node:util'
import fc from 'fast-check'
import { type Target, targets } from './targets.ts'

const targetNames = targets.map(({ name }) => name)
const usage = `usage: npm run fuzz -- [TARGET…] [--seconds 60] [--seed N] [--replay BASE64]
targets: ${targetNames.join(', ')}; without one, all`

/** Tried in one go: small enough that the clock is looked at, large enough that starting costs nothing. */
const runsOfRound = 1_000
/** What is put before the other judge at once. It is asked as long as the runs of the round have taken, and no longer. */
const judgedAtOnce = 16
/** Processor time for one input of a few kilobytes. A thousand times what it takes, so that only a blow-up gets there. */
const cpuMsMax = 1_000
const secondsDefault = 60
const seedMax = 0x7fffffff

type Finding = {
  target: string
  /** Absent for what the other judge has found: it sees as many as there is time for. */
  seed?: number
  finding: string
  bytes: Buffer
}

const { names, seconds, seed, replay } = readArguments()
const chosen = targets.filter(({ name }) => names.includes(name))
const findings = replay === undefined ? await fuzzAll() : await replayAll(replay)
for (const finding of findings) report(finding)
console.log(findings.length === 0 ? 'nothing found' : `${findings.length} found`)
process.exitCode = findings.length > 0 ? 1 : 0

async function fuzzAll(): Promise<Finding[]> {
  console.log(`seed ${seed}, ${seconds} s for ${names.join(', ')}`)
  const found: Finding[] = []
  for (const target of chosen) found.push(...(await fuzz(target, (seconds * 1_000) / chosen.length)))
  return found
}

/** Until the time is over, or until something is found: the same would be found again and again. */
async function fuzz(target: Target, forMs: number): Promise<Finding[]> {
  const startedAt = performance.now()
  const outcomes = new Map<string, number>()
  let [runs, judged] = [0, 0]
  let found: Finding[] = []
  for (let round = 0; found.length === 0 && performance.now() - startedAt < forMs; round++) {
    const roundStartedAt = performance.now()
    const seedOfRound = seed + round
    const accepted: Buffer[] = []
    const property = fc.property(target.inputs({ slow: true }), bytes => {
      const outcome = timed(() => target.examine(bytes))
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
      runs++
      if (outcome.startsWith('accepted')) accepted.push(bytes)
    })
    const { failed, counterexample, errorInstance } = fc.check(property, { seed: seedOfRound, numRuns: runsOfRound })
    if (failed && counterexample) {
      const finding = String(errorInstance instanceof Error ? errorInstance.stack : errorInstance)
      found = [{ target: target.name, seed: seedOfRound, finding, bytes: counterexample[0] }]
      continue
    }
    const judgeUntil = 2 * performance.now() - roundStartedAt
    while (target.judge && accepted.length > 0 && found.length === 0 && performance.now() < judgeUntil) {
      const some = accepted.splice(0, judgedAtOnce)
      judged += some.length
      found = (await target.judge(some)).map(it => ({ target: target.name, ...it }))
    }
  }
  const took = (performance.now() - startedAt) / 1_000
  console.log(
    `\n${target.name}: ${runs} runs in ${took.toFixed(1)} s, ${Math.round(runs / took)}/s` +
      `${judged > 0 ? `, ${judged} of the accepted judged by openssl` : ''}`,
  )
  const byCount = [...outcomes].sort(([, one], [, other]) => other - one)
  for (const [outcome, count] of byCount) console.log(`  ${String(count).padStart(8)}  ${outcome}`)
  return found
}

/** @throws when it took far more than it should, so that this is a finding like any other */
function timed<T>(work: () => T): T {
  const before = process.threadCpuUsage()
  const result = work()
  const { user, system } = process.threadCpuUsage(before)
  if (user + system > cpuMsMax * 1_000)
    throw new Error(`took ${Math.round((user + system) / 1_000)} ms of processor time`)
  return result
}

async function replayAll(bytes: Buffer): Promise<Finding[]> {
  const found: Finding[] = []
  for (const target of chosen) {
    try {
      console.log(`${target.name}: ${timed(() => target.examine(bytes))}`)
      for (const it of (await target.judge?.([bytes])) ?? []) found.push({ target: target.name, ...it })
    } catch (error) {
      found.push({ target: target.name, finding: String((error as Error).stack), bytes })
    }
  }
  return found
}

function report({ target, seed: seedOfRound, finding, bytes }: Finding): void {
  console.error(`\nFOUND by ${target}: ${finding}`)
  if (seedOfRound !== undefined) console.error(`again with:  npm run fuzz -- ${target} --seed ${seedOfRound}`)
  console.error(`with these:  npm run fuzz -- ${target} --replay ${bytes.toString('base64')}`)
}

function readArguments(): { names: string[]; seconds: number; seed: number; replay: Buffer | undefined } {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: {
        seconds: { type: 'string', default: String(secondsDefault) },
        seed: { type: 'string', default: String(randomInt(seedMax)) },
        replay: { type: 'string' },
        help: { type: 'boolean', short: 'h' },
      },
    })
    if (values.help) {
      console.log(usage)
      process.exit(0)
    }
    const unknown = positionals.filter(name => !targetNames.includes(name))
    if (unknown.length > 0) throw new Error(`there is no target ${unknown.join(', ')}`)
    const [seconds, seed] = [Number(values.seconds), Number(values.seed)]
    if (!(seconds > 0)) throw new Error(`--seconds takes a number above 0, not ${values.seconds}`)
    if (!Number.isSafeInteger(seed)) throw new Error(`--seed takes a whole number, not ${values.seed}`)
    return {
      names: positionals.length > 0 ? positionals : targetNames,
      seconds,
      seed,
      replay: values.replay === undefined ? undefined : Buffer.from(values.replay, 'base64'),
    }
  } catch (error) {
    console.error(`error: ${(error as Error).message}\n${usage}`)
    process.exit(2)
  }
}
