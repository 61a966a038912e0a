import { Metadata, type ServiceError, status } from '@grpc/grpc-js'
import test from 'ava'
import { channelTo, describeCallError } from '../../src/client/channel.ts'
import { Fault } from '../../src/fault.ts'
import { statusOf } from '../../src/rpc/status.ts'

/** What a client gets of a fault. */
function received(fault: Fault): ServiceError {
  const { code, details, metadata } = statusOf(fault)
  return Object.assign(new Error(`${code}: ${details}`), { code, details, metadata }) as ServiceError
}

test('a fault arrives with all that the server said of it', t => {
  const details = {
    violations: [{ field: 'device.id', description: 'is too long' }],
    retryAfterMs: 1_500,
    metadata: { limit: '64' },
  }
  t.deepEqual(describeCallError(received(new Fault('INVALID_ARGUMENT', 'INVALID_FIELD', 'no', details))), {
    code: 'INVALID_ARGUMENT',
    reason: 'INVALID_FIELD',
    message: 'no',
    ...details,
  })
})

test('a fault of this side reads like one of the server', t => {
  const fault = new Fault('UNAUTHENTICATED', 'SERVER_NOT_PINNED', 'no')
  t.deepEqual(describeCallError(fault), describeCallError(received(fault)))
})

test('an error without details, or with broken ones, keeps its code and message', t => {
  const broken = new Metadata()
  broken.set('grpc-status-details-bin', Buffer.from('ffff', 'hex'))
  for (const metadata of [new Metadata(), broken]) {
    const error = Object.assign(new Error('x'), { code: status.UNAVAILABLE, details: 'no connection', metadata })
    t.deepEqual(describeCallError(error), {
      code: 'UNAVAILABLE',
      reason: 'UNAVAILABLE',
      message: 'no connection',
      violations: [],
      metadata: {},
    })
  }
})

test('an error tells how far this clock is ahead of the server, where the server has said what time it is', t => {
  const { code, details, metadata } = statusOf(new Fault('NOT_FOUND', 'DEVICE_NOT_FOUND', 'no'))
  metadata.set('edgemesh-server-time', '2026-01-31T08:00:00.250Z')
  const error = Object.assign(new Error('x'), { code, details, metadata })
  const clock = () => Date.parse('2026-01-31T05:00:00.000Z')
  t.is(describeCallError(error, clock).clockOffsetMs, -3 * 3_600_000 - 250)
  metadata.set('edgemesh-server-time', 'half past eight')
  t.false('clockOffsetMs' in describeCallError(error, clock))
})

const unconnected: Record<string, string> = {
  'certificate has expired': 'SERVER_CERTIFICATE_EXPIRED',
  'certificate is not yet valid': 'SERVER_CERTIFICATE_NOT_YET_VALID',
  'unable to get local issuer certificate': 'SERVER_UNTRUSTED',
  'unable to verify the first certificate': 'SERVER_UNTRUSTED',
  'self-signed certificate in certificate chain': 'SERVER_UNTRUSTED',
  'connect ECONNREFUSED 127.0.0.1:1': 'UNAVAILABLE',
}
for (const [lastError, reason] of Object.entries(unconnected)) {
  test(`a connection that did not come about for "${lastError}" is ${reason}`, t => {
    const details = `No connection established. Last error: Error: ${lastError}. Resolution note: `
    const error = Object.assign(new Error('x'), { code: status.UNAVAILABLE, details, metadata: new Metadata() })
    const described = describeCallError(error)
    t.is(described.reason, reason)
    t.notRegex(described.message, /Resolution note|Last error/)
    // The same words from a server that was reached are the server's own.
    const told = Object.assign(new Error('x'), {
      code: status.UNAVAILABLE,
      details: lastError,
      metadata: new Metadata(),
    })
    t.like(describeCallError(told), { reason: 'UNAVAILABLE', message: lastError })
  })
}

for (const server of ['localhost', 'localhost:0', 'localhost:65536', '::1:8000', 'https://localhost:8000', '']) {
  test(`${JSON.stringify(server)} is not taken for a server`, t => {
    t.throws(() => channelTo({ server, rootsPem: '' }), { message: /not host:port/ })
  })
}
