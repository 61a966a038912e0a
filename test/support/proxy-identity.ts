/** A service identity for a proxy, made as an operator makes it: beside the database. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { type Credentials, type EdgeMesh, testEnvironment } from './edgemesh.ts'

const bin = join(import.meta.dirname, '../../src/main.ts')

export async function proxyIdentity(
  { databaseUrl }: Pick<EdgeMesh, 'databaseUrl'>,
  name = 'edge-proxy',
): Promise<Required<Credentials>> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-proxy-'))
  try {
    const env = { PATH: process.env.PATH, ...testEnvironment, DATABASE_URL: databaseUrl }
    await promisify(execFile)(process.execPath, [bin, 'service-identity', 'create', name, '--out', folder], { env })
    const read = (file: string) => readFile(join(folder, file), 'utf8')
    const [keyPem, certificatePem, rootsPem] = await Promise.all([
      read('service.key'),
      read('service.crt'),
      read('ca.crt'),
    ])
    return { keyPem, certificatePem, rootsPem }
  } finally {
    await rm(folder, { recursive: true })
  }
}
