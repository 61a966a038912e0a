/**
 * Runs a soak: `npm run soak -- [--minutes M | --seconds S] [--devices N] [--seed N] [--json]`.
 *
 * A bar while it runs, then a table; with --json the summary on stdout. Exit code 1 when something was broken, and what; 2
 * when the command was not understood. The same seed makes the same choices; what processes do in between is their own.
 */
import { randomInt } from 'node:crypto'
import { parseArgs } from 'node:util'
import { Presets, SingleBar } from 'cli-progress'
import { renderFacts, renderTable } from '../../src/cli/table.ts'
import { type SoakProgress, type SoakSummary, soak } from './soak.ts'

const usage = 'usage: npm run soak -- [--minutes M | --seconds S] [--devices N] [--seed N] [--json]'
const minutesDefault = 3
const devicesDefault = 60
const seedMax = 2 ** 32

const { durationMs, devices, seed, json } = readArguments()
const stopping = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stopping.abort())
const summary = await soak({
  durationMs,
  seed,
  devices,
  reachMs: 1_000,
  quietMs: { least: Math.min(3_000, durationMs / 20), most: Math.min(8_000, durationMs / 8) },
  // Beyond the time after which a statement is given up.
  awayMs: { least: 1_000, most: Math.min(13_000, durationMs / 8) },
  onProgress: showProgress(durationMs),
  signal: stopping.signal,
})
if (json) console.log(JSON.stringify(summary))
else console.log(forPeople(summary))
process.exitCode = summary.broken.length > 0 ? 1 : 0

function readArguments(): { durationMs: number; devices: number; seed: number; json: boolean } {
  try {
    const { values } = parseArgs({
      options: {
        minutes: { type: 'string' },
        seconds: { type: 'string' },
        devices: { type: 'string', default: String(devicesDefault) },
        seed: { type: 'string' },
        json: { type: 'boolean' },
        help: { type: 'boolean', short: 'h' },
      },
    })
    if (values.help) {
      console.log(usage)
      process.exit(0)
    }
    const number = (name: string, text: string, least: number, most: number) => {
      const value = Number(text)
      if (text.trim() !== '' && value >= least && value <= most) return value
      throw new Error(`--${name} has to be ${least} to ${most}, not ${text}`)
    }
    const minutes = values.minutes === undefined ? undefined : number('minutes', values.minutes, 0.1, 100_000)
    const seconds = values.seconds === undefined ? undefined : number('seconds', values.seconds, 5, 1_000_000)
    return {
      durationMs: seconds === undefined ? (minutes ?? minutesDefault) * 60_000 : seconds * 1_000,
      devices: Math.floor(number('devices', values.devices, 1, 5_000)),
      seed: values.seed === undefined ? randomInt(seedMax) : Math.floor(number('seed', values.seed, 0, seedMax - 1)),
      json: values.json ?? false,
    }
  } catch (error) {
    console.error(`error: ${(error as Error).message}\n${usage}`)
    process.exit(2)
  }
}

/** On a terminal a bar, elsewhere a line whenever something else is being done; both on stderr. */
function showProgress(totalMs: number): (progress: SoakProgress) => void {
  if (!process.stderr.isTTY) {
    let said = ''
    return ({ elapsedMs, doing, broken }) => {
      if (doing === said) return
      said = doing
      console.error(`… ${(elapsedMs / 1_000).toFixed(0)} s: ${doing}${broken > 0 ? ` (${broken} rules broken)` : ''}`)
    }
  }
  const format = 'soak {bar} {elapsed} s  {allowed} allowed, {denied} denied, {broken} broken  {doing}'
  const bar = new SingleBar({ format, hideCursor: true, stream: process.stderr }, Presets.shades_classic)
  const payload = ({ elapsedMs, ...rest }: SoakProgress) => ({ ...rest, elapsed: Math.round(elapsedMs / 1_000) })
  let isDrawn = false
  process.once('exit', () => bar.stop())
  return progress => {
    if (!isDrawn) bar.start(totalMs, 0, payload(progress))
    isDrawn = true
    bar.update(Math.min(totalMs, progress.elapsedMs), payload(progress))
  }
}

function forPeople(summary: SoakSummary): string {
  const { seed, elapsedMs, broken, faults, answers, acknowledged, fleet, reach, audit, series, growth } = summary
  const counted = (counts: Record<string, number>) =>
    Object.entries(counts)
      .map(([name, times]) => `${times} ${name}`)
      .join(', ')
  const facts = renderFacts({
    seed,
    elapsed: `${(elapsedMs / 1_000).toFixed(0)} s`,
    faults: counted(faults),
    answers: counted(answers),
    acknowledged: counted(acknowledged),
    fleet: `${fleet.devices} devices, ${fleet.heartbeats} heartbeats, ${fleet.allowed} allowed, ${fleet.denied} denied, ${fleet.reconnects} reconnects`,
    'fleet errors': counted(fleet.errors),
    withdrawals: `${reach.connections} connections taken back: p50 ${reach.p50Ms} ms, p99 ${reach.p99Ms} ms, at most ${reach.maxMs} ms`,
    audit: `${audit.rows} rows under ${audit.seals} seals, ${audit.findings} findings`,
    'history grows by': Object.entries(growth)
      .map(([table, bytes]) => `${table} ${(bytes / 1_024).toFixed(1)} KiB/s`)
      .join(', '),
  })
  const number = (value: number, unit: string) => `${value.toFixed(1)}${unit && ` ${unit}`}`
  const table = renderTable(
    {
      figure: ({ name }) => name,
      first: ({ first, unit }) => number(first, unit),
      last: ({ last, unit }) => number(last, unit),
      growth: ({ growth: by, unit }) => number(by, unit),
      allowed: ({ allowed, unit }) => number(allowed, unit),
      '': ({ isFlat }) => (isFlat ? 'flat' : 'GROWS'),
    },
    series,
  )
  const verdict =
    broken.length === 0
      ? 'nothing was broken'
      : broken
          .map(
            ({ rule, times, examples }) =>
              `BROKEN ${times} times: ${rule}\n${examples.map(said => `  ${said}`).join('\n')}`,
          )
          .join('\n')
  return `${facts}\n\n${table}\n\n${verdict}${broken.length > 0 ? `\nagain: npm run soak -- --seed ${seed}` : ''}`
}
