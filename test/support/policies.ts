/** Policies to put into a folder: the shipped one, changed ones, and what is none. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { rename, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { gzipSync } from 'node:zlib'
import type { ExecutionContext } from 'ava'
import { pack } from 'tar-stream'
import { bundlePolicy } from '../../src/access/policy-compiler.ts'
import { findOpa, policyDirectory } from './opa.ts'

export const shippedWasm = readFileSync(join(policyDirectory, 'bundle', 'policy.wasm'))

/** Gone with the test. */
export function emptyFolder(t: ExecutionContext): string {
  const folder = mkdtempSync(join(tmpdir(), 'edgemesh-policy-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  return folder
}

/** A bundle.tar.gz of these files. */
export async function archiveOf(files: Record<string, Buffer | string>): Promise<Buffer> {
  const archive = pack()
  for (const [name, content] of Object.entries(files)) archive.entry({ name: `/${name}` }, content)
  archive.finalize()
  return gzipSync(await buffer(archive))
}

/** The shipped policy, as if it had been built under another name. */
export function shippedAs(revision: string): Promise<Buffer> {
  return archiveOf({ 'policy.wasm': shippedWasm, '.manifest': JSON.stringify({ revision }), 'data.json': '{}' })
}

/** The shipped policy with parts of authz.rego replaced, built. Needs opa. */
export function changedBundle(t: ExecutionContext, ...changes: [from: string, to: string][]) {
  const authz = readFileSync(join(policyDirectory, 'authz.rego'), 'utf8')
  const changed = changes.reduce((text, [from, to]) => {
    if (!text.includes(from)) throw new Error(`the policy has no ${from}`)
    return text.replace(from, to)
  }, authz)
  return builtBundle(t, {
    'authz.rego': changed,
    'admin.rego': readFileSync(join(policyDirectory, 'admin.rego'), 'utf8'),
  })
}

/** Any Rego, built. Needs opa. */
export function builtBundle(t: ExecutionContext, sources: Record<string, string>) {
  const opa = findOpa()
  if (opa === undefined) throw new Error('no opa binary in $OPA, PATH, .tools/bin or /go/bin')
  const folder = emptyFolder(t)
  for (const [name, text] of Object.entries(sources)) writeFileSync(join(folder, name), text)
  return bundlePolicy(opa, folder)
}

/** Put there as an operator should: at once. */
export async function putBundle(folder: string, archive: Buffer): Promise<void> {
  const draft = join(folder, 'draft')
  await writeFile(draft, archive)
  await rename(draft, join(folder, 'bundle.tar.gz'))
}
