/** IP addresses: how they are written, which network they belong to, and which are listed. */
import { BlockList, isIPv6 } from 'node:net'

/** IPv4 addresses arrive mapped into IPv6 on a dual-stack socket. */
export function plainAddress(address: string): string {
  return address.startsWith('::ffff:') ? address.slice('::ffff:'.length) : address
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

/**
 * @param networks in CIDR notation, or single addresses, as the settings have checked them
 * @returns whether an address is in one of them
 */
export function addressList(networks: readonly string[]): (address: string) => boolean {
  const list = new BlockList()
  for (const network of networks) {
    const [address = '', prefix] = network.split('/')
    if (isIPv6(address)) list.addSubnet(address, Number(prefix ?? 128), 'ipv6')
    else list.addSubnet(address, Number(prefix ?? 32), 'ipv4')
  }
  return address => list.check(address, isIPv6(address) ? 'ipv6' : 'ipv4')
}
