/**
 * How the commands of administration reach the server: mutual TLS with an operator's credentials.
 *
 *     const list = connecting(new Command('list')).action(options =>
 *       withAdmin(options, async admin => {
 *         const { devices } = await admin.call('listDevices', { … })
 *       }),
 *     )
 */
import { join } from 'node:path'
import { type Client, type ClientReadableStream, Metadata } from '@grpc/grpc-js'
import type { Command } from 'commander'
import { answerOf, type Credentials, channelTo } from '../client/channel.ts'
import { comparingClocks } from '../client/server-clock.ts'
import { AdminServiceClient, AdminServiceService } from '../gen/edgemesh/v1/admin.ts'
import { loadCredentials } from './operator-credentials.ts'
import { hostAndPort } from './option-values.ts'

export type ConnectionOptions = { server?: string; credentials?: string }

export const serverDefault = 'localhost:8000'
const callMsMax = 10_000

/** Adds the options that say which server is meant, and as whom it is called. */
export function connecting(command: Command): Command {
  return command
    .option(
      '--server <host:port>',
      `the server (default: EDGEMESH_SERVER, else the file "server" beside the credentials, else ${serverDefault})`,
      hostAndPort,
    )
    .option(
      '--credentials <folder>',
      'operator.key, operator.crt and ca.crt (default: EDGEMESH_CREDENTIALS, else DATA_DIR/operator)',
    )
}

/** Where the server is, what to show it, and where that was found. */
export async function findServer(
  options: ConnectionOptions,
): Promise<{ server: string; credentials: Credentials; folder: string }> {
  const folder =
    options.credentials || process.env.EDGEMESH_CREDENTIALS || join(process.env.DATA_DIR || '.edgemesh', 'operator')
  const { keyPem, certificatePem, rootsPem, server } = await loadCredentials(folder)
  return {
    folder,
    server: options.server || process.env.EDGEMESH_SERVER || server || serverDefault,
    credentials: { keyPem, certificateChainPem: certificatePem, rootsPem },
  }
}

type Methods = typeof AdminServiceService

/** Methods with one request and one answer. */
type UnaryMethod = { [M in keyof Methods]: Methods[M] extends { responseStream: false } ? M : never }[keyof Methods]

type RequestOf<M extends keyof Methods> = Parameters<Methods[M]['requestSerialize']>[0]
type ResponseOf<M extends keyof Methods> = ReturnType<Methods[M]['responseDeserialize']>

/** Methods with one request and a stream of answers. */
type StreamMethod = Exclude<keyof Methods, UnaryMethod>

export type AdminClient = {
  /** @throws ServiceError, within `callMsMax` */
  call<M extends UnaryMethod>(method: M, request: RequestOf<M>): Promise<ResponseOf<M>>
  /**
   * The answers, as fast as they are taken. Has to be cancelled by who does not take them all.
   *
   * @throws ServiceError while they are taken
   */
  stream<M extends StreamMethod>(method: M, request: RequestOf<M>): Answers<ResponseOf<M>>
  close(): void
}

type Answers<T> = AsyncIterable<T> & Pick<ClientReadableStream<T>, 'cancel'>

export function openAdminClient(server: string, { keyPem, certificateChainPem, rootsPem }: Credentials): AdminClient {
  const target = channelTo({ server, rootsPem, certificatePem: certificateChainPem, keyPem })
  const client: Client = new AdminServiceClient(target.address, target.credentials, target.options)
  return {
    call<M extends UnaryMethod>(method: M, request: RequestOf<M>): Promise<ResponseOf<M>> {
      const { path, requestSerialize, responseDeserialize } = AdminServiceService[method]
      return answerOf<ResponseOf<M> | undefined>(done =>
        client.makeUnaryRequest(
          path,
          requestSerialize as (request: RequestOf<M>) => Buffer,
          responseDeserialize as (bytes: Buffer) => ResponseOf<M>,
          request,
          new Metadata(),
          { deadline: Date.now() + callMsMax },
          done,
        ),
      ) as Promise<ResponseOf<M>>
    },
    stream<M extends StreamMethod>(method: M, request: RequestOf<M>): Answers<ResponseOf<M>> {
      const { path, requestSerialize, responseDeserialize } = AdminServiceService[method]
      return client.makeServerStreamRequest(
        path,
        requestSerialize as (request: RequestOf<M>) => Buffer,
        responseDeserialize as (bytes: Buffer) => ResponseOf<M>,
        request,
      )
    },
    close: () => client.close(),
  }
}

/** Connects, does `work`, and disconnects whatever happens. */
export async function withAdmin<T>(options: ConnectionOptions, work: (admin: AdminClient) => Promise<T>): Promise<T> {
  const { server, credentials } = await findServer(options)
  const admin = openAdminClient(server, credentials)
  try {
    return await comparingClocks(server, work(admin))
  } finally {
    admin.close()
  }
}
