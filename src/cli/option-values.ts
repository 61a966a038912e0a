/** What several commands accept as the value of an option: each reads a text, or says what would be right. */
import { InvalidArgumentError } from 'commander'
import { workersMax } from '../workers/shares.ts'

export function wholeNumber(min: number, max: number): (text: string) => number {
  return text => {
    const number = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN
    if (!(number >= min && number <= max)) {
      throw new InvalidArgumentError(`It must be a whole number from ${min} to ${max}.`)
    }
    return number
  }
}

/** `auto`: one for each core. */
export function workerCount(text: string): number | 'auto' {
  if (text === 'auto') return text
  try {
    return wholeNumber(1, workersMax)(text)
  } catch {
    throw new InvalidArgumentError(`It must be auto or a whole number from 1 to ${workersMax}.`)
  }
}

export type Labels = Record<string, string>

/** For an option that may be repeated: `--label site=berlin --label floor=3`. */
export function label(text: string, before: Labels = {}): Labels {
  const [key = '', ...value] = text.split('=')
  if (key === '' || value.length === 0) throw new InvalidArgumentError('It must be key=value, such as site=berlin.')
  return { ...before, [key]: value.join('=') }
}

/** For an option that may be repeated. */
export function several(text: string, before: string[] = []): string[] {
  return [...before, text]
}

/** `localhost:8000`, `10.0.0.1:8000`, `[::1]:8000`. */
export function hostAndPort(text: string): string {
  const match = /^(\[[0-9a-f:]+\]|[^\s:/[\]]+):(\d{1,5})$/i.exec(text)
  const port = Number(match?.[2])
  if (!(port >= 1 && port <= 65_535)) throw new InvalidArgumentError('It must be host:port, such as localhost:8000.')
  return text
}

/** A moment as ISO 8601 has it. */
export function moment(text: string): Date {
  const at = /^\d{4}-\d\d-\d\d/.test(text) ? new Date(text) : new Date(Number.NaN)
  if (Number.isNaN(at.getTime())) {
    throw new InvalidArgumentError('It must be a date or a moment, such as 2026-01-31 or 2026-01-31T08:00:00Z.')
  }
  return at
}
