import { type ServerDuplexStream, type ServiceError, status } from '@grpc/grpc-js'
import test, { type ExecutionContext } from 'ava'
import { type ConnectionRevoked, openAuthorizations } from '../../src/client/authorize-stream.ts'
import { type DirectiveKind, openHeartbeats } from '../../src/client/heartbeat-stream.ts'
import {
  Answer,
  type AuthorizeRequest,
  AuthorizeResponse,
  AuthorizeServiceService,
  type Question,
} from '../../src/gen/edgemesh/v1/authorize.ts'
import {
  type HeartbeatRequest,
  HeartbeatResponse,
  HeartbeatServiceService,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { deviceCredentials, serve, smallAuthority } from '../agent/small-server.ts'

const authority = await smallAuthority()
const credentials = deviceCredentials(authority, 'alpha')

type HeartbeatCall = ServerDuplexStream<HeartbeatRequest, HeartbeatResponse>
type AuthorizeCall = ServerDuplexStream<AuthorizeRequest, AuthorizeResponse>

const serveHeartbeats = (t: ExecutionContext, heartbeat: (call: HeartbeatCall) => void) =>
  serve(t, authority, [[HeartbeatServiceService, { heartbeat }]])

const serveAuthorizations = (t: ExecutionContext, authorize: (call: AuthorizeCall) => void) =>
  serve(t, authority, [[AuthorizeServiceService, { authorize, check() {} }]])

test('a report is acknowledged by its number or by a later one', async t => {
  const server = await serveHeartbeats(t, call => {
    call.on('data', ({ sequence }) => {
      if (sequence === 2) call.write(HeartbeatResponse.fromPartial({ acknowledgedSequence: 2, failingPosture: ['x'] }))
    })
    call.on('end', () => call.end())
  })
  const heartbeats = openHeartbeats({ server, credentials })
  const answers = await Promise.all([heartbeats.report({ cpuPercent: 1 }), heartbeats.report({ cpuPercent: 2 })])
  t.deepEqual(
    answers.map(({ acknowledgedSequence }) => acknowledgedSequence),
    [2, 2],
  )
  await heartbeats.close()
  t.is(await heartbeats.closed, undefined)
  await t.throwsAsync(heartbeats.report({}), { message: /has ended/ })
})

test('what the server asks for is heard before the report that it came with is done', async t => {
  const server = await serveHeartbeats(t, call => {
    call.on('data', ({ sequence }) => {
      const directives = [{ kind: { $case: 'quarantined' as const, value: { reason: 'lost' } } }]
      call.write(HeartbeatResponse.fromPartial({ acknowledgedSequence: sequence, directives }))
    })
    call.on('end', () => call.end())
  })
  const heard: DirectiveKind[] = []
  const heartbeats = openHeartbeats({ server, credentials, onDirective: directive => heard.push(directive) })
  await heartbeats.report({})
  t.deepEqual(heard, [{ $case: 'quarantined', value: { reason: 'lost' } }])
  await heartbeats.close()
})

test('a report that was not acknowledged when the stream broke is rejected with the reason', async t => {
  const server = await serveHeartbeats(t, call => {
    call.on('data', () => call.emit('error', { code: status.UNAUTHENTICATED, details: 'revoked' }))
  })
  const ends: (ServiceError | undefined)[] = []
  const heartbeats = openHeartbeats({ server, credentials, onClosed: error => ends.push(error) })
  await t.throwsAsync(heartbeats.report({}), { message: /UNAUTHENTICATED: revoked/ })
  t.is((await heartbeats.closed)?.code, status.UNAUTHENTICATED)
  t.is(ends.length, 1)
})

const allowed = ({ id }: Question): Answer =>
  Answer.fromPartial({ questionId: id, allowed: true, connectionId: `c-${id}` })

/** Allows everything, the last question first; what is renewed is denied when its id says so. */
function lenient(call: AuthorizeCall): void {
  const send = (kind: NonNullable<AuthorizeResponse['kind']>) => call.write(AuthorizeResponse.fromPartial({ kind }))
  call.on('data', ({ kind }) => {
    if (kind?.$case === 'questions') {
      for (const question of kind.value.questions.toReversed()) {
        send({ $case: 'answers', value: { answers: [allowed(question)] } })
      }
    }
    if (kind?.$case === 'renew') {
      const answers = kind.value.connectionIds.map((connectionId: string) => {
        const questionId = connectionId.slice('c-'.length)
        const held = !questionId.startsWith('late')
        return Answer.fromPartial({ questionId, allowed: held, connectionId: held ? connectionId : '' })
      })
      send({ $case: 'answers', value: { answers: answers.toReversed() } })
    }
    if (kind?.$case === 'close') send({ $case: 'closed', value: { connectionIds: kind.value.connectionIds } })
    if (kind?.$case === 'list') send({ $case: 'connections', value: { connections: [] } })
  })
  call.on('end', () => call.end())
}

test('answers come in the order of the questions, whatever the order of their arrival', async t => {
  const server = await serveAuthorizations(t, lenient)
  const authorizations = openAuthorizations({ server, credentials, onRevoked: () => {} })
  const questions = Array.from({ length: 300 }, (_, at) => ({ id: `n${at}`, user: 'ada', service: 'wiki' }))
  const answers = await authorizations.ask(questions)
  t.deepEqual(
    answers.map(({ questionId }) => questionId),
    questions.map(({ id }) => id),
  )
  const [unnamed] = await authorizations.ask([{ user: 'ada', service: 'wiki' }])
  t.true(unnamed!.allowed && unnamed!.questionId !== '')
  await authorizations.close()
})

test('leases are renewed, refused, listed and closed on the stream that holds them', async t => {
  const server = await serveAuthorizations(t, lenient)
  const authorizations = openAuthorizations({ server, credentials, onRevoked: () => {} })
  await authorizations.ask(['early', 'late'].map(id => ({ id, user: 'ada', service: 'wiki' })))
  const renewed = await authorizations.renew(['c-late', 'c-early'])
  t.deepEqual(
    renewed.map(answer => answer.allowed),
    [false, true],
  )
  await t.throwsAsync(authorizations.renew(['c-late']), { message: /c-late is not held/ })
  t.deepEqual(await authorizations.list(), [])
  const closed = await Promise.all([
    authorizations.closeConnections(['c-early']),
    authorizations.closeConnections(['c-x', 'c-y']),
  ])
  t.deepEqual(closed, [['c-early'], ['c-x', 'c-y']])
  await authorizations.close()
})

test('a lease that is taken back is told at once', async t => {
  const server = await serveAuthorizations(t, call => {
    call.on('data', ({ kind }) => {
      if (kind?.$case !== 'questions') return
      const answers = kind.value.questions.map(allowed)
      call.write(AuthorizeResponse.fromPartial({ kind: { $case: 'answers', value: { answers } } }))
      const taken = { connectionId: 'c-q', questionId: 'q', reasons: [], policyRevision: '1', decisionId: 'd' }
      call.write(AuthorizeResponse.fromPartial({ kind: { $case: 'revoked', value: taken } }))
    })
    call.on('end', () => call.end())
  })
  const revoked = Promise.withResolvers<ConnectionRevoked>()
  const authorizations = openAuthorizations({ server, credentials, onRevoked: revoked.resolve })
  await authorizations.ask([{ id: 'q', user: 'ada', service: 'wiki' }])
  t.is((await revoked.promise).connectionId, 'c-q')
  await authorizations.close()
})

/** Resumes everything but what is late; keeps what it hears. `resumeWithin`: as a server of today says, or one of before. */
function resuming(heard: AuthorizeRequest[], resumeWithin: { seconds: number; nanos: number } | undefined) {
  return (call: AuthorizeCall) => {
    call.on('data', (request: AuthorizeRequest) => {
      heard.push(request)
      const { kind } = request
      if (kind?.$case === 'questions') {
        const answers = kind.value.questions.map(allowed)
        call.write(AuthorizeResponse.fromPartial({ kind: { $case: 'answers', value: { answers } }, resumeWithin }))
        const taken = { connectionId: 'c-q', questionId: 'q', reasons: [], policyRevision: '1', decisionId: 'd' }
        call.write(AuthorizeResponse.fromPartial({ kind: { $case: 'revoked', value: taken } }))
      }
      if (kind?.$case === 'resume') {
        const answers = kind.value.connectionIds.map(connectionId =>
          Answer.fromPartial({ connectionId, allowed: connectionId !== 'late' }),
        )
        call.write(AuthorizeResponse.fromPartial({ kind: { $case: 'answers', value: { answers } }, resumeWithin }))
      }
    })
    call.on('end', () => call.end())
  }
}

test('what was held on another stream is resumed, answered in the order of the ids, and held on this one', async t => {
  const server = await serveAuthorizations(t, resuming([], { seconds: 30, nanos: 0 }))
  const authorizations = openAuthorizations({ server, credentials, onRevoked: () => {} })
  const ids = [...Array.from({ length: 200 }, (_, at) => `c-${at}`), 'late']
  const answers = await authorizations.resume(ids)
  t.deepEqual(
    answers.map(({ connectionId, allowed }) => [connectionId, allowed]),
    ids.map(id => [id, id !== 'late']),
  )
  t.is(authorizations.resumeWithinMs(), 30_000)
  await t.throwsAsync(authorizations.renew(['late']), { message: /late is not held/ })
  await authorizations.close()
})

test('a revocation is acknowledged once the connection has ended, and never to a server that knows nothing of it', async t => {
  for (const resumeWithin of [{ seconds: 30, nanos: 0 }, undefined]) {
    const heard: AuthorizeRequest[] = []
    const server = await serveAuthorizations(t, resuming(heard, resumeWithin))
    const told = Promise.withResolvers<void>()
    const cut = Promise.withResolvers<void>()
    const onRevoked = () => {
      told.resolve()
      return cut.promise
    }
    const authorizations = openAuthorizations({ server, credentials, onRevoked })
    await authorizations.ask([{ id: 'q', user: 'ada', service: 'wiki' }])
    await told.promise
    await authorizations.resume(['another'])
    t.deepEqual(
      heard.map(({ kind }) => kind?.$case),
      ['questions', 'resume'],
    )
    cut.resolve()
    await authorizations.resume(['another'])
    const acknowledged = heard.flatMap(({ kind }) => (kind?.$case === 'acknowledge' ? kind.value.connectionIds : []))
    t.deepEqual(acknowledged, resumeWithin ? ['c-q'] : [])
    await authorizations.close()
  }
})

test('two questions with one id are refused here, and a stream that breaks answers nobody', async t => {
  const server = await serveAuthorizations(t, call => {
    call.on('data', () => call.emit('error', { code: status.UNAVAILABLE, details: 'draining' }))
  })
  const authorizations = openAuthorizations({ server, credentials, onRevoked: () => {} })
  const question = { id: 'same', user: 'ada', service: 'wiki' }
  await t.throwsAsync(authorizations.ask([question, question]), { message: /unique/ })
  await t.throwsAsync(authorizations.ask([question]), { message: /UNAVAILABLE: draining/ })
  await t.throwsAsync(authorizations.ask([question]), { message: /has ended/ })
})
