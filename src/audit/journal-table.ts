/**
 * How a row gets from the journal into its table: as JSON, one text a row, one parameter a table.
 *
 * The text is made once, and as bytes from the start: a string would be copied three times on its way. Its hash goes into the seal
 * (`seals.ts`), and PostgreSQL takes it apart again, which costs this process nothing: arrays of columns would have each document
 * in them quoted once more.
 */

/** A table that the journal writes. Rows are column values, in the order of `columns`. */
export type JournalTable = {
  name: string
  /**
   * Values are strings, numbers and booleans as they are, a Date for `timestamptz`, and for `jsonb` the text of
   * `canonicalJson`, or an array of such texts. What is null is left out.
   */
  columns: readonly { name: string; type: string }[]
  /** What follows the insert, such as `on conflict …`. */
  onConflict?: string
  /** Rows of one batch with the same key are one row, the last. */
  key?: (row: readonly unknown[]) => string
}

/**
 * A row as its seal has it: the name of its table, a newline, and its text. That is JSON with the columns in the order of their
 * names, times in microseconds since the epoch.
 *
 * @returns bytes that are so until the next row is encoded
 */
export function encodeRow(table: JournalTable, row: readonly unknown[]): Buffer {
  const { head, columns } = shapeOf(table)
  let end = put(head, 0)
  for (const column of columns) end = putColumn(column, row[column.at], end)
  // In the place of the first comma.
  encoded[head.length] = openingBrace
  if (end === head.length) end++
  encoded[end++] = closingBrace
  const bytes = encoded.subarray(0, end)
  if (encoded.length > keptBytesMax) encoded = Buffer.allocUnsafe(keptBytesMax)
  return bytes
}

/** Rows of one table as a JSON array: the parameter that `insertStatement` takes. */
export function createRowArray(table: JournalTable) {
  const headLength = shapeOf(table).head.length
  let bytes = Buffer.allocUnsafe(firstArrayBytes)
  bytes[0] = openingBracket
  let end = 1
  let count = 0
  function room(needed: number): void {
    if (bytes.length - end >= needed) return
    const larger = Buffer.allocUnsafe(Math.max(2 * bytes.length, end + needed))
    bytes.copy(larger, 0, 0, end)
    bytes = larger
  }
  return {
    /** @param row by `encodeRow` */
    add(row: Buffer): void {
      room(row.length - headLength + spareBytes)
      if (count++ > 0) bytes[end++] = comma
      end += row.copy(bytes, end, headLength)
    },
    count: () => count,
    /** No more is added. */
    close(): Buffer {
      bytes[end++] = closingBracket
      return bytes.subarray(0, end)
    },
  }
}

/** Inserts all rows of a parameter, which holds their texts as one JSON array. */
export function insertStatement(table: JournalTable, parameter: number): string {
  return shapeOf(table).insert.replace('$', `$${parameter}`)
}

const code = (character: string) => character.charCodeAt(0)
const openingBrace = code('{')
const closingBrace = code('}')
const openingBracket = code('[')
const closingBracket = code(']')
const comma = code(',')
const firstArrayBytes = 4_096
/** A buffer that has grown for a larger row is not kept. */
const keptBytesMax = 65_536
/** A character of a string takes three bytes at most. */
const characterBytesMax = 3
/** Brackets and a comma. */
const spareBytes = 4

let encoded = Buffer.allocUnsafe(keptBytesMax)

/** @returns where it ends; there is room for a few bytes more */
function put(text: string, at: number): number {
  const needed = at + text.length * characterBytesMax + spareBytes
  if (needed > encoded.length) encoded = Buffer.concat([encoded], 2 * needed)
  return at + encoded.write(text, at)
}

function putColumn(column: Column, value: unknown, at: number): number {
  if (value === null || value === undefined) return at
  if (typeof value === 'string' && column.type !== 'jsonb') return putText(column, value, at)
  if (Array.isArray(value)) return putArray(value, put(column.key, at))
  const json = jsonOf(value)
  // Once it is read as JSON, a column that is null and one that holds JSON's null are the same.
  return json === 'null' ? at : put(json, put(column.key, at))
}

function putText(column: Column, value: string, at: number): number {
  if (value === column.value) {
    column.text ??= `${column.key}${quoted(value)}`
    return put(column.text, at)
  }
  column.value = value
  column.text = undefined
  return put(quoted(value), put(column.key, at))
}

function putArray(texts: readonly string[], at: number): number {
  encoded[at] = openingBracket
  let end = at + 1
  for (let place = 0; place < texts.length; place++) {
    if (place > 0) encoded[end++] = comma
    end = put(texts[place] as string, end)
  }
  encoded[end] = closingBracket
  return end + 1
}

/** @param value a string is JSON already */
function jsonOf(value: unknown): string {
  if (typeof value === 'string') return value
  return value instanceof Date ? String(value.getTime() * 1_000) : JSON.stringify(value)
}

type Shape = {
  /** What is hashed with each row. */
  head: string
  /** In the order of their names. */
  columns: readonly Column[]
  insert: string
}

/**
 * `key`: as in JSON, a comma before it. `value` is the text that the row before had in it, and `text` that with its key, once two
 * rows had it: most say the same row after row.
 */
type Column = { at: number; key: string; type: string; value: string; text: string | undefined }

const shapes = new WeakMap<JournalTable, Shape>()

function shapeOf(table: JournalTable): Shape {
  const known = shapes.get(table)
  if (known) return known
  const columns = table.columns.map(({ name, type }, at): Column => {
    const key = `,${JSON.stringify(name)}:`
    return { at, key, type, value: '', text: undefined }
  })
  columns.sort((one, other) => (one.key < other.key ? -1 : 1))
  const names = table.columns.map(({ name }) => name)
  const types = table.columns.map(({ name, type }) => `${name} ${type === 'timestamptz' ? 'bigint' : type}`)
  const values = table.columns.map(({ name, type }) =>
    type === 'timestamptz' ? `timestamptz 'epoch' + ${name} * interval '1 microsecond'` : name,
  )
  const insert = `insert into ${table.name} (${names.join(', ')}) select ${values.join(', ')} from json_to_recordset($::json) as t(${types.join(', ')}) ${table.onConflict ?? ''}`
  const shape = { head: `${table.name}\n`, columns, insert }
  shapes.set(table, shape)
  return shape
}

const plain = /^[\w .:@/-]*$/

/** As JSON. Most texts stand for themselves, which is seen in a third of the time that quoting takes. */
function quoted(text: string): string {
  // PostgreSQL refuses half of a surrogate pair.
  return plain.test(text) ? `"${text}"` : JSON.stringify(text.toWellFormed())
}
