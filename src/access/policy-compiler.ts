/**
 * Compiles Rego to WebAssembly with `opa`. The shipped policy is compiled by `policies/build.ts`; a policy that an operator
 * writes, by `edgemesh policy`.
 *
 * The same sources and the same `opa` give the same bytes.
 */
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { accessSync, constants, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'

/** What a policy of ours answers. The explanation may be missing in others'. */
export const entrypoints = ['edgemesh/authz/decision', 'edgemesh/authz/explanation', 'edgemesh/admin/decision']

/** Where `opa` is: $OPA, the PATH, then where this project and `go install` put their tools. */
export function findOpa(): string | undefined {
  if (process.env.OPA) return process.env.OPA
  const directories = [
    ...(process.env.PATH ?? '').split(delimiter).filter(directory => directory !== ''),
    join(import.meta.dirname, '..', '..', '.tools', 'bin'),
    '/go/bin',
  ]
  return directories.map(directory => join(directory, 'opa')).find(isExecutable)
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

/**
 * Compiles a policy that is not the shipped one, for its decisions alone.
 *
 * @throws Error whose `stdout` and `stderr` are what `opa` says against it
 */
export function compileDecisions(opa: string, directory: string): { compiled: Buffer; revision: string } {
  const sources = listSources(directory)
  const { compiled } = compile(opa, directory, sources, ['edgemesh/authz/decision'])
  return { compiled, revision: revisionOf(directory, sources) }
}

/**
 * Compiles a policy that is to decide in place of the shipped one, as a bundle of OPA under the revision of its sources. It may
 * do without an explanation.
 *
 * @throws Error whose `stdout` and `stderr` are what `opa` says against it
 */
export function bundlePolicy(opa: string, directory: string): { archive: Buffer; revision: string } {
  const sources = listSources(directory)
  const revision = revisionOf(directory, sources)
  const explains = sources.some(source => /^explanation\b/m.test(readSource(directory, source)))
  const asked = entrypoints.filter(entrypoint => explains || !entrypoint.endsWith('/explanation'))
  return { archive: compile(opa, directory, sources, asked, revision).archive, revision }
}

/** Everything but tests, and but the policy that guards an OPA server, which has no meaning without one. */
export function listSources(directory: string): string[] {
  return readdirSync(directory)
    .filter(name => name.endsWith('.rego') && !name.endsWith('_test.rego') && name !== 'opa-system.rego')
    .sort()
}

export function readSource(directory: string, name: string): string {
  return readFileSync(join(directory, name), 'utf8')
}

/** Names a policy by its sources: 12 hex digits over their names and texts. */
export function revisionOf(directory: string, sources: string[]): string {
  return sha256(sources.map(source => `${source}\n${readSource(directory, source)}`).join('\n')).slice(0, 12)
}

export function sha256(text: string | Buffer): string {
  return createHash('sha256').update(text).digest('hex')
}

export function versionOf(opa: string): string {
  const version = /^Version: (\S+)/m.exec(execFileSync(opa, ['version'], { encoding: 'utf8' }))?.[1]
  if (version === undefined) throw new Error(`${opa} version: does not look like Open Policy Agent`)
  return version
}

/**
 * @param asked the entrypoints
 * @throws Error whose `stdout` and `stderr` are what `opa` says against it
 */
export function compile(
  opa: string,
  directory: string,
  sources: string[],
  asked: string[],
  revision = '',
): { archive: Buffer; compiled: Buffer } {
  const workDirectory = mkdtempSync(join(tmpdir(), 'edgemesh-policy-'))
  try {
    const bundle = join(workDirectory, 'bundle.tar.gz')
    const named = asked.flatMap(entrypoint => ['--entrypoint', entrypoint])
    const args = ['build', '--target', 'wasm', '--revision', revision, ...named, '--output', bundle, ...sources]
    execFileSync(opa, args, { cwd: directory, stdio: 'pipe' })
    // The bundle names its files with a leading slash, which tar drops. It says so, to nobody's use.
    execFileSync('tar', ['-xzf', bundle, '-C', workDirectory], { stdio: 'pipe' })
    return { archive: readFileSync(bundle), compiled: readFileSync(join(workDirectory, 'policy.wasm')) }
  } finally {
    rmSync(workDirectory, { recursive: true, force: true })
  }
}
