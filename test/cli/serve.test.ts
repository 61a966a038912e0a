/** `edgemesh serve` where it is started wrongly. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import test from 'ava'
import { secrets } from '../support/edgemesh.ts'

function serve(args: string[], env: Record<string, string> = {}): Promise<{ exitCode: number; stderr: string }> {
  const main = join(import.meta.dirname, '../../src/main.ts')
  return new Promise(resolve => {
    const options = { env: { PATH: process.env.PATH, ...secrets, ...env } }
    execFile(process.execPath, [main, 'serve', ...args], options, (error, _, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stderr })
    })
  })
}

for (const wrong of ['0', '65', 'two', '-1', '1.5', '']) {
  test(`--workers '${wrong}' ends in exit code 2, and it says what would be right`, async t => {
    const { exitCode, stderr } = await serve(['--workers', wrong])
    t.is(exitCode, 2)
    t.regex(stderr, /^error: .*--workers.*auto or a whole number from 1 to 64/)
  })
}

test('several workers without a database of their own are refused, with a hint', async t => {
  const { exitCode, stderr } = await serve(['--workers', '2'])
  t.is(exitCode, 2)
  t.regex(stderr, /^error: DATABASE_URL: is missing: .*\nhint: set it, or leave --workers away\n$/)
})

test('several workers are told of every wrong setting once, before any is started', async t => {
  const { exitCode, stderr } = await serve(['--workers', '2'], { API_PORT: 'http', DRAIN_SECONDS: '-1' })
  t.is(exitCode, 2)
  t.is(stderr.match(/^error: /gm)?.length, 2)
})
