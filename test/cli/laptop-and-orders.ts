/** A server with a device in good health, on which Ada may reach the service `orders`; and the command line of its operator. */
import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { saveCredentials } from '../../src/cli/operator-credentials.ts'
import { heartbeats } from '../support/device.ts'
import { startEdgeMesh, unary } from '../support/edgemesh.ts'
import { healthy } from '../support/healthy.ts'

export type Outcome = { exitCode: number; stdout: string; stderr: string }

/** The question that is allowed as long as the device is healthy. */
export const question = ['--user', 'ada', '--service', 'orders', '--device', 'laptop-7']

/** @param env settings of the server beyond the defaults */
export async function laptopAndOrders(file: ExecutionContext, env: Record<string, string> = {}) {
  const mesh = await startEdgeMesh(file, env)
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-cli-'))
  file.teardown(() => rm(folder, { recursive: true }))
  const { certificatePem = '', keyPem = '', rootsPem } = mesh.operator
  await saveCredentials(folder, { keyPem, certificatePem, rootsPem, server: `localhost:${mesh.server.apiPort}` })
  const main = join(import.meta.dirname, '../../src/main.ts')
  const edgemesh = (...args: string[]): Promise<Outcome> =>
    new Promise(resolve => {
      const options = { env: { PATH: process.env.PATH, EDGEMESH_CREDENTIALS: folder } }
      execFile(process.execPath, [main, ...args], options, (error, stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
      })
    })
  await unary(mesh.admin, 'createUser', { id: 'ada', email: 'ada@example.com', name: 'Ada', role: 'admin' })
  const orders = { id: 'orders', name: 'Orders', labels: { tier: 'shop' }, owner: 'ada', roles: ['admin'] }
  await unary(mesh.admin, 'createService', orders)
  const requirements = { patchesCurrent: true, antivirusEnabled: true, diskEncrypted: true, firewallEnabled: false }
  const limits = { cpuPercentMax: 90, memoryPercentMax: 90, diskPercentMax: undefined }
  // At whatever hour the tests run.
  await unary(mesh.admin, 'updatePolicyData', { data: { requirements: { ...requirements, ...limits } } })
  const device = await mesh.enroll({ device: { id: 'laptop-7', labels: { site: 'berlin' } } })
  const stream = heartbeats(file, mesh, device)
  await stream.beat(healthy)
  return { mesh, edgemesh, stream, device }
}
