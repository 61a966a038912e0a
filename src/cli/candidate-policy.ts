/**
 * A policy that nobody has activated yet, brought to answer in this process: a folder of Rego, compiled by `opa`; a bundle that
 * was built of it; or the bare WebAssembly.
 */
import { createHash } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { type PolicyBundle, readBundle, unpackBundle } from '../access/policy-bundle.ts'
import { bundlePolicy, compileDecisions, findOpa, listSources } from '../access/policy-compiler.ts'
import { proveUsable } from '../access/policy-probe.ts'
import { type CompiledPolicy, compilePolicy } from '../access/policy-wasm.ts'
import { CommandFailure } from './failure.ts'

/** @throws CommandFailure or UnusablePolicy, which say what is wrong with it */
export async function loadCandidate(path: string): Promise<CompiledPolicy> {
  const found = await stat(path).catch(() => undefined)
  if (!found) throw new CommandFailure(`there is nothing at ${path}`, 'name a folder of .rego, or one with policy.wasm')
  const isRego = found.isDirectory() && listSources(path).length > 0
  return compilePolicy(isRego ? fromRego(path) : await readBundle(path), ['authz'])
}

/**
 * Builds the bundle of a policy that could decide in place of the shipped one: it has been seen to answer.
 *
 * @throws CommandFailure or UnusablePolicy, which say what is wrong with it
 */
export async function buildCandidate(folder: string): Promise<{ archive: Buffer; revision: string }> {
  const found = await stat(folder).catch(() => undefined)
  if (!found?.isDirectory() || listSources(folder).length === 0) {
    throw new CommandFailure(`there is no .rego in ${folder}`, 'name the folder with authz.rego and admin.rego')
  }
  const { archive, revision } = withOpa(folder, bundlePolicy)
  const policy = await compilePolicy(await unpackBundle(archive, folder), ['authz', 'admin'])
  await proveUsable(folder, ['authz', 'admin'], (entrypoint, input) => policy.evaluate(entrypoint, input as never))
  return { archive, revision }
}

function fromRego(folder: string): PolicyBundle {
  const { compiled, revision } = withOpa(folder, compileDecisions)
  const digest = createHash('sha256').update(compiled).digest('hex')
  return { compiled, data: {}, revision, digest, isWhole: true, name: folder }
}

function withOpa<T>(folder: string, build: (opa: string, folder: string) => T): T {
  const opa = findOpa()
  if (opa === undefined) {
    throw new CommandFailure(
      `${folder} is Rego, and its compiler opa was not found in $OPA or PATH`,
      'install it from https://github.com/open-policy-agent/opa/releases, or name a bundle that was built with it',
    )
  }
  try {
    return build(opa, folder)
  } catch (error) {
    const { stdout, stderr } = error as { stdout?: Buffer; stderr?: Buffer }
    if (stdout === undefined || stderr === undefined) throw error
    const said = `${stdout}${stderr}`.trim()
    const missing = /edgemesh\/admin|edgemesh\.admin/.test(said)
    const hint = missing ? 'who may administer is policy too: copy policies/admin.rego into the folder' : undefined
    throw new CommandFailure(`opa can not compile ${folder}: ${said}`, hint)
  }
}
