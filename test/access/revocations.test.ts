import test from 'ava'
import { watchRevocations } from '../../src/access/revocations.ts'

function watched() {
  const world = { nowMs: 1_000 }
  const pushes: number[] = []
  const acknowledgements: number[] = []
  const revocations = watchRevocations({
    clock: () => world.nowMs,
    onPush: seconds => void pushes.push(seconds),
    onAcknowledge: seconds => void acknowledgements.push(seconds),
  })
  return { world, pushes, acknowledgements, revocations }
}

test('a revocation is measured to its push and to its first acknowledgement, on its own stream', t => {
  const { world, pushes, acknowledgements, revocations } = watched()
  const [stream, other] = [revocations.ofStream(), revocations.ofStream()]
  stream.add('a', 980)
  world.nowMs = 1_250
  other.acknowledge(['a'])
  stream.acknowledge(['a', 'a', 'b'])
  t.deepEqual([pushes, acknowledgements, revocations.unacknowledged()], [[0.02], [0.27], 0])
})

test('what seems to have been announced later counts as now, and what is of no known moment is not measured', t => {
  const { pushes, acknowledgements, revocations } = watched()
  const stream = revocations.ofStream()
  stream.add('ahead', 1_500)
  stream.add('unknown', undefined)
  t.is(revocations.unacknowledged(), 2)
  stream.acknowledge(['ahead', 'unknown'])
  t.deepEqual([pushes, acknowledgements, revocations.unacknowledged()], [[0], [0], 0])
})

test('of a client that never acknowledges the oldest are forgotten, and all with its stream', t => {
  const { acknowledgements, revocations } = watched()
  const stream = revocations.ofStream()
  for (let at = 0; at < 5_000; at++) stream.add(`c-${at}`, 1_000)
  t.is(revocations.unacknowledged(), 1_024)
  stream.acknowledge(['c-0', 'c-4999'])
  t.is(acknowledgements.length, 1)
  stream.end()
  stream.add('late', 1_000)
  t.is(revocations.unacknowledged(), 0)
})
