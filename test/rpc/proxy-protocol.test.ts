/** Headers are made by `support/proxy-header.ts` after the specification; HAProxy itself judges in `system/`. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import test, { type ExecutionContext } from 'ava'
import fc from 'fast-check'
import { ProxyHeaderError, parseProxyHeader, takeProxyHeader } from '../../src/rpc/proxy-protocol.ts'
import { binaryHeader, binaryHeaderOf, line, value } from '../support/proxy-header.ts'

const ipv6 = Buffer.from('20010db8000000000000000000000007', 'hex')
const ports = Buffer.from([0x1f, 0x90, 0x01, 0xbb])
const from6 = (source: Buffer) => Buffer.concat([source, ipv6, ports])
const values = Buffer.concat([
  value(1, Buffer.from('h2')),
  value(5, Buffer.alloc(128, 7)),
  value(0xee, Buffer.alloc(9)),
])

const accepted: Record<string, [header: Buffer, clientAddress: string | undefined]> = {
  'a line for IPv4': [line('PROXY TCP4 203.0.113.7 10.0.0.1 56324 443'), '203.0.113.7'],
  'the longest line for IPv4': [line('PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535'), '255.255.255.255'],
  'a line for IPv6': [line('PROXY TCP6 2001:db8::7 ::1 0 443'), '2001:db8::7'],
  'a line whose IPv6 address is spelled in full': [
    line('PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0007 2001:db8::1 1 2'),
    '2001:db8::7',
  ],
  'a line of an IPv4 client on a dual-stack port': [line('PROXY TCP6 ::ffff:203.0.113.7 ::1 1 2'), '203.0.113.7'],
  'a line for who knows what': [line('PROXY UNKNOWN'), undefined],
  'the longest line there is': [
    line(`PROXY UNKNOWN ${'ffff:'.repeat(7)}ffff ${'ffff:'.repeat(7)}ffff 65535 65535`),
    undefined,
  ],
  'version 2 for TCP over IPv4': [binaryHeaderOf('203.0.113.7'), '203.0.113.7'],
  'version 2 for UDP over IPv4': [
    binaryHeader({ family: 0x12, addresses: Buffer.from('cb0071070a0000011f9001bb', 'hex') }),
    '203.0.113.7',
  ],
  'version 2 for TCP over IPv6': [binaryHeader({ family: 0x21, addresses: from6(ipv6) }), '2001:db8::7'],
  'version 2 for an IPv4 client on a dual-stack port': [
    binaryHeader({ family: 0x21, addresses: from6(Buffer.from('00000000000000000000ffffcb007107', 'hex')) }),
    '203.0.113.7',
  ],
  'version 2 with values': [binaryHeaderOf('203.0.113.7', values), '203.0.113.7'],
  'version 2 as long as it may be': [binaryHeaderOf('203.0.113.7', Buffer.alloc(4_096 - 28)), '203.0.113.7'],
  'version 2 for a UNIX socket': [binaryHeader({ family: 0x31, addresses: Buffer.alloc(216, 'x') }), undefined],
  'version 2 for what it can not tell': [binaryHeader({ family: 0x00 }), undefined],
  'version 2 for what it can not tell, with values': [binaryHeader({ family: 0x00, values }), undefined],
  'a probe of the proxy': [binaryHeader({ command: 0, family: 0x00 }), undefined],
  'a probe that names addresses all the same': [
    binaryHeader({ command: 0, family: 0x11, addresses: Buffer.alloc(12, 1), values }),
    undefined,
  ],
  'a probe of a family that nobody knows': [binaryHeader({ command: 0, family: 0xff }), undefined],
}

for (const [what, [header, clientAddress]] of Object.entries(accepted)) {
  test(`${what} is read, however it is cut into pieces and whatever follows`, t => {
    for (let length = 0; length < header.length; length++) {
      t.is(parseProxyHeader(header.subarray(0, length)), undefined, `after ${length} bytes`)
    }
    for (const following of ['', 'PROXY ', '\r\n', '\u0016\u0003\u0001']) {
      const bytes = Buffer.concat([header, Buffer.from(following, 'latin1')])
      t.deepEqual(parseProxyHeader(bytes), { clientAddress, lengthBytes: header.length })
    }
  })
}

const refused: Record<string, Buffer> = {
  'a TLS handshake': Buffer.from('16030100', 'hex'),
  'one wrong byte': Buffer.from('X'),
  'HTTP/2 in plain text': Buffer.from('PRI * HTTP/2.0\r\n'),
  'a line in small letters': line('proxy TCP4 203.0.113.7 10.0.0.1 1 2'),
  'a line for another protocol': line('PROXY UDP4 203.0.113.7 10.0.0.1 1 2'),
  'a line for the name of a method of objects': line('PROXY constructor 203.0.113.7 10.0.0.1 1 2'),
  'a line without a family': line('PROXY '),
  'a line with two blanks': line('PROXY TCP4  203.0.113.7 10.0.0.1 1 2'),
  'a line with a blank at its end': line('PROXY TCP4 203.0.113.7 10.0.0.1 1 2 '),
  'a line with a number too many': line('PROXY TCP4 203.0.113.7 10.0.0.1 1 2 3'),
  'a line without its last port': line('PROXY TCP4 203.0.113.7 10.0.0.1 1'),
  'a line whose source is a name': line('PROXY TCP4 localhost 10.0.0.1 1 2'),
  'a line whose source is empty': line('PROXY TCP4  10.0.0.1 1 2'),
  'a line whose source has a leading zero': line('PROXY TCP4 203.0.113.07 10.0.0.1 1 2'),
  'a line whose source is of the other family': line('PROXY TCP4 ::1 10.0.0.1 1 2'),
  'a line whose destination is of the other family': line('PROXY TCP6 ::1 10.0.0.1 1 2'),
  'a line whose IPv6 address has a zone': line('PROXY TCP6 fe80::1%eth0 ::1 1 2'),
  'a line whose port is too high': line('PROXY TCP4 203.0.113.7 10.0.0.1 1 65536'),
  'a line whose port has a leading zero': line('PROXY TCP4 203.0.113.7 10.0.0.1 01 2'),
  'a line whose port is negative': line('PROXY TCP4 203.0.113.7 10.0.0.1 -1 2'),
  'a line that ends in a line feed alone': Buffer.from('PROXY TCP4 203.0.113.7 10.0.0.1 1 2\n'.padEnd(107, ' ')),
  'a line of one byte too many': line(`PROXY UNKNOWN ${'x'.repeat(92)}`),
  'a line without an end': Buffer.from(`PROXY UNKNOWN ${'x'.repeat(93)}`),
  'another version': binaryHeader({ version: 3, family: 0x00 }),
  'another command': binaryHeader({ command: 2, family: 0x00 }),
  'another family': binaryHeader({ family: 0x41, addresses: Buffer.alloc(300) }),
  'another protocol': binaryHeader({ family: 0x13, addresses: Buffer.alloc(12) }),
  'a header shorter than its IPv4 addresses': binaryHeader({ family: 0x11, addresses: Buffer.alloc(11) }),
  'a header shorter than its IPv6 addresses': binaryHeader({ family: 0x21, addresses: Buffer.alloc(35) }),
  'a header shorter than its UNIX addresses': binaryHeader({ family: 0x31, addresses: Buffer.alloc(215) }),
  'a header of one byte too many': binaryHeaderOf('203.0.113.7', Buffer.alloc(4_096 - 28 + 1)),
  'a probe of one byte too many': binaryHeader({ command: 0, family: 0x00, values: Buffer.alloc(4_096 - 16 + 1) }),
}

for (const [what, bytes] of Object.entries(refused)) {
  test(`${what} is no header`, t => {
    t.throws(() => parseProxyHeader(bytes), { instanceOf: ProxyHeaderError })
  })
}

test('bytes of any kind are a header, the beginning of one, or refused; nothing else happens', t => {
  const start = fc.constantFrom(
    '',
    'PROXY ',
    'PROXY TCP4 ',
    'PROXY TCP6 ',
    '\r\n\r\n\0\r\nQUIT\n',
    '\r\n\r\n\0\r\nQUIT\n!',
  )
  const text = fc.string({ unit: fc.constantFrom(...' .:0129abcf\r\n%-TCPUNKOW'), maxLength: 120 })
  const rest = fc.oneof(
    fc.uint8Array({ maxLength: 200 }).map(bytes => Buffer.from(bytes)),
    text.map(characters => Buffer.from(characters, 'latin1')),
  )
  const bytes = fc.tuple(start, rest).map(([head, tail]) => Buffer.concat([Buffer.from(head, 'latin1'), tail]))
  fc.assert(
    fc.property(bytes, given => {
      try {
        const header = parseProxyHeader(given)
        if (!header) return given.length < 4_096
        return header.lengthBytes <= given.length && header.lengthBytes <= 4_096
      } catch (error) {
        return error instanceof ProxyHeaderError
      }
    }),
    { numRuns: 20_000 },
  )
  t.pass()
})

test('what has been refused or read stays so, whatever else comes', t => {
  const start = fc.constantFrom(...Object.values(refused), ...Object.values(accepted).map(([header]) => header))
  const outcome = (bytes: Buffer) => {
    try {
      return parseProxyHeader(bytes) ?? 'more'
    } catch {
      return 'refused'
    }
  }
  fc.assert(
    fc.property(start, fc.uint8Array({ maxLength: 64 }), (given, more) => {
      t.deepEqual(outcome(Buffer.concat([given, more])), outcome(given))
    }),
  )
})

/** Both ends of a connection. */
async function connection(t: ExecutionContext): Promise<{ near: Socket; far: Socket }> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const far = connect((server.address() as AddressInfo).port, '127.0.0.1').setNoDelay(true)
  const [near] = (await once(server, 'connection')) as [Socket]
  t.teardown(() => {
    near.destroy()
    far.destroy()
    server.close()
  })
  return { near, far }
}

