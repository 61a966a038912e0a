/**
 * The PROXY protocol, versions 1 and 2 (HAProxy's proxy-protocol.txt): how a load balancer that forwards connections
 * unopened says, before their first byte, who its client is.
 *
 * Whoever may send such a header may claim any address. So only connections of TRUSTED_PROXIES are read here, and all
 * of them: the specification forbids to guess whether there is a header.
 */
import { isIPv4, isIPv6, type Socket, SocketAddress } from 'node:net'
import { plainAddress } from '../network.ts'

export type ProxyHeader = {
  /** The client's IP address; undefined where the proxy speaks for itself or can't tell: the connection's own holds. */
  clientAddress: string | undefined
  /** What follows it is the client's. */
  lengthBytes: number
}

/** `malformed`: what came is no header. `late`: it did not come in time. */
export type ProxyHeaderFailure = 'malformed' | 'late'

export class ProxyHeaderError extends Error {
  readonly failure: ProxyHeaderFailure

  constructor(failure: ProxyHeaderFailure, message: string) {
    super(message)
    this.name = 'ProxyHeaderError'
    this.failure = failure
  }
}

/** Of a whole line of version 1, as the specification sums it up. */
const lineBytesMax = 107
/**
 * Of a whole header of version 2. The specification has 536 in mind, but proxies add what they know (names, certificates),
 * and other receivers take as much.
 */
const headerBytesMax = 4_096
/** A proxy sends it at once. The specification asks for three seconds at least, for one lost packet. */
const headerMsMax = 5_000

const lineStart = Buffer.from('PROXY ', 'latin1')
const signature = Buffer.from('\r\n\r\n\0\r\nQUIT\n', 'latin1')
/** The signature, a byte for version and command, one for family and protocol, two for the length of the rest. */
const fixedBytes = signature.length + 4

/**
 * @param bytes everything that has come so far
 * @returns the header that they begin with, or undefined as long as it is not whole
 * @throws ProxyHeaderError as soon as they can't become one
 */
export function parseProxyHeader(bytes: Buffer): ProxyHeader | undefined {
  if (startsAlike(bytes, lineStart)) return parseLine(bytes)
  if (startsAlike(bytes, signature)) return parseBinary(bytes)
  throw malformed('a connection of a trusted proxy does not begin with a PROXY protocol header')
}

/** Version 1: a line of text. */
function parseLine(bytes: Buffer): ProxyHeader | undefined {
  const end = bytes.subarray(0, lineBytesMax).indexOf('\r\n')
  if (end === -1) {
    if (bytes.length >= lineBytesMax) throw malformed(`the line does not end within ${lineBytesMax} bytes`)
    return undefined
  }
  const lengthBytes = end + 2
  const [, family, ...rest] = bytes.toString('latin1', 0, end).split(' ')
  if (family === 'UNKNOWN') return { clientAddress: undefined, lengthBytes }
  const [source = '', destination = '', ...ports] = rest
  const areAddresses = lineFamilies.get(family ?? '')?.(source, destination)
  if (!areAddresses || ports.length !== 2 || !ports.every(isPort))
    throw malformed('the line is not as version 1 has it')
  return { clientAddress: canonical(source), lengthBytes }
}

const lineFamilies = new Map([
  ['TCP4', (...addresses: string[]) => addresses.every(isIPv4)],
  // Without a zone, which means nothing on another host.
  ['TCP6', (...addresses: string[]) => addresses.every(address => isIPv6(address) && !address.includes('%'))],
])

function isPort(text: string): boolean {
  return /^(0|[1-9]\d{0,4})$/.test(text) && Number(text) <= 65_535
}

/** By family: where the source address ends, and what the addresses and ports take of the header. */
const families: Record<number, { addressBytes: number; blockBytes: number }> = {
  0: { addressBytes: 0, blockBytes: 0 }, // unspecified
  1: { addressBytes: 4, blockBytes: 12 }, // IPv4
  2: { addressBytes: 16, blockBytes: 36 }, // IPv6
  3: { addressBytes: 0, blockBytes: 216 }, // UNIX: a path on the proxy's host, which tells us nothing
}
/** Unspecified, stream, datagram. */
const protocolMax = 2

/** Version 2: what is of fixed length, the addresses, then values of types that we skip. */
function parseBinary(bytes: Buffer): ProxyHeader | undefined {
  if (bytes.length < fixedBytes) return undefined
  const versionAndCommand = bytes.readUInt8(signature.length)
  const familyAndProtocol = bytes.readUInt8(signature.length + 1)
  const lengthBytes = fixedBytes + bytes.readUInt16BE(signature.length + 2)
  if (lengthBytes > headerBytesMax) throw malformed(`the header is longer than ${headerBytesMax} bytes`)

  const isLocal = versionAndCommand === 0x20
  if (!isLocal && versionAndCommand !== 0x21) throw malformed('neither LOCAL nor PROXY of version 2')
  // What a proxy says of a connection of its own, such as a probe, is to be skipped unseen.
  const family = isLocal ? families[0] : families[familyAndProtocol >> 4]
  if (!family || (!isLocal && (familyAndProtocol & 0xf) > protocolMax)) throw malformed('no such family or protocol')
  if (lengthBytes < fixedBytes + family.blockBytes) throw malformed('the header is too short for its addresses')
  if (bytes.length < lengthBytes) return undefined
  return {
    clientAddress: addressOf(bytes.subarray(fixedBytes, fixedBytes + family.addressBytes)),
    lengthBytes,
  }
}

function addressOf(bytes: Buffer): string | undefined {
  if (bytes.length === 4) return bytes.join('.')
  if (bytes.length === 16) return canonical((bytes.toString('hex').match(/.{4}/g) as string[]).join(':'))
  return undefined
}

/** One spelling for each address, so that who is counted or looked for by it is found. */
function canonical(address: string): string {
  return isIPv4(address) ? address : plainAddress(new SocketAddress({ address, family: 'ipv6' }).address)
}

function startsAlike(bytes: Buffer, start: Buffer): boolean {
  const length = Math.min(bytes.length, start.length)
  return bytes.compare(start, 0, length, 0, length) === 0
}

function malformed(message: string): ProxyHeaderError {
  return new ProxyHeaderError('malformed', message)
}

/**
 * Takes the header off the beginning of a connection, and leaves what follows for who reads it next.
 *
 * @returns undefined if the connection was closed before anything came, as balancers do to see whether a port is open
 * @throws ProxyHeaderError
 */
export function takeProxyHeader(socket: Socket, msMax = headerMsMax): Promise<ProxyHeader | undefined> {
  return new Promise((resolve, reject) => {
    let bytes = Buffer.alloc(0)
    const late = () => {
      settle()
      reject(new ProxyHeaderError('late', `no whole header within ${msMax} ms`))
    }
    const closed = () => {
      settle()
      if (bytes.length === 0) resolve(undefined)
      else reject(malformed('the connection was closed within its header'))
    }
    const read = () => {
      const chunk: Buffer | null = socket.read()
      if (!chunk) return
      bytes = Buffer.concat([bytes, chunk])
      try {
        const header = parseProxyHeader(bytes)
        if (!header) return
        settle()
        if (bytes.length > header.lengthBytes) socket.unshift(bytes.subarray(header.lengthBytes))
        resolve(header)
      } catch (error) {
        settle()
        reject(error)
      }
    }
    const timer = setTimeout(late, msMax)
    const settle = () => {
      clearTimeout(timer)
      socket.off('readable', read).off('end', closed).off('error', closed).off('close', closed)
    }
    socket.on('readable', read).on('end', closed).on('error', closed).on('close', closed)
  })
}
