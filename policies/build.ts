/**
 * Compiles the policy to WebAssembly, for instances that run without an OPA server: `node policies/build.ts`.
 *
 * Writes `bundle/policy.wasm` and `bundle/manifest.json`. Both are committed, so that only who changes a policy needs
 * `opa`; a test compares them with their sources. The same sources and the same `opa` give the same bytes.
 */
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  compile,
  entrypoints,
  findOpa,
  listSources,
  readSource,
  revisionOf,
  sha256,
  versionOf,
} from '../src/access/policy-compiler.ts'

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
