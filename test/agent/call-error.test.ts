import { Metadata, type ServiceError, status } from '@grpc/grpc-js'
import test from 'ava'
import { channelTo, describeCallError } from '../../src/agent/channel.ts'
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

for (const server of ['localhost', 'localhost:0', 'localhost:65536', '::1:8000', 'https://localhost:8000', '']) {
  test(`${JSON.stringify(server)} is not taken for a server`, t => {
    t.throws(() => channelTo({ server, rootsPem: '' }), { message: /not host:port/ })
  })
}
