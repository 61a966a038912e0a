/** The statements that a piece of the service really sends, and what they cost the database: nothing here is a copy of them. */
import pg from 'pg'
import type { Database } from '../../src/db/orm.ts'

export type Statement = { text: string; values: unknown[] }

/** What the database says of a statement, by EXPLAIN (ANALYZE, BUFFERS). */
export type Cost = {
  ms: number
  /** Pages that were looked at, in memory or not. */
  buffers: number
  /** Such as `Index Scan devices_pkey`, in the order of the plan. */
  plan: string[]
  /** Tables that were read from end to end, of those that grow with the fleet. */
  wholeTables: string[]
}

const growing =
  /^(devices|device_postures|device_presence|certificates|connections|token_redemptions|enrollment_tokens|users|audit_events|decisions|health_reports)/
/** A scan that ends with its first rows has read no table whole. */
const wholeFromPages = 50
const runs = 5

let recording: Statement[] | undefined
const { query } = pg.Client.prototype
// Before any connection is opened: the service wraps this method of each.
pg.Client.prototype.query = function (this: pg.Client, ...args: unknown[]) {
  const [first, second] = args
  const text = typeof first === 'string' ? first : (first as { text?: string } | undefined)?.text
  const values = Array.isArray(second) ? second : ((first as { values?: unknown[] } | undefined)?.values ?? [])
  if (text !== undefined && /^\s*(select|insert|update|delete|with)\b/i.test(text)) recording?.push({ text, values })
  return (query as (...args: unknown[]) => unknown).apply(this, args)
} as typeof query

/** Every statement that `work` sends to the database, whoever sends it: the pool, MikroORM, a transaction. */
export async function statementsOf(work: () => Promise<unknown>): Promise<Statement[]> {
  const sent: Statement[] = []
  recording = sent
  try {
    await work()
    return sent
  } finally {
    recording = undefined
  }
}

type PlanNode = {
  'Node Type': string
  'Index Name'?: string
  'Relation Name'?: string
  Plans?: PlanNode[]
  'Actual Loops': number
  'Shared Hit Blocks': number
  'Shared Read Blocks': number
}
type Explained = { Plan: PlanNode; 'Execution Time': number }

/** Runs it a few times, each taken back; the middle one counts. */
export async function costOf({ pool }: Pick<Database, 'pool'>, { text, values }: Statement): Promise<Cost> {
  const client = await pool.connect()
  try {
    const costs: Cost[] = []
    for (let run = 0; run < runs; run++) {
      await client.query('begin')
      await client.query('set local statement_timeout = 120000')
      const { rows } = await client.query<{ 'QUERY PLAN': Explained[] }>({
        text: `explain (analyze, buffers, format json) ${text}`,
        values,
        ...{ query_timeout: 130_000 },
      })
      await client.query('rollback')
      const explained = rows[0]!['QUERY PLAN'][0]!
      // What was planned for the case that something is there, and was not needed, costs nothing.
      const nodes = flattened(explained.Plan).filter(node => node['Actual Loops'] > 0)
      costs.push({
        ms: explained['Execution Time'],
        buffers: pagesOf(explained.Plan),
        plan: nodes.filter(node => node['Relation Name'] ?? node['Index Name']).map(nameOf),
        wholeTables: nodes
          .filter(node => node['Node Type'] === 'Seq Scan' && growing.test(node['Relation Name'] ?? ''))
          .filter(node => pagesOf(node) > wholeFromPages)
          .map(node => node['Relation Name']!),
      })
    }
    return costs.toSorted((a, b) => a.ms - b.ms)[Math.floor(runs / 2)]!
  } finally {
    await client.query('rollback').catch(() => {})
    client.release()
  }
}

/** With those of statements inside of it that nothing reads from: they run when the rest is over, and count for themselves. */
function pagesOf(node: PlanNode): number {
  const own = node['Shared Hit Blocks'] + node['Shared Read Blocks']
  return own > 0 ? own : (node.Plans ?? []).reduce((sum, inner) => sum + pagesOf(inner), 0)
}

function flattened(node: PlanNode): PlanNode[] {
  return [node, ...(node.Plans ?? []).flatMap(flattened)]
}

function nameOf(node: PlanNode): string {
  return `${node['Node Type']} ${node['Index Name'] ?? node['Relation Name']}`
}
