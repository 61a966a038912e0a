/** Lists: pages are followed until the end or the limit, and shown as a table or as one JSON document a line. */
import type { Command } from 'commander'
import { wholeNumber } from './option-values.ts'
import { type Columns, renderTable } from './table.ts'

export type ListOptions = { limit: number; json?: true }

/** What the server gives at most in one page. */
const pageSizeMax = 1_000
const limitDefault = 1_000
/** A table is held in memory until its columns can be measured. */
const limitMax = 1_000_000

/** Adds the options that every list has. */
export function listing(command: Command): Command {
  return command
    .option('--limit <n>', 'show at most so many', wholeNumber(1, limitMax), limitDefault)
    .option('--json', 'one JSON document a line')
}

/** One page, and the token of the next; an empty token ends the list. */
export type Page<T> = { rows: T[]; nextPageToken: string }

export async function printList<T>(
  options: ListOptions,
  list: {
    /** What is listed, for the line that says that there are none: "devices". */
    name: string
    page: (at: { pageSize: number; pageToken: string }) => Promise<Page<T>>
    columns: Columns<T>
    toJson: (row: T) => unknown
  },
): Promise<void> {
  const rows: T[] = []
  let pageToken = ''
  do {
    const pageSize = Math.min(pageSizeMax, options.limit - rows.length)
    const page = await list.page({ pageSize, pageToken })
    rows.push(...page.rows)
    if (options.json) for (const row of page.rows) console.log(JSON.stringify(list.toJson(row)))
    pageToken = page.nextPageToken
  } while (pageToken !== '' && rows.length < options.limit)

  if (!options.json && rows.length > 0) console.log(renderTable(list.columns, rows))
  if (!options.json && rows.length === 0) console.error(`no ${list.name}`)
  if (pageToken !== '') console.error(`note: there are more ${list.name}; see them with --limit`)
}
