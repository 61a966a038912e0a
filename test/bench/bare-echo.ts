/**
 * The floor of what a message costs: a bare grpc-js server with mutual TLS that takes the same questions and sends answers
 * of the same size, and does nothing else; or, with BENCH_COMMIT_TO, has a row on disk there before it answers a message on a
 * stream. In a process of its own; started and asked by `bare-echo-server.ts`.
 */
import { generateKeyPairSync } from 'node:crypto'
import { Server, ServerCredentials } from '@grpc/grpc-js'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import {
  type Answer,
  type AuthorizeRequest,
  type AuthorizeResponse,
  AuthorizeServiceService,
  type CheckResponse,
} from '../../src/gen/edgemesh/v1/authorize.ts'
import {
  type HeartbeatRequest,
  HeartbeatResponse,
  HeartbeatServiceService,
} from '../../src/gen/edgemesh/v1/heartbeat.ts'
import { createAuthority, openAuthority } from '../../src/identity/certificate-authority.ts'
import { newSerial } from '../../src/identity/certificates.ts'
import { checkCsr } from '../../src/identity/csr.ts'
import { encodePem } from '../../src/identity/pem.ts'
import { startBareCommit } from './bare-commit.ts'

export type EchoStarted = { port: number } & Awaited<ReturnType<typeof createIdentity>>

const validityMs = 3_600_000

const noResume = { resumeWithin: undefined }

/** What is sent back for every question, but for its id. Set by the parent: an answer that the real server has given. */
let answer: Answer | undefined

const { BENCH_COMMIT_TO: commitTo } = process.env
const commit = commitTo ? await startBareCommit(commitTo) : undefined

const server = new Server()
server.addService(AuthorizeServiceService, {
  check: (call: { request: { question?: { id: string } } }, callback: (error: null, response: CheckResponse) => void) =>
    callback(null, { answer: answerTo(call.request.question?.id ?? ''), serverTime: new Date() }),
  authorize(stream: {
    on(event: 'data', listener: (request: AuthorizeRequest) => void): void
    on(event: 'end', listener: () => void): void
    write(response: AuthorizeResponse): void
    end(): void
  }) {
    stream.on('data', ({ kind }) => {
      if (kind?.$case === 'questions') {
        const answers = kind.value.questions.map(({ id }) => answerTo(id))
        const send = () =>
          stream.write({ kind: { $case: 'answers', value: { answers } }, ...noResume, serverTime: new Date() })
        if (commit) commit(send)
        else send()
      } else if (kind?.$case === 'close') {
        stream.write({ kind: { $case: 'closed', value: kind.value }, ...noResume, serverTime: new Date() })
      }
    })
    stream.on('end', () => stream.end())
  },
})

server.addService(HeartbeatServiceService, {
  heartbeat(stream: {
    on(event: 'data', listener: (request: HeartbeatRequest) => void): void
    on(event: 'end' | 'error', listener: () => void): void
    write(response: HeartbeatResponse): void
    end(): void
  }) {
    stream.on('data', ({ sequence }) =>
      stream.write(HeartbeatResponse.fromPartial({ acknowledgedSequence: sequence, serverTime: new Date() })),
    )
    stream.on('error', () => {})
    stream.on('end', () => stream.end())
  },
})

function answerTo(questionId: string): Answer {
  if (!answer) throw new Error('asked before it was told what to answer')
  return { ...answer, questionId }
}

const identity = await createIdentity()
const port = await new Promise<number>((resolve, reject) => {
  const { rootsPem, serverKeyPem, serverCertificatePem } = identity
  const pairs = [{ private_key: Buffer.from(serverKeyPem), cert_chain: Buffer.from(serverCertificatePem) }]
  const credentials = ServerCredentials.createSsl(Buffer.from(rootsPem), pairs, true)
  server.bindAsync('127.0.0.1:0', credentials, (error, bound) => (error ? reject(error) : resolve(bound)))
})

process.on('message', (message: { ask: 'cpu' } | { ask: 'memory' } | { ask: 'answer'; answer: Answer }) => {
  if (message.ask === 'answer') answer = message.answer
  if (message.ask === 'memory') globalThis.gc?.()
  process.send?.({ cpu: process.cpuUsage(), rssBytes: process.memoryUsage.rss() })
})
process.on('disconnect', () => process.exit())
process.send?.({ started: { port, ...identity } satisfies EchoStarted })

/** An authority with a server's and a client's certificate, of the kinds that EdgeMesh has. */
async function createIdentity() {
  const passphrase = 'a passphrase of the benchmark'
  const now = new Date()
  const material = await createAuthority({ trustDomain: 'bench.test', validityDays: 1, now, passphrase })
  const authority = openAuthority({ ...material, passphrase })
  const template = { notBefore: now, notAfter: new Date(now.getTime() + validityMs) }
  const issue = (purpose: 'client' | 'server', spki: Buffer, names: object) => {
    const spiffeId = `spiffe://bench.test/service/${purpose}`
    const serial = Buffer.from(newSerial(), 'hex')
    const { der } = authority.issueLeaf({ ...template, ...names, spiffeId, commonName: purpose, serial, spki, purpose })
    return [encodePem('CERTIFICATE', der), ...authority.intermediates].join('')
  }
  const pair = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const keyPem = createKey()
  return {
    rootsPem: [authority.rootPem, ...authority.intermediates].join(''),
    serverKeyPem: pair.privateKey.export({ type: 'pkcs8', format: 'pem' }).toString(),
    serverCertificatePem: issue('server', pair.publicKey.export({ type: 'spki', format: 'der' }), {
      dnsNames: ['localhost'],
    }),
    keyPem,
    certificatePem: issue('client', checkCsr(signingRequestFor(keyPem)).spki, {}),
  }
}
