import test from 'ava'
import fc from 'fast-check'
import { keepFacts, loadedTogether } from '../../src/db/kept-facts.ts'

/** A feed that the test speaks for, and a table whose reads it can hold up. */
function scene(concerns?: (changed: string, value: string) => boolean) {
  const changes: ((keys: string[]) => void)[] = []
  const resets: (() => void)[] = []
  const table = new Map<string, string>()
  const reads: { id: string; finish: () => void }[] = []
  const facts = keepFacts<string>({
    feed: { onChange: listener => void changes.push(listener), onReset: listener => void resets.push(listener) },
    kind: 'device',
    max: 100,
    load: id => {
      // What a query sees is fixed when it starts, whenever its answer arrives.
      const seen = table.get(id) ?? 'none'
      return new Promise(resolve => reads.push({ id, finish: () => resolve(seen) }))
    },
    concerns,
  })
  return {
    facts,
    table,
    reads,
    announce: (...keys: string[]) => {
      for (const listener of changes) listener(keys)
    },
    reset: () => {
      for (const listener of resets) listener()
    },
    finishAll: () => {
      for (const read of reads.splice(0)) read.finish()
    },
  }
}

test('racing misses share one query, and later asks need none', async t => {
  const { facts, reads, finishAll } = scene()
  const asked = [facts.get('a'), facts.get('a'), facts.get('a')] as const
  t.is(reads.length, 1)
  finishAll()
  const [first, ...others] = await Promise.all(asked)
  for (const other of others) t.is(other, first)
  t.is(await facts.get('a'), first)
  t.is(reads.length, 0)
})

test('a change that arrives while a query is under way is not covered up by its answer', async t => {
  const { facts, table, announce, finishAll } = scene()
  table.set('a', 'old')
  const before = facts.get('a')
  table.set('a', 'new')
  announce('device:a')
  const after = facts.get('a')
  finishAll()
  t.is((await before).value, 'old', 'who asked before the change may get what there was')
  t.is((await after).value, 'new')
  t.is((await facts.get('a')).value, 'new')
  t.false(facts.isCurrent('a', await before))
})

test('changes of other kinds and other ids drop nothing', async t => {
  const { facts, announce, finishAll } = scene()
  const asked = facts.get('a')
  finishAll()
  const fact = await asked
  announce('user:a', 'device:b', 'devices:a', 'device', '')
  t.true(facts.isCurrent('a', fact))
  announce('device:a')
  t.false(facts.isCurrent('a', fact))
})

test('facts kept under other names are dropped with what they are about', async t => {
  const { facts, table, announce, finishAll } = scene((changed, value) => value === changed)
  table.set('ada@example.com', 'ada')
  const asked = facts.get('ada@example.com')
  finishAll()
  const fact = await asked
  announce('device:bob')
  t.true(facts.isCurrent('ada@example.com', fact))
  announce('device:ada')
  t.false(facts.isCurrent('ada@example.com', fact))
})

test('whatever happens in whatever order, an ask never gets what was announced as changed before it', async t => {
  const step = fc.oneof(
    fc.record({ do: fc.constant('ask' as const), id: fc.constantFrom('a', 'b') }),
    fc.record({ do: fc.constant('change' as const), id: fc.constantFrom('a', 'b') }),
    fc.record({ do: fc.constant('finish' as const), id: fc.constant('') }),
    fc.record({ do: fc.constant('reset' as const), id: fc.constant('') }),
  )
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 40 }), async steps => {
      const { facts, table, announce, reset, finishAll } = scene()
      const asks: { wanted: number; got: Promise<{ value: string }> }[] = []
      let value = 0
      for (const { do: what, id } of steps) {
        if (what === 'ask') {
          asks.push({ wanted: Number(table.get(id) ?? 0), got: Promise.resolve(facts.get(id)) })
        } else if (what === 'change') {
          table.set(id, String(++value))
          announce(`device:${id}`)
        } else if (what === 'reset') reset()
        else {
          finishAll()
          await Promise.resolve()
        }
      }
      finishAll()
      for (const { wanted, got } of asks) {
        const { value } = await got
        const seen = value === 'none' ? 0 : Number(value)
        if (seen < wanted) throw new Error(`asked after change ${wanted}, got ${seen}`)
      }
    }),
  )
  t.pass()
})

test('what many miss at once is asked for once, and everyone gets its own; a failure is of all, and the next is asked for anew', async t => {
  const queries: string[][] = []
  const stored = new Map([
    ['a', 'A'],
    ['b', 'B'],
  ])
  let isAway = false
  const load = loadedTogether(async ids => {
    queries.push(ids)
    if (isAway) throw new Error('away')
    return new Map([...stored].filter(([id]) => ids.includes(id)))
  })
  t.deepEqual(await Promise.all(['a', 'b', 'c', 'a'].map(load)), ['A', 'B', undefined, 'A'])
  t.deepEqual(queries, [['a', 'b', 'c']])
  isAway = true
  const failed = await Promise.allSettled(['a', 'b'].map(load))
  t.deepEqual(
    failed.map(({ status }) => status),
    ['rejected', 'rejected'],
  )
  isAway = false
  stored.set('a', 'A2')
  t.is(await load('a'), 'A2')
  t.is(queries.length, 3)
})
