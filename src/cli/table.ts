/** Plain columns on stdout: they line up for people, and still can be cut with awk. */

export type Columns<T> = Readonly<Record<string, (row: T) => string | number | Date | undefined>>

const gap = '  '

/** Lines with a heading; nothing is cut off, because an id that is cut off can't be copied. */
export function renderTable<T>(columns: Columns<T>, rows: readonly T[]): string {
  const names = Object.keys(columns)
  const cells = [
    names.map(name => name.toUpperCase()),
    ...rows.map(row => names.map(name => cell(columns[name]?.(row)))),
  ]
  const widths = names.map((_, column) => Math.max(...cells.map(line => line[column]?.length ?? 0)))
  return cells
    .map(line =>
      line
        .map((text, column) => text.padEnd(widths[column] ?? 0))
        .join(gap)
        .trimEnd(),
    )
    .join('\n')
}

/** One thing, a fact a line. Facts that are absent are left out. */
export function renderFacts(facts: Readonly<Record<string, string | number | Date | undefined>>): string {
  const present = Object.entries(facts).filter(([, value]) => value !== undefined && value !== '')
  const width = Math.max(0, ...present.map(([name]) => name.length))
  return present.map(([name, value]) => `${name.padEnd(width)}${gap}${cell(value)}`).join('\n')
}

export function renderLabels(labels: Readonly<Record<string, string>>): string {
  return Object.entries(labels)
    .map(([key, value]) => `${key}=${value}`)
    .sort()
    .join(' ')
}

function cell(value: string | number | Date | undefined): string {
  if (value === undefined || value === '') return '-'
  return value instanceof Date ? `${value.toISOString().slice(0, 19)}Z` : printable(String(value))
}

const controlCharacters = /\p{Cc}+/gu

/** Whoever wrote the text must not be able to move the reader's cursor, or to add lines. */
export function printable(text: string): string {
  return text.replace(controlCharacters, ' ')
}
