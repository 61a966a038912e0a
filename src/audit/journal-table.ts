/**
 * How a row gets from the journal into its table: as JSON, one text a row, one parameter a table.
 *
 * The text is made once. Its hash goes into the seal (`seals.ts`), and PostgreSQL takes it apart again, which costs this
 * process nothing: arrays of columns would have each document in them quoted once more.
 */

/** A table that the journal writes. Rows are column values, in the order of `columns`. */
export type JournalTable = {
  name: string
  /**
   * Values are strings, numbers and booleans as they are, a Date for `timestamptz`, and for `jsonb` the text of
   * `canonicalJson`. What is null is left out.
   */
  columns: readonly { name: string; type: string }[]
  /** What follows the insert, such as `on conflict …`. */
  onConflict?: string
  /** Rows of one batch with the same key are one row, the last. */
  key?: (row: readonly unknown[]) => string
}

/**
 * A row as its seal has it: the name of its table, a newline, and its text. Made once: what is hashed and what is written are the
 * same.
 */
export function namedRowText(table: JournalTable, row: readonly unknown[]): string {
  // Joined, not added up: hashing a text that is still in pieces takes twice as long.
  const pieces = [table.name, '\n']
  let separator = '{'
  for (const column of shapeOf(table).columns) {
    const json = jsonIn(column, row[column.at])
    // Once it is read as JSON, a column that is null and one that holds JSON's null are the same.
    if (json === 'null') continue
    pieces.push(separator, column.key, json)
    separator = ','
  }
  pieces.push(separator === '{' ? '{}' : '}')
  return pieces.join('')
}

/** The text alone: JSON with the columns in the order of their names, times in microseconds since the epoch. */
export function rowText(table: JournalTable, named: string): string {
  return named.slice(table.name.length + 1)
}

/** Inserts all rows of a parameter, which holds their texts as one JSON array. */
export function insertStatement(table: JournalTable, parameter: number): string {
  return shapeOf(table).insert.replace('$', `$${parameter}`)
}

type Shape = {
  /** In the order of their names. */
  columns: readonly Column[]
  insert: string
}

/** `value` is the text that the row before had in it, and `json` what that is as JSON: most say the same row after row. */
type Column = { at: number; key: string; type: string; value: string; json: string }

const shapes = new WeakMap<JournalTable, Shape>()

function shapeOf(table: JournalTable): Shape {
  const known = shapes.get(table)
  if (known) return known
  const columns = table.columns.map(({ name, type }, at): Column => {
    return { at, key: `${JSON.stringify(name)}:`, type, value: '', json: '""' }
  })
  columns.sort((one, other) => (one.key < other.key ? -1 : 1))
  const names = table.columns.map(({ name }) => name)
  const types = table.columns.map(({ name, type }) => `${name} ${type === 'timestamptz' ? 'bigint' : type}`)
  const values = table.columns.map(({ name, type }) =>
    type === 'timestamptz' ? `timestamptz 'epoch' + ${name} * interval '1 microsecond'` : name,
  )
  const insert = `insert into ${table.name} (${names.join(', ')}) select ${values.join(', ')} from json_to_recordset($::json) as t(${types.join(', ')}) ${table.onConflict ?? ''}`
  const shape = { columns, insert }
  shapes.set(table, shape)
  return shape
}

function jsonIn(column: Column, value: unknown): string {
  if (value === null || value === undefined) return 'null'
  if (column.type === 'jsonb') return value as string
  if (typeof value === 'string') {
    if (value !== column.value) {
      column.json = quoted(value)
      column.value = value
    }
    return column.json
  }
  if (value instanceof Date) return String(value.getTime() * 1_000)
  return JSON.stringify(value)
}

const plain = /^[\w .:@/-]*$/

/** As JSON. Most texts stand for themselves, which is seen in a third of the time that quoting takes. */
function quoted(text: string): string {
  // PostgreSQL refuses half of a surrogate pair.
  return plain.test(text) ? `"${text}"` : JSON.stringify(text.toWellFormed())
}
