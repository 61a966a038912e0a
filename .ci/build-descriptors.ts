/** Writes what reflection serves, as buf compiles it, into the folder that is named: our protos, and others' that we serve. */
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'

const folder = process.argv[2] ?? 'src/gen'
const envoyProtos = 'node_modules/@grpc/grpc-js-xds/deps'
const inputs = {
  edgemesh: ['proto'],
  health: ['node_modules/grpc-health-check/proto'],
  // The details of errors, so that grpcurl can show them.
  errors: [
    'node_modules/google-proto-files',
    '--path',
    'node_modules/google-proto-files/google/rpc/error_details.proto',
  ],
  // What code is generated from, too. As a set of descriptors it has no imports that would be left out there.
  envoy: [
    '.',
    '--config',
    JSON.stringify({
      version: 'v2',
      modules: ['envoy-api', 'xds', 'googleapis', 'protoc-gen-validate'].map(name => ({
        path: `${envoyProtos}/${name}`,
      })),
    }),
    '--path',
    `${envoyProtos}/envoy-api/envoy/service/auth/v3/external_auth.proto`,
    '--type',
    'envoy.service.auth.v3.Authorization',
    '--as-file-descriptor-set',
  ],
}
for (const [name, input] of Object.entries(inputs)) {
  const output = join(folder, `${name}.binpb`)
  execFileSync('buf', ['build', ...input, '--exclude-source-info', '-o', output], { stdio: 'inherit' })
}
