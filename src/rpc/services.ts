/** What the port serves: every method, who may call it, and where its story is told. */
import { readFileSync } from 'node:fs'
import { BinaryReader } from '@bufbuild/protobuf/wire'
import type { Server, ServiceDefinition, UntypedServiceImplementation } from '@grpc/grpc-js'
import type { PackageDefinition } from '@grpc/proto-loader'
import { ReflectionService } from '@grpc/reflection'
import { HealthImplementation } from 'grpc-health-check'
import type { createAuthorize } from '../access/authorize.ts'
import type { createCheck } from '../access/check.ts'
import type { createEnvoyCheck } from '../access/envoy.ts'
import type { Call } from '../caller.ts'
import type { Heartbeats } from '../fleet/heartbeat.ts'
import { AdminServiceService } from '../gen/edgemesh/v1/admin.ts'
import { AuthorizeResponse, AuthorizeServiceService, CheckResponse } from '../gen/edgemesh/v1/authorize.ts'
import { EnrollServiceService } from '../gen/edgemesh/v1/enroll.ts'
import { HeartbeatResponse, HeartbeatServiceService } from '../gen/edgemesh/v1/heartbeat.ts'
import { AuthorizationService } from '../gen/envoy/service/auth/v3/external_auth.ts'
import type { Challenges } from '../identity/challenge.ts'
import type { createEnroll } from '../identity/enroll.ts'
import type { createRenew } from '../identity/renew.ts'
import type { TrustBundleSource } from '../identity/trust-bundle.ts'
import type { Access, Dispatch, MethodHandler } from './dispatch.ts'
import { encoderOf } from './encoding.ts'

export type Handlers = {
  enroll: ReturnType<typeof createEnroll>
  challenges: Challenges
  /** For calls that anyone may make. @throws Fault RESOURCE_EXHAUSTED when an address makes them too often */
  limitOpenCalls: (call: Call) => void
  renewCertificate: ReturnType<typeof createRenew>
  trustBundle: TrustBundleSource
  heartbeats: Heartbeats
  check: ReturnType<typeof createCheck>
  authorize: ReturnType<typeof createAuthorize>
  envoyCheck: ReturnType<typeof createEnvoyCheck>
  /** By the names of the generated AdminServiceServer. */
  admin: Record<string, (request: never, call: Call) => Promise<unknown>>
  adminStreams: Record<string, (request: never, call: Call) => AsyncIterable<unknown>>
}

export type HealthStatus = { setServing(serving: boolean): void }

const serviceNames = [
  ...['Enroll', 'Authorize', 'Heartbeat', 'Admin'].map(name => `edgemesh.v1.${name}Service`),
  'envoy.service.auth.v3.Authorization',
]

const heartbeatService = {
  heartbeat: { ...HeartbeatServiceService.heartbeat, responseSerialize: encoderOf(HeartbeatResponse) },
}
const authorizeService = {
  check: { ...AuthorizeServiceService.check, responseSerialize: encoderOf(CheckResponse) },
  authorize: { ...AuthorizeServiceService.authorize, responseSerialize: encoderOf(AuthorizeResponse) },
}

/** Adds all services to the dispatch. @returns what `grpc.health.v1` says */
export function addServices(dispatch: Dispatch, handlers: Handlers, clock: () => number): HealthStatus {
  dispatch.add(
    EnrollServiceService as unknown as ServiceDefinition,
    {
      getChallenge: {
        kind: 'unary',
        access: 'anyone',
        async handle(_request, call) {
          handlers.limitOpenCalls(call)
          return handlers.challenges.give()
        },
      },
      enroll: { kind: 'serverStream', access: 'anyone', handle: handlers.enroll },
      renewCertificate: {
        kind: 'unary',
        access: 'operator or device, even expired',
        handle: handlers.renewCertificate,
      },
      getTrustBundle: {
        kind: 'unary',
        access: 'anyone',
        async handle(_request, call) {
          handlers.limitOpenCalls(call)
          return { trustBundle: await handlers.trustBundle.current(), serverTime: new Date(clock()) }
        },
      },
    },
    'identified',
  )
  dispatch.add(
    heartbeatService as unknown as ServiceDefinition,
    { heartbeat: { kind: 'bidi', access: 'device', handle: handlers.heartbeats.serve } },
    'device',
  )
  dispatch.add(
    authorizeService as unknown as ServiceDefinition,
    {
      check: { kind: 'unary', access: 'device, operator or service', handle: handlers.check },
      authorize: { kind: 'bidi', access: 'device', handle: handlers.authorize },
    },
    'device',
  )
  dispatch.add(
    AuthorizationService as unknown as ServiceDefinition,
    { check: { kind: 'unary', access: 'device or service', handle: handlers.envoyCheck } },
    'device or service',
  )
  const admin: Record<string, MethodHandler> = {}
  for (const [name, handle] of Object.entries(handlers.admin)) {
    admin[name] = {
      kind: 'unary',
      access: 'operator',
      handle: handle as (request: unknown, call: Call) => Promise<unknown>,
    }
  }
  for (const [name, handle] of Object.entries(handlers.adminStreams)) {
    admin[name] = {
      kind: 'serverStream',
      access: 'operator',
      handle: handle as (request: unknown, call: Call) => AsyncIterable<unknown>,
    }
  }
  dispatch.add(AdminServiceService as unknown as ServiceDefinition, admin, 'operator')
  addReflection(dispatch)
  return addHealth(dispatch)
}

/** grpc.health.v1, for anyone: load balancers have no certificate. */
function addHealth(dispatch: Dispatch): HealthStatus {
  const names = ['', ...serviceNames]
  const health = new HealthImplementation(Object.fromEntries(names.map(name => [name, 'NOT_SERVING'])))
  health.addToServer(foreign(dispatch, 'anyone'))
  return {
    setServing(serving) {
      for (const name of names) health.setStatus(name, serving ? 'SERVING' : 'NOT_SERVING')
    },
  }
}

/**
 * Reflection, from what buf has compiled (`npm run generate`): proto-loader compiles too, but the descriptors that it
 * makes name types in a way that grpcurl can't follow.
 */
function addReflection(dispatch: Dispatch): void {
  const fileDescriptorProtos = ['edgemesh', 'health', 'errors', 'envoy'].flatMap(name =>
    filesOf(readFileSync(new URL(`../gen/${name}.binpb`, import.meta.url))),
  )
  const definitions = { all: { fileDescriptorProtos } } as unknown as PackageDefinition
  new ReflectionService(definitions).addToServer(foreign(dispatch, 'identified'))
}

/** The files of a google.protobuf.FileDescriptorSet, each as it was encoded. */
function filesOf(descriptorSet: Uint8Array): Buffer[] {
  const reader = new BinaryReader(descriptorSet)
  const files: Buffer[] = []
  while (reader.pos < reader.len) {
    reader.uint32() // always field 1, `repeated FileDescriptorProto file`
    files.push(Buffer.from(reader.bytes()))
  }
  return files
}

/** Others' services come to the server through our dispatch, so that they are admitted like ours. */
function foreign(dispatch: Dispatch, access: Access): Server {
  const recipient = {
    addService(definition: ServiceDefinition, implementation: UntypedServiceImplementation) {
      const handlers: Record<string, MethodHandler> = {}
      for (const [name, method] of Object.entries(definition)) {
        const handle = implementation[name] ?? implementation[method.originalName ?? '']
        if (handle) handlers[name] = { kind: 'foreign', access, handle: handle.bind(implementation) as typeof handle }
      }
      dispatch.add(definition, handlers, access)
    },
  }
  return recipient as unknown as Server
}
