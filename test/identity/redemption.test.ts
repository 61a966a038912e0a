import test from 'ava'
import type pg from 'pg'
import { Fault } from '../../src/fault.ts'
import type { CheckedCsr } from '../../src/identity/csr.ts'
import { createRedemptions } from '../../src/identity/redemption.ts'
import { newCall } from '../admin/operator.ts'

/** Redemptions over a database that does not answer until the test says that it is away. */
function scene() {
  const time = { now: 0 }
  const connecting: ((error: Error) => void)[] = []
  const pool = {
    connect: () => new Promise((_, reject) => connecting.push(reject)),
  } as unknown as pg.Pool
  const redemptions = createRedemptions({
    pool,
    issuance: {
      prepare: () => {
        throw new Error('nothing is reserved here')
      },
    },
    trustDomain: 'test',
    certValidityMs: 1,
    clock: () => time.now,
  })
  const redeem = (tokenId: string): Promise<string> =>
    redemptions
      .redeem({
        tokenId,
        key: { publicKeySha256: '' } as CheckedCsr,
        description: { id: '', type: 'iot', os: '', osVersion: '', labels: {} },
        call: newCall(),
      })
      .then(
        () => 'redeemed',
        error => (error instanceof Fault ? error.reason : error.message),
      )
  /** Answers who connects now, and those who come next for as long as there are any. */
  const away = async () => {
    while (connecting.length > 0) {
      for (const reject of connecting.splice(0)) reject(new Error('away'))
      await new Promise(resolve => setImmediate(resolve))
    }
  }
  return { time, connecting, redeem, away }
}

test('calls with one token take turns, calls with different tokens do not wait for each other', async t => {
  const { connecting, redeem, away } = scene()
  const calls = [redeem('a'), redeem('a'), redeem('b'), redeem('a')]
  await new Promise(resolve => setImmediate(resolve))
  t.is(connecting.length, 2)
  await away()
  t.deepEqual(await Promise.all(calls), Array(4).fill('away'), 'one that fails does not hold up the next')
})

test('whoever has waited too long for a turn is told to come back, and takes no connection', async t => {
  const { time, connecting, redeem, away } = scene()
  const [first, second] = [redeem('a'), redeem('a')]
  await new Promise(resolve => setImmediate(resolve))
  time.now += 5_001
  const third = redeem('a')
  connecting.splice(0)[0]?.(new Error('away'))
  t.deepEqual([await first, await second], ['away', 'ENROLLMENTS_BEHIND'])
  await away()
  t.is(await third, 'away')
})

test('no more than two thousand wait for a turn', async t => {
  const { redeem, away } = scene()
  const waiting = Array.from({ length: 2_000 }, () => redeem('a'))
  t.is(await redeem('a'), 'ENROLLMENTS_BEHIND')
  await away()
  t.deepEqual(new Set(await Promise.all(waiting)), new Set(['away']))
})
