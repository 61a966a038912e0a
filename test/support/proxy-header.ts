/** PROXY protocol headers as proxies make them, put together from the specification and not with our parser. */

export type BinaryHeader = {
  /** 0: LOCAL, 1: PROXY. */
  command?: number
  version?: number
  /** The byte of family and protocol, such as 0x11 for TCP over IPv4. */
  family: number
  /** Source and destination addresses, then source and destination ports. */
  addresses?: Buffer
  /** What follows the addresses: types, lengths and values. */
  values?: Buffer
}

export function binaryHeader(header: BinaryHeader): Buffer {
  const { command = 1, version = 2, family, addresses = Buffer.alloc(0), values = Buffer.alloc(0) } = header
  const signature = Buffer.from('0d0a0d0a000d0a515549540a', 'hex')
  const length = Buffer.alloc(2)
  length.writeUInt16BE(addresses.length + values.length)
  return Buffer.concat([signature, Buffer.from([(version << 4) | command, family]), length, addresses, values])
}

/** Of TCP over IPv4, from `source`, such as 203.0.113.7. */
export function binaryHeaderOf(source: string, values?: Buffer): Buffer {
  const addresses = Buffer.from([...source.split('.').map(Number), 10, 0, 0, 1, 0x1f, 0x90, 0x01, 0xbb])
  return binaryHeader({ family: 0x11, addresses, ...(values && { values }) })
}

export function line(text: string): Buffer {
  return Buffer.from(`${text}\r\n`, 'latin1')
}

/** One value of version 2, such as type 5, the name that the proxy gives to the connection. */
export function value(type: number, bytes: Buffer): Buffer {
  return Buffer.concat([Buffer.from([type, bytes.length >> 8, bytes.length & 0xff]), bytes])
}
