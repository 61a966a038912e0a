/**
 * The same by stubs that @grpc/proto-loader makes of the protos at run time: one report, one connection, on bare streams. The
 * identity is one that `daemon.ts` has enrolled. See docs/integrate.md.
 */
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { credentials, loadPackageDefinition } from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const server = process.env.EDGEMESH_SERVER ?? 'localhost:8000'
const [folder = './edge-daemon-state', user = 'demo', service = 'demo-database'] = process.argv.slice(2)

const protos = fileURLToPath(new URL('../../', import.meta.resolve('edgemesh/protos/edgemesh/v1/types.proto')))
const definition = loadSync(['edgemesh/v1/heartbeat.proto', 'edgemesh/v1/authorize.proto'], {
  includeDirs: [protos],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
})
// biome-ignore lint/suspicious/noExplicitAny: what is loaded at run time has no types
const { HeartbeatService, AuthorizeService } = (loadPackageDefinition(definition) as any).edgemesh.v1

const file = (name: string) => readFileSync(join(folder, name))
const shown = credentials.createSsl(file('ca.crt'), file('device.key'), file('device.crt'))

const heartbeat = new HeartbeatService(server, shown).heartbeat()
heartbeat.write({
  sequence: 1,
  posture: {
    cpuPercent: 12,
    memoryPercent: 12,
    diskPercent: 12,
    patchesCurrent: true,
    antivirusEnabled: true,
    diskEncrypted: true,
    firewallEnabled: true,
  },
})
const [acknowledged] = await once(heartbeat, 'data')
console.log(`reported, failing: ${acknowledged.failingPosture.join(' ')}`)

const authorizations = new AuthorizeService(server, shown).authorize()
authorizations.write({ questions: { questions: [{ id: '1', user, service }] } })
const [{ answers }] = await once(authorizations, 'data')
const [answer] = answers.answers
console.log(answer.allowed ? `allowed ${answer.connectionId}` : `denied ${answer.reasons[0].code}`)
authorizations.end()
heartbeat.end()
