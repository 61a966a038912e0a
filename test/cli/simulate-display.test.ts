import { Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import test from 'ava'
import { onTerminal, type Shown } from '../../src/cli/simulate-display.ts'
import { emptyTally } from '../../src/simulate/tally.ts'

/** A terminal as far as it is used here: what stands on its screen after all that was written. */
function terminal() {
  const lines: string[] = ['']
  let [row, column] = [0, 0]
  let cursorIsHidden = false
  function take(text: string): void {
    // Control sequences, line ends, and what is printed.
    // biome-ignore lint/suspicious/noControlCharactersInRegex: a terminal is told what to do by them
    for (const [part, , parameter = '', command] of text.matchAll(/(\x1b\[([?\d;]*)([A-Za-z]))|[\r\n]|[^\x1b\r\n]+/g)) {
      const count = Number(parameter) || 1
      if (part === '\r') column = 0
      else if (part === '\n') [row, column] = [row + 1, 0]
      else if (command === 'A') row -= count
      else if (command === 'B') row += count
      else if (command === 'G') column = count - 1
      else if (command === 'J') lines.splice(row, lines.length, (lines[row] ?? '').slice(0, column))
      else if (command === 'K')
        lines[row] = parameter === '2' || parameter === '1' ? '' : (lines[row] ?? '').slice(0, column)
      else if (command === 'l' || command === 'h') {
        if (parameter === '?25') cursorIsHidden = command === 'l'
      } else if (command === undefined) {
        const line = (lines[row] ?? '').padEnd(column)
        lines[row] = line.slice(0, column) + part + line.slice(column + part.length)
        column += part.length
      } else throw new Error(`unknown control sequence ${JSON.stringify(part)}`)
      while (lines.length <= row) lines.push('')
    }
  }
  const stream = Object.assign(
    new Writable({
      write(chunk, _encoding, done) {
        take(String(chunk))
        done()
      },
    }),
    { isTTY: true, columns: 100, rows: 40 },
  ) as unknown as NodeJS.WriteStream
  return {
    stream,
    screen: () =>
      lines
        .map(line => line.trimEnd())
        .join('\n')
        .trimEnd(),
    cursorIsHidden: () => cursorIsHidden,
  }
}

const { states, acknowledgements: _, broken: __, ...counts } = emptyTally()
const progress = {
  phase: 'enrolling' as const,
  elapsedMs: 1_000,
  devices: 200,
  ...counts,
  states: { ...states, enrolling: 150, reporting: 50 },
  heartbeatsPerSecond: 25,
  acknowledgedMs: { p50: 3.2, p99: 40 },
  decisionsPerSecond: 0,
  bytesPerDevice: 300 * 1_024,
}

test('a bar grows while devices enroll, with what has gone wrong beside it', async t => {
  const { stream, screen, cursorIsHidden } = terminal()
  const show = onTerminal(stream)
  show({ ...progress, enrolled: 0 })
  show({ ...progress, enrolled: 50, errors: { RATE_LIMITED: 3 } })
  // It draws at its own pace.
  const drawn = () => /^enrolling (\S+) 50\/200 {2}3 RATE_LIMITED$/.exec(screen())
  for (let looked = 0; !drawn() && looked < 200; looked++) await sleep(50)
  const boxes = [...(drawn()?.[1] ?? screen())]
  t.is(boxes.filter(box => box === '=').length / boxes.length, 0.25)
  t.true(cursorIsHidden())
  show({ ...progress, phase: 'running', enrolled: 200 })
})

test('then a table is drawn in place again and again, and the summary takes its place', t => {
  const { stream, screen, cursorIsHidden } = terminal()
  const show = onTerminal(stream)
  show({ ...progress, enrolled: 200 })
  const running = { ...progress, phase: 'running' as const, enrolled: 200, states: { ...states, reporting: 200 } }
  show({ ...running, elapsedMs: 2_000, heartbeats: 400 })
  show({ ...running, elapsedMs: 3_000, heartbeats: 600, revocations: 7 })
  const lines = screen().split('\n')
  t.is(lines.filter(line => line.startsWith('elapsed')).length, 1)
  t.true(lines.includes('heartbeats    600, 25/s'))
  t.true(lines.includes('acknowledged  p50 3.2 ms, p99 40 ms'))
  t.true(lines.includes('memory        300 KiB a device'))
  t.true(lines.some(line => /^revocations +7$/.test(line)))
  t.false(cursorIsHidden(), 'whoever stops it now has a cursor')

  const summary: Shown = {
    ...running,
    phase: 'done',
    elapsedMs: 9_000,
    statesAtEnd: { ...states, reporting: 198, failed: 2 },
    states: { ...states, stopped: 198, failed: 2 },
    enrolledInMs: 1_500,
    failedDevices: 2,
  }
  show(summary)
  const end = screen().split('\n')
  t.is(end.filter(line => line.startsWith('elapsed')).length, 1)
  t.true(
    end.some(line => /^devices +198 reporting, 2 failed$/.test(line)),
    'as they were when the end began',
  )
  t.true(end.some(line => /^enrolled in +1\.5 s$/.test(line)))
  t.regex(end.at(-1) ?? '', /^failed +2$/)
})
