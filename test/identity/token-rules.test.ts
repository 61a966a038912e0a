import test from 'ava'
import { Fault } from '../../src/fault.ts'
import type { Description } from '../../src/identity/description.ts'
import {
  demandFitting,
  demandSameDevice,
  demandUsable,
  type Redemption,
  type Token,
  tokenState,
} from '../../src/identity/token-rules.ts'
import { storedToken } from '../support/stored-token.ts'

const now = Date.parse('2026-03-02T10:00:00Z')
const minute = 60_000
const hour = 60 * minute

const fresh = storedToken({ expiresAt: new Date(now + 10 * minute) })
const anyDevice: Description = { id: '', type: 'iot', os: '', osVersion: '', labels: {} }

/** The reason of the refusal; undefined where there is none. */
function reasonOf(demand: () => void): string | undefined {
  try {
    demand()
    return undefined
  } catch (error) {
    if (error instanceof Fault) return error.reason
    throw error
  }
}

test('revoked counts more than used up, used up more than expired; a reusable token is never used up', t => {
  t.is(tokenState(fresh, now), 'active')
  t.is(tokenState(fresh, now + 10 * minute), 'expired')
  t.is(tokenState({ ...fresh, uses: 1 }, now + hour), 'used-up')
  t.is(tokenState({ ...fresh, uses: 1, revokedAt: new Date(now) }, now + hour), 'revoked')
  t.is(tokenState({ ...fresh, usesMax: null, uses: 1_000_000 }, now), 'active')
})

test('who has not redeemed a token is refused by what became of it', t => {
  const refusal = (token: Partial<Token>, at = now) =>
    reasonOf(() => demandUsable({ ...fresh, ...token }, undefined, at))
  t.is(refusal({}), undefined)
  t.is(refusal({}, now + 10 * minute - 1), undefined)
  t.is(refusal({}, now + 10 * minute), 'TOKEN_EXPIRED')
  t.is(refusal({ uses: 1 }), 'TOKEN_OTHER_KEY')
  t.is(refusal({ uses: 1 }, now + hour), 'TOKEN_OTHER_KEY')
  t.is(refusal({ usesMax: 3, uses: 2 }), undefined)
  t.is(refusal({ usesMax: 3, uses: 3 }), 'TOKEN_USED_UP')
  t.is(refusal({ usesMax: 3, uses: 3, revokedAt: new Date(now) }), 'TOKEN_REVOKED')
})

test('a call may be repeated until the token expires or for an hour, whichever is later, and not once it is revoked', t => {
  const used = { ...fresh, uses: 1 }
  const repeated = (token: Token, completedAt: number, at: number) => {
    const redemption = { deviceId: 'a', redeemedAt: new Date(now), completedAt: new Date(completedAt) }
    return reasonOf(() => demandUsable(token, redemption, at))
  }
  t.is(repeated(used, now, now + hour - 1), undefined, 'longer than the token lasts')
  t.is(repeated(used, now, now + hour), 'TOKEN_EXPIRED')
  const long = { ...used, expiresAt: new Date(now + 5 * hour) }
  t.is(repeated(long, now, now + 5 * hour - 1), undefined)
  t.is(repeated(long, now, now + 5 * hour), 'TOKEN_EXPIRED')
  t.is(repeated(long, now + 4.5 * hour, now + 5.5 * hour - 1), undefined, 'the hour counts from the completion')
  t.is(repeated({ ...used, revokedAt: new Date(now) }, now, now), 'TOKEN_REVOKED')
})

test('what waits for approval outlives the token, but not its revocation', t => {
  const waiting: Redemption = { deviceId: 'a', redeemedAt: new Date(now), completedAt: undefined }
  const used = { ...fresh, uses: 1, requiresApproval: true }
  t.is(
    reasonOf(() => demandUsable(used, waiting, now + 1_000 * hour)),
    undefined,
  )
  t.is(
    reasonOf(() => demandUsable({ ...used, revokedAt: new Date(now) }, waiting, now)),
    'TOKEN_REVOKED',
  )
})

test('a token bound to networks lets in who calls from one of them, in IPv4 and in IPv6', t => {
  const from = (address: string, ...sourceNetworks: string[]) =>
    reasonOf(() => demandFitting({ ...fresh, sourceNetworks }, anyDevice, address))
  t.is(from('192.0.2.1'), undefined, 'bound to none: from anywhere')
  for (const [address, network] of [
    ['10.1.2.3', '10.0.0.0/8'],
    ['10.1.2.3', '10.1.2.3/8'],
    ['10.1.2.3', '10.1.2.3'],
    ['10.1.2.3', '10.1.2.3/32'],
    ['10.1.2.3', '0.0.0.0/0'],
    ['2001:db8::7', '2001:db8::/32'],
    ['2001:DB8:0:0::7', '2001:db8::7'],
    ['fe80::1%eth0', 'fe80::/10'],
    ['2001:db8::7', '::/0'],
  ] as const) {
    t.is(from(address, network), undefined, `${address} ${network}`)
    t.is(from(address, '192.0.2.0/24', network), undefined, `${address} the second, ${network}`)
  }
  for (const [address, network] of [
    ['11.1.2.3', '10.0.0.0/8'],
    ['10.1.2.4', '10.1.2.3'],
    ['10.1.2.3', '::/0'],
    ['2001:db8::7', '0.0.0.0/0'],
    ['2001:db9::7', '2001:db8::/32'],
    ['', '0.0.0.0/0'],
  ] as const) {
    t.is(from(address, network), 'TOKEN_FOR_OTHER_NETWORK', `${address} ${network}`)
  }
})

test('a token bound to a type, an id or a pattern is for no other device', t => {
  const fits = (token: Partial<Token>, device: Partial<Description>) =>
    reasonOf(() => demandFitting({ ...fresh, ...token }, { ...anyDevice, ...device }, '192.0.2.1'))
  t.is(fits({ deviceType: 'iot' }, {}), undefined)
  t.is(fits({ deviceType: 'laptop' }, {}), 'TOKEN_FOR_OTHER_TYPE')
  t.is(fits({ deviceType: 'laptop' }, { type: 'unspecified' }), 'TOKEN_FOR_OTHER_TYPE')
  t.is(fits({ deviceId: 'press-7' }, { id: 'press-7' }), undefined)
  t.is(fits({ deviceId: 'press-7' }, {}), undefined, 'the server gives it the id of the token')
  t.is(fits({ deviceId: 'press-7' }, { id: 'press-8' }), 'TOKEN_FOR_OTHER_DEVICE')
  t.is(fits({ deviceIdPattern: 'press-*' }, { id: 'press-8' }), undefined)
  t.is(fits({ deviceIdPattern: 'press-*' }, { id: 'gate-8' }), 'TOKEN_FOR_OTHER_DEVICE')

  const unnamed = t.throws(() => demandFitting({ ...fresh, deviceIdPattern: 'press-*' }, anyDevice, '192.0.2.1'), {
    instanceOf: Fault,
  })
  t.deepEqual(
    [unnamed?.code, unnamed?.violations.map(({ field }) => field)],
    ['INVALID_ARGUMENT', ['device.id']],
    'the server can not choose one that matches',
  )
})

test('a key that has redeemed a token for one device does not become another with it', t => {
  const redemption = { deviceId: 'press-7', redeemedAt: new Date(now), completedAt: new Date(now) }
  const asked = (id: string) => reasonOf(() => demandSameDevice(redemption, { ...anyDevice, id }))
  t.is(asked(''), undefined)
  t.is(asked('press-7'), undefined)
  t.is(asked('press-8'), 'TOKEN_FOR_OTHER_DEVICE')
})
