/**
 * Compiles the policy to WebAssembly, for instances that run without an OPA server: `node policies/build.ts`.
 *
 * Writes `bundle/policy.wasm` and `bundle/manifest.json`. Both are committed, so that only who changes a policy needs
 * `opa`; a test compares them with their sources. The same sources and the same `opa` give the same bytes.
 */
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  constants,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'

const entrypoints = ['edgemesh/authz/decision', 'edgemesh/authz/explanation', 'edgemesh/admin/decision']
const policyDirectory = import.meta.dirname

/** What stands beside the artefact: which sources it was made of, and by what. */
export type PolicyManifest = {
  /** Names the policy in decisions and logs: 12 hex digits over the names and texts of all sources. */
  revision: string
  entrypoints: string[]
  /** The version of `opa` that compiled it; another version may give other bytes. */
  opa: string
  /** File name to `sha256:` of its text. */
  sources: Record<string, string>
  /** `sha256:` of the artefact: whoever reads both knows that they belong together. */
  wasm: string
}

/** Where `opa` is: $OPA, the PATH, then where this project and `go install` put their tools. */
export function findOpa(): string | undefined {
  if (process.env.OPA) return process.env.OPA
  const directories = [
    ...(process.env.PATH ?? '').split(delimiter).filter(directory => directory !== ''),
    join(policyDirectory, '..', '.tools', 'bin'),
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

/** Compiles the sources with `opa` and writes artefact and manifest into `outputDirectory`. */
export function buildPolicy(opa: string, outputDirectory: string): PolicyManifest {
  const sources = listSources(policyDirectory)
  const { compiled } = compile(opa, policyDirectory, sources, entrypoints)
  const manifest: PolicyManifest = {
    revision: revisionOf(policyDirectory, sources),
    entrypoints,
    opa: versionOf(opa),
    sources: Object.fromEntries(
      sources.map(source => [source, `sha256:${sha256(readSource(policyDirectory, source))}`]),
    ),
    wasm: `sha256:${sha256(compiled)}`,
  }
  mkdirSync(outputDirectory, { recursive: true })
  writeFileSync(join(outputDirectory, 'policy.wasm'), compiled)
  writeFileSync(join(outputDirectory, 'manifest.json'), `${JSON.stringify(manifest, undefined, 2)}\n`)
  return manifest
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

function readSource(directory: string, name: string): string {
  return readFileSync(join(directory, name), 'utf8')
}

function revisionOf(directory: string, sources: string[]): string {
  return sha256(sources.map(source => `${source}\n${readSource(directory, source)}`).join('\n')).slice(0, 12)
}

function sha256(text: string | Buffer): string {
  return createHash('sha256').update(text).digest('hex')
}

function versionOf(opa: string): string {
  const version = /^Version: (\S+)/m.exec(execFileSync(opa, ['version'], { encoding: 'utf8' }))?.[1]
  if (version === undefined) throw new Error(`${opa} version: does not look like Open Policy Agent`)
  return version
}

function compile(
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

if (import.meta.main) {
  const opa = findOpa()
  if (opa === undefined) {
    console.error('error: the policy compiler `opa` was not found in $OPA, PATH or .tools/bin')
    console.error('hint: go install github.com/open-policy-agent/opa@v1.22.2')
    console.error('hint: or download it from https://github.com/open-policy-agent/opa/releases to .tools/bin/opa')
    process.exit(1)
  }
  const manifest = buildPolicy(opa, join(policyDirectory, 'bundle'))
  console.log(`policies/bundle: revision ${manifest.revision} of ${Object.keys(manifest.sources).join(', ')}`)
}