async function write(socket: Socket, pieces: Iterable<Buffer>): Promise<void> {
  for (const piece of pieces) {
    await new Promise(resolve => socket.write(piece, resolve))
    await new Promise(resolve => setImmediate(resolve))
  }
}

test('what follows the header is left for who reads next, wherever the packets were cut', async t => {
  const header = binaryHeaderOf('203.0.113.7', values)
  const sent = Buffer.concat([header, Buffer.from('the first words of the client')])
  const cuts = fc.uniqueArray(fc.nat({ max: sent.length }), { maxLength: 8 }).map(at => [...at.sort((a, b) => a - b)])
  await fc.assert(
    fc.asyncProperty(cuts, async at => {
      const { near, far } = await connection(t)
      const taken = takeProxyHeader(near)
      await write(
        far,
        [0, ...at].map((from, index) => sent.subarray(from, at[index])),
      )
      far.end()
      t.is((await taken)?.clientAddress, '203.0.113.7')
      const chunks = await near.toArray()
      t.is(Buffer.concat(chunks).toString(), 'the first words of the client')
    }),
    { numRuns: 30 },
  )
})

test('who sends only a part of the header within the time is late', async t => {
  const { near, far } = await connection(t)
  far.write(binaryHeaderOf('203.0.113.7').subarray(0, 20))
  const error = await t.throwsAsync(takeProxyHeader(near, 50), { instanceOf: ProxyHeaderError })
  t.is(error.failure, 'late')
})

test('who hangs up before saying anything has done nothing wrong; who does so in the middle has', async t => {
  const probe = await connection(t)
  probe.far.end()
  t.is(await takeProxyHeader(probe.near), undefined)

  const broken = await connection(t)
  broken.far.end(Buffer.from('PROXY TCP4 '))
  const error = await t.throwsAsync(takeProxyHeader(broken.near), { instanceOf: ProxyHeaderError })
  t.is(error.failure, 'malformed')

  const reset = await connection(t)
  const taken = takeProxyHeader(reset.near)
  reset.far.resetAndDestroy()
  t.is(await taken, undefined)
})
