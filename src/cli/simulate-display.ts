/** What `edgemesh simulate` shows of a fleet: on a terminal, in lines, or as JSON. */
import { clearScreenDown, moveCursor } from 'node:readline'
import { SingleBar } from 'cli-progress'
import type { Progress, Summary } from '../simulate/simulate.ts'
import { renderFacts } from './table.ts'

/** Between two lines where nobody looks at a terminal. */
const lineEveryMs = 5_000

/** The last that is shown is the summary. */
export type Shown = Progress | Summary

export function printJson(shown: Shown): void {
  console.log(JSON.stringify({ type: isSummary(shown) ? 'summary' : 'progress', ...shown }))
}

export function inLines(): (shown: Shown) => void {
  let dueMs = 0
  return shown => {
    if (isSummary(shown)) return console.log(summaryOf(shown))
    if (shown.elapsedMs < dueMs) return
    dueMs = shown.elapsedMs + lineEveryMs
    const { phase, enrolled, devices, heartbeatsPerSecond, acknowledgedMs, decisionsPerSecond, errors } = shown
    const facts = [
      `${(shown.elapsedMs / 1_000).toFixed(0)} s`,
      phase,
      `${enrolled}/${devices} enrolled`,
      `${shown.states.reporting} reporting`,
      `${heartbeatsPerSecond} heartbeats/s (p50 ${milliseconds(acknowledgedMs.p50)}, p99 ${milliseconds(acknowledgedMs.p99)})`,
      `${decisionsPerSecond} decisions/s`,
    ]
    console.log([...facts, counted(errors)].filter(Boolean).join('  '))
  }
}

/** A bar while devices are enrolled, then a table in place. */
export function onTerminal(stream: NodeJS.WriteStream): (shown: Shown) => void {
  let bar: SingleBar | undefined
  let linesDrawn = 0
  return shown => {
    if (shown.phase === 'enrolling') {
      if (!bar) {
        bar = new SingleBar({
          format: 'enrolling {bar} {value}/{total}  {errors}',
          stream,
          hideCursor: true,
        })
        bar.start(shown.devices, 0, { errors: '' })
      }
      bar.update(shown.enrolled, { errors: counted(shown.errors) })
      return
    }
    bar?.update(shown.enrolled)
    bar?.stop()
    bar = undefined
    if (linesDrawn > 0) {
      moveCursor(stream, 0, -linesDrawn)
      clearScreenDown(stream)
    }
    const text = isSummary(shown) ? summaryOf(shown) : tableOf(shown)
    linesDrawn = isSummary(shown) ? 0 : text.split('\n').length
    stream.write(`${text}\n`)
  }
}

function isSummary(shown: Shown): shown is Summary {
  return 'failedDevices' in shown
}

function tableOf(shown: Progress): string {
  return renderFacts({
    elapsed: `${(shown.elapsedMs / 1_000).toFixed(0)} s`,
    devices: counted(isSummary(shown) ? shown.statesAtEnd : shown.states),
    enrolled: `${shown.enrolled} of ${shown.devices}`,
    heartbeats: `${shown.heartbeats}, ${shown.heartbeatsPerSecond}/s`,
    acknowledged: `p50 ${milliseconds(shown.acknowledgedMs.p50)}, p99 ${milliseconds(shown.acknowledgedMs.p99)}`,
    decisions: `${shown.allowed} allowed, ${shown.denied} denied, ${shown.decisionsPerSecond}/s`,
    revocations: shown.revocations,
    reconnects: shown.reconnects,
    script: counted(shown.scripted),
    errors: counted(shown.errors),
    memory: `${(shown.bytesPerDevice / 1_024).toFixed(0)} KiB a device`,
  })
}

function summaryOf(summary: Summary): string {
  return `${tableOf(summary)}\n${renderFacts({
    'enrolled in': `${(summary.enrolledInMs / 1_000).toFixed(1)} s`,
    failed: summary.failedDevices,
  })}`
}

export function counted(counts: Readonly<Record<string, number>>): string {
  return Object.entries(counts)
    .filter(([, count]) => count > 0)
    .map(([name, count]) => `${count} ${name}`)
    .join(', ')
}

function milliseconds(ms: number | undefined): string {
  return ms === undefined ? '-' : `${ms} ms`
}
