import { SocketAddress } from 'node:net'
import test from 'ava'
import fc from 'fast-check'
import { networkList, networkOf, plainAddress } from '../src/network.ts'

test('an IPv4 address that arrives mapped into IPv6 is written as what it is', t => {
  t.is(plainAddress('::ffff:203.0.113.7'), '203.0.113.7')
  t.is(plainAddress('2001:db8::7'), '2001:db8::7')
})

for (const [address, network] of [
  ['203.0.113.7', '203.0.113.7'],
  ['2001:db8:1:2:3:4:5:6', '2001:db8:1:2::/64'],
  ['2001:db8:1:2::6', '2001:db8:1:2::/64'],
  ['2001:db8::6', '2001:db8:0:0::/64'],
  ['::1', '0:0:0:0::/64'],
  ['::', '0:0:0:0::/64'],
  ['2001:db8:1:2:3:4:5::', '2001:db8:1:2::/64'],
  ['64:ff9b::203.0.113.7', '64:ff9b:0:0::/64'],
  ['fe80::1%eth0', 'fe80:0:0:0::/64'],
  ['', ''],
]) {
  test(`${address || 'no address'} counts as ${network || 'nothing'}`, t => {
    t.is(networkOf(address as string), network as string)
  })
}

test('IPv6 addresses count as one when their first 64 bits are equal, and only then', t => {
  const half = fc.array(fc.oneof(fc.constant(0), fc.nat({ max: 0xffff })), { minLength: 4, maxLength: 4 })
  const written = (groups: number[]) => {
    const address = groups.map(group => group.toString(16)).join(':')
    return new SocketAddress({ address, family: 'ipv6' }).address
  }
  fc.assert(
    fc.property(half, half, half, half, (network, host, otherNetwork, otherHost) => {
      const of = (...halves: number[][]) => networkOf(written(halves.flat()))
      t.is(of(network, host), of(network, otherHost))
      t.is(of(network, host) === of(otherNetwork, host), `${network}` === `${otherNetwork}`)
    }),
  )
})

test('a list holds the addresses of its networks, in both families', t => {
  const listed = networkList(['10.0.0.0/8', '192.0.2.1', 'fd00::/8', '2001:db8::7'])
  for (const address of ['10.1.2.3', '192.0.2.1', 'fd12::1', '2001:db8::7']) t.true(listed(address), address)
  for (const address of ['11.0.0.1', '192.0.2.2', '2001:db8::8', '::1', '']) t.false(listed(address), address)
  t.true(networkList(['0.0.0.0/0'])('203.0.113.7'))
  t.false(networkList([])('127.0.0.1'))
  t.true(networkList(['::/0'])('fe80::1%eth0'))
  t.false(networkList(['::/0'])('203.0.113.7'), 'all of IPv6 is none of IPv4')
})
