import { setImmediate } from 'node:timers/promises'
import test from 'ava'
import type pg from 'pg'
import type { Identified } from '../../src/caller.ts'
import type { ChangeFeed } from '../../src/db/change-feed.ts'
import { Fault } from '../../src/fault.ts'
import { createStanding } from '../../src/identity/standing.ts'

const caller: Identified = {
  kind: 'device',
  id: 'alpha',
  spiffeId: 'spiffe://test/device/alpha',
  issuerKeyId: 'retired',
  serial: 'a1',
  notBefore: 0,
  notAfter: Number.POSITIVE_INFINITY,
  role: '',
  publicKeySha256: '',
}

// A promise that nobody awaits would end the process when it fails; the test runner fails for it.
test('who shows a certificate of a retired authority is told so, and an outage of the database at that moment harms nobody', async t => {
  let queries = 0
  const standing = createStanding({
    pool: {
      async query() {
        queries++
        throw new Error('Connection terminated unexpectedly')
      },
    } as unknown as pg.Pool,
    feed: { isLive: () => true, onChange() {}, onReset() {} } as unknown as ChangeFeed,
    isTrusted: () => false,
  })
  const refused = await t.throwsAsync(async () => standing.demand(caller), { instanceOf: Fault })
  t.is((refused as Fault).reason, 'CERTIFICATE_RETIRED')
  await setImmediate()
  t.is(queries, 0)
})
