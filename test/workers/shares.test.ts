/** How what a machine has is divided among workers. */
import test from 'ava'
import fc from 'fast-check'
import { readSettings } from '../../src/settings.ts'
import { isTooLittle, type Machine, nodeOptions, settingsOf, shareOf, workersFor } from '../../src/workers/shares.ts'
import { secrets } from '../support/edgemesh.ts'

const GiB = 2 ** 30
const large: Machine = { parallelism: 8, memoryBytes: 32 * GiB, heapBytes: 4 * GiB, heapGiven: false }

test('there is a worker for each core, and fewer where the memory is for fewer', t => {
  t.is(workersFor(large), 8)
  t.is(workersFor({ ...large, parallelism: 1 }), 1)
  t.is(workersFor({ ...large, memoryBytes: 2 * GiB }), 4)
  t.is(workersFor({ ...large, memoryBytes: GiB / 4 }), 1)
  t.is(workersFor({ ...large, heapBytes: GiB / 4, heapGiven: true }), 2)
  t.is(workersFor({ ...large, parallelism: 500, memoryBytes: 9_000 * GiB }), 64)
})

test('however the memory is limited, all workers together stay within it; each can live, or it is said that it can not', t => {
  const machines = fc.record({
    parallelism: fc.integer({ min: 1, max: 128 }),
    memoryBytes: fc.integer({ min: GiB / 4, max: 256 * GiB }),
    heapBytes: fc.integer({ min: GiB / 8, max: 8 * GiB }),
    heapGiven: fc.boolean(),
  })
  fc.assert(
    fc.property(
      machines,
      fc.integer({ min: 2, max: 64 }),
      fc.integer({ min: 1, max: 2_000 }),
      (machine, count, pool) => {
        const auto = workersFor(machine)
        if (auto > 1 && isTooLittle(machine, auto)) throw new Error(`${auto} have too little`)
        const { heapMiB, databaseConnections, connectionsMost } = shareOf(machine, pool, count)
        if (databaseConnections < 2 || (databaseConnections > 2 && databaseConnections * count > pool)) {
          throw new Error(`${databaseConnections} connections for ${count} of ${pool}`)
        }
        if (isTooLittle(machine, count)) return
        if (heapMiB * 2 ** 20 * count > machine.memoryBytes) throw new Error(`${heapMiB} MiB each`)
        if (machine.heapGiven && heapMiB * 2 ** 20 * count > machine.heapBytes)
          throw new Error(`${heapMiB} MiB of heap each`)
        if (connectionsMost * 100_000 * count > machine.memoryBytes)
          throw new Error(`${connectionsMost} connections each`)
      },
    ),
  )
  t.pass()
})

test('what was said of the memory of one process is not said of each worker', t => {
  const share = shareOf(large, 30, 4)
  const { env, execArgv } = nodeOptions(
    { PATH: '/bin', NODE_OPTIONS: '--max-old-space-size=900 --enable-source-maps --max_old_space_size_percentage=50' },
    share,
  )
  t.deepEqual(env, { PATH: '/bin', NODE_OPTIONS: '--enable-source-maps' })
  t.is(execArgv.at(-1), `--max-old-space-size=${share.heapMiB}`)
})

test('a worker has a name that no other has had, within 63 characters, and its part of the connections', t => {
  const environment = { ...secrets, DATABASE_URL: 'postgresql://a:b@localhost/c' }
  const settings = readSettings({ ...environment, INSTANCE_ID: 'i'.repeat(63) })
  const share = shareOf(large, settings.database.poolMax, 4)
  const names = Array.from({ length: 200 }, (_, at) => settingsOf(settings, (at % 64) + 1, share))
  t.is(new Set(names.map(({ instanceId }) => instanceId)).size, 200)
  for (const { instanceId, database } of names) {
    t.regex(instanceId, /^i+-\d\d?-[0-9a-f]{8}$/)
    t.is(readSettings({ ...environment, INSTANCE_ID: instanceId }).instanceId, instanceId)
    t.is(database.poolMax, 7)
  }
  const short = settingsOf({ ...settings, instanceId: 'edge-1' }, 2, share)
  t.regex(short.instanceId, /^edge-1-2-[0-9a-f]{8}$/)
})
