/**
 * The same question by typed stubs that ts-proto makes of the protos, once: `npx buf generate`. The identity is one that
 * `daemon.ts` has enrolled. See docs/integrate.md.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { credentials } from '@grpc/grpc-js'
import { AuthorizeServiceClient, type CheckRequest } from './gen/edgemesh/v1/authorize.ts'

const server = process.env.EDGEMESH_SERVER ?? 'localhost:8000'
const [folder = './edge-daemon-state', user = 'demo', service = 'demo-database'] = process.argv.slice(2)

const file = (name: string) => readFileSync(join(folder, name))
const client = new AuthorizeServiceClient(
  server,
  credentials.createSsl(file('ca.crt'), file('device.key'), file('device.crt')),
)
const request: CheckRequest = {
  question: { id: '1', user, service, action: '' },
  deviceId: '',
  userAssertion: undefined,
}
client.check(request, (error, response) => {
  if (error) throw error
  const { allowed, reasons } = response.answer ?? { allowed: false, reasons: [] }
  console.log(allowed ? 'allowed' : `denied ${reasons.map(({ code }) => code).join(' ')}`)
  client.close()
})
