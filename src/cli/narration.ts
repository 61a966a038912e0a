/** How `edgemesh dev` tells what it does: a line of JSON for programs, or a line with a tick for people. */
import { stripVTControlCharacters } from 'node:util'

export type StepReport = {
  step: string
  ok: boolean
  /** How long this step took. */
  ms: number
  detail: Record<string, unknown>
  /** The same for people. */
  said: string
}

export type Narrator = {
  /** A step begins that may take a while. */
  begin(step: string): void
  end(report: StepReport): void
  /** What only people want to know. */
  say(text: string): void
}

/** Nothing but the steps, `{step, ok, ms, detail}`, on stdout. */
export const narrateJson: Narrator = {
  begin: () => {},
  end: ({ step, ok, ms, detail }) => console.log(JSON.stringify({ step, ok, ms: Math.round(ms * 10) / 10, detail })),
  say: () => {},
}

const stepWidth = 10
const msWidth = 6

export function narrateToPeople(): Narrator {
  const terminal = process.stdout.isTTY
  const colour = terminal && process.stdout.hasColors()
  const green = (text: string) => (colour ? `\x1b[32m${text}\x1b[0m` : text)
  const red = (text: string) => (colour ? `\x1b[31m${text}\x1b[0m` : text)
  return {
    // Only a terminal can take a line back.
    begin: step => terminal && process.stdout.write(`  … ${step}`),
    end({ step, ok, ms, said }) {
      const mark = ok ? green('✓') : red('✗')
      const took = `${Math.round(ms)} ms`.padStart(msWidth + 3)
      if (terminal) process.stdout.write('\r\x1b[K')
      console.log(`  ${mark} ${step.padEnd(stepWidth)}${took}   ${stripVTControlCharacters(said)}`)
    },
    say: text => console.log(text),
  }
}
