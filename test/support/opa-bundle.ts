/** A bundle for a real OPA server, as deploy/opa/README.md makes it. */
import { execFileSync } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ExecutionContext } from 'ava'
import { findOpa, policyDirectory } from './opa.ts'

/** @returns the path of bundle.tar.gz, gone with the test. Ask `findOpa()` first */
export async function buildOpaBundle(t: ExecutionContext, revision: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-opa-bundle-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const output = join(folder, 'bundle.tar.gz')
  const ignored = ['--ignore', '*_test.rego', '--ignore', 'bundle', '--ignore', '*.json']
  const args = ['build', '--revision', revision, ...ignored, '--output', output, policyDirectory]
  execFileSync(findOpa() as string, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  return output
}
