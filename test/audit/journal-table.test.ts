import test from 'ava'
import fc from 'fast-check'
import { createRowArray, encodeRow, type JournalTable } from '../../src/audit/journal-table.ts'
import { canonicalJson } from '../../src/audit/seals.ts'

const columns = [
  { name: 'note', type: 'text' },
  { name: 'at', type: 'timestamptz' },
  { name: 'id', type: 'uuid' },
  { name: 'count', type: 'int' },
  { name: 'open', type: 'boolean' },
  { name: 'detail', type: 'jsonb' },
  { name: 'parts', type: 'jsonb' },
]
const tables: JournalTable[] = [
  { name: 'events', columns },
  { name: 'others', columns },
]

/** Most rows say what the one before has said; some texts are so long that the buffer has to grow. */
const text = fc.oneof(
  fc.constantFrom('device/alpha', '', 'say "so"', 'ä', '\ud800', '漢'.repeat(40_000)),
  fc.string({ unit: 'binary', maxLength: 20 }),
)
const row = fc.record({
  note: fc.option(text),
  at: fc.date({ noInvalidDate: true, min: new Date(0), max: new Date('2100-01-01') }),
  id: fc.uuid(),
  count: fc.option(fc.integer()),
  open: fc.boolean(),
  detail: fc.jsonValue(),
  parts: fc.array(fc.jsonValue(), { maxLength: 3 }),
})
type Row = typeof row extends fc.Arbitrary<infer R> ? R : never

const given = ({ note, at, id, count, open, detail, parts }: Row) => [
  note,
  at,
  id,
  count,
  open,
  canonicalJson(detail),
  parts.map(canonicalJson),
]

function expected({ note, at, id, count, open, detail, parts }: Row): string {
  const content = { at: at.getTime() * 1_000, count, detail, id, note: note?.toWellFormed(), open, parts }
  return canonicalJson(Object.fromEntries(Object.entries(content).filter(([, value]) => (value ?? null) !== null)))
}

test('whatever a row says, its bytes are the name of its table and JSON with sorted keys, times in microseconds and nothing that is null', t => {
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.constantFrom(...tables), row), { maxLength: 12 }), rows => {
      for (const [table, row] of rows) {
        t.is(encodeRow(table, given(row)).toString(), `${table.name}\n${expected(row)}`)
      }
    }),
  )
})

test('rows of one table are one array of JSON, however large it gets', t => {
  const [table] = tables as [JournalTable, JournalTable]
  fc.assert(
    fc.property(fc.array(row, { maxLength: 12 }), rows => {
      const array = createRowArray(table)
      for (const row of rows) array.add(encodeRow(table, given(row)))
      t.is(array.count(), rows.length)
      t.is(array.close().toString(), `[${rows.map(expected).join(',')}]`)
    }),
  )
})

test('a row of which all is null is an object without columns', t => {
  const [table] = tables as [JournalTable, JournalTable]
  t.is(
    encodeRow(
      table,
      columns.map(() => null),
    ).toString(),
    'events\n{}',
  )
})
