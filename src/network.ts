/** IP addresses and networks: how they are written, which network an address belongs to, which are listed. */
import { BlockList, isIP, isIPv4, isIPv6 } from 'node:net'

/** IPv4 addresses arrive mapped into IPv6 on a dual-stack socket. */
export function plainAddress(address: string): string {
  return address.startsWith('::ffff:') ? address.slice('::ffff:'.length) : address
}

/** Of this host itself. */
export function isLoopback(address: string): boolean {
  return /^(::ffff:)?127\.|^::1$/.test(address)
}

/**
 * What limits by address count as one: an IPv4 address, or the /64 of an IPv6 address, because a whole /64 is what one
 * host is given at least (RFC 6177), and it may call from another of its addresses each time.
 */
export function networkOf(address: string): string {
  if (!isIPv6(address)) return address
  const [before = '', after] = (address.split('%')[0] as string).split('::')
  const left = groupsOf(before)
  const right = groupsOf(after ?? '')
  const groups = after === undefined ? left : [...left, ...Array(8 - left.length - right.length).fill(0), ...right]
  const network = groups.slice(0, 4).map(group => group.toString(16))
  return `${network.join(':')}::/64`
}

/** The 16-bit groups of a part of an IPv6 address. Where it ends in the form of IPv4, these bytes are two groups. */
function groupsOf(part: string): number[] {
  return part.split(':').flatMap(group => {
    if (group === '') return []
    const [a, b, c, d] = group.split('.').map(Number) as [number, number, number, number]
    return group.includes('.') ? [a * 256 + b, c * 256 + d] : [Number.parseInt(group, 16)]
  })
}

/** CIDR notation (RFC 4632 section 3.1), or a single address. */
export function isNetwork(text: string): boolean {
  const [, address = '', length] = /^([0-9a-f.:]+)(?:\/(\d{1,3}))?$/i.exec(text) ?? []
  const family = isIP(address)
  return family !== 0 && Number(length ?? 0) <= (family === 4 ? 32 : 128)
}

/**
 * @param networks as `isNetwork` lets them through
 * @returns whether an address is in one of them; what is no address is in none
 */
export function networkList(networks: readonly string[]): (address: string) => boolean {
  // One list a family: a BlockList takes every IPv4 address for an IPv6 one, too, so ::/0 would let them all in.
  const lists = { 4: new BlockList(), 6: new BlockList() }
  for (const network of networks) {
    const [address = '', length] = network.split('/')
    if (isIPv6(address)) lists[6].addSubnet(address, Number(length ?? 128), 'ipv6')
    else lists[4].addSubnet(address, Number(length ?? 32), 'ipv4')
  }
  return address => {
    // A link-local IPv6 address comes with the name of an interface, which is nobody's address.
    const [plain = ''] = address.split('%')
    if (isIPv4(plain)) return lists[4].check(plain, 'ipv4')
    return isIPv6(plain) && lists[6].check(plain, 'ipv6')
  }
}
